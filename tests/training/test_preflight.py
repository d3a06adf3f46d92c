"""What would go wrong in hours is said before the first step, with the rank, the numbers and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import Applications

from drwkv.parallel import ParallelConfig, World, session
from drwkv.training.preflight import check_folder, check_offload, check_room


@pytest.fixture
def world():
    with session() as world:
        yield world


def run_two(applications: Applications, digits: Path, folder: Path, program: str):
    arguments = [
        "--config", "configs/digits.yaml", f"run.folder={folder}", f"data.paths=[{digits / 'train'}]",
        "run.total_steps=2", "monitor.progress=false",
    ]  # fmt: skip
    prologue = "import os, sys, train_dist\nfrom drwkv import command\nrank = int(os.environ['RANK'])\n"
    return applications.start(
        "-c", prologue + program + "\ncommand.run(train_dist.main)", *arguments, world_size=2
    ).wait(120)


def test_ranks_of_different_configs_versions_or_folders_are_refused(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    other_rate = run_two(applications, digits, tmp_path / "a", "sys.argv += [f'optimizer.lr=0.00{rank + 1}']")
    assert other_rate.codes == [2, 2]
    words = "rank 1 has optimizer.lr 0.002 and rank 0 has 0.001: start all ranks from the same"
    assert words in other_rate.output
    assert not (tmp_path / "a").exists()

    apart = "from pathlib import Path\nfrom drwkv.training import preflight\nplain = preflight.check_folder\n"
    apart += f"preflight.check_folder = lambda folder, world: plain(Path('{tmp_path}') / str(rank), world)"
    not_shared = run_two(applications, digits, tmp_path / "b", apart)
    assert not_shared.codes == [2, 2]
    assert (
        "rank 0 does not see what rank 1 writes there; give a folder that all nodes share"
        in not_shared.output
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, world: World) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        ValueError, match=r"run.folder .*file/run: rank 0 cannot write there: .*; give a folder"
    ):
        check_folder(tmp_path / "file" / "run", world)


def test_room_for_two_checkpoints_is_asked_for(tmp_path: Path, world: World) -> None:
    with pytest.raises(OSError, match=r"GiB are free, and 2 checkpoints need 8\.39e\+06: free some space"):
        check_room(tmp_path, 1 << 52, 2, world)
    check_room(tmp_path, 16, 2, world)


def test_offload_without_memory_is_refused(world: World) -> None:
    zero, fsdp = ParallelConfig(engine="zero2", offload="optimizer"), ParallelConfig(offload="all")
    with pytest.raises(ValueError, match=r"'parallel.offload': 1 ranks of this node need 16384\.0 GiB"):
        check_offload(zero, 1 << 40, world)
    with pytest.raises(
        ValueError, match=r"need 20480\.0 GiB of its memory and .* are free: give offload=none"
    ):
        check_offload(fsdp, 1 << 40, world)
    check_offload(fsdp, 1 << 20, world)
    check_offload(ParallelConfig(), 1 << 40, world)


def test_an_all_reduce_is_timed_on_more_than_one_rank(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    finished = run_two(applications, digits, tmp_path, "")
    assert finished.codes == [0, 0]
    assert "all-reduce of 16 MiB over 2 ranks: " in finished.output and " GB/s" in finished.output

"""The configuration: composed from defaults, file and command line; every mistake is one line that says what to do."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from processes import Applications

import train_dist
from data_prep.encode import EncodeConfig
from drwkv import command
from drwkv.compose import dump, load, read_dumped
from drwkv.config import SampleConfig, TrainConfig, check_sample, check_train


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {seed: 3, total_steps: 70}\nmodel: {options: {depth: 5, patch_size: 4}}\n")
    config = load(
        TrainConfig, ["--config", str(path), "run.seed=4", "model.options.depth=7", "ema.decay=0.5"]
    )
    assert (config.run.seed, config.run.total_steps, config.run.batch_size) == (
        4,
        70,
        TrainConfig().run.batch_size,
    )
    assert config.model.options == {"depth": 7, "patch_size": 4}
    assert config.ema.decay == 0.5


def test_lists_of_stages_are_read_from_file_and_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: {stages: [{from_step: 10, lr: 3.0e-5}]}\n")
    config = load(TrainConfig, ["--config", str(path)])
    assert [(stage.from_step, stage.lr) for stage in config.optimizer.stages] == [(10, 3e-5)]
    config = load(TrainConfig, ["optimizer.stages=[{from_step: 7, lr: 0.5}]"])
    assert [(stage.from_step, stage.lr) for stage in config.optimizer.stages] == [(7, 0.5)]


def test_a_dumped_config_is_read_back_equal(tmp_path: Path) -> None:
    config = load(
        TrainConfig, ["run.seed=9", "data.paths=[a,b]", "optimizer.stages=[{from_step: 7, lr: 0.5}]"]
    )
    dump(config, tmp_path / "dumped.yaml")
    assert read_dumped(TrainConfig, tmp_path / "dumped.yaml") == config


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("run: {sede: 3}\n", [], ["config.yaml", "'run.sede'", "3", "'run.seed'"]),
        ("", ["run.sede=3"], ["command line", "'run.sede'", "3", "'run.seed'"]),
        ("", ["modle.name=x"], ["'modle'", "'model'"]),
        ("run: {seed: many}\n", [], ["config.yaml", "'run.seed'", "'many'"]),
        ("", ["run.total_steps=1.5"], ["command line", "'run.total_steps'", "1.5"]),
        ("", ["parallel.engine=zero"], ["'parallel.engine'", "'zero'"]),
        ("run: 3\n", [], ["config.yaml", "'run'", "3"]),
        ("optimizer: {stages: [{form_step: 1, lr: 1}]}\n", [], ["config.yaml", "form_step"]),
        ("- 1\n", [], ["config.yaml", "list"]),
        ("run: {seed: [\n", [], ["config.yaml", "YAML"]),
        ("", ["--verbose"], ["'--verbose'"]),
        ("", ["run.seed"], ["'run.seed'", "key.sub=value"]),
        ("", ["data.paths=/tmp/x"], ["'data.paths' is a list", "give data.paths=[/tmp/x]"]),
    ],
)
def test_a_mistake_is_named_with_key_value_place_and_the_nearest_right_key(
    tmp_path: Path, text: str, overrides: list[str], words: list[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=".") as caught:
        load(TrainConfig, ["--config", str(path), *overrides])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("schema", [TrainConfig, SampleConfig, EncodeConfig])
def test_help_tells_every_key_with_type_default_and_meaning(
    schema: type, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load(schema, ["--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0 and said.startswith("usage: python ")
    told = [line.strip().partition(":")[0] for line in said.splitlines() if re.match(r"  \w", line)]
    keys = {name for name, value in vars(schema()).items() if not dataclasses.is_dataclass(value)}
    assert keys <= set(told) and len(told) == len(set(told))
    expected = {
        TrainConfig: "  run.seed: int = 0\n      0 <= seed < 2**32; every random number is a function of it\n",
        SampleConfig: "  weights: 'ema' | 'model' = \"ema\"\n      which of the two sets of weights\n",
        EncodeConfig: "  out: str (must be given)\n      the shard set to write: a folder, or s3://bucket/prefix\n",
    }
    assert expected[schema] in said


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(FileNotFoundError, match=r"confg\.yaml: no such file; did you mean .*config\.yaml"):
        load(TrainConfig, ["--config", str(tmp_path / "confg.yaml")])


def test_a_key_without_a_value_is_named() -> None:
    with pytest.raises(ValueError, match="'checkpoint' has no value"):
        load(SampleConfig, ["out=x"])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["run.seed=-1"], "run.seed"),
        (["run.seed=4294967296"], "run.seed"),
        (["run.batch_size=0"], "run.batch_size"),
        (["run.label_drop=1.0"], "run.label_drop"),
        (["ema.decay=1.0"], "ema.decay"),
        (["ema.widths=[0.0]"], "ema.widths"),
        (["ema.widths=[0.05,0.289]"], "ema.widths"),
        (["ema.widths=[0.0505]"], "ema.widths"),
        (["ema.widths=[0.1,0.1]"], "ema.widths"),
        (["ema.snapshot_every_steps=100"], "ema.snapshot_every_steps"),
        (["ema.widths=[0.1]", "ema.snapshot_every_steps=-1"], "ema.snapshot_every_steps"),
        (["optimizer.lr=0"], "optimizer.lr"),
        (["optimizer.max_grad_norm=-1"], "optimizer.max_grad_norm"),
        (["optimizer.eps=-1"], "optimizer.eps"),
        (["optimizer.warmup_steps=-1"], "optimizer.warmup_steps"),
        (["optimizer.stages=[{from_step: 7, lr: 0}]"], "optimizer.stages.lr"),
        (["monitor.grid_every_steps=-1"], "monitor.grid_every_steps"),
        (["health.lost_sec=0"], "health.lost_sec"),
        (["run.skip=[[7, 7]]"], "run.skip"),
        (["run.skip=[[7]]"], "run.skip"),
        (["health.heartbeat_sec=0"], "health.heartbeat_sec"),
        (["health.stall_sec=600"], "health.stall_sec"),
        (["health.max_hours=0"], "health.max_hours"),
        (["data.paths=[s3://b/x]", "health.stall_sec=500"], "data.timeout_sec"),
        (["objective.min_snr_gamma=0"], "objective.min_snr_gamma"),
        (["objective.vlb_weight=-1"], "objective.vlb_weight"),
        (["objective.vlb_weight=.inf"], "objective.vlb_weight"),
        (["parallel.replicas=0"], "parallel.replicas"),
        (["parallel.engine=zero2", "parallel.replicas=2"], "parallel.replicas"),
        (["parallel.engine=ddp", "parallel.offload=all"], "parallel.offload"),
        (["parallel.engine=fsdp", "parallel.offload=optimizer"], "parallel.offload"),
        (["parallel.engine=zero3", "parallel.offload=all"], "parallel.offload"),
        (["parallel.engine=ddp", "parallel.precision=bf16_params"], "parallel.precision"),
        (["parallel.engine=zero3", "parallel.compile=true"], "parallel.compile"),
        (["parallel.activations.every=0"], "parallel.activations.every"),
        (["optimizer.stages=[{from_step: 7, lr: 1}, {from_step: 7, lr: 2}]"], "optimizer.stages"),
    ],
)
def test_values_that_cannot_be_are_refused_before_a_run(overrides: list[str], key: str) -> None:
    with pytest.raises(ValueError, match=f"config key '{key}'"):
        check_train(load(TrainConfig, overrides))


def test_a_chunk_that_no_micro_batch_divides_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'chunk': 100 .* multiple of micro_batch=30"):
        check_sample(load(SampleConfig, ["checkpoint=x", "out=y", "micro_batch=30"]))


def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `train_dist.py ARGUMENTS` ends with, and exit code 2; run in this process, to be quick."""
    monkeypatch.setattr("sys.argv", ["train_dist.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        command.run(train_dist.main)
    assert caught.value.code == 2
    said = capfd.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and not any("Traceback" in line for line in said), said
    return said[-1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.sede=1", ["'run.sede'", "'run.seed'"]),
        ("run.seed=x", ["'run.seed'", "'x'"]),
        ("data.paths=[/nowhere/at/all]", ["/nowhere/at/all"]),
        ("model.in_channels=3", ["in_channels", "3", "manifest.json"]),
        ("model.num_classes=9", ["num_classes", "9", "10"]),
        ("model.input_size=[16,16]", ["16x16", "8x8"]),
        ("model.options.patch_size=3", ["8", "3", "patch"]),
        ("model.options.hiden_size=3", ["hiden_size", "hidden_size"]),
        ("model.name=DRWKV-XL/2", ["DRWKV-XL/2", "DRWKV-"]),
        ("run.accumulate=1000", ["run.batch_size", "1000"]),
        ("parallel.replicas=2", ["parallel.replicas", "1 processes"]),
        ("health.max_nonfinite_in_row=0", ["health.max_nonfinite_in_row", "0"]),
        ("checkpoint.keep_last=0", ["checkpoint.keep_last", "0"]),
        ("checkpoint.folder=gs://bucket/run", ["checkpoint.folder", "gs://bucket/run", "s3://bucket/prefix"]),
        ("monitor.grid_sampler.steps=300", ["300", "250"]),
        ("diffusion.beta_start=2", ["beta_start=2"]),
        ("diffusion.learn_variance=false", ["diffusion.learn_variance", "False"]),
        ("optimizer.beta1=2", ["optimizer.beta1", "2"]),
    ],
)
def test_bad_input_to_training_is_one_line_exit_code_2_and_nothing_written(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    override: str, words: list[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    base = ["--config", "configs/digits.yaml", f"run.folder={run}", "run.total_steps=1"]
    line = refused(monkeypatch, capfd, *base, f"data.paths=[{digits / 'train'}]", override)
    assert all(word in line for word in words), line
    assert not run.exists()


def test_a_mistake_ends_the_process_with_code_2_and_one_line(
    applications: Applications, tmp_path: Path
) -> None:
    assert "'run.sede'" in applications.refused(
        "train_dist.py", "run.sede=1", f"run.folder={tmp_path / 'run'}"
    )
    assert "'chunck'" in applications.refused("sample_dist.py", "chunck=1", f"out={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_or_meaning_is_refused_and_kept(
    applications: Applications, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = [
        "--config", "configs/digits.yaml", f"run.folder={tmp_path}", f"data.paths=[{digits / 'train'}]",
        "run.batch_size=8", "monitor.progress=false", "model.options.depth=3",
    ]  # fmt: skip
    applications.run("train_dist.py", *base, "run.total_steps=2")
    before = sorted(tmp_path.rglob("*"))
    for override, words in {
        "model.options.hidden_size=32": ["model.options"],
        "run.seed=5": ["run.seed", "0", "5"],
        "data.window=4": ["data.window", "4"],
        "diffusion.num_timesteps=500": ["diffusion.num_timesteps", "1000", "500"],
    }.items():
        line = refused(monkeypatch, capfd, *base, "run.total_steps=4", override)
        assert all(word in line for word in ["step_00000002", *words]), line
    assert sorted(tmp_path.rglob("*")) == before
    changed = applications.run("train_dist.py", *base, "run.total_steps=2", "optimizer.lr=0.5")
    assert "is finished: 2 of 2" in changed.output

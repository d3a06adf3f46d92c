"""What the bench of one block counts, and how it groups a profile. No time is asserted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drwkv.models import bench_block
from drwkv.models.bench_block import Size
from drwkv.models.launches import count_compiled, count_eager

SMALL = Size("DRWKV-S/2", 1, (2, 3), torch.float32)


def test_eager_kernels_and_bytes_are_those_of_each_call() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(8, 16, requires_grad=True)

    counts = count_eager(lambda x, weight: torch.sigmoid((x * 2).t().t() @ weight), [x, weight])
    assert dict(counts.forward.kernels) == {"rest": 2, "matmul": 1}
    assert counts.forward.num_bytes["matmul"] == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert counts.forward.num_bytes["rest"] == 4 * (2 * 4 * 8 + 2 * 4 * 16)
    assert counts.backward.kernels["matmul"] == 2


@pytest.mark.proof
def test_compiling_fuses_what_is_pointwise_and_leaves_matmuls_alone() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.sigmoid(F.silu(x) @ weight) * 2 + 1

    inputs = [torch.randn(4, 8, requires_grad=True), torch.randn(8, 16, requires_grad=True)]
    eager, compiled = count_eager(function, inputs), count_compiled(function, inputs)
    for before, after in ((eager.forward, compiled.forward), (eager.backward, compiled.backward)):
        assert after.kernels["matmul"] == before.kernels["matmul"]
        assert after.num_bytes["matmul"] == before.num_bytes["matmul"]
        assert 0 < after.kernels["rest"] < before.kernels["rest"]
        assert 0 < after.num_bytes["rest"] < before.num_bytes["rest"]
    assert compiled.forward.kernels["rest"] == 2, "one before the matmul and one after"


def test_a_block_calls_each_of_our_operators_forward_and_backward() -> None:
    block, inputs = bench_block.make(SMALL, torch.device("cpu"))
    counts = count_eager(block, inputs)
    assert counts.forward.kernels["operator"] == counts.backward.kernels["operator"] == 3
    assert counts.backward.kernels["matmul"] == 2 * counts.forward.kernels["matmul"]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in block.parameters())


def test_the_tables_go_to_a_section_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n\n## Operators: one\nkept\n")
    monkeypatch.setattr(bench_block, "rows", lambda size, device: [[str(size), *"1234567"]])
    assert bench_block.main(["--model", "DRWKV-B/2", "--markdown", str(page)]) == 0
    written = page.read_text()
    assert "## Operators: one\nkept\n\n## One block: " in written
    assert "| DRWKV-B/2, B=2 T=256 float32 | 1 |" in written and "DRWKV-B/2" in capsys.readouterr().out


def event(
    name: str, parent: object = None, us: float = 0, kernels: tuple[tuple[str, float], ...] = ()
) -> object:
    """An event as torch.profiler gives it: of the GPU if it has a time, else of the CPU."""
    kind = torch.autograd.DeviceType.CUDA if us else torch.autograd.DeviceType.CPU
    return SimpleNamespace(
        name=name, device_type=kind, cpu_parent=parent, is_user_annotation=False,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
        kernels=[SimpleNamespace(name=kernel, duration=took) for kernel, took in kernels],
    )  # fmt: skip


def test_a_profile_gives_our_kernels_to_the_operator_that_launched_them() -> None:
    wkv = event("drwkv::bi_wkv_gated_triton_backward")
    events = [
        event("aten::mm", kernels=(("nvjet_tst_128", 40.0),)),
        event("drwkv::shift_mix_triton", kernels=(("forward_kernel", 5.0),)),
        wkv,
        event("aten::sum", wkv, kernels=(("reduce_kernel", 1.0),)),
        event("cuLaunchKernelEx", wkv, kernels=(("backward_kernel", 7.0),)),
        event("nvjet_tst_128", us=40), event("forward_kernel", us=5), event("reduce_kernel", us=1),
        event("backward_kernel", us=7), event("triton_poi_fused_0", us=3), event("Memcpy DtoD", us=2),
        event("void at::native::vectorized_elementwise_kernel<4>", us=4),
    ]  # fmt: skip
    microseconds, launches = bench_block.group_times(events)
    assert dict(microseconds) == {
        "matmul": 40, "shift_mix": 5, "bi_wkv": 8, "norms and pointwise": 7, "other": 2
    }  # fmt: skip
    assert dict(launches) == {"matmul": 1, "shift_mix": 1, "bi_wkv": 2, "norms and pointwise": 2, "other": 1}


@pytest.mark.needs("gpu")
def test_a_profile_names_every_operator() -> None:
    table = bench_block.profile(Size("DRWKV-S/2", 4, (16, 16), torch.bfloat16), torch.device("cuda"))
    assert all(f"| {group} " in table for group in ("matmul", "bi_wkv", "shift_mix", "norms and pointwise"))

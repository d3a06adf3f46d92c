"""The bench: what it calls the least bytes, what it writes and where, and that a requirement not met fails.

No time is asserted here: `make bench` does that.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drwkv.kernels.bench import __main__ as bench
from drwkv.kernels.bench import cases, gates, report
from drwkv.kernels.bench.cases import Case
from drwkv.kernels.bench.measure import Direction, Result, Results, attention_ms
from drwkv.kernels.resources import Resources, Row

CPU = torch.device("cpu")


def result(case: Case, forward_ms: float, backward_ms: float, copy_ms: float = 1.0) -> Result:
    """Invented times."""
    return Result(case, Direction(forward_ms, 1000, copy_ms), Direction(backward_ms, 2000, copy_ms))


def invented(*measured: Result) -> Results:
    return {found.case: found for found in measured}


@pytest.mark.parametrize(
    ("operator", "forward", "backward", "vectors"),
    [
        ("bi_wkv", 3, 5, 2),  # k, v, y; gy, k, v, gk, gv
        ("bi_wkv_gated", 4, 7, 2),  # with r; with r, gr
        ("shift_mix_3", 4, 5, 3),  # x, 3 outputs; 3 gradients, x, gx
        ("shift_mix_2", 3, 4, 2),
        (cases.ATTENTION, 4, 7, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_least_bytes_are_every_tensor_read_and_written_once(
    operator: str, forward: int, backward: int, vectors: int, dtype: torch.dtype
) -> None:
    call = cases.build(Case(operator, "torch", (2, 12, 64), dtype), CPU)
    tensor, vector = 2 * 12 * 64 * dtype.itemsize, 64 * 4
    assert call.forward_bytes == forward * tensor + vectors * vector
    assert call.backward_bytes == backward * tensor + 2 * vectors * vector


@pytest.mark.parametrize("operator", [*cases.OPERATORS, cases.ATTENTION])
def test_every_operator_runs_forward_and_backward_with_the_gradients_given(operator: str) -> None:
    call = cases.build(Case(operator, "torch", (2, 12, 64)), CPU)
    outputs = call.function(*call.inputs)
    got = torch.autograd.grad(outputs, call.inputs, call.grads)
    assert all(grad.isfinite().all() for grad in got)


@pytest.mark.parametrize(("num_tokens", "expected"), [(256, (16, 16)), (8192, (64, 128)), (7, (1, 7))])
def test_a_grid_is_as_near_to_a_square_as_divides(num_tokens: int, expected: tuple[int, int]) -> None:
    assert cases.grid(num_tokens) == expected


def test_a_direction_tells_its_bandwidth_and_its_share_of_a_copy() -> None:
    direction = Direction(ms=2.0, num_bytes=3_000_000_000, copy_ms=1.5)
    assert direction.gb_per_s == 1500
    assert direction.of_copy == 0.75


def test_attention_is_foretold_from_the_last_shorter_length() -> None:
    def attention(T: int, channels: int = 64) -> Case:
        return Case(cases.ATTENTION, "sdpa", (4096 // T, T, channels))

    known = invented(
        result(attention(256), 1, 2), result(attention(1024), 4, 8), result(attention(512, 128), 90, 9)
    )
    assert attention_ms(attention(2048), known) == 24
    assert attention_ms(attention(128), known) == 0
    assert attention_ms(Case("bi_wkv", "torch", (2, 2048, 64)), known) == 0


def test_each_gate_passes_at_its_limit_and_fails_beyond() -> None:
    growth = Case("bi_wkv_gated", "torch", (16, 4096, 128)), Case("bi_wkv_gated", "torch", (1, 65536, 128))
    good = invented(
        result(cases.LOOPS_MATCH, 1, 1), result(cases.LOOP, 10, 40),
        result(cases.SHORT, 5, 5), result(cases.LONG, 24, 24),
        result(growth[0], 50, 50), result(growth[1], 30, 100),
    )  # fmt: skip
    found = gates.verdicts(good, "cpu")
    assert len(found) == 3 and all(verdict.met for verdict in found) and gates.exit_code(found) == 0
    for case in (cases.LOOPS_MATCH, cases.LONG, growth[1]):
        slower = good | {case: result(case, good[case].forward.ms, good[case].backward.ms + 0.5)}
        found = gates.verdicts(slower, "cpu")
        assert [verdict.met for verdict in found].count(False) == 1 and gates.exit_code(found) == 1


def test_a_gpu_is_held_to_a_share_of_a_copys_bandwidth_and_to_its_own_growth() -> None:
    def growing(backend: str, ms: dict[int, float]) -> list[Result]:
        shapes = {T: (65536 // T, T, 1024) for T in ms}
        return [result(Case("bi_wkv", backend, shapes[T], torch.bfloat16), ms[T], 0) for T in ms]

    measured = invented(
        result(cases.LARGE, 1 / 0.81, 1 / 0.64),
        *growing("triton", {4096: 10, 65536: 12}),
        *growing("torch", {4096: 10, 65536: 100}),
    )
    found = gates.verdicts(measured, "cuda")
    assert [verdict.met for verdict in found] == [True, False, False]
    assert str(found[1]).startswith(
        "FAIL  bi_wkv triton, B=32 T=1024 C=1024 bfloat16, backward"
    ) and "0.64" in str(found[1])
    assert str(found[2]).endswith("1.20 (at most 1.1)")


def test_gates_whose_cases_are_not_there_are_left_out() -> None:
    assert gates.verdicts(invented(result(cases.LONG, 1, 1)), "cpu") == []


def test_ratios_are_multiples_of_the_rows_own_time() -> None:
    shape = (2, 16, 64)
    table = report.operators_table(
        invented(
            result(Case("bi_wkv", "triton", shape), 1, 2),
            result(Case("bi_wkv", "torch", shape), 3, 8),
            result(Case(cases.ATTENTION, "sdpa", shape), 20, 30),
        )
    )
    triton, by_torch, attention = (
        [cell.strip() for cell in line.strip("|").split("|")][-2:] for line in table.splitlines()[2:]
    )
    assert triton == ["3.00 x / 4.00 x", "20.0 x / 15.0 x"]
    assert by_torch == ["", "6.67 x / 3.75 x"]
    assert attention == ["", ""]


def test_compilations_are_summed_up_by_kernel_and_chip() -> None:
    def row(name: str, capability: int, registers: int) -> Row:
        return Row("bi_wkv", name, 4, capability, Resources(registers, 0, 0, shared_bytes=64, warps=8), 0.0)

    table = report.resources_table(
        [row("forward a", 80, 128), row("forward b", 80, 96), row("forward a", 90, 80), row("sums", 80, 32)]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert rows == [
        ["bi_wkv", "forward", "sm_80", "2", "96 to 128", "0", "64", "8"],
        ["bi_wkv", "forward", "sm_90", "1", "80", "0", "64", "8"],
        ["bi_wkv", "sums", "sm_80", "1", "32", "0", "64", "8"],
    ]


PAGE = "# Benchmarks\n\nHow.\n\n## Operators: one\nold\n\n### more\nold\n\n## Operators: one and more\nkept\n"


def test_a_machines_section_takes_the_place_of_its_former_one_and_leaves_all_others() -> None:
    new = report.replaced(PAGE, "Operators: one", "new\n")
    assert new == "# Benchmarks\n\nHow.\n\n## Operators: one\nnew\n\n## Operators: one and more\nkept\n"
    assert report.replaced(new, "Operators: one", "new") == new


def test_a_new_machines_section_comes_last(tmp_path: Path) -> None:
    assert report.replaced(PAGE, "Operators: two", "new") == PAGE + "\n## Operators: two\nnew\n"
    report.write_section(tmp_path / "new.md", "Operators: two", "new")
    assert (tmp_path / "new.md").read_text() == "# Benchmarks\n\n## Operators: two\nnew\n"


def test_the_bench_runs_from_end_to_end_and_writes_page_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, picture = tmp_path / "BENCHMARKS.md", tmp_path / "docs" / "bench.png"
    picture.parent.mkdir()
    page.write_text(PAGE)
    arguments = ["--tiny", "--plot", str(picture), "--markdown", str(page)]
    assert bench.main(arguments) == 0
    printed, written = capsys.readouterr().out, page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "](docs/bench.png)" in written and f"## Operators: {report.machine(CPU)}\n" in written
    assert written.startswith(PAGE)
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(cases.TINY.cases(CPU)) and all(row in written for row in rows)


def test_a_requirement_not_met_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = invented(result(cases.SHORT, 1, 1), result(cases.LONG, 10, 10))
    monkeypatch.setattr(bench, "measure_all", lambda plan, device: slow)
    assert bench.main([]) == 1
    assert "FAIL  bi_wkv torch, B=8 C=128" in capsys.readouterr().out


@pytest.mark.needs("gpu")
def test_a_gpus_times_are_of_the_same_order_as_their_bytes() -> None:
    from drwkv.kernels.bench.measure import measure

    found = measure(cases.LARGE, torch.device("cuda"), budget_sec=0)
    assert 0 < found.forward.of_copy < 1.2 and 0 < found.backward.of_copy < 1.2

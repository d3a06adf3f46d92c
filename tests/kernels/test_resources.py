"""What the Triton kernels take of the chip: that the measure sees faults, and that no kernel of ours has one.

Compiling needs a process without TRITON_INTERPRET, which the tests of the kernels run under; so the measure is
taken in processes of their own, with Triton's usual cache: the second run compiles nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drwkv.kernels import resources

pytest.importorskip("triton")

# Sums T tiles of (BT, BC) exponentials: with the whole tile in one warp's registers it must spill.
TOY = """
import triton
import triton.language as tl
from drwkv.kernels.resources import Compilation


@triton.jit
def sum_exp(p_x, p_y, stride_t, stride_c, T, BT: tl.constexpr, BC: tl.constexpr):
    o_tile = tl.arange(0, BT)[:, None] * stride_t + tl.arange(0, BC)[None, :] * stride_c
    b_sum = tl.zeros((BT, BC), tl.float32)
    for i in range(T):
        b_sum = b_sum * 0.9 + tl.exp(tl.load(p_x + o_tile + i * 77).to(tl.float32))
    tl.store(p_y + o_tile, tl.flip(b_sum, 0))


def toy(name, BT, num_warps=4, **more):
    constexprs = {"BT": BT, "BC": 64, "stride_c": 1}
    signature = {"p_x": "*bf16", "p_y": "*bf16", "stride_t": "i32", "T": "i32"} | more.pop("signature", {})
    return Compilation("toy", name, sum_exp, signature, constexprs, num_warps, **more)


def compilations():
"""
FITS = '    yield toy("small", 16)\n'


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run(compilations, *arguments): the command over a toy operator that yields these compilations."""

    def command(body: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "toy_operator.py").write_text(TOY + body)
        script = (
            "import sys; from drwkv.kernels import resources as r; r.OPERATORS = {'toy': 'toy_operator'}\n"
            f"sys.exit(r.main(['--jobs', '1', '--json', {str(tmp_path / 'rows.json')!r}, *sys.argv[1:]]))"
        )
        path = os.pathsep.join([str(tmp_path), *sys.path])
        return _run(["-c", script, *arguments], PYTHONPATH=path, **environment)

    return command


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """The rows that the last run wrote."""
    return lambda: json.loads((tmp_path / "rows.json").read_text())


def _run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=variables | environment, capture_output=True, text=True
    )


def test_kernels_that_fit_pass_with_a_row_a_capability(
    run: Callable[..., subprocess.CompletedProcess[str]], rows: Callable[[], list[dict[str, Any]]]
) -> None:
    done = run(FITS)
    assert done.returncode == 0, done.stderr
    assert [(row["name"], row["capability"]) for row in rows()] == [("small", 80), ("small", 90)]
    for row in rows():
        assert 10 < row["resources"]["registers"] < 128
        assert row["resources"]["spill_stores"] == row["resources"]["spill_loads"] == 0
        assert f" {row['resources']['registers']} |" in done.stdout
    assert "2 compilations in" in done.stdout


def test_spills_are_seen_and_fail(
    run: Callable[..., subprocess.CompletedProcess[str]], rows: Callable[[], list[dict[str, Any]]]
) -> None:
    done = run('    yield toy("fat", 128, num_warps=1)\n' + FITS, "--capability", "80")
    assert done.returncode == 1
    fat, small = (row["resources"] for row in rows())
    assert fat["spill_stores"] > 1000 and fat["spill_loads"] > 1000 and small["spill_stores"] == 0
    assert f"toy fat on sm_80: spills {fat['spill_stores']} B in stores" in done.stderr
    assert "small" not in done.stderr


def test_registers_and_spills_are_those_that_the_assembler_tells(
    run: Callable[..., subprocess.CompletedProcess[str]],
    rows: Callable[[], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    body = '    yield toy("pinched", 32, options={"maxnreg": 32})\n'
    told = run(body, TRITON_DUMP_PTXAS_LOG="1", TRITON_CACHE_DIR=str(tmp_path / "cache")).stdout
    for found in (row["resources"] for row in rows()):
        assert found["spill_stores"] and found["spill_loads"]
        assert f"{found['spill_stores']} bytes spill stores, {found['spill_loads']} bytes spill loads" in told
        assert f"Used {found['registers']} registers" in told


def test_too_much_shared_memory_fails() -> None:
    fits = resources.Resources(64, 0, 0, shared_bytes=166912, warps=4)
    assert fits.fault(80) == "" and fits.fault(90) == ""
    big = resources.Resources(64, 0, 0, shared_bytes=166913, warps=4)
    assert big.fault(80) == "wants 166913 B of shared memory, sm_80 has 166912 B a block"
    assert big.fault(90) == ""
    assert resources.Resources(64, 0, 0, shared_bytes=232449, warps=4).fault(90)


def test_instructions_are_counted_by_kind(
    run: Callable[..., subprocess.CompletedProcess[str]], rows: Callable[[], list[dict[str, Any]]]
) -> None:
    done = run('    yield toy("one", 16)\n    yield toy("two", 32)\n', "--capability", "90", "--instructions")
    assert done.returncode == 0, done.stderr
    one, two = (row["resources"]["instructions"] for row in rows())
    assert one["special"] == 16 * 64 / 128, (
        "one exponential an element of a thread, the loop's body counted once"
    )
    assert two["special"] == 2 * one["special"] and two["fp32"] > one["fp32"] > 0
    assert one["load"] > 0 and one["store"] > 0 and one["fp64"] == one["local"] == 0
    for counts in (one, two):
        assert sum(counts.values()) == 2 * counts["all"]
    assert "special" in done.stdout


def test_occupancy_is_what_the_occupancy_calculator_gives() -> None:
    """Known rows of NVIDIA's calculator for capability 8.0."""
    chip = resources.CHIPS[80]
    assert resources.resident_warps(chip, registers=32, shared_bytes=0, num_warps=8) == 64
    assert resources.resident_warps(chip, registers=64, shared_bytes=0, num_warps=4) == 32
    assert resources.resident_warps(chip, registers=255, shared_bytes=0, num_warps=4) == 8
    assert resources.resident_warps(chip, registers=32, shared_bytes=81 * 1024, num_warps=4) == 8
    assert resources.resident_warps(chip, registers=16, shared_bytes=0, num_warps=1) == 32


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            '    yield toy("odd", 16, signature={"p_z": "*bf16"})\n',
            "arguments ['p_z'] are in one of the kernel",
        ),
        ('    yield toy("wrong", 12)\n', "toy wrong does not compile for sm_80: "),
    ],
)
def test_a_compilation_that_is_wrong_is_named(
    run: Callable[..., subprocess.CompletedProcess[str]], body: str, sentence: str
) -> None:
    done = run(body, "--capability", "80")
    assert done.returncode == 1 and sentence in done.stderr


def test_the_interpreter_is_refused_with_a_sentence() -> None:
    done = _run(["-m", "drwkv.kernels.resources"], TRITON_INTERPRET="1")
    assert done.returncode == 2 and "without TRITON_INTERPRET" in done.stderr


@pytest.mark.timeout(900)
@pytest.mark.parametrize("extent", [["--heaviest"], pytest.param([], marks=pytest.mark.proof)])
def test_every_configuration_of_every_operator_fits_sm_80_and_sm_90(
    extent: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    done = _run(["-m", "drwkv.kernels.resources", "--jobs", "2", "--json", str(file), *extent])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())
    assert {(row["operator"], row["capability"]) for row in rows} == {
        (operator, capability) for operator in resources.OPERATORS for capability in resources.CHIPS
    }
    names = [(row["operator"], row["name"], row["capability"]) for row in rows]
    assert len(names) == len(set(names)), "two compilations of one name"


COMPILE_ODD_ARGUMENTS = """
import dataclasses
from drwkv.kernels.resources import measure
from drwkv.kernels.shift_mix.triton import compilations

kernels = {c.kernel.__name__: c for c in compilations() if c.name.endswith("unaligned")}
assert len(kernels) == 2
for c in kernels.values():
    numbers = [name for name, kind in c.signature.items() if kind == "i32"]
    ones = dict.fromkeys(numbers, 1) | dict(c.constexprs) | {"M": 4}
    pointers = {name: kind for name, kind in c.signature.items() if name not in ones}
    measure(dataclasses.replace(c, constexprs=ones, signature=pointers, divisible_by_16=None), 80)
    wide = dict(c.signature) | {name: "i64" for name in numbers if name.startswith(("stride", "B"))}
    any_strides = {name: c.constexprs[name] for name in ("M", "BT", "BC")}
    wide |= {name: "i64" for name in c.constexprs if name not in any_strides}
    measure(dataclasses.replace(c, constexprs=any_strides, signature=wide), 80)
"""


def test_shift_mix_compiles_for_sizes_of_one_and_strides_past_32_bits() -> None:
    # Triton takes a 1 for a constant and a large number for int64, which its interpreter does not.
    done = _run(["-c", COMPILE_ODD_ARGUMENTS])
    assert done.returncode == 0, done.stderr

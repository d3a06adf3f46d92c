"""What every Triton kernel takes of the chip, compiled without a GPU: registers, spills, shared memory, SASS.

    python -m drwkv.kernels.resources [--capability 80 90] [--operator bi_wkv] [--heaviest] [--instructions]

compiles every kernel, dtype and configuration that `autotune.py` may choose, and prints a table. It exits 1
when one spills registers or wants more shared memory than a thread block may have. What there is to compile is
told by `compilations()` in each operator's Triton module. Compiled kernels stay in Triton's own cache.
Counts of instructions are static: the body of a loop counts once, however often it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drwkv.kernels import backends

OPERATORS = {"bi_wkv": "drwkv.kernels.wkv.triton_compilations", "shift_mix": "drwkv.kernels.shift_mix.triton"}


@dataclass(frozen=True)
class Chip:
    """Limits of one compute capability, from the CUDA programming guide's table of technical specifications."""

    block_shared_bytes: int  # shared memory that one thread block may have
    shared_bytes: int  # shared memory of one multiprocessor
    registers: int = 65536  # of one multiprocessor
    warps: int = 64  # that may be resident on one multiprocessor
    blocks: int = 32  # the same for thread blocks


CHIPS = {
    80: Chip(block_shared_bytes=163 * 1024, shared_bytes=164 * 1024),
    90: Chip(block_shared_bytes=227 * 1024, shared_bytes=228 * 1024),
}

# Kinds of instruction and the SASS opcodes (without modifiers) that belong to them; the rest is "other".
KINDS = {
    "fp32": ("FFMA", "FADD", "FMUL", "FMNMX", "FSEL", "FSET", "FSETP", "FSWZADD", "FCHK", "FRND"),
    "fp64": ("DFMA", "DADD", "DMUL", "DMNMX", "DSETP"),
    "half": ("HFMA2", "HADD2", "HMUL2", "HMNMX2", "HSETP2", "HSET2"),
    "special": ("MUFU",),
    "convert": ("F2F", "F2FP", "F2I", "I2F", "I2FP"),
    "shuffle": ("SHFL",),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ATOMS"),
    "load": ("LDG", "LDGSTS"),
    "store": ("STG",),
    "barrier": ("BAR",),
    "local": ("LDL", "STL"),
}
_KIND_OF = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes}
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)")


@dataclass(frozen=True)
class Compilation:
    """One kernel with everything that it is specialised on, as a launch at run time would compile it."""

    operator: str  # the operator's name, a key of OPERATORS
    name: str  # what tells it from the operator's others: kernel, dtype, configuration
    kernel: Any  # the JITFunction
    signature: Mapping[str, str]  # argument -> Triton's type, such as "*bf16", "i32", "i64", "fp32"
    constexprs: Mapping[
        str, object
    ]  # constexpr argument -> value; also strides of 1, which Triton specialises
    num_warps: int = 4
    num_stages: int = 3
    divisible_by_16: Collection[str] | None = None  # arguments that are known to be; None means every pointer
    # Other options of the launch, such as maxnreg
    options: Mapping[str, object] = field(default_factory=dict)
    is_lighter: bool = False  # another form of the same kernel and configuration is listed, a heavier one


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes. Registers are per thread, shared bytes per block, spills in bytes a thread."""

    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    warps: int  # resident on one multiprocessor, of 64: what registers, shared memory and block count leave
    # Kind -> static count; empty if not asked for
    instructions: Mapping[str, int] = field(default_factory=dict)

    def fault(self, capability: int) -> str:
        """What makes this kernel unfit, empty if nothing does."""
        limit = CHIPS[capability].block_shared_bytes
        faults = []
        if self.spill_stores or self.spill_loads:
            faults.append(
                f"spills {self.spill_stores} B in stores and {self.spill_loads} B in loads a thread"
            )
        if self.shared_bytes > limit:
            faults.append(
                f"wants {self.shared_bytes} B of shared memory, sm_{capability} has {limit} B a block"
            )
        return "; ".join(faults)


def measure(c: Compilation, capability: int, *, instructions: bool = False) -> Resources:
    """Compile for a capability in CHIPS, on a machine with or without a GPU, and look at the machine code.

    instructions: count them too, which takes the disassembler a third of a second a kernel.
    Raises RuntimeError where the kernel does not compile, or under TRITON_INTERPRET, which leaves nothing to
    compile, and ValueError for a capability or an argument that is not known.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    if capability not in CHIPS:
        raise ValueError(f"capability {capability} is not known; known are {', '.join(map(str, CHIPS))}")
    if backends.interpreting():
        raise RuntimeError("nothing is compiled under TRITON_INTERPRET=1; start the process without it")
    target = GPUTarget("cuda", capability, 32)
    source = ASTSource(c.kernel, *_specialisation(c))
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages, "enable_fp_fusion": True, **c.options}
    try:
        compiled = compile(source, target=target, options=options)
    except Exception as error:  # Triton raises many kinds; the kernel's name goes with all of them
        raise RuntimeError(f"{c.operator} {c.name} does not compile for sm_{capability}: {error}") from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return _look_at(Path(cubin.name), capability, compiled.metadata.shared, c.num_warps, instructions)


def _specialisation(c: Compilation) -> tuple[dict[str, str], dict[str, object], dict[tuple[int, ...], Any]]:
    """Signature, constexprs and attributes as Triton's ASTSource takes them."""
    names = list(c.kernel.arg_names)
    known = {*c.signature, *c.constexprs}
    if wrong := sorted(known.symmetric_difference(names)):
        raise ValueError(
            f"{c.operator} {c.name}: arguments {wrong} are in one of the kernel and its compilation only"
        )
    signature = {name: "constexpr" if name in c.constexprs else c.signature[name] for name in names}
    aligned = c.divisible_by_16
    if aligned is None:
        aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    attributes: dict[tuple[int, ...], Any] = {
        (names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in c.constexprs
    }
    return signature, dict(c.constexprs), attributes


def _look_at(
    cubin: Path, capability: int, shared_bytes: int, num_warps: int, instructions: bool
) -> Resources:
    from triton import knobs

    usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
    if not (found := re.search(r"REG:(\d+) STACK:(\d+)", usage)):
        raise RuntimeError(f"cuobjdump printed no resource usage, but:\n{usage}")
    registers, stack = map(int, found.groups())
    stores = loads = 0
    counts: Counter[str] = Counter()
    if instructions or stack:  # without a stack nothing can be spilled
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(cubin))
        code = [(opcode, modifiers) for opcode, modifiers in _INSTRUCTION.findall(sass) if opcode != "NOP"]
        stores = sum(_width(modifiers) for opcode, modifiers in code if opcode == "STL")
        loads = sum(_width(modifiers) for opcode, modifiers in code if opcode == "LDL")
        counts.update(_KIND_OF.get(opcode, "other") for opcode, _ in code)
    kinds = {kind: counts[kind] for kind in (*KINDS, "other")} | {"all": counts.total()}
    return Resources(
        registers=registers,
        spill_stores=stores,
        spill_loads=loads,
        shared_bytes=shared_bytes,
        warps=resident_warps(CHIPS[capability], registers, shared_bytes, num_warps),
        instructions=kinds if instructions else {},
    )


def resident_warps(chip: Chip, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Warps of one kernel that fit a multiprocessor: registers come in 256 a warp, each block costs 1 KiB shared."""
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = chip.registers // warp_registers // num_warps
    by_shared = chip.shared_bytes // (shared_bytes + 1024)
    return min(by_registers, by_shared, chip.warps // num_warps, chip.blocks) * num_warps


def _width(modifiers: str) -> int:
    """Bytes that one instruction on local memory moves a thread."""
    parts = modifiers.split(".")
    return 16 if "128" in parts else 8 if "64" in parts else 1 if {"U8", "S8"} & {*parts} else 4


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    operator: str
    name: str
    num_warps: int
    capability: int
    resources: Resources
    seconds: float  # that compiling took; next to none when Triton's cache had it


@functools.cache
def listed(operator: str) -> Sequence[Compilation]:
    """What an operator may launch."""
    compilations: Iterator[Compilation] = importlib.import_module(OPERATORS[operator]).compilations()
    return tuple(compilations)


def table(
    operators: Sequence[str],
    capabilities: Sequence[int],
    *,
    instructions: bool,
    jobs: int,
    heaviest: bool = False,
) -> list[Row]:
    """Measure what the operators list, with `heaviest` but one form of each configuration.

    `jobs` kernels at a time are compiled, in processes of their own.
    """
    work = [
        (operator, place, capability, instructions)
        for operator in operators
        for place, compilation in enumerate(listed(operator))
        if not (heaviest and compilation.is_lighter)
        for capability in capabilities
    ]
    if jobs == 1 or len(work) < 2:
        return [_row(task) for task in work]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_row, work))


def _row(task: tuple[str, int, int, bool]) -> Row:
    operator, place, capability, instructions = task
    c = listed(operator)[place]
    began = time.perf_counter()
    resources = measure(c, capability, instructions=instructions)
    return Row(operator, c.name, c.num_warps, capability, resources, time.perf_counter() - began)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table that reads the same in a terminal and on a page."""
    kinds = list(rows[0].resources.instructions) if rows else []
    head = [
        "operator",
        "kernel",
        "sm",
        "warps",
        "registers",
        "spills B",
        "shared B",
        "resident warps",
        *kinds,
    ]
    cells = [
        [
            row.operator, row.name, str(row.capability), str(row.num_warps), str(row.resources.registers),
            f"{row.resources.spill_stores}/{row.resources.spill_loads}", str(row.resources.shared_bytes),
            str(row.resources.warps), *(str(row.resources.instructions[kind]) for kind in kinds),
        ]
        for row in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return "\n".join(_line(cell, widths) for cell in (head, ["-" * width for width in widths], *cells))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line: names to the left, numbers to the right."""
    padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    padded[:2] = [cell.ljust(width) for cell, width in zip(cells[:2], widths, strict=False)]
    return f"| {' | '.join(padded)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 0 if every kernel fits every chip, else 1."""
    told = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m drwkv.kernels.resources", description=told)
    parser.add_argument("--capability", type=int, nargs="+", choices=sorted(CHIPS), default=sorted(CHIPS))
    parser.add_argument("--operator", nargs="+", choices=sorted(OPERATORS), default=sorted(OPERATORS))
    parser.add_argument(
        "--instructions", action="store_true", help="count SASS instructions by kind (static)"
    )
    parser.add_argument(
        "--heaviest",
        action="store_true",
        help="each configuration in its heaviest form alone: a third of the time",
    )
    parser.add_argument("--jobs", type=int, default=2, help="kernels compiled at a time")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    given = parser.parse_args(arguments)
    if not backends.HAS_TRITON or backends.interpreting():
        parser.error("needs triton, and a process without TRITON_INTERPRET")

    began = time.perf_counter()
    rows = table(
        given.operator,
        given.capability,
        instructions=given.instructions,
        jobs=given.jobs,
        heaviest=given.heaviest,
    )
    print(markdown(rows))
    if given.json:
        given.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    faults = [(row, fault) for row in rows if (fault := row.resources.fault(row.capability))]
    slowest = max((row.seconds for row in rows), default=0.0)
    print(f"\n{len(rows)} compilations in {time.perf_counter() - began:.0f} s, the slowest {slowest:.1f} s")
    for row, fault in faults:
        print(f"{row.operator} {row.name} on sm_{row.capability}: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

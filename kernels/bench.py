"""Times of the operators on this machine: `python -m drwkv.kernels.bench [--device cuda] [--threads N]`.

Prints one row a case and one PASS or FAIL line a requirement, and exits 1 when a requirement is not met. A
further operator or backend is a further `Case`. Correctness is not looked at here: `tests/kernels` does that.
Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drwkv.kernels.wkv import bi_wkv

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One row: an operator's backend at one shape."""

    operator: str
    backend: str
    shape: tuple[int, int, int]  # (B, T, C)
    dtype: torch.dtype
    function: Callable[..., Tensor]
    runs: int


@dataclass(frozen=True)
class Time:
    """Medians in milliseconds."""

    forward_ms: float
    both_ms: float  # forward and backward


def bi_wkv_loop(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV as a loop over tokens that carries (maximum, numerator, denominator); autograd's backward."""
    num_tokens = k.shape[1]

    def scan(order: Sequence[int]) -> list[Inputs]:
        m, num, den = torch.full_like(k[:, 0], -1e30), torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
        before: list[Inputs] = [()] * num_tokens
        for t in order:
            before[t] = (m, num, den)
            aged, k_t, v_t = m - decay, k[:, t], v[:, t]
            m = torch.maximum(aged, k_t)
            old, new = torch.exp(aged - m), torch.exp(k_t - m)
            num, den = old * num + new * v_t, old * den + new
        return before

    past, future = scan(range(num_tokens)), scan(range(num_tokens - 1, -1, -1))
    y = []
    for t in range(num_tokens):
        (m_past, num_past, den_past), (m_future, num_future, den_future) = past[t], future[t]
        own, v_t = first + k[:, t], v[:, t]
        m = torch.maximum(torch.maximum(m_past, m_future), own)
        a, b, c = torch.exp(m_past - m), torch.exp(m_future - m), torch.exp(own - m)
        y.append((a * num_past + b * num_future + c * v_t) / (a * den_past + b * den_future + c))
    return torch.stack(y, dim=1)


class _Unbound:
    """Tokens cut once by `unbind`: its backward is one stack, that of each k[:, t] fills a whole tensor."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.tokens = x.shape, x.unbind(1)

    def __getitem__(self, index: tuple[slice, int]) -> Tensor:
        return self.tokens[index[1]]


def bi_wkv_loop_unbind(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same loop, for information: what it costs where its author knows autograd well."""
    return bi_wkv_loop(decay, first, _Unbound(k), _Unbound(v))  # type: ignore[arg-type]


def wkv_case(
    backend: str, shape: tuple[int, int, int], runs: int, dtype: torch.dtype = torch.float32
) -> Case:
    loops = {"loop": bi_wkv_loop, "loop-unbind": bi_wkv_loop_unbind}
    function = loops.get(backend) or functools.partial(bi_wkv, backend=backend)
    return Case("bi_wkv", backend, shape, dtype, function, runs)


def measure(case: Case, device: torch.device) -> Time:
    """Medians over `case.runs` runs, after one run to warm up."""
    batch, num_tokens, channels = case.shape
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    k, v, gy = (normal(batch, num_tokens, channels).to(case.dtype) for _ in range(3))
    inputs = [
        x.requires_grad_() for x in (normal(channels) / num_tokens, normal(channels) / num_tokens, k, v)
    ]

    def forward() -> None:
        with torch.no_grad():
            case.function(*inputs)

    def both() -> None:
        torch.autograd.grad(case.function(*inputs), inputs, gy)

    return Time(_median_ms(forward, case.runs, device), _median_ms(both, case.runs, device))


def _median_ms(run: Callable[[], None], runs: int, device: torch.device) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    once()
    return statistics.median(once() for _ in range(runs))


def check(text: str, value: float, limit: float, *, at_least: bool) -> bool:
    """Print whether the value keeps to the limit."""
    met = value >= limit if at_least else value <= limit
    bound = "at least" if at_least else "at most"
    print(f"{'PASS' if met else 'FAIL'}  {text}: {value:.2f} ({bound} {limit:g})")
    return met


def main() -> int:
    """The command line: print the table and the verdicts; 1 if a requirement is not met."""
    parser = argparse.ArgumentParser(description="Time the operators on this machine.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} CPU threads; medians\n")

    loop = wkv_case("loop", (8, 256, 384), runs=3)
    same = wkv_case("torch", (8, 256, 384), runs=25)
    short = wkv_case("torch", (8, 1024, 128), runs=15)
    long = wkv_case("torch", (8, 4096, 128), runs=9)
    cases = [
        loop,
        wkv_case("loop-unbind", (8, 256, 384), runs=3),
        same,
        wkv_case("torch", (8, 256, 384), runs=25, dtype=torch.bfloat16),
        wkv_case("torch", (64, 16, 128), runs=51),
        wkv_case("torch", (64, 64, 192), runs=25),
        short,
        long,
        wkv_case("torch", (8, 1024, 384), runs=9),
        wkv_case("torch", (8, 4096, 384), runs=5),
    ]
    print(
        f"{'operator':9} {'backend':12} {'B':>3} {'T':>5} {'C':>5} {'dtype':9} {'forward ms':>11} "
        f"{'fwd+bwd ms':>11} {'x loop':>7} {'T4096/T1024':>12}"
    )
    times: dict[Case, Time] = {}
    for case in cases:
        times[case] = took = measure(case, device)
        batch, num_tokens, channels = case.shape
        to_loop = f"{times[loop].both_ms / took.both_ms:.1f}" if case.shape == loop.shape else ""
        quarter = [t for c, t in times.items() if c.shape == (batch, 1024, channels) and num_tokens == 4096]
        to_short = f"{took.both_ms / quarter[0].both_ms:.2f}" if quarter else ""
        print(
            f"{case.operator:9} {case.backend:12} {batch:3} {num_tokens:5} {channels:5} "
            f"{str(case.dtype).removeprefix('torch.'):9} {took.forward_ms:11.2f} {took.both_ms:11.2f} "
            f"{to_loop:>7} {to_short:>12}"
        )

    print()
    faster = check(
        "bi_wkv torch, B=8 T=256 C=384, forward and backward, times as fast as the per-token loop",
        times[loop].both_ms / times[same].both_ms,
        25,
        at_least=True,
    )
    linear = check(
        "bi_wkv torch, B=8 C=128, forward and backward, T=4096 over T=1024",
        times[long].both_ms / times[short].both_ms,
        4.8,
        at_least=False,
    )
    return 0 if faster and linear else 1


if __name__ == "__main__":
    sys.exit(main())

"""What must hold: `verdicts` compares results with their limits. A gate whose cases were not timed is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from drwkv.kernels.bench.cases import LARGE, LONG, LOOP, LOOPS_MATCH, SHORT, Case
from drwkv.kernels.bench.measure import Results

GROWTH_FROM, GROWTH_TO = 4096, 65536  # tokens, with as many in all
GROWTH_LIMIT = {"torch": 1.3, "triton": 1.1}  # by backend: torch's is meant on a CPU
SHARE_OF_COPY = {"forward": 0.80, "backward": 0.65}


@dataclass(frozen=True)
class Verdict:
    """One requirement and what was found."""

    text: str
    value: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return f"{'PASS' if self.met else 'FAIL'}  {self.text}: {self.value:.2f} ({bound} {self.limit:g})"


def exit_code(found: Sequence[Verdict]) -> int:
    """0 if every requirement is met, else 1."""
    return 0 if all(verdict.met for verdict in found) else 1


def verdicts(results: Results, device_type: str) -> list[Verdict]:
    """Every requirement that these results can tell about; device_type: "cpu" or "cuda"."""
    return [*_speed(results), *_growth(results, "triton" if device_type == "cuda" else "torch")]


def _speed(results: Results) -> Iterator[Verdict]:
    def both_ms(case: Case) -> float:
        return results[case].both_ms

    if {LOOP, LOOPS_MATCH} <= results.keys():
        text = "bi_wkv torch, B=8 T=256 C=384, forward and backward, times as fast as the per-token loop"
        yield Verdict(text, both_ms(LOOP) / both_ms(LOOPS_MATCH), 25, at_least=True)
    if {SHORT, LONG} <= results.keys():
        text = "bi_wkv torch, B=8 C=128, forward and backward, T=4096 over T=1024"
        yield Verdict(text, both_ms(LONG) / both_ms(SHORT), 4.8, at_least=False)
    if LARGE in results:
        result = results[LARGE]
        for name, direction in (("forward", result.forward), ("backward", result.backward)):
            text = f"bi_wkv triton, B=32 T=1024 C=1024 bfloat16, {name}, share of a copy's bandwidth"
            yield Verdict(text, direction.of_copy, SHARE_OF_COPY[name], at_least=True)


def _growth(results: Results, backend: str) -> Iterator[Verdict]:
    for long in results:
        B, T, C = long.shape
        if T != GROWTH_TO or long.backend != backend or not long.operator.startswith("bi_wkv"):
            continue
        short = Case(long.operator, backend, (B * T // GROWTH_FROM, GROWTH_FROM, C), long.dtype)
        if short in results:
            yield Verdict(
                f"{long.operator} {backend}, B T={B * T} C={C}, forward and backward, T={T} over T={GROWTH_FROM}",
                results[long].both_ms / results[short].both_ms,
                GROWTH_LIMIT[backend],
                at_least=False,
            )

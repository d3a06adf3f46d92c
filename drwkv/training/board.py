"""What the ranks tell each other outside of their collectives: where each one stands, and why one has ended the run.

Small texts on the store that brought the ranks together, over a connection of its own. Every call may block while that
store does not answer, and raises RuntimeError once it is gone. Who acts on what is read: watch.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from drwkv.parallel.distributed import World

FAILED = "failed"  # key: who ended the run, and why


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    moves: int  # counts every change of step or phase; all ranks make the same ones
    step: int
    phase: str
    collectives: int  # begun so far, over all process groups
    beat: int  # signs of life so far
    host: str
    pid: int

    @staticmethod
    def first(phase: str) -> Place:
        """That of this process, before it has moved."""
        return Place(0, 0, phase, 0, 0, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase} (pid {self.pid} on {self.host})"


class Board:
    """The texts of one run. Collective."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._store = dist.PrefixStore(f"watch/{world.from_first(secrets.token_hex(4))}", world.board)

    def publish(self, place: Place) -> None:
        """Say where this rank stands."""
        self._store.set(f"rank{self._world.rank}", json.dumps(vars(place)))

    def place_of(self, rank: int) -> Place:
        """Where another rank stood when it last said so."""
        return Place(**json.loads(self._store.get(f"rank{rank}")))

    def places(self) -> list[Place]:
        """Where all stood, by rank."""
        keys = [f"rank{rank}" for rank in range(self._world.size)]
        return [Place(**json.loads(text)) for text in self._store.multi_get(keys)]

    def tell(self, text: str, code: int) -> bool:
        """Say why the run ends, unless somebody has; whether this rank was the first."""
        said = {"rank": self._world.rank, "text": text, "code": code}
        try:
            return bool(json.loads(self._store.compare_set(FAILED, "", json.dumps(said))) == said)
        except RuntimeError:  # nobody else hears of it
            return True

    def failed(self) -> dict[str, Any] | None:
        """What the first rank to `tell` has said: rank, text and exit code."""
        return dict(json.loads(self._store.get(FAILED))) if self._store.check([FAILED]) else None


def num_collectives() -> int:
    """Collectives that this rank has begun; a rank that stands outside of one has begun fewer than those in it."""
    count = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            count += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return count


def blame(places: list[Place], silent: set[int], stood_sec: float) -> str:
    """One line for people: which ranks hold up the others, as far as their places tell."""
    progress = [(place.moves, place.collectives) for place in places]
    behind = [rank for rank, made in enumerate(progress) if made == min(progress)]
    if silent:
        named, why = sorted(silent), "without a sign of life"
    elif len(behind) < len(places):
        named, why = behind, "behind all others"
    else:
        return f"all {len(places)} ranks stand still since {stood_sec:.0f} s at {places[0]}"
    shown = "; ".join(f"rank {rank} at {places[rank]}" for rank in named[:8])
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    others = next((place for rank, place in enumerate(places) if rank not in named), None)
    waiting = f"; the others wait at step {others.step}, {others.phase}" if others else ""
    return f"{shown}{more} {'stands' if len(named) == 1 else 'stand'} still since {stood_sec:.0f} s, {why}{waiting}"

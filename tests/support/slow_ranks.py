"""Two ranks, one of which waits for its data while the other computes for twice as long: what they learn of that."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator

from drwkv.parallel import session
from drwkv.training.stragglers import Stragglers

STEPS, LOOKS = 2, 3


def main() -> None:
    logging.basicConfig(format="%(message)s")
    with session(timeout_sec=60.0) as world:
        if world.rank > 0:
            logging.disable()
        ranks = Stragglers(world, STEPS)

        def batches() -> Iterator[int]:
            for i in itertools.count():
                time.sleep(0.08 * world.rank)
                yield i

        stream, found = batches(), {}
        for _ in range(STEPS * LOOKS):
            ranks.fetch(stream.__next__)
            with ranks.working():
                end = time.thread_time() + (0.02 if world.rank else 0.06)
                while time.thread_time() < end:
                    pass
                world.barrier()
            found = ranks.compare() or found
        who, ratio = found["data_wait_max_rank"], found["work_max_over_median"]
        print(
            f"rank {world.rank} knows: data_wait_max_rank {who:.0f}, work over {int(ratio > 2) * 2}",
            flush=True,
        )


if __name__ == "__main__":
    main()

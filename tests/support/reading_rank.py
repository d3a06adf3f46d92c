"""One rank that reads shard sets as a trainer does and writes down what came: `python reading_rank.py JOB.json`.

The job: {"data": DataConfig's fields, "batch_size", "start", "num_batches", "out"}; "{rank}" in `out` is this rank's
number. Each line of `out` is a sample as it came: n, sample id, label, crc32c of its bytes. It is flushed batch by
batch, so that what a killed rank had is known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import google_crc32c

from drwkv import command
from drwkv.data.loader import DataConfig, open_data


@dataclass
class Place:
    rank: int
    size: int


def main(arguments: Sequence[str]) -> None:
    with open(arguments[0]) as file:
        job = json.load(file)
    place = Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    data = open_data(DataConfig(**job["data"]), seed=job.get("seed", 0))
    batches = data.batches(job["batch_size"], job["start"], world=place)
    with open(job["out"].format(rank=place.rank), "a") as out:
        for _ in range(job["num_batches"]):
            for batch in next(batches):
                samples = zip(
                    batch.n.tolist(), batch.sample_id.tolist(), batch.y.tolist(), batch.x, strict=True
                )
                for n, sample_id, label, x in samples:
                    print(n, sample_id, label, google_crc32c.value(x.numpy().tobytes()), file=out)
            out.flush()


if __name__ == "__main__":
    command.run(main)

"""Decoding, encoding and writing go on side by side: the whole takes little longer than its slowest part alone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from image_trees import write_image_folder
from small_vae import save_small_vae

from data_prep.decoding import Decoded, Decoder, DecodingPool, Request
from data_prep.encode import EncodeConfig, encode
from data_prep.encoder import VaeEncoder
from data_prep.sources import open_source
from drwkv.cpu import keep_freed_memory

NUM_IMAGES, RESOLUTION, BATCH = 4096, 64, 16
MOST = 1.25  # wall time of the whole, over that of its slower half
TRIES = 3  # the machine's other work may spoil a measurement; the best one counts


@pytest.mark.proof
@pytest.mark.timeout(900)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the two halves need a core each")
def test_the_whole_takes_at_most_a_quarter_longer_than_its_slower_half(tmp_path, capsys):
    tree, vae = tmp_path / "tree", save_small_vae(tmp_path / "vae")
    write_image_folder(tree, NUM_IMAGES, num_classes=8, seed=0, sizes=(400, 560))
    torch.set_num_threads(1)
    keep_freed_memory()
    _encode(tree, vae, tmp_path / "warm", limit=64)  # imports what is imported once, for all three

    ratios = []
    for i in range(TRIES):
        decoded, decoding_sec = _decode_alone(tree)
        encoding_sec = _encode_alone(vae, decoded)
        begin = time.monotonic()
        _encode(tree, vae, tmp_path / f"set-{i}")
        whole_sec = time.monotonic() - begin
        ratios.append(whole_sec / max(decoding_sec, encoding_sec))
        with capsys.disabled():
            print(
                f"\n{NUM_IMAGES} images: decoding {decoding_sec:.1f} s, encoding {encoding_sec:.1f} s, "
                f"the whole {whole_sec:.1f} s, {ratios[-1]:.2f} x the slower"
            )
        assert max(decoding_sec, encoding_sec) < 2 * min(decoding_sec, encoding_sec), "make them more alike"
    assert min(ratios) <= MOST


def _encode(tree: Path, vae: Path, out: Path, limit: int | None = None) -> None:
    encode(
        EncodeConfig(
            source=str(tree), vae=str(vae), out=str(out), resolution=RESOLUTION, batch=BATCH, workers=1,
            samples_per_shard=128, limit=limit,
        )
    )  # fmt: skip


def _decode_alone(tree: Path) -> tuple[list[Decoded], float]:
    items = open_source(str(tree)).items
    pool = DecodingPool(Decoder(batch=BATCH, resolution=RESOLUTION, max_pixels=1 << 30), workers=1)
    requests = [Request(0, items[at : at + BATCH]) for at in range(0, NUM_IMAGES, BATCH)]
    begin = time.monotonic()
    decoded = list(pool.decode(requests))
    return decoded, time.monotonic() - begin


def _encode_alone(vae: Path, decoded: list[Decoded]) -> float:
    encoder = VaeEncoder(
        str(vae), resolution=RESOLUTION, flip=True, batch=BATCH, dtype="float32", device=torch.device("cpu")
    )
    begin = time.monotonic()
    for batch in decoded:
        encoder.begin(batch.x)()
    return time.monotonic() - begin

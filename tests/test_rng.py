"""The random numbers: published known answers, dependence on (seed, purpose, n) alone, and distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from drwkv import rng
from drwkv.rng import Purpose

ONES = 0xFFFFFFFF
# Random123, tests/kat_vectors, "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
COUNTERS = [0, 1, 5, 2**32 - 1, 2**32, 2**32 + 5, 2**62, 2**63 - 1]


def philox_in_plain_integers(counter, key):
    """Ten rounds as the paper defines them (section 3.3), written a second time, in Python integers."""
    x0, x1, x2, x3 = counter
    for i in range(10):
        k0, k1 = ((k + i * w) % 2**32 for k, w in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        high0, low0 = divmod(x0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(x2 * 0xCD9E8D57, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
    return x0, x1, x2, x3


def words_from_the_definition(seed, purpose, n, num, step=0):
    blocks = [
        philox_in_plain_integers((block, step, n % 2**32, n >> 32), (seed, purpose))
        for block in range(-(-num // 4))
    ]
    return [word for block in blocks for word in block][:num]


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, answer):
    tensors = [torch.tensor([word]) for word in counter]
    assert tuple(int(word) for word in rng._philox(*tensors, key)) == answer
    assert rng._philox(*counter, key) == answer


def test_bits_put_element_step_and_both_halves_of_n_into_the_counter():
    for seed, purpose, step in [(0, 1, 0), (ONES, 7, 3), (20240407, 12, ONES)]:
        expected = [words_from_the_definition(seed, purpose, n, 11, step) for n in COUNTERS]
        assert rng.bits(seed, purpose, torch.tensor(COUNTERS), 11, step=step).tolist() == expected


def test_a_row_depends_on_its_own_n_alone():
    n = torch.arange(100, 137)
    whole = rng.normal(3, Purpose.NOISE, n, (5, 7))
    shuffled = torch.randperm(len(n), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rng.normal(3, Purpose.NOISE, n[shuffled], (5, 7)), whole[shuffled])
    assert torch.equal(rng.normal(3, Purpose.NOISE, n[11:12], (5, 7)), whole[11:12])
    assert torch.equal(rng.normal(3, Purpose.NOISE, n[None, 11].expand(4), (5, 7)), whole[[11] * 4])
    assert torch.equal(rng.uniform(3, Purpose.FLIP, n, 2)[20:], rng.uniform(3, Purpose.FLIP, n[20:], 2))


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
def test_working_in_chunks_changes_no_bit(monkeypatch, chunk):
    n = torch.arange(7) * 2**31
    words, noise = rng.bits(1, 2, n, 250), rng.normal(1, 2, n, (250,))
    monkeypatch.setattr(rng, "_CPU_CHUNK", chunk)
    assert torch.equal(rng.bits(1, 2, n, 250), words)
    assert torch.equal(rng.normal(1, 2, n, (250,)), noise)


@pytest.mark.parametrize("num", [1, 2, 3, 5, 63, 500])
def test_a_short_row_is_the_beginning_of_a_longer_one(num):
    n = torch.tensor(COUNTERS)
    for draw in (rng.bits, rng.uniform):
        assert torch.equal(draw(9, 4, n, num), draw(9, 4, n, 777)[:, :num])
    assert torch.equal(rng.normal(9, 4, n, (num,)), rng.normal(9, 4, n, (777,))[:, :num])


def test_normals_are_box_muller_in_float64_on_pairs_of_words():
    n = torch.tensor(COUNTERS)
    words = rng.bits(5, Purpose.NOISE, n, 3000).numpy().astype(np.float64).reshape(len(n), -1, 2)
    radius = np.sqrt(-2 * np.log((words[..., 0] + 0.5) / 2**32))
    angle = 2 * np.pi * words[..., 1] / 2**32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(len(n), 3, 1000)
    z = rng.normal(5, Purpose.NOISE, n, (3, 1000))
    assert z.dtype == torch.float32 and z.shape == (len(n), 3, 1000)
    assert np.abs(z.numpy() - expected).max() < 1e-6


def test_the_extreme_words_give_finite_normals():
    words = [torch.tensor([[0, ONES, 0, ONES]]) for _ in range(4)]
    out = torch.full((1, 4, 4), torch.nan)
    rng._write_normal(out, (words[0], words[1], words[2], words[3]))
    assert out.isfinite().all() and 6.7 < out.abs().max() < 6.8


def test_normals_have_the_moments_and_the_distribution_of_a_normal():
    z = rng.normal(0, Purpose.NOISE, torch.arange(500), (4, 10, 50)).double().flatten()
    error = len(z) ** -0.5
    assert abs(z.mean()) < 4 * error
    assert abs(z.var() - 1) < 4 * error * 2**0.5
    assert abs((z**3).mean()) < 4 * error * 15**0.5
    assert abs((z**4).mean() - 3) < 4 * error * 96**0.5
    assert abs((z[::2] * z[1::2]).mean()) < 4 * error * 2**0.5  # the two of one Box-Muller pair
    assert stats.kstest(z[:100_000].numpy(), "norm").pvalue > 1e-3


def test_uniforms_are_24_bits_in_the_half_open_unit_interval():
    u = rng.uniform(0, Purpose.LABEL_DROP, torch.arange(1000), 333)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert torch.equal((u * 2**24).round(), u * 2**24) and (u * 2**24 % 2).mean() > 0.49
    assert stats.kstest(u.flatten().double().numpy(), "uniform").pvalue > 1e-3
    largest = torch.empty(1, 1, 4)
    rng._write_uniform(largest, tuple(torch.tensor([[ONES]]) for _ in range(4)))
    assert largest.tolist() == [[[1 - 2**-24] * 4]]


def test_integers_cover_their_range_evenly():
    n = torch.arange(200_000)
    t = rng.integers(0, Purpose.TIMESTEP, n, 1000)
    assert t.shape == n.shape and t.dtype == torch.int64
    counts = torch.bincount(t, minlength=1000)
    assert len(counts) == 1000
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert rng.integers(0, 5, n[:9], 1).tolist() == [0] * 9
    assert rng.integers(0, 5, n, 2**31).max() > 2**31 - 2**18


def test_seeds_purposes_steps_and_counters_draw_independently():
    n = torch.arange(64)
    draws = [rng.normal(seed, purpose, n, (500,)) for seed in (0, 1) for purpose in Purpose]
    draws += [rng.normal(0, Purpose.NOISE, n, (500,), step=step) for step in (1, 2)]
    draws += [rng.normal(0, Purpose.NOISE, n + offset, (500,)) for offset in (64, 2**32)]
    correlation = torch.corrcoef(torch.stack(draws).flatten(1).double())
    apart = correlation - torch.eye(len(draws), dtype=torch.float64)
    assert apart.abs().max() < 5 * (64 * 500) ** -0.5


def test_the_purposes_keep_their_numbers():
    names = "PARAMETER ORDER FLIP POSTERIOR TIMESTEP NOISE LABEL_DROP STOCHASTIC_DEPTH SHARD_PLAN"
    names += " SAMPLE_NOISE SAMPLE_STEP VALIDATION"
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        name: i for i, name in enumerate(names.split(), start=1)
    }


def test_name_keys_are_63_bits_of_sha256():
    assert rng.name_key("blocks.0.att.key.weight") == 0x321DC02CAA594D3E  # echo -n NAME | sha256sum, halved
    assert len({rng.name_key(f"blocks.{i}") for i in range(100)}) == 100


def test_key64_is_philox_chained_over_its_words():
    def chained(seed, purpose, *words):
        low, high = len(words), 0
        for word in words or (0,):
            counter = (word % 2**32, word >> 32, low, high)
            low, high = philox_in_plain_integers(counter, (seed, purpose))[:2]
        return high * 2**32 + low

    words = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (2**32,), (2**64 - 1, 7)]
    keys = [rng.key64(11, Purpose.ORDER, *w) for w in words]
    assert keys == [chained(11, Purpose.ORDER, *w) for w in words]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**64 for key in keys)


def test_no_rows_and_no_elements_give_empty_tensors():
    assert rng.bits(0, 1, torch.arange(0), 5).shape == (0, 5)
    assert rng.normal(0, 1, torch.arange(3), (2, 0)).shape == (3, 2, 0)
    assert rng.normal(0, 1, torch.arange(3), ()).shape == (3,)


def test_the_generator_leaves_its_n_alone():
    n = torch.arange(10)
    rng.normal(0, 1, n, (9,))
    assert n.tolist() == list(range(10))


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda n: rng.bits(-1, 1, n, 4), "seed is -1"),
        (lambda n: rng.bits(2**32, 1, n, 4), "seed is 4294967296"),
        (lambda n: rng.key64(2**32, 1), "seed is 4294967296"),
        (lambda n: rng.key64(0, 1, -5), "-5"),
        (lambda n: rng.normal(0, -3, n, (4,)), "purpose is -3"),
        (lambda n: rng.uniform(0, 1, n, 4, step=-2), "step is -2"),
        (lambda n: rng.bits(0, 1, n - 7, 4), "-7"),
        (lambda n: rng.bits(0, 1, n.int(), 4), "int32"),
        (lambda n: rng.bits(0, 1, n[None], 4), r"\(1, 3\)"),
        (lambda n: rng.bits(0, 1, n, -4), "-4 elements"),
        (lambda n: rng.integers(0, 1, n, 0), "high is 0"),
        (lambda n: rng.integers(0, 1, n, 2**31 + 1), "high is 2147483649"),
    ],
)
def test_arguments_out_of_range_raise_a_value_error_with_the_number(call, named):
    with pytest.raises(ValueError, match=named) as error:
        call(torch.arange(3))
    assert "\n" not in str(error.value)


@pytest.mark.needs("gpu")
def test_the_gpu_draws_the_same_integers_and_normals_to_1e_6():
    n = torch.tensor(COUNTERS)
    gpu = n.cuda()
    assert torch.equal(rng.bits(5, 6, gpu, 999).cpu(), rng.bits(5, 6, n, 999))
    assert torch.equal(rng.uniform(5, 6, gpu, 999).cpu(), rng.uniform(5, 6, n, 999))
    assert torch.equal(rng.integers(5, 6, gpu, 1000).cpu(), rng.integers(5, 6, n, 1000))
    z = rng.normal(5, 6, n, (3, 9999))
    assert (rng.normal(5, 6, gpu, (3, 9999)).cpu() - z).abs().max() < 1e-6

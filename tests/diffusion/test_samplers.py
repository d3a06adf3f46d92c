"""DDPM and DDIM against the golden trajectories and against exact solutions for Gaussian data."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drwkv.diffusion.gaussian import GaussianProcess
from drwkv.diffusion.samplers import ddim, ddpm, even_timesteps, strided_timesteps

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusion.safetensors"
SAMPLERS = {"ddpm10": (ddpm, even_timesteps), "ddim10": (ddim, strided_timesteps)}


def relative_rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).pow(2).mean().sqrt() / b.double().pow(2).mean().sqrt())


def unused_noise(s: int) -> torch.Tensor:
    raise AssertionError(f"noise was asked for at step {s}")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_matches_the_golden_trajectory(golden, name):
    sampler, spacing = SAMPLERS[name]
    assert spacing(1000, 10) == golden[f"{name}.timesteps"].tolist()
    told, visited = [], []

    def denoise(x, t):
        told.append(t.tolist())
        shift = golden["model.b"] + golden["model.tw"] * (t.float() / 1000)[:, None]
        return torch.tanh(torch.einsum("oc,bchw->bohw", golden["model.W"], x) + shift[:, :, None, None])

    noise = golden[f"{name}.noise"]
    x_0 = sampler(
        GaussianProcess(),
        denoise,
        golden[f"{name}.x_T"],
        lambda s: noise[s],
        steps=10,
        on_step=lambda s, x: visited.append((s, x)),
    )
    assert [s for s, _ in visited] == list(range(10))
    assert told == [[t, t] for t in reversed(golden[f"{name}.timesteps"].tolist())]
    for s, x in visited:
        assert relative_rms(x, golden[f"{name}.trajectory"][s]) < 1e-5, f"step {s}"
    assert torch.equal(x_0, visited[-1][1])


def gaussian_data_denoiser(process: GaussianProcess, mean: float, std: float):
    """The exact model, eps and v, of data that is N(mean, std^2) in every pixel."""

    def denoise(x, t):
        alpha_bar = torch.from_numpy(process.tables["alpha_bar"])[t].view(-1, 1, 1, 1)
        signal, variance = alpha_bar.sqrt(), alpha_bar * std**2 + 1 - alpha_bar
        eps = (1 - alpha_bar).sqrt() * (x - signal * mean) / variance
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)

    return denoise


def test_ddim_with_1000_steps_carries_the_noise_to_the_data_distribution_exactly():
    process = GaussianProcess()
    x_T = torch.tensor([-2.0, -0.5, 0.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    x_0 = ddim(process, gaussian_data_denoiser(process, 0.4, 0.3), x_T, unused_noise, steps=1000)
    # The probability-flow map of Gaussian data is affine: it keeps the standard score of each point.
    alpha_bar = float(process.tables["alpha_bar"][-1])
    score = (x_T - math.sqrt(alpha_bar) * 0.4) / math.sqrt(alpha_bar * 0.3**2 + 1 - alpha_bar)
    torch.testing.assert_close(x_0, 0.4 + 0.3 * score, rtol=0, atol=5e-3)


@pytest.mark.parametrize("sampler, options", [(ddpm, {}), (ddim, {"eta": 1.0})])
def test_stochastic_samplers_reach_mean_and_spread_of_gaussian_data(sampler, options):
    process = GaussianProcess()
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(501, 5000, 1, 1, 1, generator=generator, dtype=torch.float64)
    x_0 = sampler(
        process,
        gaussian_data_denoiser(process, 0.4, 0.3),
        normal[500],
        lambda s: normal[s],
        steps=500,
        **options,
    )
    assert abs(float(x_0.mean()) - 0.4) < 0.015
    assert abs(float(x_0.std()) - 0.3) < 0.015


@pytest.mark.parametrize("sampler, options", [(ddpm, {}), (ddim, {"eta": 0.5})])
def test_noise_is_asked_for_once_a_step_and_never_at_the_last(golden, sampler, options):
    asked = []

    def noise(s):
        asked.append(s)
        return golden["ddpm10.noise"][s]

    x_T = golden["ddpm10.x_T"]
    sampler(GaussianProcess(), lambda x, t: torch.cat([x, x], 1) / 3, x_T, noise, steps=5, **options)
    assert asked == [0, 1, 2, 3]


def test_ddim_without_eta_never_asks_for_noise(golden):
    x_T = golden["ddim10.x_T"]
    x_0 = ddim(GaussianProcess(), lambda x, t: torch.cat([x, x], 1) / 3, x_T, unused_noise, steps=5)
    assert torch.isfinite(x_0).all()


@pytest.mark.parametrize("sampler", [ddpm, ddim])
def test_clipped_samples_end_inside_the_pixel_range(golden, sampler):
    arguments = (GaussianProcess(), lambda x, t: torch.cat([x, x], 1) / 3, golden["ddpm10.x_T"])
    noise = golden["ddpm10.noise"]
    wild = sampler(*arguments, lambda s: noise[s], steps=5)
    tame = sampler(*arguments, lambda s: noise[s], steps=5, clip_denoised=True)
    assert wild.abs().max() > 1
    assert tame.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("sampler", [ddpm, ddim])
def test_samplers_are_pure_and_leave_x_T_alone(golden, sampler):
    x_T, noise = golden["ddpm10.x_T"].clone(), golden["ddpm10.noise"]
    runs = [
        sampler(GaussianProcess(), lambda x, t: torch.cat([x, x], 1) / 3, x_T, lambda s: noise[s], steps=10)
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    assert torch.equal(x_T, golden["ddpm10.x_T"])


def test_even_timesteps_hold_both_ends_and_as_many_as_asked():
    for steps in range(2, 1001):
        timesteps = even_timesteps(1000, steps)
        assert len(set(timesteps)) == steps and timesteps == sorted(timesteps)
        assert (timesteps[0], timesteps[-1]) == (0, 999)
    assert even_timesteps(1000, 250)[:4] == [0, 4, 8, 12]


def test_a_ddim_count_without_an_integer_stride_names_the_nearest_counts():
    assert strided_timesteps(1000, 50) == list(range(0, 1000, 20))
    with pytest.raises(ValueError, match="steps=600.*nearest counts are 500 and 1000"):
        strided_timesteps(1000, 600)
    for steps in range(2, 1001):
        try:
            assert len(strided_timesteps(1000, steps)) == steps
        except ValueError:
            assert all(len(range(0, 1000, stride)) != steps for stride in range(1, 1000))


@pytest.mark.parametrize("sampler", [ddpm, ddim])
@pytest.mark.parametrize("steps", [0, 1, 1001])
def test_impossible_step_counts_are_refused(golden, sampler, steps):
    with pytest.raises(ValueError, match=rf"steps={steps}: sampling needs 2..1000"):
        sampler(GaussianProcess(), lambda x, t: x, golden["ddpm10.x_T"], unused_noise, steps=steps)


def test_an_eta_outside_0_to_1_is_refused(golden):
    with pytest.raises(ValueError, match="eta=1.5"):
        ddim(GaussianProcess(), lambda x, t: x, golden["ddim10.x_T"], unused_noise, steps=10, eta=1.5)

"""The Gaussian process against the golden numbers and against plain float64 formulas written here."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from drwkv.diffusion.gaussian import (
    GaussianConfig,
    GaussianProcess,
    discretised_gaussian_log_likelihood,
    min_snr_weight,
    normal_kl,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusion.safetensors"
TOLERANCE = 1e-5  # relative RMS


def relative_rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).pow(2).mean().sqrt() / b.double().pow(2).mean().sqrt())


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def golden_model(golden, x, t):
    shift = golden["model.b"] + golden["model.tw"] * (t.float() / 1000)[:, None]
    return torch.tanh(torch.einsum("oc,bchw->bohw", golden["model.W"], x) + shift[:, :, None, None])


def test_q_sample_matches_the_golden_file(golden):
    x_t = GaussianProcess().q_sample(golden["train.x0"], golden["train.t"], golden["train.noise"])
    assert relative_rms(x_t, golden["train.x_t"]) < TOLERANCE


@pytest.mark.parametrize("name", ["mse", "vb", "loss"])
def test_each_loss_of_each_sample_matches_the_golden_file(golden, name):
    t, x_t = golden["train.t"], golden["train.x_t"]
    losses = GaussianProcess().losses(
        golden_model(golden, x_t, t), golden["train.x0"], x_t, t, golden["train.noise"]
    )
    torch.testing.assert_close(losses[name], golden[f"train.{name}"], rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("place, name", list(enumerate(["mean", "variance", "log_variance", "pred_xstart"])))
def test_the_reverse_step_matches_the_golden_file(golden, place, name):
    t, x_t = golden["train.t"], golden["train.x_t"]
    result = GaussianProcess().p_mean_variance(golden_model(golden, x_t, t), x_t, t)[place]
    assert relative_rms(result, golden[f"p.{name}"]) < TOLERANCE


def test_the_schedule_has_the_published_betas_in_float64():
    tables = GaussianProcess().tables
    betas = [1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(1000)]
    alpha_bar, expected = 1.0, []
    for beta in betas:
        alpha_bar *= 1 - beta
        expected.append(alpha_bar)
    np.testing.assert_allclose(tables["beta"], betas, rtol=1e-13)
    np.testing.assert_allclose(tables["alpha_bar"], expected, rtol=1e-12)


def test_vb_moves_the_variance_and_mse_moves_the_mean(golden):
    t, x_t, x0, eps = (golden[f"train.{k}"] for k in ("t", "x_t", "x0", "noise"))
    out = golden_model(golden, x_t, t).requires_grad_()
    losses = GaussianProcess().losses(out, x0, x_t, t, eps)
    (by_vb,) = torch.autograd.grad(losses["vb"].sum(), out, retain_graph=True)
    (by_mse,) = torch.autograd.grad(losses["mse"].sum(), out, retain_graph=True)
    (by_loss,) = torch.autograd.grad(losses["loss"].sum(), out)
    assert torch.count_nonzero(by_vb[:, :4]) == 0 and torch.count_nonzero(by_vb[:, 4:]) > 0
    assert torch.count_nonzero(by_mse[:, :4]) > 0 and torch.count_nonzero(by_mse[:, 4:]) == 0
    torch.testing.assert_close(by_loss, by_vb + by_mse)


def test_min_snr_weighs_the_squared_error_by_the_clamped_ratio_of_signal_to_noise(golden):
    t, x_t, x0, eps = (golden[f"train.{k}"] for k in ("t", "x_t", "x0", "noise"))
    t = torch.tensor([0, 100, 250, 500, 999, 999, 50, 3])[: len(t)]
    out = golden_model(golden, x_t, t)
    plain, weighted = (GaussianProcess().losses(out, x0, x_t, t, eps, min_snr_gamma=g) for g in (None, 5.0))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[t.numpy()]
    weight = np.minimum(alpha_bar / (1 - alpha_bar), 5.0) / (alpha_bar / (1 - alpha_bar))
    assert weight.min() < 1e-3 and weight.max() == 1
    expected = torch.from_numpy(weight) * plain["mse"].double() + plain["vb"].double()
    torch.testing.assert_close(weighted["loss"].double(), expected, rtol=TOLERANCE, atol=0)
    assert torch.equal(weighted["mse"], plain["mse"]) and torch.equal(weighted["vb"], plain["vb"])


def test_min_snr_at_gamma_1_by_hand():
    snr = torch.tensor([0.25, 1.0, 4.0])
    assert min_snr_weight(snr, 1.0).tolist() == [1.0, 1.0, 0.25]


def test_the_weight_of_the_bound_scales_what_trains_the_variance_and_nothing_else(golden):
    t, x_t, x0, eps = (golden[f"train.{k}"] for k in ("t", "x_t", "x0", "noise"))
    gradients = {}
    for weight in (1.0, 0.25, 0.0):
        out = golden_model(golden, x_t, t).requires_grad_()
        loss = GaussianProcess().losses(out, x0, x_t, t, eps, vlb_weight=weight)["loss"]
        (gradients[weight],) = torch.autograd.grad(loss.sum(), out)
    for weight in (0.25, 0.0):
        assert torch.equal(gradients[weight][:, :4], gradients[1.0][:, :4])
        torch.testing.assert_close(gradients[weight][:, 4:], weight * gradients[1.0][:, 4:])
    assert torch.count_nonzero(gradients[1.0][:, 4:]) > 0


def test_the_true_noise_gives_back_x0_and_the_true_posterior():
    process = GaussianProcess()
    generator = torch.Generator().manual_seed(0)
    x0, eps = (
        torch.rand(5, 3, 4, 4, generator=generator).double(),
        torch.randn(5, 3, 4, 4, generator=generator).double(),
    )
    t = torch.tensor([0, 3, 77, 500, 999])
    x_t = process.q_sample(x0, t, eps)
    out = torch.cat([eps, -torch.ones_like(eps)], dim=1)
    mean, _, log_variance, pred_xstart = process.p_mean_variance(out, x_t, t)
    true_mean, true_log_variance = process.q_posterior(x0, x_t, t)
    torch.testing.assert_close(pred_xstart, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean, true_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_variance, true_log_variance.expand_as(log_variance))
    assert process.vb_terms(out, x0, x_t, t)[1:].abs().max() < 1e-9


def test_the_learned_variance_runs_from_the_posterior_variance_to_beta():
    process = GaussianProcess()
    t, x_t = torch.tensor([500]), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    beta, alpha_bar, alpha_bar_prev = (
        process.tables[k][500] for k in ("beta", "alpha_bar", "alpha_bar_prev")
    )
    for v, expected in [(1.0, beta), (-1.0, beta * (1 - alpha_bar_prev) / (1 - alpha_bar))]:
        out = torch.cat([torch.zeros_like(x_t), torch.full_like(x_t, v)], dim=1)
        _, variance, _, _ = process.p_mean_variance(out, x_t, t)
        np.testing.assert_allclose(variance.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("fixed", ["small", "large"])
def test_a_fixed_variance_trains_by_mse_alone(golden, fixed):
    process = GaussianProcess(learn_variance=False, fixed_variance=fixed)
    t, x_t, x0, eps = (golden[f"train.{k}"] for k in ("t", "x_t", "x0", "noise"))
    out = golden_model(golden, x_t, t)[:, :4].requires_grad_()
    losses = process.losses(out, x0, x_t, t, eps)
    torch.testing.assert_close(losses["loss"], golden["train.mse"], rtol=TOLERANCE, atol=0)
    assert torch.isfinite(losses["vb"]).all() and not losses["vb"].requires_grad
    variance = process.p_mean_variance(out, x_t, t)[1][:, 0, 0, 0].detach()
    tables = process.tables
    small = tables["beta"] * (1 - tables["alpha_bar_prev"]) / (1 - tables["alpha_bar"])
    expected = (small if fixed == "small" else tables["beta"])[t.numpy()]
    expected[t.numpy() == 0] = small[1]
    np.testing.assert_allclose(variance.numpy(), expected, rtol=1e-5)


def test_clip_denoised_clamps_x0_alone(golden):
    t, x_t = golden["train.t"], golden["train.x_t"]
    out = golden_model(golden, x_t, t)
    process = GaussianProcess()
    plain, clipped = (
        process.p_mean_variance(out, x_t, t),
        process.p_mean_variance(out, x_t, t, clip_denoised=True),
    )
    assert plain[3].abs().max() > 1
    torch.testing.assert_close(clipped[3], plain[3].clamp(-1, 1))
    torch.testing.assert_close(clipped[2], plain[2])
    torch.testing.assert_close(clipped[0], process.q_posterior(plain[3].clamp(-1, 1), x_t, t)[0])


def test_a_respaced_process_keeps_alpha_bar_and_tells_the_model_the_original_timestep():
    process = GaussianProcess()
    kept = [0, 10, 400, 999]
    respaced = process.respaced(kept)
    np.testing.assert_allclose(respaced.tables["alpha_bar"], process.tables["alpha_bar"][kept], rtol=1e-12)
    assert respaced.model_t(torch.tensor([3, 0, 2])).tolist() == [999, 0, 400]
    twice = respaced.respaced([1, 3])
    assert twice.model_t(torch.tensor([0, 1])).tolist() == [10, 999]
    np.testing.assert_allclose(twice.tables["alpha_bar"], process.tables["alpha_bar"][[10, 999]], rtol=1e-12)


def test_the_discretised_likelihood_sums_to_one_over_the_levels():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, scale in [(0.0, 0.05), (0.98, 0.3), (-1.4, 0.01), (0.1, 0.9)]:
        log_scale = torch.tensor(math.log(scale), dtype=torch.float64)
        log_p = discretised_gaussian_log_likelihood(
            levels, torch.tensor(mean, dtype=torch.float64), log_scale
        )
        assert abs(float(log_p.exp().sum()) - 1) < 1e-8


def test_the_discretised_likelihood_is_near_the_exact_bin_integral():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, scale = 0.1, 0.2
    cdf = torch.distributions.Normal(mean, scale).cdf
    exact = cdf(levels + 1 / 255) - cdf(levels - 1 / 255)
    log_p = discretised_gaussian_log_likelihood(
        levels, torch.tensor(mean).double(), torch.tensor(math.log(scale)).double()
    )
    middle = (exact > 1e-4) & (levels.abs() < 0.999)
    assert middle.sum() > 100
    assert float((log_p.exp() - exact)[middle].abs().max()) < 2e-5


def test_normal_kl_is_the_kl_of_torch_distributions():
    mean1, log1, mean2, log2 = torch.randn(
        4, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean1, (0.5 * log1).exp()),
        torch.distributions.Normal(mean2, (0.5 * log2).exp()),
    )
    torch.testing.assert_close(normal_kl(mean1, log1, mean2, log2), expected)


def test_a_bf16_model_output_gives_float32_losses(golden):
    t, x_t, x0, eps = (golden[f"train.{k}"] for k in ("t", "x_t", "x0", "noise"))
    losses = GaussianProcess().losses(golden_model(golden, x_t, t).bfloat16(), x0, x_t, t, eps)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    torch.testing.assert_close(losses["mse"], golden["train.mse"], rtol=1e-2, atol=0)


def test_an_output_with_the_wrong_channels_is_refused_with_the_numbers(golden):
    with pytest.raises(ValueError, match=r"\(6, 4, 8, 8\).*learn_variance=True needs \(6, 8, 8, 8\)"):
        GaussianProcess().p_mean_variance(golden["train.x_t"], golden["train.x_t"], golden["train.t"])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_timesteps": 1}, "num_timesteps=1"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start=0.5"),
        ({"fixed_variance": "medium"}, "fixed_variance='medium'"),
    ],
)
def test_an_impossible_process_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        GaussianProcess(**settings)


@pytest.mark.parametrize("timesteps", [[], [3, 3], [5, 2], [0, 1000], [-1, 4]])
def test_impossible_respacing_is_refused(timesteps):
    with pytest.raises(ValueError, match="respaced timesteps"):
        GaussianProcess().respaced(timesteps)


def test_the_config_builds_the_default_process():
    process = GaussianProcess(**vars(GaussianConfig()))
    assert (process.num_timesteps, process.learn_variance) == (1000, True)
    np.testing.assert_array_equal(process.tables["beta"], GaussianProcess().tables["beta"])


def test_a_respaced_process_keeps_its_kind_of_variance(golden):
    t, x_t = torch.tensor([0, 1]), golden["train.x_t"][:2]
    respaced = GaussianProcess(learn_variance=False, fixed_variance="large").respaced([0, 500, 999])
    _, variance, _, _ = respaced.p_mean_variance(torch.zeros_like(x_t), x_t, t)
    alpha_bar = GaussianProcess().tables["alpha_bar"]
    np.testing.assert_allclose(variance[1].numpy(), 1 - alpha_bar[500] / alpha_bar[0], rtol=1e-5)

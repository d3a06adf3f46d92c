"""Guidance: what is combined, what runs, and in how many rows."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from drwkv.diffusion.guidance import Guidance, guided

NULL = 10


class CountingModel:
    """Output depends on x, t and y in every channel; remembers the rows of each call."""

    def __init__(self, learn_variance: bool = True) -> None:
        self.rows: list[int] = []
        self.doubling = 2 if learn_variance else 1

    def __call__(self, x, t, y):
        self.rows.append(len(x))
        assert len(x) == len(t) and (y is None or len(y) == len(x))
        label = torch.zeros(len(x)) if y is None else y.float()
        return torch.cat(
            [x * (k + 1) + (t.float() * 0.01 + label**2)[:, None, None, None] for k in range(self.doubling)],
            1,
        )


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def y() -> torch.Tensor:
    return torch.tensor([1, 7, 3])


def two_passes(model, x, t, y):
    return model(x, t, y), model(x, t, torch.full_like(y, NULL))


@pytest.mark.parametrize("channels, guided_count", [(3, 3), (None, 4), (9, 4), (1, 1)])
@pytest.mark.parametrize("learn_variance", [True, False])
def test_guidance_combines_the_first_channels_of_eps_and_leaves_the_rest_conditional(
    x, y, channels, guided_count, learn_variance
):
    model = CountingModel(learn_variance)
    t = torch.full((3,), 500)
    out = guided(model, y, NULL, Guidance(scale=2.5, channels=channels))(x, t)
    assert model.rows == [6]
    cond, uncond = two_passes(model, x, t, y)
    expected = uncond + 2.5 * (cond - uncond)
    torch.testing.assert_close(out[:, :guided_count], expected[:, :guided_count])
    assert torch.equal(out[:, guided_count:], cond[:, guided_count:])
    assert not torch.allclose(out[:, :1], cond[:, :1])


@pytest.mark.parametrize("t, rows", [(99, 3), (100, 6), (400, 6), (700, 6), (701, 3)])
def test_outside_the_interval_only_the_conditional_half_runs(x, y, t, rows):
    model = CountingModel()
    out = guided(model, y, NULL, Guidance(scale=3.0, interval=[100, 700]))(x, torch.full((3,), t))
    assert model.rows == [rows]
    cond, _ = two_passes(model, x, torch.full((3,), t), y)
    assert torch.equal(out, cond) == (rows == 3)


def test_at_scale_1_only_the_conditional_half_runs(x, y):
    model = CountingModel()
    t = torch.full((3,), 500)
    out = guided(model, y, NULL, Guidance(scale=1.0))(x, t)
    assert model.rows == [3]
    assert torch.equal(out, model(x, t, y))


def test_rows_with_different_t_are_guided_each_by_its_own_t(x, y):
    model = CountingModel()
    guidance = Guidance(scale=3.0, interval=[100, 700])
    t = torch.tensor([50, 300, 900])
    out = guided(model, y, NULL, guidance)(x, t)
    assert model.rows == [4]
    for row in range(3):
        one = slice(row, row + 1)
        alone = guided(model, y[one], NULL, guidance)(x[one], t[one])
        torch.testing.assert_close(out[one], alone)


def test_scale_0_is_the_unconditional_model(x, y):
    model = CountingModel()
    t = torch.full((3,), 500)
    out = guided(model, y, NULL, Guidance(scale=0.0, channels=None))(x, t)
    _, uncond = two_passes(model, x, t, y)
    torch.testing.assert_close(out[:, :4], uncond[:, :4])


def test_an_unconditional_model_runs_without_labels_and_refuses_guidance(x):
    model = CountingModel()
    t = torch.full((3,), 500)
    assert torch.equal(guided(model, None, None, Guidance())(x, t), model(x, t, None))
    with pytest.raises(ValueError, match="scale=2.0 without labels"):
        guided(model, None, None, Guidance(scale=2.0))


def test_guidance_needs_a_null_label(y):
    with pytest.raises(ValueError, match="null label"):
        guided(CountingModel(), y, None, Guidance(scale=2.0))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"scale": float("nan")}, "scale=nan"),
        ({"channels": 0}, "channels=0"),
        ({"interval": [700, 100]}, r"interval=\[700, 100\]"),
        ({"interval": [100]}, r"interval=\[100\]"),
    ],
)
def test_impossible_guidance_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Guidance(**settings)


def test_guidance_is_a_structured_config():
    config = OmegaConf.merge(OmegaConf.structured(Guidance), {"channels": None, "interval": [5, 9]})
    assert OmegaConf.to_object(config) == Guidance(channels=None, interval=[5.0, 9.0])

"""Models by name, and the values that their parameters start from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from drwkv.models import create, names, options
from drwkv.models.layers import sincos_positions


def tiny(**overrides: Any) -> Any:
    settings: dict[str, Any] = dict(input_size=8, in_channels=3, patch_size=2, hidden_size=64, depth=5)
    return create("DRWKV", **(settings | overrides))


def test_names_are_the_sizes_of_the_release_and_the_bare_family() -> None:
    assert {f"DRWKV-{size}/{patch}" for size in "SBMLH" for patch in (2, 4, 8)} | {"DRWKV"} <= set(names())
    assert options("DRWKV-H/2") == {"hidden_size": 1024, "depth": 37, "patch_size": 2}


@pytest.mark.parametrize("name", [name for name in names() if "/" in name])
def test_every_sized_name_builds_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model: Any = create(name, input_size=(32, 16), in_channels=4, num_classes=10)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.patch_size == options(name)["patch_size"]
    assert len(model.blocks_in_order()) == model.depth == options(name)["depth"]


def test_overrides_win_over_the_name() -> None:
    with torch.device("meta"):
        model: Any = create("DRWKV-S/2", input_size=8, in_channels=1, depth=3, learn_variance=False)
    assert (model.depth, model.hidden_size, model.out_channels) == (3, 384, 1)


def test_a_models_config_builds_it_again() -> None:
    model = tiny(input_size=(8, 12), num_classes=3, conditioning="adaln", skip="add", hidden_rate=2, depth=4)
    again = create(**model.config)
    assert model.config == again.config
    first, second = model.state_dict(), again.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("DRWKV-S/3", {}, "no model is called 'DRWKV-S/3'; did you mean 'DRWKV-S/"),
        ("drwkv-h/2", {}, "did you mean 'DRWKV-H/2'"),
        ("DRWKV", {"depht": 5}, "has no option depht=5; did you mean 'depth'"),
        ("DRWKV", {"depth": 5}, "DRWKV needs patch_size=, hidden_size="),
        ("DRWKV-S/2", {"input_size": (8, 9)}, "input_size=8x9 must be divisible by patch_size=2"),
        ("DRWKV-S/2", {"input_size": 0}, "input_size=0 must be a whole number of at least 1"),
        ("DRWKV-S/2", {"num_classes": 0}, "num_classes=0 must be"),
        ("DRWKV-S/2", {"num_classes": 10.0}, "num_classes=10.0 must be a whole number"),
        ("DRWKV-S/2", {"depth": -1}, "depth=-1 must be"),
        (
            "DRWKV-S/2",
            {"conditioning": "adaln_zero"},
            "conditioning='adaln_zero'; expected one of adaln-zero",
        ),
        ("DRWKV-S/2", {"skip": "sum"}, "skip='sum'; expected one of concat, add, none"),
        ("DRWKV-S/2", {"drop_path_rate": 1.0}, r"drop_path_rate=1.0 must lie in \[0, 1\)"),
    ],
)
def test_what_makes_no_model_is_refused_in_one_line(name: str, change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = dict(input_size=8, in_channels=1)
    with pytest.raises(ValueError, match=message) as caught:
        create(name, **(settings | change))
    assert "\n" not in str(caught.value)


def test_a_parameter_depends_on_seed_and_name_alone() -> None:
    alone, grown = tiny().state_dict(), tiny(num_classes=7, input_size=16, learn_variance=False).state_dict()
    other_seed = tiny(seed=1).state_dict()
    drawn = "in_blocks.1.ffn.key.weight"
    assert torch.equal(alone[drawn], grown[drawn])
    assert torch.equal(alone["time_embed.mlp.0.weight"], grown["time_embed.mlp.0.weight"])
    assert not torch.equal(alone[drawn], other_seed[drawn])
    assert not torch.equal(alone[drawn], alone["in_blocks.0.ffn.key.weight"])
    assert not torch.equal(alone["mid_block.att.key.weight"], alone["mid_block.att.value.weight"])


def test_one_parameter_can_be_drawn_without_the_others() -> None:
    model = tiny(seed=3)
    with torch.device("meta"):
        skeleton = tiny(seed=3)
    for name, parameter in skeleton.named_parameters():
        value = skeleton.initial_value(3, name, torch.empty(parameter.shape))
        assert torch.equal(value, model.get_parameter(name)), name


def test_creating_a_model_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    tiny()
    assert torch.equal(before, torch.get_rng_state())


def test_initial_values_have_the_releases_distributions() -> None:
    model = tiny(hidden_size=128, num_classes=100)
    drawn_normal = {"time_embed.mlp.0.weight", "time_embed.mlp.2.weight", "label_emb.embedding_table.weight"}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
            assert not value.any(), name
        elif name in drawn_normal:
            assert abs(float(value.std()) - 0.02) < 5e-4 and float(value.abs().max()) > 0.05, name
        elif value.ndim == 1 and "spatial" not in name:
            assert (value == 1).all(), name
        elif value.ndim >= 2 and "spatial" not in name and name != "pos_embed":
            bound = math.sqrt(6 / (value.shape[0] + value[0].numel()))
            assert 0.99 * bound < float(value.abs().max()) <= bound * (1 + 1e-6), name
            assert abs(float(value.mean())) < 5 * bound / math.sqrt(3 * value.numel()), name
            assert abs(float(value.std()) / (bound / math.sqrt(3)) - 1) < 0.05, name


def test_adaln_without_zero_starts_open() -> None:
    weight = tiny(conditioning="adaln").mid_block.adaLN_modulation[1].weight
    assert weight.shape == (4 * 64, 64) and weight.any()


def test_decay_first_and_mix_vectors_start_as_in_rwkv() -> None:
    model = tiny(depth=5, hidden_size=8)
    model.requires_grad_(False)
    first, middle, last = model.in_blocks[0].att, model.mid_block.att, model.out_blocks[1].att
    # Written out by hand from RWKV's rule for block l of 5 and channel i of 8.
    for att, layer in ((first, 0), (middle, 2), (last, 4)):
        for i in range(8):
            up, down = layer / 4, 1 - layer / 5
            assert float(att.spatial_decay[i]) == pytest.approx(
                -5 + 8 * (i / 7) ** (0.7 + 1.3 * up), abs=1e-5
            )
            assert float(att.spatial_first[i]) == pytest.approx(
                math.log(0.3) + (0.0, 0.5, -0.5)[i % 3], abs=1e-6
            )
            assert float(att.spatial_mix_k[0, 0, i]) == pytest.approx((i / 8) ** down, abs=1e-6)
            assert float(att.spatial_mix_v[0, 0, i]) == pytest.approx((i / 8) ** down + 0.3 * up, abs=1e-6)
            assert float(att.spatial_mix_r[0, 0, i]) == pytest.approx((i / 8) ** (down / 2), abs=1e-6)
    assert torch.equal(model.mid_block.ffn.spatial_mix_r, model.mid_block.att.spatial_mix_k)
    assert torch.equal(model.mid_block.ffn.spatial_mix_k, model.mid_block.att.spatial_mix_k)


def test_positions_hold_the_column_then_the_row() -> None:
    positions = sincos_positions(10, (2, 3))
    assert positions.shape == (1, 6, 10) and positions.dtype == torch.float32
    row, column = 1, 2
    expected = [math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)]
    expected += [math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100), 0, 0]
    torch.testing.assert_close(positions[0, row * 3 + column], torch.tensor(expected))
    assert torch.equal(tiny(input_size=(4, 6)).pos_embed.data, sincos_positions(64, (2, 3)))


def test_a_fresh_model_predicts_zero() -> None:
    model = tiny()
    out = model(torch.randn(2, 3, 8, 8), torch.tensor([0.0, 999.0]))
    assert out.shape == (2, 6, 8, 8) and not out.any()
    assert isinstance(model, nn.Module) and not list(model.buffers())

"""The Diffusion-RWKV backbone: its shapes, its options, stochastic depth, and what it refuses.

That its numbers are those of the published architecture is proved in `tests/test_convert.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drwkv.models import create
from drwkv.models.layers import PatchEmbed, resize_positions, unpatchify


def tiny(**overrides: Any) -> Any:
    """A model small enough for a test, with no parameter at zero, so that every path carries a signal."""
    options: dict[str, Any] = dict(
        input_size=8, in_channels=3, patch_size=2, hidden_size=16, depth=5, num_classes=4
    )
    model = create("DRWKV", **(options | overrides))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(model: Any, batch: int = 3, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Any]:
    """x, t and y (None for an unconditional model)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.in_channels, *(size or model.input_size), generator=generator)
    t = torch.rand(batch, generator=generator) * 999
    y = None if model.num_classes is None else torch.arange(batch) % (model.num_classes + 1)
    return x, t, y


def relative_rms(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("skip", ["concat", "add", "none"])
@pytest.mark.parametrize("conditioning", ["adaln-zero", "adaln", "in-context"])
@pytest.mark.parametrize("num_classes", [4, None])
def test_every_parameter_gets_a_gradient_under_every_conditioning_and_skip(
    conditioning: str, skip: str, num_classes: int | None
) -> None:
    model = tiny(conditioning=conditioning, skip=skip, num_classes=num_classes)
    x, t, y = inputs(model, batch=5)
    out = model(x, t, y)
    assert out.shape == (5, 6, 8, 8)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("conditioning", ["adaln-zero", "adaln", "in-context"])
def test_time_and_label_reach_every_pixel(conditioning: str) -> None:
    model = tiny(conditioning=conditioning)
    x, t, y = inputs(model)
    out = model(x, t, y)
    for other in (model(x, t + 300, y), model(x, t, (y + 1) % 5)):
        assert ((out - other).abs() > 1e-7).all()


@pytest.mark.parametrize("skip", ["concat", "add", "none"])
def test_the_first_shallow_block_reaches_the_last_deep_one_only_by_a_skip(skip: str) -> None:
    model = tiny(skip=skip)
    model.out_blocks[-1].register_forward_pre_hook(lambda block, args: (torch.zeros_like(args[0]), *args[1:]))
    x, t, y = inputs(model)
    reaches = not torch.equal(model(x, t, y), model(x + 1, t, y))
    assert reaches == (skip != "none")


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("learn_variance", [True, False])
def test_any_patch_size_gives_an_image_of_the_inputs_size(patch_size: int, learn_variance: bool) -> None:
    model = tiny(patch_size=patch_size, input_size=(8, 16), learn_variance=learn_variance)
    assert model.grid == (8 // patch_size, 16 // patch_size)
    assert model(*inputs(model)).shape == (3, model.out_channels, 8, 16)
    assert model.out_channels == (6 if learn_variance else 3)


def test_patches_are_a_strided_convolution_and_come_back_in_place() -> None:
    embed, x = PatchEmbed(2, 3, 7), torch.randn(2, 3, 4, 6)
    for parameter in embed.parameters():
        nn.init.normal_(parameter)
    by_convolution = nn.functional.conv2d(x, embed.proj.weight, embed.proj.bias, stride=2).flatten(2).mT
    torch.testing.assert_close(embed(x), by_convolution)
    patches = nn.functional.unfold(x, 2, stride=2).mT.unflatten(2, (3, 4)).mT.flatten(2)
    torch.testing.assert_close(unpatchify(patches, (2, 3), 2), x, rtol=0, atol=0)


def test_a_dropped_block_is_identity_for_its_sample_alone() -> None:
    model = tiny()
    x, t, y = inputs(model)
    seen: dict[str, Tensor] = {}
    for name in ("in_blocks.0", "in_blocks.1", "out_blocks.1"):

        def watch(block: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            seen[f"{name}.in"], seen[f"{name}.out"] = args[0], out
            if args[3] is not None:
                seen[f"{name}.skip"] = args[3]

        model.get_submodule(name).register_forward_hook(watch)
    keep = torch.ones(5, 3)
    keep[:, 1] = 0
    model(x, t, y, keep=keep)

    torch.testing.assert_close(seen["in_blocks.1.out"][1], seen["in_blocks.1.in"][1], rtol=0, atol=0)
    assert (seen["in_blocks.1.out"][[0, 2]] != seen["in_blocks.1.in"][[0, 2]]).all()
    # The first block's norm and a deep block's skip connection stay.
    normed = model.in_blocks[0].ln0(seen["in_blocks.0.in"])
    torch.testing.assert_close(seen["in_blocks.0.out"][1], normed[1], rtol=0, atol=0)
    joined = model.out_blocks[1].skip_linear(
        torch.cat([seen["out_blocks.1.in"], seen["out_blocks.1.skip"]], -1)
    )
    torch.testing.assert_close(seen["out_blocks.1.out"][1], joined[1])


@pytest.mark.parametrize("conditioning", ["adaln-zero", "adaln", "in-context"])
def test_keep_scales_both_branches_of_its_block(conditioning: str) -> None:
    model = tiny(conditioning=conditioning)
    x, t, y = inputs(model)
    ones, keep = torch.ones(5, 3), torch.ones(5, 3)
    torch.testing.assert_close(model(x, t, y, keep=ones), model(x, t, y))
    keep[2] = torch.tensor([1.0, 1.25, 0.5])
    with_keep = model(x, t, y, keep=keep)
    for mix in (model.mid_block.att.output, model.mid_block.ffn.value):
        mix.register_forward_hook(lambda mix, args, out: out * torch.tensor([1.0, 1.25, 0.5])[:, None, None])
    torch.testing.assert_close(with_keep, model(x, t, y))


def test_drop_path_rates_rise_linearly_from_zero() -> None:
    assert tiny(drop_path_rate=0.1).drop_path_rates == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])
    assert tiny(drop_path_rate=0.0).drop_path_rates == [0.0] * 5


@pytest.mark.parametrize("conditioning", ["adaln-zero", "in-context"])
def test_a_sample_does_not_depend_on_its_batch(conditioning: str) -> None:
    model = tiny(conditioning=conditioning)
    x, t, y = inputs(model, batch=4)
    together = model(x, t, y)
    x_others, t_others, y_others = x.flip(0) * 50, t.flip(0), y.flip(0)
    x_others[2], t_others[2], y_others[2] = x[2], t[2], y[2]
    torch.testing.assert_close(model(x_others, t_others, y_others)[2], together[2], rtol=0, atol=0)


def test_train_and_eval_mode_give_the_same_numbers() -> None:
    model = tiny(drop_path_rate=0.5)
    torch.testing.assert_close(model.train()(*inputs(model)), model.eval()(*inputs(model)), rtol=0, atol=0)


def test_the_native_size_takes_the_positions_as_they_are_and_another_interpolates_them() -> None:
    positions = torch.randn(1, 12, 8)
    assert resize_positions(positions, (3, 4), (3, 4)) is positions
    ramp = torch.arange(4.0).repeat(3)[None, :, None]
    wider = resize_positions(ramp, (3, 4), (3, 8)).view(3, 8)
    torch.testing.assert_close(wider[0], wider[2])
    torch.testing.assert_close(wider[1, 2:6], torch.arange(2, 6) / 2 - 0.25, atol=0.1, rtol=0)
    assert wider[1].diff().min() > 0


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (16, 6), (2, 2)])
def test_a_model_runs_at_sizes_it_was_not_made_for(size: tuple[int, int]) -> None:
    model = tiny()
    assert model(*inputs(model, size=size)).shape == (3, 6, *size)


def test_bfloat16_autocast_and_bfloat16_weights_stay_close_to_float32() -> None:
    model = tiny()
    x, t, y = inputs(model)
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x, t, y)
        autocast.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert 0 < relative_rms(autocast.float(), exact) < 0.05
    half = model.to(torch.bfloat16)
    out = half(x.bfloat16(), t, y, keep=torch.ones(5, 3))
    assert out.dtype == torch.bfloat16 and relative_rms(out.float(), exact) < 0.05


@pytest.mark.parametrize("conditioning", ["adaln-zero", "in-context"])
def test_the_model_compiles_as_one_graph(conditioning: str) -> None:
    model = tiny(conditioning=conditioning, depth=3)
    x, t, y = inputs(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    keep = torch.full((3, 3), 1.1)
    eager, traced = model(x, t, y, keep=keep), compiled(x, t, y, keep=keep)
    torch.testing.assert_close(traced, eager)
    gradient = torch.autograd.grad(eager.square().sum(), model.pos_embed)[0]
    torch.testing.assert_close(torch.autograd.grad(traced.square().sum(), model.pos_embed)[0], gradient)


def test_an_even_depth_counts_as_the_next_odd_one() -> None:
    even, odd = tiny(depth=4), tiny(depth=5)
    assert even.depth == odd.depth == len(even.blocks_in_order()) == len(even.drop_path_rates) == 5
    torch.testing.assert_close(even(*inputs(even)), odd(*inputs(odd)), rtol=0, atol=0)


def test_blocks_come_in_the_order_in_which_they_run() -> None:
    model = tiny()
    ran: list[nn.Module] = []
    for block in model.blocks_in_order():
        block.register_forward_pre_hook(lambda block, args: ran.append(block))
    model(*inputs(model))
    assert ran == model.blocks_in_order()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3, 3, 8, 7)), "x is 8x7; both must be multiples of patch_size=2"),
        (dict(x=torch.zeros(3, 4, 8, 8)), r"x has shape \(3, 4, 8, 8\); expected \(B, 3, H, W\)"),
        (dict(t=torch.zeros(2)), r"t has shape \(2,\); expected \(3,\)"),
        (dict(t=torch.zeros(3, 1)), r"t has shape \(3, 1\)"),
        (dict(y=None), r"y is missing; use label 4 \(= num_classes\)"),
        (dict(y=torch.tensor([0, 5, 1])), r"y holds labels 0..5; expected 0..4"),
        (dict(y=torch.tensor([0, -1, 1])), r"y holds labels -1..1"),
        (dict(y=torch.zeros(3)), "integer labels"),
        (dict(keep=torch.ones(3, 5)), r"keep has shape \(3, 5\); expected \(5, 3\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_their_numbers(change: dict[str, Any], message: str) -> None:
    model = tiny()
    x, t, y = inputs(model)
    with pytest.raises(ValueError, match=message):
        model(**(dict(x=x, t=t, y=y) | change))


def test_an_unconditional_model_refuses_labels() -> None:
    model = tiny(num_classes=None)
    x, t, _ = inputs(model)
    with pytest.raises(ValueError, match="unconditional model"):
        model(x, t, torch.zeros(3, dtype=torch.int64))

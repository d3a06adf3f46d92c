"""Bi-WKV's `torch` backend against `reference.py`: values, gradients, registration, bad input.

How things are compared says `tests/support/wkv_cases.py`; fresh memory is full of NaN. The triton backend has
`test_wkv_triton.py`. Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from closeness import assert_close, relative_rms
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from wkv_cases import NAMES, assert_safe, assert_safe_with, expected, make_inputs, results

from drwkv.kernels.wkv import bi_wkv, bi_wkv_gated
from drwkv.kernels.wkv.torch import _bi_wkv, _bi_wkv_backward

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")

GOLDEN = Path(__file__).parents[1] / "golden" / "wkv.safetensors"


SIZES = [(T, C) for T in (1, 15, 63, 256, 500, 1024) for C in (1, 8, 384, 1000)] + [(4097, 1000)]
SLOW_SIZES = [pytest.param(4097, C, marks=pytest.mark.proof) for C in (1, 8, 384)]


@pytest.mark.parametrize(("num_tokens", "channels"), [*SIZES, *SLOW_SIZES])
@pytest.mark.parametrize("k_scale", [1.0, 30.0])
def test_output_and_every_gradient_equal_the_equation(num_tokens: int, channels: int, k_scale: float) -> None:
    batch = 2 if num_tokens < 1024 and channels < 384 else 1
    inputs = make_inputs(
        (batch, num_tokens, channels), decay_times_T="positive, zero, negative", k_scale=k_scale
    )
    assert_close(results(inputs), expected(inputs), 1e-5)


@pytest.mark.parametrize("decay_times_T", ["positive", "zero", "negative", "far", "near and far"])
@pytest.mark.parametrize("num_tokens", [2, 33, 63, 300])
def test_decays_of_either_sign_and_any_size_equal_the_equation(decay_times_T: str, num_tokens: int) -> None:
    inputs = make_inputs((2, num_tokens, 16), decay_times_T=decay_times_T)
    assert_close(results(inputs), expected(inputs), 1e-5)


@pytest.mark.parametrize("decay_times_T", ["mixed signs", "near and far"])
def test_float64_inputs_are_computed_in_float64(decay_times_T: str) -> None:
    inputs = make_inputs((2, 300, 9), decay_times_T=decay_times_T, dtype=torch.float64)
    assert_close(results(inputs), expected(inputs), 1e-12)


@pytest.mark.parametrize("decay_times_T", ["positive, zero, negative", "near and far"])
@pytest.mark.parametrize("num_tokens", [1, 15, 256, 1024])
def test_keys_of_ten_thousand_are_safe(decay_times_T: str, num_tokens: int) -> None:
    inputs = make_inputs((2, num_tokens, 8), decay_times_T=decay_times_T, k_scale=1e4)
    assert_safe(inputs, "torch")


@pytest.mark.parametrize("name", ["decay", "first"])
@pytest.mark.parametrize("value", [1e3, -1e3, 1e6, -1e6])
def test_huge_decay_or_first_is_safe(name: str, value: float) -> None:
    assert_safe_with(make_inputs((2, 70, 3)), name, value, "torch")


@pytest.mark.parametrize("num_tokens", [64, 256, 1024])
def test_golden_formula_is_met(num_tokens: int) -> None:
    golden = load_file(GOLDEN)
    names = ("decay", "first", "k", "v")
    decay, first, k, v = (golden[f"T{num_tokens}.{name}"] for name in names)
    k, v = k.reshape(1, num_tokens, -1), v.reshape(1, num_tokens, -1)
    for backend in ("reference", "torch"):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            y = bi_wkv(*(x.to(dtype) for x in (decay, first, k, v)), backend=backend)
            assert relative_rms(y[0], golden[f"T{num_tokens}.formula"]) <= tolerance, (backend, dtype)


@pytest.mark.parametrize("decay_times_T", ["mixed signs", "far"])
def test_gradients_are_those_of_finite_differences(decay_times_T: str) -> None:
    inputs = make_inputs((2, 5, 2), decay_times_T=decay_times_T, dtype=torch.float64)
    assert torch.autograd.gradcheck(bi_wkv, inputs)
    inputs = make_inputs((1, 37, 2), decay_times_T=decay_times_T, dtype=torch.float64)
    assert torch.autograd.gradcheck(bi_wkv, inputs, fast_mode=True)


@pytest.mark.parametrize("decay_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("decay_times_T", ["mixed signs", "near and far"])
def test_bfloat16_keeps_its_dtypes_and_a_float32_state(decay_dtype: torch.dtype, decay_times_T: str) -> None:
    decay, first, k, v = make_inputs((2, 500, 8), decay_times_T=decay_times_T)
    inputs = [x.detach().to(decay_dtype).requires_grad_() for x in (decay, first)]
    inputs += [x.detach().bfloat16().requires_grad_() for x in (k, v)]
    actual = results(inputs)
    assert actual["output"].dtype == torch.bfloat16
    assert [actual[name].dtype for name in NAMES[1:-1]] == [x.dtype for x in inputs]
    assert_close(actual, expected(inputs), 1e-2)


@pytest.mark.parametrize("num_tokens", [1, 63, 1024, pytest.param(4097, marks=pytest.mark.proof)])
@pytest.mark.parametrize("k_scale", [1.0, 30.0])
def test_bfloat16_is_within_its_rounding(num_tokens: int, k_scale: float) -> None:
    inputs = make_inputs((1, num_tokens, 384), decay_times_T="positive, zero, negative", k_scale=k_scale)
    inputs = [x.detach().bfloat16().requires_grad_() for x in inputs]
    assert_close(results(inputs), expected(inputs), 1e-2)


@pytest.mark.parametrize("decay_times_T", ["mixed signs", "near and far"])
def test_the_gated_form_is_the_sigmoid_times_the_other(decay_times_T: str) -> None:
    inputs = make_inputs((2, 40, 8), decay_times_T=decay_times_T, gated=True)
    assert_close(results(inputs), expected(inputs), 1e-5)
    product = torch.sigmoid(inputs[4]) * bi_wkv(*inputs[:4])
    assert torch.equal(bi_wkv_gated(*inputs), product)


def test_autocast_leaves_the_operator_alone() -> None:
    inputs = make_inputs((2, 40, 8))
    outside = results(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results(inputs)
    assert all(torch.equal(inside[name], outside[name]) for name in NAMES[:-1])


def test_strides_of_the_inputs_do_not_matter() -> None:
    decay, first, k, v = make_inputs((2, 100, 6))
    for decay_times_T in (1, 40):
        plain = [decay * decay_times_T, first, k, v]
        plain = [x.detach().requires_grad_() for x in plain]
        strided = [x.detach().repeat_interleave(2)[::2] for x in plain[:2]]
        strided += [
            k.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0),
            v.detach().repeat(1, 1, 3)[..., 6:12],
        ]
        strided = [x.requires_grad_() for x in strided]
        assert not any(x.is_contiguous() for x in strided)
        assert_close(results(strided), results(plain), 1e-6)


def test_two_runs_give_the_same_bits() -> None:
    inputs = make_inputs((3, 200, 40), decay_times_T="near and far")
    first_run, second_run = results(inputs), results(inputs)
    assert all(torch.equal(first_run[name], second_run[name]) for name in NAMES[:-1])


def test_training_after_inference_mode_in_one_thread_is_possible() -> None:
    inputs = make_inputs((2, 70, 3))
    exact = results(inputs)
    with torch.inference_mode():
        bi_wkv(*inputs)
    assert all(torch.equal(x, exact[name]) for name, x in results(inputs).items())


def test_a_sample_does_not_depend_on_its_batch() -> None:
    inputs = make_inputs((5, 1100, 96))
    whole = bi_wkv(*inputs)
    alone = [bi_wkv(*inputs[:2], *(x[b : b + 1] for x in inputs[2:])) for b in range(5)]
    assert relative_rms(torch.cat(alone), whole) <= 1e-7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("decay_times_T", ["mixed signs", "far"])
def test_a_key_that_is_not_finite_poisons_its_batch_and_channel_alone(bad: float, decay_times_T: str) -> None:
    decay, first, k, v = (x.detach() for x in make_inputs((2, 70, 3), decay_times_T=decay_times_T))
    clean = bi_wkv(decay, first, k, v)
    k[1, 4, 2] = bad
    y = bi_wkv(decay, first, k, v)
    assert y[1, :, 2].isnan().all()
    y[1, :, 2] = clean[1, :, 2]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("decay_times_T", ["mixed signs", "far"])
def test_a_key_of_minus_infinity_weighs_nothing(decay_times_T: str) -> None:
    inputs = make_inputs((2, 70, 3), decay_times_T=decay_times_T)
    with torch.no_grad():
        inputs[2][:, 5] = float("-inf")
    assert_close(results(inputs), expected(inputs), 1e-5)


@pytest.mark.parametrize("decay_times_T", ["mixed signs", "near and far"])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(decay_times_T: str) -> None:
    actual = results(make_inputs((0, 70, 4), decay_times_T=decay_times_T))
    assert actual["output"].shape == (0, 70, 4)
    assert not actual["grad decay"].any() and not actual["grad first"].any()


@pytest.mark.parametrize("decay_times_T", ["mixed signs", "near and far"])
def test_the_operator_is_registered_rightly(decay_times_T: str) -> None:
    inputs = make_inputs((2, 20, 5), decay_times_T=decay_times_T)
    torch.library.opcheck(_bi_wkv, inputs)
    bare = [x.detach() for x in inputs]
    torch.library.opcheck(_bi_wkv_backward, (bare[3], *bare))


def gated(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(v) * bi_wkv(decay, first, 2 * k, v)


def gradients(function: object, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs).square().sum(), inputs)  # type: ignore[operator]


def test_compile_sees_one_node_and_changes_nothing() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example_inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    inputs = make_inputs((2, 33, 8))
    torch.compile(gated, fullgraph=True, backend=keep)(*inputs)
    calls = [str(node.target) for node in graphs[0].graph.nodes if "bi_wkv" in str(node.target)]
    assert len(graphs) == 1 and len(calls) == 1

    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    for actual, exact in zip(gradients(compiled, inputs), gradients(gated, inputs), strict=True):
        assert relative_rms(actual, exact) <= 1e-6


def test_checkpointing_gives_the_same_gradients_and_can_keep_the_output() -> None:
    inputs = make_inputs((2, 33, 8))
    exact = gradients(gated, inputs)

    def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        is_ours = op is torch.ops.drwkv.bi_wkv.default
        ran.append(is_ours)
        return CheckpointPolicy.MUST_SAVE if is_ours else CheckpointPolicy.PREFER_RECOMPUTE

    ran: list[bool] = []
    selective = partial(create_selective_checkpoint_contexts, policy)
    for extra in ({}, {"context_fn": selective}):
        wrapped = partial(checkpoint, gated, use_reentrant=False, **extra)
        assert all(map(torch.equal, gradients(wrapped, inputs), exact))
    assert any(ran)


def test_flops_are_counted_and_linear_in_tokens() -> None:
    def count(num_tokens: int) -> int:
        with FlopCounterMode(display=False) as counter:
            bi_wkv(*make_inputs((2, num_tokens, 8))).sum().backward()
        return counter.get_total_flops()

    assert 0 < count(200) == 2 * count(100)


@pytest.mark.parametrize("decay_times_T", ["mixed signs", "far"])
def test_memory_is_linear_in_tokens(decay_times_T: str) -> None:
    # The equation itself would need 65,536^2 * 4 * 4 bytes = 69 GB here.
    saved_bytes: list[int] = []

    def note(x: Tensor) -> Tensor:
        saved_bytes.append(x.numel() * x.element_size())
        return x

    inputs = make_inputs((1, 65_536, 4), decay_times_T=decay_times_T)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        y = bi_wkv(*inputs)
    assert sum(saved_bytes) == 4 * sum(x.numel() for x in inputs)
    assert all(x.isfinite().all() for x in torch.autograd.grad(y.sum(), inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 6, 3)}, "one shape .B, T, C.; got k .2, 6, 3., v .2, 5, 3."),
        ({"k": torch.zeros(5, 3), "v": torch.zeros(5, 3)}, "got k .5, 3., v .5, 3."),
        ({"k": torch.zeros(2, 0, 3), "v": torch.zeros(2, 0, 3)}, "at least one token .* got k .2, 0, 3."),
        ({"k": torch.zeros(2, 5, 0), "v": torch.zeros(2, 5, 0)}, "at least one .* channel; got k .2, 5, 0."),
        ({"decay": torch.zeros(4)}, "decay must be .C,. = .3,. to fit k .2, 5, 3.; got .4,."),
        ({"first": torch.zeros(1, 3)}, "first must be .* got .1, 3."),
        ({"v": torch.zeros(2, 5, 3, dtype=torch.int64)}, "v must be floating point .* got torch.int64"),
        (
            {"k": torch.zeros(2, 5, 3, dtype=torch.float8_e5m2)},
            "k must be floating point .* got torch.float8_e5m2",
        ),
        ({"first": torch.zeros(3, device="meta")}, "first is on meta but k is on cpu"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; known are 'reference', 'torch', 'triton'"),
    ],
)
def test_bad_arguments_are_named_with_their_numbers(change: dict[str, Tensor | str], message: str) -> None:
    arguments = {"decay": torch.zeros(3), "first": torch.zeros(3), "k": torch.zeros(2, 5, 3)}
    arguments |= {"v": torch.zeros(2, 5, 3), **change}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=message):
        bi_wkv(**arguments)  # type: ignore[arg-type]

"""Bi-WKV's `triton` backend against `reference.py`: values, gradients, registration, bad input.

Without a GPU the kernels run in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1, set by the conftest); that
they compile for real chips without spills is proved in `test_resources.py`. With one, these same tests run on it,
and so do those marked `needs("gpu")`, which are too large for the interpreter. How things are compared says
`tests/support/wkv_cases.py`; fresh memory is full of NaN.
Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close, relative_rms
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from wkv_cases import NAMES, apply, assert_safe, assert_safe_with, expected

from drwkv.kernels.wkv import bi_wkv, bi_wkv_gated

pytest.importorskip("triton")

from wkv_cases import make_inputs as make_cpu_inputs
from wkv_cases import results as results_of

from drwkv.kernels.wkv import triton as backend

pytestmark = [
    pytest.mark.usefixtures("fresh_memory_is_nan"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # NumPy's, of infinities
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_NAMES = tuple(name for name in NAMES if name != "grad decay")  # which far channels have to fewer digits
GOLDEN = Path(__file__).parents[1] / "golden" / "wkv.safetensors"
make_inputs = partial(make_cpu_inputs, device=DEVICE)
results = partial(results_of, backend="triton")


@pytest.fixture(params=["whole", "split"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether one program takes all tiles of a sequence, as in a large batch, or each tile has its own."""
    monkeypatch.setattr(backend, "PROGRAMS_TO_FILL", 0 if request.param == "whole" else 1 << 30)
    return str(request.param)


@pytest.mark.parametrize("num_tokens", [1, 15, 63, 256])
@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("k_scale", [1.0, 30.0])
@pytest.mark.parametrize("gated", [False, True])
def test_output_and_every_gradient_equal_the_equation(
    num_tokens: int, channels: int, k_scale: float, gated: bool
) -> None:
    inputs = make_inputs(
        (2, num_tokens, channels), decay_times_T="positive, zero, negative", k_scale=k_scale, gated=gated
    )
    assert_close(results(inputs), expected(inputs), 1e-5)


@pytest.mark.needs("gpu")
@pytest.mark.parametrize("num_tokens", [1, 15, 63, 256, 500, 1024, 4097])
def test_large_sizes_equal_the_equation(num_tokens: int) -> None:
    for channels, k_scale in itertools.product((1, 8, 384, 1000), (1.0, 30.0)):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            shape, decays = (2, num_tokens, channels), "positive, zero, negative"
            inputs = make_inputs(shape, decay_times_T=decays, k_scale=k_scale, gated=True, dtype=dtype)
            assert_close(results(inputs), expected(inputs), tolerance)


@pytest.mark.parametrize("decay_times_T", ["positive", "negative"])
@pytest.mark.parametrize("num_tokens", [300, 384])
def test_tiles_of_one_sequence_meet(cut: str, decay_times_T: str, num_tokens: int) -> None:
    inputs = make_inputs((1, num_tokens, 17), decay_times_T=decay_times_T, gated=True)
    assert_close(results(inputs), expected(inputs), 1e-5)


@pytest.mark.parametrize("config", dict.fromkeys((*backend.FORWARD, *backend.BACKWARD, *backend.ODD)))
def test_every_launch_configuration_computes_the_same(
    cut: str, config: backend.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(backend, name, (config,))
    inputs = make_inputs((1, 2 * config.tile, 32), gated=True)  # whole tiles
    assert_close(results(inputs), expected(inputs), 1e-5)


@pytest.mark.parametrize("decay_times_T", ["positive, zero, negative", "near and far"])
def test_whole_tiles_of_short_sequences_equal_the_equation(decay_times_T: str) -> None:
    inputs = make_inputs((1, backend.SHORT, 32), decay_times_T=decay_times_T, gated=True)
    actual, exact = results(inputs), expected(inputs)
    assert_close(actual, exact, 1e-5, MOST_NAMES)
    assert_close(actual, exact, 2e-4)


@pytest.mark.parametrize("decay_times_T", ["positive", "negative"])
def test_tiles_are_exchanged_a_few_at_a_time(
    cut: str, decay_times_T: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "WHOLE_ROWS", 2)
    monkeypatch.setattr(backend, "EXCHANGE", backend.EXCHANGE | {"ROWS": 2})
    inputs = make_inputs((1, 600, 3), decay_times_T=decay_times_T)
    assert_close(results(inputs), expected(inputs), 1e-5)


@pytest.mark.parametrize("num_tokens", [33, 129])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_decays_of_one_maximum_are_right(num_tokens: int, sign: int) -> None:
    decay, first, k, v = (x.detach() for x in make_inputs((1, num_tokens, 3)))
    decay = torch.full_like(decay, sign * 24.9 / max(num_tokens, backend.ODD[0].tile))
    inputs = [x.requires_grad_() for x in (decay, 0 * first, k, v)]
    actual, exact = results(inputs), expected(inputs)
    assert_close(actual, exact, 1e-5)


@pytest.mark.parametrize("num_tokens", [2, 15, 40])
@pytest.mark.parametrize("decay_times_T", ["far", "near and far"])
def test_decays_of_any_size_equal_the_equation(decay_times_T: str, num_tokens: int) -> None:
    inputs = make_inputs((1, num_tokens, 9), decay_times_T=decay_times_T, gated=True)
    actual, exact = results(inputs), expected(inputs)
    assert_close(actual, exact, 1e-5, MOST_NAMES)
    assert_close(actual, exact, 2e-4)


def test_near_and_far_channels_meet_in_one_block_of_a_split_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "PROGRAMS_TO_FILL", 1 << 30)
    inputs = make_inputs((1, 150, 5), decay_times_T="near and far")
    assert_close(results(inputs), expected(inputs), 1e-5)


@pytest.mark.parametrize("decay_times_T", ["positive, zero, negative", "near and far"])
@pytest.mark.parametrize("num_tokens", [1, 15, 63])
def test_keys_of_ten_thousand_are_safe(decay_times_T: str, num_tokens: int) -> None:
    inputs = make_inputs((1, num_tokens, 6), decay_times_T=decay_times_T, k_scale=1e4)
    assert_safe(inputs, "triton")


@pytest.mark.parametrize("name", ["decay", "first"])
@pytest.mark.parametrize("value", [1e3, -1e3, 1e6, -1e6])
def test_huge_decay_or_first_is_safe(name: str, value: float) -> None:
    assert_safe_with(make_inputs((1, 20, 3)), name, value, "triton")


@pytest.mark.parametrize("num_tokens", [64, 256])
def test_golden_formula_is_met(num_tokens: int) -> None:
    golden = load_file(GOLDEN)
    decay, first, k, v = (golden[f"T{num_tokens}.{name}"].float() for name in ("decay", "first", "k", "v"))
    k, v = k.reshape(1, num_tokens, -1), v.reshape(1, num_tokens, -1)
    y = bi_wkv(*(x.to(DEVICE) for x in (decay, first, k, v)), backend="triton")
    assert relative_rms(y[0].cpu(), golden[f"T{num_tokens}.formula"]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay_times_T", ["mixed signs", "near and far"])
def test_half_precision_keeps_its_dtypes_and_a_float32_state(dtype: torch.dtype, decay_times_T: str) -> None:
    inputs = make_inputs((1, 40, 8), decay_times_T=decay_times_T, gated=True)
    inputs = [*inputs[:2], *(x.detach().to(dtype).requires_grad_() for x in inputs[2:])]
    actual = results(inputs)
    assert actual["output"].dtype == dtype
    assert [actual[name].dtype for name in NAMES[1:]] == [x.dtype for x in inputs]
    assert_close(actual, expected(inputs), 1e-2)


@pytest.mark.parametrize("decay_times_T", ["mixed signs", "near and far"])
def test_strides_of_the_inputs_do_not_matter(decay_times_T: str) -> None:
    plain = make_inputs((2, 18, 6), decay_times_T=decay_times_T, gated=True)
    decay, first, k, v, r = (x.detach() for x in plain)
    strided = [x.repeat_interleave(2)[::2] for x in (decay, first)]
    strided += [k.permute(2, 0, 1).contiguous().permute(1, 2, 0), v.repeat(1, 1, 3)[..., 6:12]]
    strided += [r.repeat_interleave(3, dim=1)[:, ::3]]
    strided = [x.requires_grad_() for x in strided]
    assert not any(x.is_contiguous() for x in strided)
    exact, actual = results(plain), results(strided)
    assert all(torch.equal(actual[name], exact[name]) for name in NAMES)

    y = apply(plain, "triton")
    expanded = torch.autograd.grad(y.sum(), plain)
    ones = torch.autograd.grad(y := apply(plain, "triton"), plain, torch.ones_like(y))
    assert all(map(torch.equal, expanded, ones))


def test_steps_of_more_than_two_to_the_31_elements_are_right() -> None:
    # Five tokens, 2^29 elements apart, each in a page of its own of a file that takes no room.
    far, shape = 1 << 29, (1, 5, 4)
    generator = torch.Generator().manual_seed(0)
    inputs = make_inputs(shape)
    for i in (2, 3):
        wide = _sparse(4 * far + 4)
        with torch.no_grad():
            strided = wide.as_strided(shape, (0, far, 1))
            strided.copy_(torch.randn(shape, generator=generator))
            inputs[i] = strided.requires_grad_()
    close = [x.detach().contiguous().requires_grad_() for x in inputs]
    actual, exact = results(inputs), results(close)
    assert all(torch.equal(actual[name], exact[name]) for name in NAMES[:-1])


def _sparse(numel: int) -> Tensor:
    return torch.empty(numel, dtype=torch.bfloat16, device="cuda") if DEVICE == "cuda" else _mapped(numel)


def _mapped(numel: int) -> Tensor:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(2 * numel)
        return torch.from_file(file.name, shared=True, size=numel, dtype=torch.bfloat16)


def test_two_runs_give_the_same_bits(cut: str) -> None:
    inputs = make_inputs((1, 150, 17), gated=True)
    first_run, second_run = results(inputs), results(inputs)
    assert all(torch.equal(first_run[name], second_run[name]) for name in NAMES)


def test_a_sample_does_not_depend_on_the_others_of_its_batch() -> None:
    inputs = [x.detach() for x in make_inputs((3, 40, 9))]
    whole = bi_wkv(*inputs, backend="triton")
    inputs[2][0], inputs[3][2] = 7.0, -3.0
    assert torch.equal(bi_wkv(*inputs, backend="triton")[1], whole[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("decay_times_T", ["mixed signs", "far"])
def test_a_key_that_is_not_finite_poisons_its_batch_and_channel_alone(
    cut: str, bad: float, decay_times_T: str
) -> None:
    inputs = [x.detach() for x in make_inputs((2, 140 if decay_times_T != "far" else 20, 3))]
    if decay_times_T == "far":
        inputs[0] += 9.0
    clean = bi_wkv(*inputs, backend="triton")
    inputs[2][1, 4, 2] = bad
    y = bi_wkv(*inputs, backend="triton")
    assert y[1, :, 2].isnan().all()
    y[1, :, 2] = clean[1, :, 2]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("decay_times_T", ["mixed signs", "far"])
def test_a_key_of_minus_infinity_weighs_nothing(decay_times_T: str) -> None:
    inputs = make_inputs((2, 35, 3), decay_times_T=decay_times_T)
    with torch.no_grad():
        inputs[2][:, 5] = float("-inf")
        inputs[2][:, 32:] = float("-inf")
    actual, exact = results(inputs), expected(inputs)
    assert_close(actual, exact, 1e-5, MOST_NAMES)
    assert_close(actual, exact, 2e-4)


def test_a_sequence_whose_first_tile_weighs_nothing_is_right(cut: str) -> None:
    inputs = make_inputs((1, 300, 3))
    with torch.no_grad():
        inputs[2][:, :256] = float("-inf")
    assert_close(results(inputs), expected(inputs), 1e-5)


def test_an_empty_batch_gives_an_empty_output_and_zero_gradients() -> None:
    actual = results(make_inputs((0, 70, 4), gated=True))
    assert actual["output"].shape == (0, 70, 4)
    assert not actual["grad decay"].any() and not actual["grad first"].any()


@pytest.mark.parametrize("gated", [False, True])
def test_the_operators_are_registered_rightly(gated: bool) -> None:
    inputs = make_inputs((1, 6, 3), gated=gated)
    forward, backward = (
        (backend._bi_wkv_gated, backend._bi_wkv_gated_backward)
        if gated
        else (backend._bi_wkv, backend._bi_wkv_backward)
    )
    torch.library.opcheck(forward, inputs)
    bare = [x.detach() for x in inputs]
    y, centre = forward(*bare)
    torch.library.opcheck(backward, (torch.ones_like(y), centre, *bare))


def loss(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (2 * bi_wkv_gated(decay, first, k, torch.tanh(v), k, backend="triton")).square().sum()


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs), inputs)


def test_compile_sees_one_graph_and_changes_nothing() -> None:
    inputs = make_inputs((2, 33, 8))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, gradients(compiled, inputs), gradients(loss, inputs)))


def test_checkpointing_gives_the_same_gradients() -> None:
    inputs = make_inputs((2, 33, 8))
    wrapped = partial(checkpoint, loss, use_reentrant=False)
    assert all(map(torch.equal, gradients(wrapped, inputs), gradients(loss, inputs)))


def test_autocast_leaves_the_operator_alone() -> None:
    inputs = make_inputs((2, 20, 8), gated=True)
    outside = results(inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = results(inputs)
    assert all(torch.equal(inside[name], outside[name]) for name in NAMES)


@pytest.mark.needs("gpu")
def test_a_cuda_graph_and_another_stream_give_the_same_bits() -> None:
    inputs = [x.detach() for x in make_inputs((2, 300, 40), gated=True)]
    exact = bi_wkv_gated(*inputs, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = bi_wkv_gated(*inputs, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(beside, exact)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bi_wkv_gated(*inputs, backend="triton")
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, exact)


def test_flops_are_counted_and_linear_in_tokens() -> None:
    def count(num_tokens: int, gated: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            apply(make_inputs((1, num_tokens, 8), gated=gated), "triton").sum().backward()
        return int(counter.get_total_flops())

    assert 0 < count(40, False) == 2 * count(20, False) < count(40, True)


def test_only_the_inputs_and_one_row_a_sample_are_saved() -> None:
    saved: list[Tensor] = []
    inputs = make_inputs((2, 40, 8), gated=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        apply(inputs, "triton")
    assert sum(x.numel() for x in saved) == sum(x.numel() for x in inputs) + 2 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "bi_wkv: .*triton.*float64"),
        ({"tokens": (1 << 30) + 1}, "up to 1073741824 tokens and channels; got k .1, 1073741825, 1."),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(change: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 1, 1, dtype=change.get("dtype", torch.float32), device=DEVICE)
    x = x.expand(1, change.get("tokens", 3), 1)
    with pytest.raises(ValueError, match=message):
        bi_wkv(x[0, 0], x[0, 0], x, x, backend="triton")

"""shift_mix: both backends against `reference.py`, the reference against loops; registration, bad input.

Everything is compared in float64 by relative root mean square, tensor by tensor, with all fresh memory full of
NaN. Without a GPU the Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1, set by the conftest); that
they compile without spills is proved in `test_resources.py`, and for odd arguments here.
Shapes: B batch, N = K + h w tokens, D channels, M mixes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from closeness import assert_close, relative_rms
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from drwkv.kernels.shift_mix import shift_mix
from drwkv.kernels.shift_mix import torch as by_torch
from drwkv.kernels.shift_mix import triton as by_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")
OPERATORS = {
    "torch": (by_torch._shift_mix, by_torch._shift_mix_backward),
    "triton": (by_triton._shift_mix, by_triton._shift_mix_backward),
}
Grid = tuple[int, int]


pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


def make_inputs(
    grid: Grid,
    D: int,
    *,
    K: int = 0,
    M: int = 3,
    B: int = 2,
    dtype: torch.dtype = torch.float32,
    mixes_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x and mixes with gradients asked for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, K + grid[0] * grid[1], D, generator=generator)
    mixes = torch.rand(M, D, generator=generator)
    x, mixes = x.to(DEVICE, dtype), mixes.to(DEVICE, mixes_dtype or dtype)
    return x.requires_grad_(), mixes.requires_grad_()


def results(
    x: Tensor,
    mixes: Tensor,
    grid: Grid,
    backend: str,
    *,
    out_dtype: torch.dtype | None = None,
    layout: Callable[[Tensor], Tensor] = lambda g: g,
) -> dict[str, Tensor]:
    """The outputs and every gradient, for fixed cotangents of the outputs' dtype that `layout` may stride."""
    K = x.shape[1] - grid[0] * grid[1]
    outs = shift_mix(x, mixes, grid, num_tokens=K, out_dtype=out_dtype, backend=backend)
    generator = torch.Generator().manual_seed(1)
    grads = [layout(torch.randn(x.shape, generator=generator).to(out)) for out in outs]
    gx, gmixes = torch.autograd.grad(outs, (x, mixes), grads)
    named = {f"output {m}": out.detach() for m, out in enumerate(outs)}
    return {**named, "grad x": gx, "grad mixes": gmixes}


def expected(x: Tensor, mixes: Tensor, grid: Grid) -> dict[str, Tensor]:
    x, mixes = (a.detach().double().requires_grad_() for a in (x, mixes))
    return results(x, mixes, grid, "reference")


def shift_mix_by_loops(x: Tensor, mixes: Tensor, grid: Grid) -> list[Tensor]:
    """The definition, element by element."""
    (h, w), (B, N, _), q = grid, x.shape, x.shape[2] // 4
    K = N - h * w
    outs = [x.clone() for _ in mixes]
    for b in range(B):
        for s in range(h * w):
            for d in range(4 * q):
                i, j = divmod(s, w)
                i, j = ((i, j - 1), (i, j + 1), (i - 1, j), (i + 1, j))[d // q]
                is_inside = 0 <= i < h and 0 <= j < w
                xx = x[b, K + i * w + j, d] if is_inside else 0.0
                for m, out in enumerate(outs):
                    out[b, K + s, d] = x[b, K + s, d] * mixes[m, d] + xx * (1 - mixes[m, d])
    return outs


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("grid", "D", "K"), [((3, 4), 8, 0), ((4, 3), 11, 2), ((1, 3), 4, 1), ((2, 1), 3, 0)]
)
def test_every_backend_equals_the_definition_by_loops(backend: str, grid: Grid, D: int, K: int) -> None:
    x, mixes = (a.detach() for a in make_inputs(grid, D, K=K, M=2))
    outs = shift_mix(x, mixes, grid, num_tokens=K, backend=backend)
    for out, exact in zip(outs, shift_mix_by_loops(x.cpu(), mixes.cpu(), grid), strict=True):
        assert relative_rms(out.cpu(), exact) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [1, 3, 8, 10, 130])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 3), (16, 16), (7, 9)])
def test_outputs_and_every_gradient_equal_the_equation(backend: str, grid: Grid, D: int) -> None:
    K = D % 3
    x, mixes = make_inputs(grid, D, K=K)
    assert_close(results(x, mixes, grid, backend), expected(x, mixes, grid), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("K", [0, 1, 2])
@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_any_number_of_mixes_and_conditioning_tokens_equals_the_equation(
    backend: str, M: int, K: int
) -> None:
    x, mixes = make_inputs((5, 3), 10, K=K, M=M, B=3)
    actual = results(x, mixes, (5, 3), backend)
    assert_close(actual, expected(x, mixes, (5, 3)), 1e-5)
    assert all(torch.equal(actual[f"output {m}"][:, :K], x[:, :K]) for m in range(M))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixes_dtype", [None, torch.float32])
def test_half_precision_keeps_its_dtypes(
    backend: str, dtype: torch.dtype, mixes_dtype: torch.dtype | None
) -> None:
    x, mixes = make_inputs((7, 9), 24, K=1, dtype=dtype, mixes_dtype=mixes_dtype)
    actual = results(x, mixes, (7, 9), backend)
    assert_close(actual, expected(x, mixes, (7, 9)), 1e-2)
    assert actual["output 0"].dtype == actual["grad x"].dtype == dtype
    assert actual["grad mixes"].dtype == mixes.dtype


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_outputs_come_in_the_dtype_asked_for_rounded_once(backend: str) -> None:
    x, mixes = make_inputs((4, 4), 12)
    wide = results(x, mixes, (4, 4), backend)
    # Not bfloat16: Triton's interpreter truncates where the chip rounds.
    actual = results(x, mixes, (4, 4), backend, out_dtype=torch.float16)
    assert all(torch.equal(actual[f"output {m}"], wide[f"output {m}"].half()) for m in range(3))
    assert_close(actual, expected(x, mixes, (4, 4)), 1e-2)
    assert actual["grad x"].dtype == torch.float32
    assert results(x, mixes, (4, 4), backend, out_dtype=torch.bfloat16)["output 0"].dtype == torch.bfloat16


@pytest.mark.parametrize("names", [("x",), ("mixes",), ("x", "mixes")])
def test_float64_is_computed_in_float64(names: tuple[str, ...]) -> None:
    inputs = dict(zip(("x", "mixes"), make_inputs((3, 5), 9, K=1), strict=True))
    inputs |= {name: inputs[name].detach().double().requires_grad_() for name in names}
    actual = results(inputs["x"], inputs["mixes"], (3, 5), "torch", out_dtype=torch.float64)
    exact = expected(inputs["x"], inputs["mixes"], (3, 5))
    assert_close(actual, exact, 1e-7)
    assert relative_rms(actual["output 0"], exact["output 0"]) <= 1e-14


def test_gradients_are_those_of_finite_differences() -> None:
    for K, D in ((0, 5), (2, 8)):
        inputs = make_inputs((2, 3), D, K=K, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            partial(shift_mix, grid=(2, 3), num_tokens=K, backend="torch"), inputs
        )


def every_second(g: Tensor) -> Tensor:
    return torch.repeat_interleave(g, 2, dim=2)[..., ::2]


def transposed(g: Tensor) -> Tensor:
    return g.transpose(0, 2).contiguous().transpose(0, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [every_second, transposed])
def test_strides_do_not_matter(backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    x, mixes = make_inputs((5, 3), 10, K=1)
    strided_x, strided_mixes = layout(x.detach()), mixes.detach().T.contiguous().T
    assert not strided_x.is_contiguous() and not strided_mixes.is_contiguous()
    actual = results(
        strided_x.requires_grad_(), strided_mixes.requires_grad_(), (5, 3), backend, layout=layout
    )
    assert_close(actual, expected(x, mixes, (5, 3)), 1e-5)
    assert all(tensor.is_contiguous() for tensor in actual.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs_and_gradients_of_unlike_strides_are_read_rightly(backend: str) -> None:
    grid, token = (4, 4), torch.randn(2, 1, 12, device=DEVICE)
    mix = torch.rand(1, 12, device=DEVICE)
    x, mixes = token.expand(2, 16, 12), mix.expand(3, 12)
    exact = [a.contiguous() for a in shift_mix(x, mixes, grid, backend="reference")]
    assert_close(
        {str(m): a for m, a in enumerate(shift_mix(x, mixes, grid, backend=backend))},
        {str(m): a for m, a in enumerate(exact)},
        1e-5,
    )
    grads = [torch.ones((), device=DEVICE).expand(2, 16, 12), token.expand(2, 16, 12), x.contiguous()]
    backward = OPERATORS[backend][1]
    for actual, plain in zip(
        backward(grads, x, mixes, *grid),
        backward([g.contiguous() for g in grads], x.contiguous(), mixes.contiguous(), *grid),
        strict=True,
    ):
        assert relative_rms(actual, plain) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(1, 4), (4, 1)])
def test_offsets_past_two_to_the_31_are_right(backend: str, grid: Grid) -> None:
    # Four tokens, 0.8e9 elements apart: the last is 2.4e9 away. Pages that nobody touches take no memory.
    step, D = 800_000_000, 8
    torch.use_deterministic_algorithms(False)  # which would fill them
    try:
        memory = torch.empty(3 * step + D, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.fail("no 4.8 GB of address space")
    far = memory.as_strided((1, 4, D), (3 * step, step, 1))
    near = torch.randn(1, 4, D, device=DEVICE).bfloat16()
    far.copy_(near)
    mixes = torch.rand(3, D, device=DEVICE)
    forward, backward = OPERATORS[backend]
    exact = forward(near, mixes, *grid, torch.bfloat16)
    assert all(map(torch.equal, forward(far, mixes, *grid, torch.bfloat16), exact))
    exact = backward([near] * 3, near, mixes, *grid)
    assert all(map(torch.equal, backward([far] * 3, far, mixes, *grid), exact))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(backend: str) -> None:
    x, mixes = make_inputs((3, 2), 8, B=0)
    actual = results(x, mixes, (3, 2), backend)
    assert actual["output 0"].shape == actual["grad x"].shape == (0, 6, 8)
    assert torch.equal(actual["grad mixes"], torch.zeros_like(mixes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend: str) -> None:
    x, mixes = make_inputs((9, 7), 72, B=3)
    first_run, second_run = (results(x, mixes, (9, 7), backend) for _ in range(2))
    assert all(torch.equal(first_run[name], second_run[name]) for name in first_run)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_blocks_add_up_to_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_torch, "BLOCK_ELEMENTS", 500)  # two samples
    monkeypatch.setattr(by_triton, "ENOUGH_PROGRAMS", 1)  # loops of the greatest length, the last cut short
    x, mixes = make_inputs((4, 5), 12, B=11)
    assert_close(results(x, mixes, (4, 5), backend), expected(x, mixes, (4, 5)), 1e-5)


@pytest.mark.parametrize("config", sorted({*by_triton.FORWARD, *by_triton.BACKWARD}, key=str), ids=str)
def test_every_launch_configuration_computes_the_same(
    config: by_triton.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_triton, "FORWARD", (config,))
    monkeypatch.setattr(by_triton, "BACKWARD", (config,))
    x, mixes = make_inputs((7, 9), 136, K=1)
    assert_close(results(x, mixes, (7, 9), "triton"), expected(x, mixes, (7, 9)), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_that_nobody_uses_adds_nothing(backend: str) -> None:
    x, mixes = make_inputs((3, 4), 8)
    used = shift_mix(x, mixes, (3, 4), backend=backend)[1]
    gx, gmixes = torch.autograd.grad(used.square().sum(), (x, mixes))
    used = shift_mix(x, mixes, (3, 4), backend="reference")[1]
    exact_gx, exact_gmixes = torch.autograd.grad(used.square().sum(), (x, mixes))
    assert relative_rms(gx, exact_gx) <= 1e-6 and relative_rms(gmixes, exact_gmixes) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_operator_alone(backend: str, dtype: torch.dtype) -> None:
    x, mixes = make_inputs((4, 4), 12, dtype=dtype, mixes_dtype=torch.float32)
    outside = results(x, mixes, (4, 4), backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = results(x, mixes, (4, 4), backend)
    assert all(torch.equal(inside[name], outside[name]) for name in outside)
    assert inside["output 0"].dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_is_registered_rightly(backend: str) -> None:
    x, mixes = make_inputs((3, 4), 10, K=1)
    forward, backward = OPERATORS[backend]
    torch.library.opcheck(forward, (x, mixes, 3, 4, torch.float32))
    bare = x.detach()
    torch.library.opcheck(backward, ([bare, bare + 1, bare - 1], bare, mixes.detach(), 3, 4))


def mixed(x: Tensor, mixes: Tensor, backend: str) -> Tensor:
    r, k, v = shift_mix(2 * x, mixes, (4, 4), num_tokens=1, backend=backend)
    return torch.sigmoid(r) * k + v


def gradients(function: Callable[..., Tensor], x: Tensor, mixes: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(x, mixes).square().sum(), (x, mixes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_sees_one_node_and_changes_nothing(backend: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example_inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x, mixes = make_inputs((4, 4), 12, K=1)
    function = partial(mixed, backend=backend)
    torch.compile(function, fullgraph=True, backend=keep)(x, mixes)
    calls = [str(node.target) for node in graphs[0].graph.nodes if "shift_mix" in str(node.target)]
    assert len(graphs) == 1 and len(calls) == 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, exact in zip(gradients(compiled, x, mixes), gradients(function, x, mixes), strict=True):
        assert relative_rms(actual, exact) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_gives_the_same_gradients(backend: str) -> None:
    x, mixes = make_inputs((4, 4), 12, K=1)
    function = partial(mixed, backend=backend)
    wrapped = partial(checkpoint, function, use_reentrant=False)
    assert all(map(torch.equal, gradients(wrapped, x, mixes), gradients(function, x, mixes)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_inputs_are_saved(backend: str) -> None:
    x, mixes = make_inputs((4, 4), 12)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda a: saved.append(a) or a, lambda a: a):
        shift_mix(x, mixes, (4, 4), backend=backend)
    assert {a.data_ptr() for a in saved} == {x.data_ptr(), mixes.data_ptr()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_are_counted(backend: str) -> None:
    x, mixes = make_inputs((4, 4), 12)
    with FlopCounterMode(display=False) as counter:
        results(x, mixes, (4, 4), backend)
    assert counter.get_total_flops() == (7 + 20) * x.numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 8)}, r"x must be \(B, T, D\) with at least one channel; got \(6, 8\)"),
        ({"x": torch.zeros(2, 6, 0), "mixes": torch.zeros(3, 0)}, r"at least one channel; got \(2, 6, 0\)"),
        ({"x": torch.zeros(2, 7, 8)}, r"has 7 tokens, but num_tokens 0 and grid 2 x 3 make 6"),
        ({"num_tokens": 1}, r"has 6 tokens, but num_tokens 1 and grid 2 x 3 make 7"),
        ({"grid": (-2, -3)}, r"grid -2 x -3"),
        ({"grid": (6, 0), "num_tokens": 6}, r"grid 6 x 0"),
        ({"grid": (7, 1), "num_tokens": -1}, r"num_tokens -1"),
        ({"mixes": torch.zeros(3, 7)}, r"M in 1..4 and D = 8 to fit x \(2, 6, 8\); got \(3, 7\)"),
        ({"mixes": torch.zeros(5, 8)}, r"M in 1..4 .* got \(5, 8\)"),
        ({"mixes": torch.zeros(0, 8)}, r"got \(0, 8\)"),
        ({"mixes": torch.zeros(1, 1, 8)}, r"got \(1, 1, 8\)"),
        ({"x": torch.zeros(2, 6, 8, dtype=torch.int32)}, r"x must be .* got torch.int32"),
        ({"mixes": torch.zeros(3, 8, dtype=torch.complex64)}, r"mixes must be .* got torch.complex64"),
        ({"out_dtype": torch.int64}, r"out_dtype must be .* got torch.int64"),
        ({"out_dtype": torch.float8_e5m2}, r"out_dtype must be .* got torch.float8_e5m2"),
        ({"mixes": torch.zeros(3, 8, device="meta")}, r"mixes is on meta but x is on cpu"),
        ({"backend": "cuda"}, r"unknown backend 'cuda'; known are 'reference', 'torch', 'triton'"),
        ({"backend": "triton", "mixes": torch.zeros(3, 8, dtype=torch.float64)}, r"'triton' cannot run"),
        ({"backend": "triton", "out_dtype": torch.float64}, r"'triton' cannot run"),
    ],
)
def test_bad_arguments_are_named_with_their_numbers(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(2, 6, 8), "mixes": torch.zeros(3, 8), "grid": (2, 3), **change}
    with pytest.raises(ValueError, match=message):
        shift_mix(**arguments)  # type: ignore[arg-type]

"""One Bi-RWKV block on each kernel backend: the same numbers under compile, checkpointing, autocast and FSDP2.

Without a GPU the triton backend runs in Triton's interpreter. The whole model's numbers are proved in
`tests/test_convert.py`, on several ranks in `tests/training/test_equalities.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from drwkv.kernels import backends
from drwkv.models.rwkv_block import Block, Conditioning

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton") if backends.HAS_TRITON else ("torch",)
GRID, D, BATCH = (3, 4), 16, 2


def make_block(backend: str | None, conditioning: Conditioning = "adaln-zero") -> Block:
    """A block with a skip, no parameter of which is zero."""
    block = Block(
        D, first=True, takes_skip=True, conditioning=conditioning, skip="concat", hidden_rate=2, backend=backend
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return block.to(DEVICE)


def make_inputs(num_tokens: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    T = num_tokens + GRID[0] * GRID[1]
    x, skip = torch.randn(2, BATCH, T, D, generator=generator)
    return [x.to(DEVICE), torch.randn(BATCH, D, generator=generator).to(DEVICE), skip.to(DEVICE)]


def gradients(
    block: Block, run: Callable[..., Tensor] | None = None, num_tokens: int = 0
) -> dict[str, Tensor]:
    """The output and the gradients of all parameters and of x."""
    x, c, skip = make_inputs(num_tokens)
    x.requires_grad_()
    y = (block if run is None else run)(x, c, GRID, skip, None, num_tokens)
    block.zero_grad()
    y.float().square().sum().backward()
    assert x.grad is not None
    found = {"output": y.detach(), "x": x.grad}
    for name, parameter in block.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def assert_close(actual: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    errors = {
        name: float((actual[name].double() - exact[name].double()).norm() / exact[name].double().norm())
        for name in exact
    }
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize(("conditioning", "num_tokens"), [("adaln-zero", 0), ("in-context", 2)])
def test_every_backend_gives_the_same_numbers(conditioning: Conditioning, num_tokens: int) -> None:
    exact = gradients(make_block("reference", conditioning), num_tokens=num_tokens)
    for backend in BACKENDS:
        assert_close(gradients(make_block(backend, conditioning), num_tokens=num_tokens), exact, 1e-5)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_compiles_as_one_graph(backend: str, compiler: str) -> None:
    torch.compiler.reset()
    block = make_block(backend)
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    assert_close(gradients(block, compiled), gradients(block), 1e-5)


def test_shapes_are_told_on_the_meta_device() -> None:
    block = make_block(None).to("meta")
    x, c, skip = (x.to("meta") for x in make_inputs())
    assert block(x, c, GRID, skip).shape == x.shape


def test_autocast_leaves_a_float64_block_alone() -> None:
    block = make_block(None).double()
    x, c, skip = (x.double() for x in make_inputs())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = block(x, c, GRID, skip)
    assert inside.dtype == torch.float64
    assert torch.equal(inside, block(x, c, GRID, skip))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_bfloat16_into_the_operators_and_float32_back(backend: str) -> None:
    block = make_block(backend)
    exact = gradients(block)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = gradients(block)
    assert all(actual[name].dtype == torch.float32 for name in exact if name != "output")
    assert_close(actual, exact, 5e-2)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    store = dist.HashStore()
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fsdp_compile_and_checkpointing_together_change_nothing(backend: str, alone: None) -> None:
    exact = gradients(make_block(backend))
    torch.compiler.reset()
    block = make_block(backend)
    block.compile(fullgraph=True, backend="aot_eager")
    fully_shard(block, mesh=init_device_mesh(DEVICE, (1,)))

    def run(*args: object) -> Tensor:
        return checkpoint(block, *args, use_reentrant=False)

    assert_close(gradients(block, run), exact, 1e-6)

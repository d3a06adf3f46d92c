"""Which backend `drwkv.kernels.backends.choose` gives, what it refuses, and what it says in the log.

GPUs that are not here are stood in for by a tensor on the meta device of PyTorch's fake mode and by a stated
compute capability; the kernels themselves are tested in the operators' files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from drwkv.kernels import backends

KNOWN = {"reference": 1.0, "torch": 2.0, "triton": 3.0}
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Sets what the machine offers: machine(triton=True, interpreting=False, capability=(9, 0))."""

    def offer(
        *, triton: bool = True, interpreting: bool = False, capability: tuple[int, int] = (9, 0)
    ) -> None:
        monkeypatch.setattr(backends, "HAS_TRITON", triton)
        monkeypatch.setattr(backends, "interpreting", lambda: interpreting)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return offer


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_logged", set())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="drwkv.kernels"):
        yield caplog


def on_gpu(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor that calls itself a CUDA tensor, without a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(2, 3, 4, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gpu_runs_triton_and_a_cpu_runs_torch(machine: Machine, dtype: torch.dtype) -> None:
    machine()
    assert backends.choose("toy", None, on_gpu(dtype), KNOWN) == "triton"
    assert backends.choose("toy", None, torch.ones(1, dtype=dtype), KNOWN) == "torch"


def test_the_interpreter_is_never_chosen_unasked_on_a_cpu(machine: Machine) -> None:
    machine(interpreting=True)
    assert backends.choose("toy", None, torch.ones(1), KNOWN) == "torch"
    assert backends.choose("toy", "triton", torch.ones(1), KNOWN) == "triton"


def test_an_operator_without_triton_runs_torch_on_a_gpu(machine: Machine) -> None:
    machine()
    assert backends.choose("toy", None, on_gpu(), ("torch",)) == "torch"


@pytest.mark.parametrize("asked", ["reference", "torch"])
def test_what_is_asked_for_is_given(machine: Machine, asked: str) -> None:
    machine()
    assert backends.choose("toy", asked, on_gpu(), KNOWN) == asked


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="toy: unknown backend 'cuda'; known are 'reference', 'torch', 'triton'"
    ):
        backends.choose("toy", "cuda", torch.ones(1), KNOWN)
    with pytest.raises(ValueError, match="unknown backend 'triton'"):
        backends.choose("toy", "triton", torch.ones(1), ("torch",))


@pytest.mark.parametrize(
    ("offer", "x", "why"),
    [
        (dict(triton=False), torch.ones(1), "triton is not installed"),
        (dict(), torch.ones(1), "CUDA tensors, not cpu ones, unless TRITON_INTERPRET=1"),
        (dict(), on_gpu(torch.float64), "not float64"),
        (dict(interpreting=True), torch.ones(1).double(), "not float64"),
        (dict(interpreting=True), torch.ones(1, device="meta"), "no meta tensors"),
        (dict(capability=(7, 5)), on_gpu(), "compute capability 7.5, it needs 8.0"),
    ],
)
def test_triton_where_it_cannot_run_is_refused_with_the_reason(
    machine: Machine, offer: dict[str, bool], x: Tensor, why: str
) -> None:
    machine(**offer)
    with pytest.raises(ValueError, match=f"toy: backend 'triton' cannot run here: .*{why}"):
        backends.choose("toy", "triton", x, KNOWN)


def test_the_choice_is_logged_once_an_operator_backend_and_device(
    machine: Machine, said: pytest.LogCaptureFixture
) -> None:
    machine()
    for _ in range(3):
        backends.choose("toy", None, on_gpu(), KNOWN)
        backends.choose("toy", None, torch.ones(1), KNOWN)
        backends.choose("other", None, torch.ones(1), KNOWN)
    assert said.messages == [
        "toy: backend triton for cuda tensors",
        "toy: backend torch for cpu tensors",
        "other: backend torch for cpu tensors",
    ]


@pytest.mark.parametrize("offer", [dict(triton=False), dict(capability=(7, 0))])
def test_a_gpu_without_triton_warns_once(
    machine: Machine, said: pytest.LogCaptureFixture, offer: dict[str, bool]
) -> None:
    machine(**offer)
    backends.choose("toy", None, on_gpu(torch.float64), KNOWN)  # never Triton's: no reason to warn
    for _ in range(2):
        assert backends.choose("toy", None, on_gpu(), KNOWN) == "torch"
    assert [record.levelname for record in said.records] == ["INFO", "WARNING"]
    assert "for triton cannot run" in said.messages[1]


def test_a_whole_graph_compiles_and_the_choice_is_still_logged(
    machine: Machine, said: pytest.LogCaptureFixture
) -> None:
    machine(interpreting=True)

    def double_or_triple(x: Tensor, asked: str | None) -> Tensor:
        return x * KNOWN[backends.choose("toy", asked, x, KNOWN)]

    compiled = torch.compile(double_or_triple, fullgraph=True, backend="eager")
    for _ in range(2):
        assert compiled(torch.ones(1), None).item() == 2.0
        assert compiled(torch.ones(1), "triton").item() == 3.0
    assert said.messages == ["toy: backend torch for cpu tensors", "toy: backend triton for cpu tensors"]


def test_the_interpreter_is_seen_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.interpreting()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not backends.interpreting()
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not backends.interpreting()

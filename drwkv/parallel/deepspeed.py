"""DeepSpeed's ZeRO stages 1, 2 and 3 behind the engine interface. FSDP2 is in fsdp.py.

ZeRO keeps the float32 weights and moments in flat buffers, of which each rank holds a stretch. `parts` are views of
that stretch, one a parameter, empty where none of it is here; so averages cost 1/N of the memory too. A checkpoint
stores rows of whole tensors, as FSDP2's does, hence `whole` gathers and `take` cuts: collectives, at saves alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from drwkv.parallel.distributed import World
from drwkv.parallel.engine import MOMENTS, Engine, MakeOptimizer, ParallelConfig, start_moments

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
NEVER = 1 << 62  # steps between its own reports


@dataclass(frozen=True)
class Place:
    """Where this rank's part of a parameter lies."""

    buffer: int  # which flat buffer
    offset: int  # in that, in elements
    start: int  # in the flattened parameter
    numel: int  # 0: none of it is here

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The part, as a view of its buffer, or of a moment's."""
        return flat.detach().narrow(0, self.offset, self.numel)


class ZeroEngine(Engine):
    """Stage 1 shards moments and float32 weights, 2 gradients too, 3 the weights that compute too."""

    module: deepspeed.DeepSpeedEngine

    def __init__(
        self, model: nn.Module, make_optimizer: MakeOptimizer, config: ParallelConfig, world: World
    ) -> None:
        super().__init__(config, world)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Its all-reduce through shared memory, for inference on CPUs, would be compiled for half a minute first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._stage, self._mesh = STAGES[config.engine], init_device_mesh(world.device.type, (world.size,))
        model.to(world.device)
        if config.precision != "fp32":
            # DeepSpeed switches an autocast off that is entered outside of it.
            autocast = torch.autocast(world.device.type, dtype=torch.bfloat16)
            model.forward = autocast(model.forward)
        self._parameters = dict(model.named_parameters())
        self._shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        # Without a launcher it asks for it all the same
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        optimizer = make_optimizer(self._parameters.values())
        optimizer.state.clear()  # ZeRO puts its flat buffers in the place of the parameters
        if self._stage == 3:
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.forward = partial(_linear, layer)  # type: ignore[method-assign]
        self.module, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._settings(model), dist_init_required=False
        )
        self._zero: Any = self.module.optimizer
        self.optimizer = self._zero.optimizer
        sharded = "fp32_partitioned_groups_flat" if self._stage == 3 else "single_partition_of_fp32_groups"
        self._flat: list[torch.Tensor] = getattr(self._zero, sharded)
        start_moments(self.optimizer, self._flat)
        self._places = {name: self._place(parameter) for name, parameter in self._parameters.items()}
        self.parts = {
            name: nn.Parameter(place.of(self._flat[place.buffer])) for name, place in self._places.items()
        }

    def _settings(self, model: nn.Module) -> dict[str, Any]:
        offload = self.config.offload == "optimizer"
        blocks: list[nn.Module] = model.blocks_in_order()  # type: ignore[operator]
        block = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
        # Its linear layer would be put into torch for all models, for good, and adds the bias in place: see `_linear`.
        fetching: dict[str, Any] = {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
        if self.config.reshard_after_forward:  # else it keeps up to 1e9 weights gathered
            fetching |= {
                "stage3_max_live_parameters": 2 * block,
                "stage3_prefetch_bucket_size": block,
                "stage3_max_reuse_distance": 0,
            }
        return {
            "train_micro_batch_size_per_gpu": 1,  # which it only counts with
            "steps_per_print": NEVER,
            "gradient_clipping": 0.0,  # its default is 1
            "bf16": {"enabled": self.config.precision == "bf16_params"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self._stage,
                "reduce_bucket_size": block,
                **fetching,
                **({"offload_optimizer": {"device": "cpu", "pin_memory": self._is_cuda}} if offload else {}),
            },
        }

    @property
    def _is_cuda(self) -> bool:
        return self.world.device.type == "cuda"

    def _place(self, parameter: nn.Parameter) -> Place:
        if self._stage == 3:
            buffer, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = min(self.world.rank * padded, parameter.ds_numel)  # type: ignore[attr-defined]
            return Place(buffer, offset, start, min(padded, parameter.ds_numel - start))  # type: ignore[attr-defined]
        found = parameter._hp_mapping  # type: ignore[attr-defined]
        if found is None:
            return Place(0, 0, 0, 0)
        here, there = found.hp_fragment_address, found.lp_fragment_address
        return Place(found.param_group_index, here.start, there.start, here.numel)

    def moments(self, name: str) -> dict[str, torch.Tensor]:
        place = self._places[name]
        state = self.optimizer.state[self._flat[place.buffer]]
        return {kind: place.of(state[kind]) for kind in MOMENTS}

    def whole(self, name: str, part: torch.Tensor) -> DTensor:
        place, shape = self._places[name], self._shapes[name]
        whole = torch.zeros(shape.numel(), dtype=part.dtype, device=self.world.device)
        whole.narrow(0, place.start, place.numel).copy_(part)
        self.world.sum_(whole)
        return distribute_tensor(whole.view(shape), self._mesh, [Shard(0)], src_data_rank=None)

    def take(self, name: str, part: torch.Tensor, whole: torch.Tensor) -> None:
        assert isinstance(whole, DTensor)
        place = self._places[name]
        part.copy_(whole.full_tensor().flatten().narrow(0, place.start, place.numel))

    @torch.no_grad()
    def refresh(self) -> None:
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        for name, parameter in self._parameters.items():
            part = self.parts[name]
            parameter.ds_tensor.narrow(0, 0, part.numel()).copy_(part)  # type: ignore[attr-defined]

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # the model's forward enters its own

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.module.backward(loss * self.world.size, scale_wrt_gas=False)

    def clip_grad_norm(self, max_norm: float | None) -> torch.Tensor:
        groups = self._zero._get_norm_groups() if self._stage == 3 else None
        norm: torch.Tensor = (
            self._zero.scaled_global_norm() if groups is None else combine_grad_norm_groups(groups)
        )
        if max_norm is not None:  # the fused step divides by it
            scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)
            self.optimizer.grad_scale = scale.float().to(self._flat[0].device)  # type: ignore[attr-defined]
        return norm.float().to(self.world.device)

    def step(self, lr: float, found_inf: torch.Tensor) -> None:
        self._prepare_step(lr, found_inf)
        self.module.step()


def _linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """A linear layer whose graph does not hold the gathered weight, which stage 3 means to free after the forward.

    Of an input of more than 2 dimensions the bias is added out of place, not in place as DeepSpeed does: what selective
    checkpointing has kept of the product must stay as it was, for else the recomputation adds the bias once more.
    """
    if layer.bias is None or x.dim() == 2:
        return zero3_linear_wrap(x, layer.weight, layer.bias)
    product: torch.Tensor = zero3_linear_wrap(x, layer.weight)
    return product + layer.bias.to(product.dtype)

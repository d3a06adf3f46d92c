"""Diffusion-RWKV (arXiv 2404.04478): patches through bidirectional RWKV blocks with long skip connections.

The block and its equations are in `rwkv_block.py`, what other backbones share in `layers.py`, initial values
in `initial.py`, names and sizes in `__init__.py`, costs in `cost.py`. Shape suffixes as in `layers.py`, and
L blocks. Parameters carry the names of the public release, so its weights load as they are.

Stochastic depth: the model draws nothing. `keep` (L, B) holds mask / keep_prob and multiplies both
branches of a block: one draw a block and sample, where the release draws each branch by itself. The skip
connection and LN_0 stay when a block is dropped, as in the release.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from drwkv.models.initial import draw_normal, rwkv_vector, usual_value
from drwkv.models.layers import (
    FinalLayer,
    LabelEmbed,
    PatchEmbed,
    TimestepEmbed,
    resize_positions,
    sincos_positions,
    unpatchify,
)
from drwkv.models.rwkv_block import Block, Conditioning, Skip

# Width and depth as in the released code, which gives the parameter counts of the paper's Table 1.
SIZES: dict[str, dict[str, int]] = {
    "S": dict(hidden_size=384, depth=13),
    "B": dict(hidden_size=384, depth=25),
    "M": dict(hidden_size=512, depth=25),
    "L": dict(hidden_size=768, depth=37),
    "H": dict(hidden_size=1024, depth=37),
}
PATCH_SIZES = (2, 4, 8)


class DiffusionRWKV(nn.Module):
    """Noisy image (B, C, H, W), timestep, label -> prediction (B, 2 C, H, W), or C channels without variance.

    `depth` d makes d // 2 shallow blocks, one in the middle and d // 2 deep ones, as in the release, so an
    even d counts as d + 1: `model.depth` is the true number L of blocks, and initial values and drop path
    rates go by it. Parameters are uninitialised until `init_weights(seed)`, which `create` calls.

    Sizes other than `input_size` work where the patch divides them: positions are interpolated, and the
    decays are per image length as ever (w / T).
    """

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],  # (H, W) of the trained images or latents; an int is a square
        in_channels: int,
        patch_size: int,
        hidden_size: int,
        depth: int,  # blocks; even d makes d + 1
        num_classes: int | None = None,  # None: unconditional
        learn_variance: bool = True,  # False: C output channels in place of 2 C
        conditioning: Conditioning = "adaln-zero",
        skip: Skip = "concat",
        drop_path_rate: float = 0.1,  # of the deepest block, nearly; only `drop_path_rates` uses it
        hidden_rate: int = 4,  # width of the channel mix over hidden_size
        kernel_backend: str | None = None,  # of shift_mix and bi_wkv; None: by device
    ) -> None:
        super().__init__()
        H, W = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        for key, value in dict(
            input_size=min(H, W), in_channels=in_channels, patch_size=patch_size, hidden_size=hidden_size,
            depth=depth, hidden_rate=hidden_rate, num_classes=1 if num_classes is None else num_classes,
        ).items():  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key}={value!r} must be a whole number of at least 1")
        if H % patch_size or W % patch_size:
            raise ValueError(f"input_size={H}x{W} must be divisible by patch_size={patch_size}")
        if conditioning not in get_args(Conditioning):
            raise ValueError(
                f"conditioning={conditioning!r}; expected one of {', '.join(get_args(Conditioning))}"
            )
        if skip not in get_args(Skip):
            raise ValueError(f"skip={skip!r}; expected one of {', '.join(get_args(Skip))}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate} must lie in [0, 1)")

        self.input_size, self.in_channels, self.num_classes = (H, W), in_channels, num_classes
        self.patch_size, self.hidden_size, self.hidden_rate = patch_size, hidden_size, hidden_rate
        self.learn_variance, self.conditioning, self.skip = learn_variance, conditioning, skip
        self.drop_path_rate, self.kernel_backend = drop_path_rate, kernel_backend
        self.out_channels = 2 * in_channels if learn_variance else in_channels
        self.grid = (H // patch_size, W // patch_size)
        half = depth // 2
        self.depth = 2 * half + 1

        def block(index: int) -> Block:
            return Block(
                hidden_size, first=index == 0, takes_skip=index > half, conditioning=conditioning, skip=skip,
                hidden_rate=hidden_rate, backend=kernel_backend,
            )  # fmt: skip

        self.patch_embed = PatchEmbed(patch_size, in_channels, hidden_size)
        self.time_embed = TimestepEmbed(hidden_size)
        self.label_emb = None if num_classes is None else LabelEmbed(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], hidden_size))
        self.in_blocks = nn.ModuleList(block(i) for i in range(half))
        self.mid_block = block(half)
        self.out_blocks = nn.ModuleList(block(i) for i in range(half + 1, self.depth))
        self.norm_f = nn.LayerNorm(hidden_size)
        self.final_layer = FinalLayer(
            hidden_size, patch_size, self.out_channels, conditioned=conditioning != "in-context"
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, keep: Tensor | None = None) -> Tensor:
        """Predict from the noisy image.

        x (B, C, H, W); t (B,) in 0..999, fractions allowed; y (B,) integer labels, `num_classes` meaning
        "no label", None for an unconditional model; keep (L, B), see the file's docstring, None keeps all.
        Returns (B, out_channels, H, W): the noise or velocity, then the variance logits where learned.

        Raises ValueError for shapes that do not fit and for labels out of range; the latter on CPU only, for
        on a GPU looking at them would wait for the device.
        """
        self._check_inputs(x, t, y, keep)
        grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)

        # Embed image, time and label.
        x_BTD = self.patch_embed(x) + resize_positions(self.pos_embed, self.grid, grid)
        time_BD = self.time_embed(t)
        label_BD = None if self.label_emb is None or y is None else self.label_emb(y)
        c_BD: Tensor | None = None
        num_tokens = 0
        if self.conditioning == "in-context":
            tokens = [time_BD] if label_BD is None else [time_BD, label_BD]
            num_tokens = len(tokens)
            x_BTD = torch.cat([torch.stack(tokens, dim=1).to(x_BTD.dtype), x_BTD], dim=1)
        else:
            c_BD = time_BD if label_BD is None else time_BD + label_BD

        # Shallow blocks leave a skip each, which the deep ones take up in reverse.
        keeps = [None] * self.depth if keep is None else list(keep.to(x_BTD.dtype).unbind(0))
        half = self.depth // 2
        skips: list[Tensor] = []
        for block, keep_B in zip(self.in_blocks, keeps[:half], strict=True):
            x_BTD = block(x_BTD, c_BD, grid, None, keep_B, num_tokens)
            skips.append(x_BTD)
        x_BTD = self.mid_block(x_BTD, c_BD, grid, None, keeps[half], num_tokens)
        for block, keep_B in zip(self.out_blocks, keeps[half + 1 :], strict=True):
            x_BTD = block(x_BTD, c_BD, grid, skips.pop(), keep_B, num_tokens)

        x_BTD = self.norm_f(x_BTD[:, num_tokens:])
        return unpatchify(self.final_layer(x_BTD, c_BD), grid, self.patch_size)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor | None, keep: Tensor | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, {self.in_channels}, H, W)")
        B, _, H, W = x.shape
        if H % self.patch_size or W % self.patch_size or min(H, W) == 0:
            raise ValueError(f"x is {H}x{W}; both must be multiples of patch_size={self.patch_size}")
        if t.shape != (B,):
            raise ValueError(f"t has shape {tuple(t.shape)}; expected ({B},), one timestep a sample")
        if keep is not None and keep.shape != (self.depth, B):
            raise ValueError(f"keep has shape {tuple(keep.shape)}; expected ({self.depth}, {B})")
        if self.num_classes is None:
            if y is not None:
                raise ValueError("y was given to an unconditional model (num_classes=None); leave it out")
            return
        if y is None:
            raise ValueError(f"y is missing; use label {self.num_classes} (= num_classes) for 'no label'")
        if y.shape != (B,) or y.is_floating_point():
            raise ValueError(f"y has shape {tuple(y.shape)} and {y.dtype}; expected ({B},) integer labels")
        if y.device.type == "cpu" and not torch.compiler.is_compiling() and B > 0:
            low, high = int(y.min()), int(y.max())
            if low < 0 or high > self.num_classes:
                raise ValueError(
                    f"y holds labels {low}..{high}; expected 0..{self.num_classes} (the last: no label)"
                )

    def blocks_in_order(self) -> list[nn.Module]:
        """The L blocks as they run: the units to shard, checkpoint or compile."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    @property
    def drop_path_rates(self) -> list[float]:
        """Drop probability of each block: drop_path_rate * l / L, so block 0 is never dropped."""
        return [self.drop_path_rate * index / self.depth for index in range(self.depth)]

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that make `drwkv.models.create` build this model again; fit for JSON."""
        keys = (
            "in_channels", "num_classes", "patch_size", "hidden_size", "depth", "learn_variance",
            "conditioning", "skip", "drop_path_rate", "hidden_rate",
        )  # fmt: skip
        options = {key: getattr(self, key) for key in keys}
        return {"name": "DRWKV", "input_size": list(self.input_size), **options}

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Give every parameter its value by (seed, name). Parameters on the meta device are left alone."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(self.initial_value(seed, name, parameter))

    def initial_value(self, seed: int, name: str, parameter: Tensor) -> Tensor:
        """The float32 value that the parameter called `name` starts from, on the parameter's device."""
        shape, device = parameter.shape, parameter.device
        owner, _, leaf = name.rpartition(".")
        if name == "pos_embed":
            return sincos_positions(self.hidden_size, self.grid).to(device)
        if leaf.startswith("spatial_"):
            block, _, mix = owner.rpartition(".")
            vector = rwkv_vector(f"{mix}.{leaf}", self._layer_index(block), self.depth, self.hidden_size)
            return vector.to(device).reshape(shape)
        if leaf == "weight" and owner.startswith(("time_embed.", "label_emb.")):
            return draw_normal(seed, name, shape, 0.02, device)
        starts_closed = self.conditioning == "adaln-zero" and ".adaLN_modulation." in name
        if leaf == "weight" and (starts_closed or owner == "final_layer.linear"):
            return torch.zeros(shape, device=device)
        return usual_value(seed, name, parameter)

    def _layer_index(self, block: str) -> int:
        if block == "mid_block":
            return self.depth // 2
        stack, _, index = block.partition(".")
        return int(index) if stack == "in_blocks" else self.depth // 2 + 1 + int(index)

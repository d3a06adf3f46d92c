"""Diffusion-RWKV (arXiv 2404.04478): patches through bidirectional RWKV blocks with long skip connections.

What other backbones share is in `layers.py`, initial values in `initial.py`, the operator in
`drwkv.kernels.wkv`, names and sizes in `__init__.py`, costs in `cost.py`. Shape suffixes as in
`layers.py`, and K conditioning tokens, L blocks. Parameters carry the names of the public release, so its
weights load as they are.

Block. With c = time embedding + label embedding, a skip from the mirrored shallow block, and the residual
branches f_1 = SpatialMix and f_2 = ChannelMix:

    x <- Linear([x, skip])                       skip="concat"; x + skip for "add"; x for "none"
    x <- LN_0(x)                                 in the first block alone
    x <- x + keep * gate_i * f_i(LN_i(x) * (1 + scale_i) + shift_i)                        i = 1, 2

Conditioning (paper section 2.2):

* "adaln-zero": shift, scale, gate = Linear(SiLU(c)), starting from zero, so each branch starts closed.
* "adaln": shift and scale likewise but starting from Xavier's values; no gate (gate = 1).
* "in-context": plain norms (shift = scale = 0, gate = 1), and the conditions are tokens of the sequence. The
  sequence is [time, label, image row by row], or [time, image] without classes; conditioning tokens
  have no position embedding, pass through skips, norms and the channel mix as image tokens do, and are
  dropped before the final norm. In the spatial mix they are taken out: q_shift and bi_wkv see the
  h x w image tokens and T = h w alone. To be heard at all they come back as a broadcast value,
      image:   W_o (sigmoid(r) * (bi_wkv(k, v) + mean_j W_v z_j))       z_j: the conditioning tokens
      token j: W_o (sigmoid(W_r z_j) * W_v z_j)                         bi_wkv of one token is its value
  and in both mixes a conditioning token is its own shifted neighbour. The paper says only that they are
  removed in the spatial mix, which alone would leave the image unconditioned.

Stochastic depth: the model draws nothing. `keep` (L, B) holds mask / keep_prob and multiplies both
branches of a block: one draw a block and sample, where the release draws each branch by itself. The skip
connection and LN_0 stay when a block is dropped, as in the release.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drwkv.kernels.wkv import bi_wkv
from drwkv.models.initial import draw_normal, rwkv_vector, usual_value
from drwkv.models.layers import (
    FinalLayer,
    Grid,
    LabelEmbed,
    PatchEmbed,
    TimestepEmbed,
    modulate,
    resize_positions,
    sincos_positions,
    unpatchify,
)

Conditioning = Literal["adaln-zero", "adaln", "in-context"]
Skip = Literal["concat", "add", "none"]

# Width and depth as in the released code, which gives the parameter counts of the paper's Table 1.
SIZES: dict[str, dict[str, int]] = {
    "S": dict(hidden_size=384, depth=13),
    "B": dict(hidden_size=384, depth=25),
    "M": dict(hidden_size=512, depth=25),
    "L": dict(hidden_size=768, depth=37),
    "H": dict(hidden_size=1024, depth=37),
}
PATCH_SIZES = (2, 4, 8)


class _QShift(torch.autograd.Function):
    """One allocation and a copy a quarter; the gradient is the same move in the opposite directions."""

    @staticmethod
    def forward(ctx: Any, x_BhwD: Tensor, step: int) -> Tensor:
        ctx.step = step
        quarter = x_BhwD.shape[3] // 4
        out = torch.zeros_like(x_BhwD, memory_format=torch.contiguous_format)
        for i, (dim, sign) in enumerate(((2, step), (2, -step), (1, step), (1, -step))):
            length = x_BhwD.shape[dim] - 1
            channels = slice(i * quarter, (i + 1) * quarter)
            source, target = (0, 1) if sign > 0 else (1, 0)
            out.narrow(dim, target, length)[..., channels] = x_BhwD.narrow(dim, source, length)[..., channels]
        out[..., 4 * quarter :] = x_BhwD[..., 4 * quarter :]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _QShift.apply(grad, -ctx.step), None


def q_shift(x_BTD: Tensor, grid: Grid) -> Tensor:
    """Quad-directional shift: the four quarters of the channels move one token right, left, down and up.

    Zeros enter at the border. A quarter is D // 4 channels; the D % 4 left over stay where they are
    (Vision-RWKV, arXiv 2403.02308, section 3.2).
    """
    return _QShift.apply(x_BTD.unflatten(1, grid), 1).flatten(1, 2)


def _neighbours(x_BTD: Tensor, grid: Grid, num_tokens: int) -> Tensor:
    """q_shift of the image tokens; the leading `num_tokens` conditioning tokens are their own neighbours."""
    if num_tokens == 0:
        return q_shift(x_BTD, grid)
    return torch.cat([x_BTD[:, :num_tokens], q_shift(x_BTD[:, num_tokens:], grid)], dim=1)


class SpatialMix(nn.Module):
    """Tokens mix along the two raster directions: W_o (sigmoid(r) * bi_wkv(w / T, u / T, k, v))."""

    def __init__(self, hidden_size: int, wkv_backend: str | None) -> None:
        super().__init__()
        self.wkv_backend = wkv_backend
        self.spatial_decay = nn.Parameter(torch.empty(hidden_size))
        self.spatial_first = nn.Parameter(torch.empty(hidden_size))
        self.spatial_mix_k = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.spatial_mix_v = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.spatial_mix_r = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, grid: Grid, num_tokens: int = 0) -> Tensor:
        # Lerp each token with its neighbours: x mix + xx (1 - mix).
        xx_BTD = _neighbours(x_BTD, grid, num_tokens)
        delta_BTD = x_BTD - xx_BTD
        r_BTD = self.receptance(torch.addcmul(xx_BTD, delta_BTD, self.spatial_mix_r))
        k_BTD = self.key(torch.addcmul(xx_BTD, delta_BTD, self.spatial_mix_k))
        v_BTD = self.value(torch.addcmul(xx_BTD, delta_BTD, self.spatial_mix_v))

        # Conditioning tokens step aside for the operator.
        z_BKD, k_BTD, v_BTD = v_BTD[:, :num_tokens], k_BTD[:, num_tokens:], v_BTD[:, num_tokens:]
        T = grid[0] * grid[1]
        decay, first = self.spatial_decay.float() / T, self.spatial_first.float() / T
        wkv_BTD = bi_wkv(decay, first, k_BTD, v_BTD, backend=self.wkv_backend)
        if num_tokens:
            wkv_BTD = torch.cat([z_BKD, wkv_BTD + z_BKD.mean(dim=1, keepdim=True)], dim=1)
        return self.output(torch.sigmoid(r_BTD) * wkv_BTD)


class ChannelMix(nn.Module):
    """Channels mix in each token: sigmoid(W_r x_r) * W_v relu(W_k x_k)^2."""

    def __init__(self, hidden_size: int, hidden_rate: int) -> None:
        super().__init__()
        self.spatial_mix_k = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.spatial_mix_r = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.key = nn.Linear(hidden_size, hidden_rate * hidden_size, bias=False)
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_rate * hidden_size, hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, grid: Grid, num_tokens: int = 0) -> Tensor:
        xx_BTD = _neighbours(x_BTD, grid, num_tokens)
        delta_BTD = x_BTD - xx_BTD
        k = self.key(torch.addcmul(xx_BTD, delta_BTD, self.spatial_mix_k))
        r_BTD = self.receptance(torch.addcmul(xx_BTD, delta_BTD, self.spatial_mix_r))
        return torch.sigmoid(r_BTD) * self.value(F.relu(k).square())


class Block(nn.Module):
    """One Bi-RWKV block; its equations are in the file's docstring."""

    def __init__(
        self,
        hidden_size: int,
        *,
        first: bool,
        takes_skip: bool,
        conditioning: Conditioning,
        skip: Skip,
        hidden_rate: int,
        wkv_backend: str | None,
    ) -> None:
        super().__init__()
        self.conditioning = conditioning
        self.adds_skip = takes_skip and skip == "add"
        self.ln0 = nn.LayerNorm(hidden_size) if first else None
        self.ln1 = nn.LayerNorm(hidden_size)
        self.ln2 = nn.LayerNorm(hidden_size)
        self.att = SpatialMix(hidden_size, wkv_backend)
        self.ffn = ChannelMix(hidden_size, hidden_rate)
        if conditioning != "in-context":
            width = (6 if conditioning == "adaln-zero" else 4) * hidden_size
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, width))
        concatenates = takes_skip and skip == "concat"
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if concatenates else None

    def forward(
        self,
        x_BTD: Tensor,
        c_BD: Tensor | None,
        grid: Grid,
        skip_BTD: Tensor | None = None,
        keep_B: Tensor | None = None,
        num_tokens: int = 0,
    ) -> Tensor:
        if self.skip_linear is not None:
            assert skip_BTD is not None
            x_BTD = self.skip_linear(torch.cat([x_BTD, skip_BTD], dim=-1))
        elif self.adds_skip:
            assert skip_BTD is not None
            x_BTD = x_BTD + skip_BTD
        if self.ln0 is not None:
            x_BTD = self.ln0(x_BTD)

        keep_B11 = None if keep_B is None else keep_B[:, None, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(c_BD, keep_B11)
        x_BTD = _residual(x_BTD, gate1, self.att(_norm(self.ln1, x_BTD, shift1, scale1), grid, num_tokens))
        return _residual(x_BTD, gate2, self.ffn(_norm(self.ln2, x_BTD, shift2, scale2), grid, num_tokens))

    def _modulation(self, c_BD: Tensor | None, keep_B11: Tensor | None) -> tuple[Tensor | None, ...]:
        """shift, scale, gate of both branches, (B, 1, D) or None; `keep` goes into the gates."""
        if self.conditioning == "in-context":
            return None, None, keep_B11, None, None, keep_B11
        assert c_BD is not None
        vectors = self.adaLN_modulation(c_BD).unsqueeze(1)
        if self.conditioning == "adaln":
            shift1, scale1, shift2, scale2 = vectors.chunk(4, dim=-1)
            return shift1, scale1, keep_B11, shift2, scale2, keep_B11
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors.chunk(6, dim=-1)
        if keep_B11 is not None:
            gate1, gate2 = gate1 * keep_B11, gate2 * keep_B11
        return shift1, scale1, gate1, shift2, scale2, gate2


def _norm(norm: nn.LayerNorm, x_BTD: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    x_BTD = norm(x_BTD)
    return x_BTD if shift is None or scale is None else modulate(x_BTD, shift, scale)


def _residual(x_BTD: Tensor, gate: Tensor | None, branch_BTD: Tensor) -> Tensor:
    return x_BTD + branch_BTD if gate is None else torch.addcmul(x_BTD, branch_BTD, gate)


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
        wkv_backend: str | None = None,  # None: by device
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
        self.drop_path_rate, self.wkv_backend = drop_path_rate, wkv_backend
        self.out_channels = 2 * in_channels if learn_variance else in_channels
        self.grid = (H // patch_size, W // patch_size)
        half = depth // 2
        self.depth = 2 * half + 1

        def block(index: int) -> Block:
            return Block(
                hidden_size, first=index == 0, takes_skip=index > half, conditioning=conditioning, skip=skip,
                hidden_rate=hidden_rate, wkv_backend=wkv_backend,
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

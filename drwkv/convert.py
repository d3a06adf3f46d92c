"""Weights in and out of other formats: `python -m drwkv.convert SRC DST`.

Reads the public Diffusion-RWKV release's `.pt` files ({"model", "ema", "opt", "args"}, or a bare state
dict) and `.safetensors` files with the model's configuration as JSON metadata; writes the latter. A `.pt`
is read without running any code it may carry. The trainer's own checkpoints are in
`training/checkpoint.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from drwkv.models import create

Weights = dict[str, Tensor]
# What torch's unpickler raises on a file that is cut short, or is none of its own.
_UNREADABLE = (RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, AssertionError)
MAX_NAMED = 3  # names listed in an error before "and N more"


def load_weights(path: str | Path, which: str = "ema") -> tuple[Weights, dict[str, Any]]:
    """Read weights: (state dict on the CPU in the stored dtype, keyword arguments for `drwkv.models.create`).

    `which` chooses "ema" or "model" in a released `.pt`; files with one set of weights ignore it. Released
    files do not say what model they hold: it is inferred from the tensors, with a square input.

    Raises FileNotFoundError, and ValueError for a file that is damaged, holds objects other than tensors
    and plain values, or whose tensors are not those of the model.
    """
    path = Path(path)
    if which not in ("ema", "model"):
        raise ValueError(f"which={which!r} must be 'ema' or 'model'")
    if not path.is_file():
        what = "is a folder, give a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}")
    if path.suffix == ".safetensors":
        weights, config = _read_safetensors(path)
    else:
        weights = _pick_weights(_read_pickle(path), which, path)
        config = infer_config(weights, path)
    _check_fit(weights, config, path)
    return weights, config


def build(path: str | Path, which: str = "ema") -> nn.Module:
    """The model of a weights file, in float32 on the CPU, ready to run."""
    weights, config = load_weights(path, which)
    model = _skeleton(config)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model


def read_process(path: str | Path) -> dict[str, Any] | None:
    """The diffusion process that a `.safetensors` says its weights were trained for; None if the file does not tell."""
    if Path(path).suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt", device="cpu") as file:
        return json.loads((file.metadata() or {}).get("process", "null"))


def save_weights(
    path: str | Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    process: Mapping[str, Any] | None = None,
) -> None:
    """Write weights and the model's `config` (arguments of `create`) to a `.safetensors`, atomically.

    `process` are the settings of the diffusion process, as GaussianConfig holds them; None: not known.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are written as .safetensors; choose that ending")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        said = {"format": "pt", "config": json.dumps(dict(config))}
        if process is not None:
            said["process"] = json.dumps(dict(process))
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; save_file makes files that nobody else may read
        save_file(tensors, temporary, metadata=said)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def infer_config(weights: Mapping[str, Tensor], source: str | Path = "weights") -> dict[str, Any]:
    """What `create` needs to build the released architecture that these tensors belong to.

    The release has adaLN-Zero conditioning and concatenated skips; anything else shows as missing or
    unexpected tensors when the names are compared.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in weights:
            raise ValueError(f"{source}: no tensor {name!r}; these are not Diffusion-RWKV weights")
        if weights[name].ndim != ndim:
            raise ValueError(f"{source}: {name} is {tuple(weights[name].shape)}; expected {ndim} dimensions")
        return tuple(weights[name].shape)

    hidden_size, in_channels, patch_size, _ = shape("patch_embed.proj.weight", 4)
    _, tokens, _ = shape("pos_embed", 3)
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"{source}: {tokens} positions are no square grid, and a .pt names no other")
    out_channels, left_over = divmod(shape("final_layer.linear.weight", 2)[0], patch_size**2)
    if left_over or out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"{source}: the output layer has {out_channels} channels and {left_over} rows over; "
            f"expected {in_channels} or {2 * in_channels} channels of {patch_size}x{patch_size}"
        )
    labels = "label_emb.embedding_table.weight"
    stacks = ("in_blocks", "out_blocks")
    blocks = {match[0] for name in weights if (match := re.match(rf"({'|'.join(stacks)})\.\d+(?=\.)", name))}
    return {
        "name": "DRWKV",
        "input_size": side * patch_size,
        "in_channels": in_channels,
        "num_classes": shape(labels, 2)[0] - 1 if labels in weights else None,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": len(blocks) + 1,
        "learn_variance": out_channels == 2 * in_channels,
        "hidden_rate": shape("mid_block.ffn.key.weight", 2)[0] // hidden_size,
    }


def _read_pickle(path: Path) -> Any:
    """Load a `.pt` with the restricted unpickler; beside tensors and plain values it may hold a Namespace."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        culprit = re.search(r"(?:GLOBAL|Unsupported \w+|class) (\S+)", str(error))
        named = f" ({culprit[1]})" if culprit else ""
        raise ValueError(
            f"{path}: refused, nothing was run: holds objects other than tensors{named}, or no torch file"
        ) from error
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path}: damaged or no torch file ({type(error).__name__}: {reason})") from error


def _pick_weights(content: Any, which: str, path: Path) -> Weights:
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds a {type(content).__name__}; expected tensors, or 'ema' and 'model', by name"
        )
    if not any(isinstance(value, Tensor) for value in content.values()):
        if not isinstance(content.get(which), dict):
            raise ValueError(
                f"{path}: has no {which!r} weights; it holds {_listed([*map(str, content)]) or 'nothing'}"
            )
        content = content[which]
    strays = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strays:
        raise ValueError(f"{path}: not tensors: {_listed(strays)}")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _read_safetensors(path: Path) -> tuple[Weights, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or no safetensors file: {error}") from error
    if "config" not in metadata:
        raise ValueError(f"{path}: has no 'config' in its metadata; write it with drwkv.convert")
    try:
        config = json.loads(metadata["config"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its 'config' is no JSON: {error}") from error
    size = config.get("input_size")
    return weights, config | {"input_size": tuple(size) if isinstance(size, list) else size}


def _skeleton(config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return create(**config)


def _check_fit(weights: Weights, config: dict[str, Any], path: Path) -> None:
    try:
        expected = {name: tuple(p.shape) for name, p in _skeleton(config).named_parameters()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its configuration makes no model: {error}") from error
    complaints = []
    if missing := [name for name in expected if name not in weights]:
        complaints.append(f"missing {_listed(missing)}")
    if unexpected := [name for name in weights if name not in expected]:
        complaints.append(f"unexpected {_listed(unexpected)}")
    both = [name for name in expected if name in weights]
    if wrong := [
        f"{name} {tuple(weights[name].shape)}, expected {expected[name]}"
        for name in both
        if tuple(weights[name].shape) != expected[name]
    ]:
        complaints.append(f"wrong shape {_listed(wrong)}")
    if complaints:
        raise ValueError(f"{path}: tensors do not fit {config['name']}: {'; '.join(complaints)}")


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + more


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert one file; say in one line what was written, or what is wrong (exit code 2)."""
    parser = argparse.ArgumentParser(prog="python -m drwkv.convert", description="weights to .safetensors")
    parser.add_argument("src", metavar="SRC", help=".pt of the public release, or .safetensors")
    parser.add_argument("dst", metavar="DST", help=".safetensors to write")
    parser.add_argument("--which", choices=("ema", "model"), default="ema", help="weights to take from a .pt")
    given = parser.parse_args(arguments)
    try:
        weights, config = load_weights(given.src, given.which)
        save_weights(given.dst, weights, config, read_process(given.src))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model = _skeleton(config)
    num_params = sum(p.numel() for p in model.parameters())
    print(f"{given.dst}: {len(weights)} tensors, {num_params:,} parameters, {json.dumps(config)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

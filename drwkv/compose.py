"""From dataclasses, a YAML file and the command line to one checked instance, for every command.

Here is only composing, loading and dumping. Which dataclasses make up a run is config.py's; each stands beside the
code that it configures, and what a field means is said there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def load(schema: type[T], arguments: Sequence[str]) -> T:
    """Compose defaults <- `--config FILE` <- `key.sub=value ...` into a checked instance of the dataclass `schema`.

    Raises FileNotFoundError for a missing file, ValueError naming key, value, file and the nearest right key else.
    """
    path, overrides = _split_arguments(arguments)
    merged = OmegaConf.structured(schema)
    if path is not None:
        merged = _merge(schema, merged, _read_yaml(path), source=str(path))
    for override in overrides:
        merged = _merge(schema, merged, _parse_override(override), source="command line")
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ValueError(
            f"config key {missing[0]!r} has no value: give {missing[0]}=... on the command line or in --config"
        )
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"config: {_first_line(error)}") from None


def dump(config: Any, path: Path) -> None:
    """Write the resolved configuration as YAML, every field with its value."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def read_dumped(schema: type[T], path: Path) -> T:
    """Read back what `dump` wrote."""
    return load(schema, ["--config", str(path)])


def require(holds: bool, key: str, value: Any, advice: str) -> None:
    """ValueError that names key, value and what to do, unless the condition holds."""
    if not holds:
        raise ValueError(f"config key {key!r}: {value!r} is not possible: {advice}")


def _split_arguments(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    path, overrides, rest = None, [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--config":
            if not rest:
                raise ValueError("--config needs a file: --config configs/NAME.yaml")
            path = Path(rest.pop(0))
        elif argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
        elif re.match(r"^[A-Za-z_][\w.]*=", argument):
            overrides.append(argument)
        else:
            raise ValueError(
                f"command line: {argument!r} is not understood: give --config FILE or key.sub=value"
            )
    return path, overrides


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise FileNotFoundError(
            f"--config {path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ValueError(f"{path}: not readable as YAML: {_first_line(error)}") from None
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: holds a list, not keys with values")
    return content


def _parse_override(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"command line: {override!r} is not understood: {_first_line(error)}") from None


def _merge(schema: type, base: DictConfig, change: DictConfig, *, source: str) -> DictConfig:
    _check_keys(schema, OmegaConf.to_container(change), source, prefix="")
    try:
        return OmegaConf.merge(base, change)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        value = OmegaConf.select(change, key) if key != "?" else None
        raise ValueError(f"{source}: config key {key!r} cannot be {value!r}: {_first_line(error)}") from None


def _check_keys(schema: type, content: Any, source: str, prefix: str) -> None:
    """Refuse keys that the dataclass does not have, naming the nearest that it has."""
    if not isinstance(content, dict):
        raise ValueError(
            f"{source}: config key {prefix.rstrip('.')!r} is a group of keys, not one value: {content!r}"
        )
    known = {f.name for f in fields(schema)}
    hints = get_type_hints(schema)
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(f"{prefix}{key}", _all_keys(schema, prefix), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
            raise ValueError(f"{source}: unknown config key {prefix + str(key)!r} (value {value!r}): {hint}")
        if is_dataclass(hints[key]):
            _check_keys(hints[key], value, source, prefix=f"{prefix}{key}.")


def _all_keys(schema: type, prefix: str = "") -> set[str]:
    hints = get_type_hints(schema)
    keys = set()
    for f in fields(schema):
        keys.add(prefix + f.name)
        if is_dataclass(hints[f.name]):
            keys |= _all_keys(hints[f.name], f"{prefix}{f.name}.")
    return keys


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

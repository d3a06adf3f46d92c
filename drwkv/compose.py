"""From dataclasses, a YAML file and the command line to one checked instance, for every command.

Here is only composing, loading and dumping. Which dataclasses make up a run is config.py's; each stands beside the
code that it configures, and what a field means is said there.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def load(schema: type[T], arguments: Sequence[str]) -> T:
    """Compose defaults <- `--config FILE` <- `key.sub=value ...` into a checked instance of the dataclass `schema`.

    Raises FileNotFoundError for a missing file, ValueError naming key, value, file and the nearest right key else.
    `--help` among the arguments prints every key and exits.
    """
    if {"--help", "-h"} & set(arguments):
        print(usage(schema))
        sys.exit(0)
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


def usage(schema: type) -> str:
    """What `--help` prints: how the command is called, and each key with type, default and meaning."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name}" if spec else Path(sys.argv[0]).name
    return "\n".join(
        [f"usage: python {program} [--config FILE] [KEY=VALUE ...]", "", *_key_lines(schema(), prefix="")]
    )


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


def _key_lines(defaults: Any, prefix: str) -> Iterator[str]:
    """Two lines for each key of a dataclass: key, type and default as YAML has it; and the meaning."""
    meanings = _meanings(type(defaults))
    for f in fields(defaults):
        default = getattr(defaults, f.name)
        if is_dataclass(default):
            yield from _key_lines(default, f"{prefix}{f.name}.")
            continue
        kind = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace(", ", " | "), str(f.type))
        given = " (must be given)" if default == "???" else f" = {json.dumps(default)}"
        yield f"  {prefix}{f.name}: {kind}{given}"
        if f.name in meanings:
            yield f"      {meanings[f.name]}"


def _meanings(schema: type) -> dict[str, str]:
    """The comment that stands beside each field in the source, where a field's meaning is said."""
    source = inspect.getsource(schema)
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt:")
    }
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return {name: meaning for name, meaning in found.items() if meaning}


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
        elif _is_list(hints[key]) and not (value is None or isinstance(value, list)):
            raise ValueError(
                f"{source}: config key {prefix + key!r} is a list, not {value!r}: give {prefix}{key}=[{value}]"
            )


def _is_list(hint: Any) -> bool:
    """Whether a field of this type holds a list, or a list or null."""
    return any(get_origin(kind) is list for kind in (hint, *get_args(hint)))


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

"""The rules of the house, read from the syntax trees of its files; a breach is file:line and a sentence.

Who may import whom (kernels/ is drwkv.kernels, its only name):

    launchers -> train_dist, sample_dist, data_prep -> drwkv -> drwkv.kernels
    launchers -> drwkv
    tests -> all

and inside drwkv, models and diffusion import neither parallel, training, data nor config. The checker itself
is proved on small bad examples below.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

APPLICATIONS = ("train_dist", "sample_dist", "data_prep")
ROOMS = ("launchers", *APPLICATIONS, "drwkv", "drwkv.kernels", "tests", "kernels")
# Room -> rooms that its files may import, beside their own. Applications do not import each other.
MAY_IMPORT = {
    "launchers": {*APPLICATIONS, "drwkv"},
    "drwkv": {"drwkv.kernels"},
    "drwkv.kernels": set(),
    "tests": {"launchers", *APPLICATIONS, "drwkv", "drwkv.kernels"},
} | {application: {"drwkv"} for application in APPLICATIONS}
PURE = ("drwkv.models", "drwkv.diffusion")
NOT_FOR_PURE = ("drwkv.parallel", "drwkv.training", "drwkv.data", "drwkv.config")

NAMELESS = re.compile(r"(.*_)?(utils?|misc|common|helpers?)")
SHORT_FILE = 10  # lines up to which a file needs no docstring
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w|\.\./shar" + "ed")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".sh", ".cfg", ".ini", ""}


def breaches(path: PurePath, source: str) -> list[str]:
    """Every breach in one Python file, as `file:line: sentence`; `path` is relative to the checkout."""
    tree = ast.parse(source, filename=str(path))
    found = [*_name_breaches(path), *_docstring_breaches(tree, source)]
    for node in ast.walk(tree):
        found += _import_breaches(path, node)
        found += _call_breaches(node)
    return [f"{path}:{line}: {sentence}" for line, sentence in sorted(found)]


Breach = tuple[int, str]


def _name_breaches(path: PurePath) -> Iterator[Breach]:
    for part in (*path.parts[:-1], path.stem):
        if NAMELESS.fullmatch(part):
            yield 1, f"{part!r} says nothing; name the idea"
    if path.name == "__init__.py" and (path.parts[0] == "tests" or path.parts == ("kernels", "__init__.py")):
        yield 1, f"{path.parts[0]}/ has no __init__.py"


def _docstring_breaches(tree: ast.Module, source: str) -> Iterator[Breach]:
    if len(source.splitlines()) > SHORT_FILE and not ast.get_docstring(tree):
        yield 1, "no docstring that says what lives here"


def _import_breaches(path: PurePath, node: ast.AST) -> Iterator[Breach]:
    here = _module(path)
    for name in _imported(node, here, is_package=path.name == "__init__.py"):
        if name is None:
            yield node.lineno, "this relative import leaves the package"  # type: ignore[attr-defined]
            return
        if sentence := _import_breach(here, name):
            yield node.lineno, sentence  # type: ignore[attr-defined]
            return


def _import_breach(here: str, name: str) -> str | None:
    room, own = _room(name), _room(here)
    if room == "kernels":
        return f"imports {name}: the only name of kernels/ is drwkv.kernels"
    if room and own and room != own and room not in MAY_IMPORT[own]:
        return (
            f"imports {name}: {own} may import {', '.join(sorted(MAY_IMPORT[own])) or 'nothing of the house'}"
        )
    if _inside(here, PURE) and _inside(name, NOT_FOR_PURE):
        return f"imports {name}: models and diffusion import none of {', '.join(NOT_FOR_PURE)}"
    return None


def _module(path: PurePath) -> str:
    """Dotted name under which the file is imported; kernels/ is drwkv.kernels."""
    parts = [*path.with_suffix("").parts]
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(["drwkv", *parts] if parts[0] == "kernels" else parts)


def _imported(node: ast.AST, here: str, *, is_package: bool) -> Iterator[str | None]:
    """Names in one import statement that may be modules; None for a relative one that leaves the package."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module
        if node.level:
            package = here.split(".") if is_package else here.split(".")[:-1]
            kept = len(package) - (node.level - 1)
            if kept < 1:
                yield None
                return
            base = ".".join(package[:kept] + ([node.module] if node.module else []))
        assert base is not None
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def _room(name: str) -> str | None:
    """The room that a module belongs to, None for other people's packages."""
    fitting = [room for room in ROOMS if _inside(name, (room,))]
    return max(fitting, key=len, default=None)


def _inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _call_breaches(node: ast.AST) -> Iterator[Breach]:
    if not isinstance(node, ast.Call):
        return
    called = ast.unparse(node.func)
    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if given.get("allow_pickle", "False") != "False":
        yield node.lineno, "allow_pickle runs the file's code"
    if called == "torch.load" and given.get("weights_only") != "True":
        yield node.lineno, "torch.load without weights_only=True runs the file's code"
    if called in ("eval", "exec"):
        yield node.lineno, f"{called} runs text as code"
    if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads"):
        yield node.lineno, f"{called} runs the file's code"


def test_the_house_keeps_its_rules(root: Path, house_files: list[Path]) -> None:
    sources = [path for path in house_files if path.suffix == ".py"]
    assert len(sources) > 50, "the walk lost the house"
    found = [breach for path in sources for breach in breaches(path, (root / path).read_text())]
    assert not found, "\n" + "\n".join(found)


def test_nothing_in_the_house_names_a_folder_of_one_machine(root: Path, house_files: list[Path]) -> None:
    texts = [
        path for path in house_files if path.suffix in TEXT_SUFFIXES and path != Path("tests/test_house.py")
    ]
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in texts
        if (root / path).is_file()
        for number, line in enumerate((root / path).read_text().splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, "\n" + "\n".join(found)


def test_the_link_makes_kernels_a_part_of_drwkv_and_of_nothing_else(root: Path) -> None:
    assert (root / "drwkv" / "kernels").readlink() == Path("../kernels")
    import drwkv.kernels.wkv

    assert drwkv.kernels.wkv.__name__ == "drwkv.kernels.wkv"


FORBIDDEN_IMPORTS = [
    ("drwkv/rng.py", "import train_dist"),
    ("drwkv/rng.py", "from data_prep.digits import main"),
    ("drwkv/rng.py", "import launchers.local"),
    ("drwkv/rng.py", "import tests.conftest"),
    ("drwkv/rng.py", "import kernels.wkv"),
    ("drwkv/rng.py", "import os, kernels"),
    ("drwkv/__init__.py", "from .. import kernels"),
    ("drwkv/models/drwkv.py", "from drwkv.training.ema import Ema"),
    ("drwkv/models/drwkv.py", "from drwkv import config"),
    ("drwkv/models/drwkv.py", "from .. import data"),
    ("drwkv/models/__init__.py", "from ..parallel.engine import Engine"),
    ("drwkv/diffusion/gaussian.py", "def f():\n    import drwkv.data.order"),
    ("drwkv/diffusion/gaussian.py", "if TYPE_CHECKING:\n    from ..config import load"),
    ("kernels/bench.py", "from drwkv import rng"),
    ("kernels/bench.py", "import drwkv"),
    ("kernels/bench.py", "from kernels.wkv import bi_wkv"),
    ("kernels/wkv/op.py", "from ...rng import bits"),
    ("kernels/wkv/__init__.py", "from ... import rng"),
    ("kernels/wkv/op.py", "from ..... import rng"),
    ("data_prep/digits.py", "import drwkv.kernels.wkv"),
    ("data_prep/digits.py", "from drwkv import kernels"),
    ("data_prep/digits.py", "import train_dist"),
    ("train_dist.py", "from data_prep import writer"),
    ("train_dist.py", "import sample_dist"),
    ("launchers/job.py", "import drwkv.kernels"),
    ("tests/test_rng.py", "import kernels"),
]
ALLOWED_IMPORTS = [
    ("drwkv/rng.py", "import torch, numpy.random"),
    (
        "drwkv/models/drwkv.py",
        "from drwkv import rng\nfrom drwkv.kernels.wkv import bi_wkv\nfrom . import layers",
    ),
    (
        "drwkv/models/__init__.py",
        "from .config import ModelConfig\nfrom drwkv.models.config import from_config",
    ),
    ("drwkv/training/ema.py", "from ..parallel import engine"),
    ("kernels/wkv/op.py", "import torch\nfrom . import torch as by_torch\nfrom .reference import bi_wkv"),
    (
        "kernels/wkv/__init__.py",
        "from .op import bi_wkv\nfrom drwkv.kernels import bench\nfrom .. import bench",
    ),
    ("data_prep/digits.py", "from data_prep.writer import ShardSetWriter\nfrom drwkv import rng"),
    ("train_dist.py", "from drwkv.compose import load"),
    ("launchers/job.py", "import train_dist, data_prep.digits, drwkv.config\nfrom launchers import slurm"),
    (
        "tests/test_rng.py",
        "import launchers, train_dist, data_prep, drwkv.kernels.wkv\nfrom drwkv.data import order",
    ),
]


@pytest.mark.parametrize(("path", "source"), FORBIDDEN_IMPORTS)
def test_the_checker_names_each_forbidden_import_with_its_line(path: str, source: str) -> None:
    line = 1 + source.count("\n")
    (breach,) = breaches(PurePath(path), source)
    assert breach.startswith(f"{path}:{line}: ")
    assert "import" in breach


@pytest.mark.parametrize(("path", "source"), ALLOWED_IMPORTS)
def test_the_checker_lets_allowed_imports_pass(path: str, source: str) -> None:
    assert breaches(PurePath(path), source) == []


@pytest.mark.parametrize(
    "source",
    [
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "pickle.loads(data)",
    ],
)
def test_the_checker_names_each_call_that_runs_code_from_a_file(source: str) -> None:
    (breach,) = breaches(PurePath("drwkv/rng.py"), f"pass\n{source}")
    assert breach.startswith("drwkv/rng.py:2: ")


def test_the_checker_lets_harmless_calls_pass() -> None:
    for source in (
        "model.eval()",
        "np.load(path, allow_pickle=False)",
        "torch.load(path, weights_only=True)",
    ):
        assert breaches(PurePath("drwkv/rng.py"), source) == []


@pytest.mark.parametrize(
    "path",
    [
        "tests/__init__.py",
        "tests/data/__init__.py",
        "kernels/__init__.py",
        "drwkv/utils.py",
        "drwkv/io_utils.py",
        "drwkv/common/io.py",
        "data_prep/misc.py",
        "tests/helpers.py",
    ],
)
def test_the_checker_names_files_that_should_not_be(path: str) -> None:
    (breach,) = breaches(PurePath(path), "")
    assert breach.startswith(f"{path}:1: ")


def test_the_checker_wants_a_docstring_in_all_but_short_files() -> None:
    body = "x = 1\n" * SHORT_FILE
    assert breaches(PurePath("drwkv/rng.py"), body) == []
    assert len(breaches(PurePath("drwkv/rng.py"), body + "x = 1\n")) == 1
    assert breaches(PurePath("drwkv/rng.py"), '"""What lives here."""\n' + body) == []


@pytest.mark.parametrize(
    "line", ["see /wo" + "rk/main", "open('/ho" + "me/me/x')", "cp ../shar" + "ed/golden ."]
)
def test_the_checker_knows_a_folder_of_one_machine(line: str) -> None:
    assert MACHINE_PATH.search(line)
    assert not MACHINE_PATH.search("https://host/home/x, artwork/home/x, frame/homes")

"""README.md and the configs say what is true: links, commands, paths, targets of make, keys and headers.

A config opens with four comment lines, which these tests read:

    # Command:  torchrun ... train_dist.py --config configs/NAME.yaml ...
    # Hardware: what it ran on
    # Hours:    how long that took
    # Expected: the number that it should reach
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import pytest

from data_prep.encode import EncodeConfig
from drwkv.compose import load
from drwkv.config import SampleConfig, TrainConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.yaml"))
SCHEMAS = {"train_dist.py": TrainConfig, "sample_dist.py": SampleConfig, "data_prep.encode": EncodeConfig}
HEADER = ("Command", "Hardware", "Hours", "Expected")
OTHER_PROGRAMS = {"cd", "git", "source", "tensorboard"}  # not ours to check
LINK = re.compile(r"\]\(([^)\s]+)|<(?:img|a)\s[^>]*?(?:src|href)=\"([^\"]+)\"")
PATH_IN_TEXT = re.compile(r"`((?:\.?\w[\w-]*/)+(?:[\w.-]+\.(?:py|yaml|md|png))?|[\w-]+\.(?:py|md|toml|txt))`")


def shell_commands(markdown: str) -> Iterator[list[str]]:
    """The words of each command in the fenced `sh` blocks, comments and `NAME=value` in front taken off."""
    for block in re.findall(r"^```sh\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield words


def make_targets(makefile: str) -> set[str]:
    """Targets that the Makefile documents."""
    return set(re.findall(r"^([a-z]+):.*## ", makefile, flags=re.MULTILINE))


def complaint(words: Sequence[str], root: Path) -> str | None:
    """What is wrong with a command, run in `root`; None if it names only what exists."""
    program, arguments = PurePath(words[0]).name, list(words[1:])
    if program == "make":
        unknown = [word for word in arguments if "=" not in word and word not in TARGETS]
        return f"make has no target {unknown[0]!r}" if unknown else None
    if program not in ("python", "torchrun"):
        return None if program in OTHER_PROGRAMS else f"unknown program {program!r}"
    if "-m" in arguments:
        started = arguments[arguments.index("-m") + 1]
        if importlib.util.find_spec(started) is None:
            return f"no module {started}"
    else:
        scripts = [word for word in arguments if word.endswith(".py")]
        started = scripts[0] if scripts else "at all"
        if not (root / started).is_file():
            return f"no script {started}"
    if started in SCHEMAS:
        try:
            load(SCHEMAS[started], arguments[arguments.index(started) + 1 :])
        except (ValueError, FileNotFoundError) as error:
            return str(error)
    return None


def header(text: str) -> dict[str, str]:
    """The lines `# Key: value` of the comment block that opens a config."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return dict(re.findall(r"^# (\w+): +(\S.*)$", "\n".join(lines), flags=re.MULTILINE))


TARGETS = make_targets((ROOT / "Makefile").read_text())


def test_every_link_in_a_markdown_file_leads_to_a_file_of_the_house(
    root: Path, house_files: list[Path]
) -> None:
    there = {*house_files, *(folder for path in house_files for folder in path.parents)}
    pages = [path for path in house_files if path.suffix == ".md"]
    broken = [
        f"{page}: {target}"
        for page in pages
        for match in LINK.findall((root / page).read_text())
        if "://" not in (target := (match[0] or match[1]).split("#")[0])
        if target and (root / page.parent / target).resolve() not in {root / path for path in there}
    ]
    assert pages
    assert not broken, broken


def test_every_path_in_the_readme_exists(root: Path) -> None:
    paths = PATH_IN_TEXT.findall(README)
    assert len(paths) > 10
    assert [path for path in paths if not (root / path).exists()] == []


def test_every_make_target_in_the_readme_exists() -> None:
    named = [word for words in re.findall(r"`make ([a-z ]+)`", README) for word in words.split()]
    assert {"demo", "test", "check", "bench", "proof"} <= set(named)
    assert sorted(set(named) - TARGETS) == []


def test_every_command_in_the_readme_is_understood(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    commands = list(shell_commands(README))
    assert len(commands) > 5
    wrong = [f"{shlex.join(words)}: {found}" for words in commands if (found := complaint(words, root))]
    assert not wrong, "\n" + "\n".join(wrong)


def test_ci_runs_the_command_that_the_readme_gives(root: Path) -> None:
    assert "`make check test`" in README
    assert re.search(r"^(time )?make check test$", (root / ".ci" / "run").read_text(), flags=re.MULTILINE)


def test_the_readme_leaves_no_number_open() -> None:
    assert re.findall(r"TBD[\w-]*", README) == []


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_says_command_hardware_hours_and_the_number_to_expect(config: str, root: Path) -> None:
    said = header((root / config).read_text())
    assert tuple(said) == HEADER, f"{config}: the first lines must be # {': ..., # '.join(HEADER)}: ..."
    assert f"--config {config}" in said["Command"]
    assert re.search(r"\d", said["Hours"]), said["Hours"]
    assert re.search(r"\d", said["Expected"]), said["Expected"]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_loads_by_the_command_that_opens_it(
    config: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    words = shlex.split(header((root / config).read_text())["Command"])
    assert SCHEMAS.keys() & set(words), f"{config}: its command runs neither of {', '.join(SCHEMAS)}"
    assert complaint(words, root) is None


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("make demmo", "make has no target 'demmo'"),
        ("make check FOLDER=x", None),
        ("python -m data_prep.digit demo/shards", "no module data_prep.digit"),
        ("python -m data_prep.digits demo/shards", None),
        ("torchrun --standalone --nproc-per-node 2 train.py", "no script train.py"),
        ("python -m data_prep.encode sauce=x out=y", "unknown config key 'sauce'"),
        ("python -m data_prep.encode source=x out=y", None),
        ("python train_dist.py run.seeed=1", "unknown config key 'run.seeed'"),
        ("python train_dist.py --config configs/none.yaml", "configs/none.yaml: no such file"),
        ("python train_dist.py run.seed=1", None),
        ("pyhton train_dist.py", "unknown program 'pyhton'"),
    ],
)
def test_the_checker_finds_what_is_wrong_with_a_command(command: str, expected: str | None) -> None:
    found = complaint(shlex.split(command), ROOT)
    assert found == expected or (expected and found and expected in found)


def test_commands_are_read_from_sh_blocks_only() -> None:
    page = "```sh\n# why\nA=1 make \\\n  demo  # now\n\ncd x\n```\n```text\nmake no\n```\n"
    assert list(shell_commands(page)) == [["make", "demo"], ["cd", "x"]]

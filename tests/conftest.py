"""What every test may rely on: the marker `needs`, the account of skipped tests, and the files of the house.

A test that needs a program or a GPU is marked so, and skipped and named at the end where that is absent:
`@pytest.mark.needs("sbatch", apt="slurm-wlm")`, `@pytest.mark.needs("gpu")`. With DRWKV_CI=1 in the
environment a skip for any reason but the want of a GPU fails the run: CI cannot quietly stop testing a thing.
Without a GPU, Triton's kernels run in its interpreter, on CPU tensors; what compiles them starts a process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is imported: it is read at their definition
    os.environ.setdefault("TRITON_INTERPRET", "1")

NO_GPU = "no GPU"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        if absent := [reason for tool in mark.args if (reason := _absence(tool, mark.kwargs.get("apt")))]:
            pytest.skip("; ".join(absent))


def _absence(tool: str, apt: str | None) -> str | None:
    """Why `tool` cannot be used here, None if it can."""
    if tool == "gpu":
        return None if torch.cuda.is_available() else NO_GPU
    if shutil.which(tool):
        return None
    return f"no program {tool!r}" + (f": apt-get install {apt}" if apt else "")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _is_ci() and session.exitstatus == pytest.ExitCode.OK and _forbidden(_skipped(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    skipped = _skipped(config)
    if not skipped:
        return
    terminalreporter.section(f"SKIPPED, so not proved here: {len(skipped)}", red=True, bold=True)
    for name, reason in skipped:
        terminalreporter.line(f"{name}: {reason}")
    if _is_ci() and (forbidden := _forbidden(skipped)):
        terminalreporter.line(
            f"DRWKV_CI=1: {len(forbidden)} skips for want of something other than a GPU fail this run",
            red=True,
        )


def _skipped(config: pytest.Config) -> list[tuple[str, str]]:
    """(test, reason) of everything that was skipped, whole files included."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports: Sequence[pytest.TestReport] = reporter.stats.get("skipped", []) if reporter else []
    return [(report.nodeid, _reason(report)) for report in reports]


def _reason(report: pytest.TestReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    return reason.removeprefix("Skipped: ")


def _forbidden(skipped: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, reason) for name, reason in skipped if reason != NO_GPU]


def _is_ci() -> bool:
    return os.environ.get("DRWKV_CI") == "1"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's folder."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def house_files(root: Path) -> list[Path]:
    """All files of the checkout but what .gitignore names, relative to `root`, links not followed.

    The folders are walked rather than git asked, so that a copy without .git is checked the same way.
    """
    lines = (root / ".gitignore").read_text().split()
    ignored_at_top = {line.strip("/") for line in lines if line.startswith("/")} | {".git"}
    ignored_anywhere = {line.strip("/") for line in lines if not line.startswith("/")}
    found: list[Path] = []
    for folder, names, files in os.walk(root):
        here = Path(folder).relative_to(root)
        names[:] = [
            name
            for name in sorted(names)
            if not any(Path(name).match(pattern) for pattern in ignored_anywhere)
            and not (here == Path() and name in ignored_at_top)
        ]
        found += [here / name for name in sorted(files) if name != ".git"]
    return found

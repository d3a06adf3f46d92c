"""The account of skipped tests in conftest.py, proved on a small suite run by a pytest of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NO_TOOL = """
import pytest

@pytest.mark.needs("a-program-nobody-has", apt="its-package")
def test_with_a_tool():
    raise AssertionError("ran without its tool")
"""
WHOLE_FILE = """
import pytest

pytest.skip("a plain reason", allow_module_level=True)
"""
NO_GPU = """
import pytest

def test_on_a_gpu():
    pytest.skip("no GPU")

@pytest.mark.needs("sh")
def test_with_a_shell():
    pass
"""


def _run(root: Path, folder: Path, suite: str, *more: str, ci: bool) -> subprocess.CompletedProcess[str]:
    shutil.copy(root / "tests" / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    needs\n")
    (folder / "test_suite.py").write_text(suite)
    (folder / "test_other.py").write_text("def test_that_passes():\n    pass\n")
    environment = {name: value for name, value in os.environ.items() if name != "DRWKV_CI"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *more],
        cwd=folder,
        env=environment | ({"DRWKV_CI": "1"} if ci else {}),
        capture_output=True,
        text=True,
    )


def test_a_test_without_its_tool_is_skipped_and_named_with_the_package_to_install(root: Path, tmp_path: Path):
    run = _run(root, tmp_path, NO_TOOL, ci=False)
    assert run.returncode == 0, run.stdout
    assert "SKIPPED, so not proved here: 1" in run.stdout
    line = "test_suite.py::test_with_a_tool: no program 'a-program-nobody-has': apt-get install its-package"
    assert line in run.stdout


@pytest.mark.parametrize("more", [(), ("-n", "2")], ids=["one process", "two"])
@pytest.mark.parametrize("suite", [NO_TOOL, WHOLE_FILE], ids=["a tool", "a whole file"])
def test_ci_fails_when_anything_but_a_gpu_was_wanting(
    suite: str, more: tuple[str, ...], root: Path, tmp_path: Path
):
    run = _run(root, tmp_path, suite, *more, ci=True)
    assert run.returncode == 1, run.stdout
    assert "1 skips for want of something other than a GPU fail this run" in run.stdout


def test_ci_passes_without_a_gpu(root: Path, tmp_path: Path):
    run = _run(root, tmp_path, NO_GPU, ci=True)
    assert run.returncode == 0, run.stdout
    assert "test_suite.py::test_on_a_gpu: no GPU" in run.stdout
    assert "2 passed, 1 skipped" in run.stdout

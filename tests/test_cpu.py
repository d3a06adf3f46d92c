"""Memory that is freed is used again: a loop over large tensors costs no page faults after its first round."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from drwkv.cpu import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def fill() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        for megabytes in (1, 4, 40):
            torch.empty(megabytes << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fill()
print(fill())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_loop_over_large_tensors_faults_no_page_in_again(root):
    def faults(how: str) -> int:
        command = [sys.executable, "-c", PROGRAM, how]
        return int(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100 < 10_000 < faults("leave")

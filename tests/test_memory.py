"""What a process keeps of the memory it frees."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")

PROGRAM = """
import resource, sys
import torch
from siamese_detr.training.memory import keep_memory

def held(megabytes, count):
    blocks = [torch.ones(megabytes << 18) for _ in range(count)]
    del blocks
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize() / 2**20

if len(sys.argv) > 1:
    keep_memory(int(sys.argv[1]))
start = held(0, 0)
print(held(20, 20) - start, held(100, 4) - start)
"""


def freed_and_held(*arguments: str) -> list[float]:
    """MB that a process holds more than before after 400 were freed, in blocks of 20, then of 100."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return [float(word) for word in answer.split()]


def test_freed_blocks_are_kept_up_to_a_size() -> None:
    small, large = freed_and_held(str(32 << 20))
    assert small > 350
    assert large < small + 50
    assert min(freed_and_held(str(1 << 30))) > 350
    assert max(freed_and_held()) < 200

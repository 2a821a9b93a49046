"""What a process keeps of the memory it frees."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")

PROGRAM = """
import resource
import torch
from siamese_detr.training.memory import keep_memory, kept_memory

def freed(megabytes, count):
    blocks = [torch.ones(megabytes << 18) for _ in range(count)]
    del blocks
    return held()

def held():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize() / 2**20

start = freed(0, 0)
"""
"""Then, blocks of 20 and of 100 MB are of the sizes that a step's tensors have, and a large picture's."""


def measured(program: str) -> list[float]:
    """What ``program`` prints of MB, less those held at its start."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM + program]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    start, *values = (float(line) for line in answer.split())
    return [value - start for value in values]


def test_freed_blocks_are_kept_up_to_a_size() -> None:
    small, large = measured("keep_memory(32 << 20); print(start, freed(20, 20), freed(100, 4))")
    assert small > 350
    assert large < small + 50
    assert max(measured("print(start, freed(20, 20), freed(100, 4))")) < 200


def test_memory_is_handed_back_at_the_end_of_the_outermost_context() -> None:
    inside, between, after, later = measured("""
with kept_memory():
    with kept_memory():
        inside = freed(20, 20)
    between = held()
print(start, inside, between, held(), freed(100, 4))
""")
    assert min(inside, between) > 350
    assert max(after, later) < 100

"""What a process keeps of the memory it frees."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from siamese_detr.runtime.memory import SETTINGS

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")

PROGRAM = """
import resource
import torch
from siamese_detr.runtime.memory import keep_memory, kept_memory

def freed(megabytes, count):
    blocks = [torch.ones(megabytes << 18) for _ in range(count)]
    del blocks
    return held()

def held():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize() / 2**20

start = freed(0, 0)
"""


def measured(program: str, **environment: str) -> list[float]:
    """What ``program`` prints of MB, less those held at its start."""
    own = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-c", PROGRAM + program]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=own | environment).stdout
    start, *values = (float(word) for word in answer.split())
    return [value - start for value in values]


FREED = "print(start, freed(20, 20))"


def test_what_is_freed_is_kept() -> None:
    assert measured("keep_memory();" + FREED)[0] > 350
    assert measured(FREED)[0] < 200


def test_the_users_own_settings_stay() -> None:
    assert measured("keep_memory();" + FREED, MALLOC_TRIM_THRESHOLD_="131072")[0] < 200


def test_memory_is_handed_back_at_the_end_of_the_outermost_context() -> None:
    inside, between, after, later = measured("""
cpu = torch.device("cpu")
with kept_memory(cpu):
    with kept_memory(cpu):
        inside = freed(20, 20)
    between = held()
print(start, inside, between, held(), freed(500, 1))
""")
    assert min(inside, between) > 350
    assert max(after, later) < 100


def test_a_data_process_hands_a_large_picture_back() -> None:
    (picture,) = measured("""
from PIL import Image
from siamese_detr.runtime.processes import begin_worker
keep_memory()  # inherited
begin_worker(0)
start = held()
Image.new("RGB", (9000, 9000)).load()
print(start, held())
""")
    assert picture < 150

"""Two machines, as network namespaces joined by a virtual cable: neither can reach the other's loopback.

Skipped where namespaces cannot be made (it takes root and the command ``ip``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import slow, textured
from runs import TINY, Run, logged
from shard_files import write_tar
from siamese_detr.proposals.propose import propose
from siamese_detr.proposals.store import ProposalStore
from siamese_detr.runtime.checkpoint import list_checkpoints

PATIENCE = 120
ADDRESSES = ("10.254.77.1", "10.254.77.2")


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], check=False, capture_output=True).returncode == 0


@pytest.fixture
def machines() -> Iterator[list[list[str]]]:
    """For each of two machines, what a command must begin with to run there."""
    if not shutil.which("ip"):
        pytest.skip("there is no command ip")
    names = [f"siamese{os.getpid()}{side}" for side in "ab"]
    cables = [f"sd{os.getpid() % 10**7}{side}" for side in "ab"]
    try:
        made = [ip("netns", "add", name) for name in names]
        made.append(ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1]))
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            made.append(ip("link", "set", cable, "netns", name))
            made.append(ip("-n", name, "addr", "add", f"{address}/24", "dev", cable))
            made += [ip("-n", name, "link", "set", device, "up") for device in (cable, "lo")]
        if not all(made):
            pytest.skip("namespaces cannot be made here")
        yield [
            [
                "ip",
                "netns",
                "exec",
                name,
                "env",
                f"GLOO_SOCKET_IFNAME={cable}",
                "OMP_NUM_THREADS=1",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            ]
            for name, cable in zip(names, cables, strict=True)
        ]
    finally:
        for name in names:
            left = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True)
            for number in left.stdout.split():  # of a test that failed
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(number), signal.SIGKILL)
            ip("netns", "del", name)  # and the cable with it


def start(machine: list[str], log: Path, *command: str) -> subprocess.Popen:
    with open(log, "w") as output:
        return subprocess.Popen([*machine, sys.executable, *command], stdout=output, stderr=output)


def flags(options: dict[str, Any]) -> list[str]:
    plain = {k: v for k, v in options.items() if not isinstance(v, bool)}
    return [word for k, v in plain.items() for word in (f"--{k}", str(v))]


@slow
@pytest.mark.promise("lost-process")
def test_pretraining_over_two_machines(machines: list[list[str]], tmp_path: Path) -> None:
    """torchrun on each: the losses of one process; a killed process is made good by a restart, to the same bits."""
    (tmp_path / "photos").mkdir()
    for n in range(12):
        textured(n, 120, 90).save(tmp_path / "photos" / f"{n:02}.jpg")
    propose(images=str(tmp_path / "photos"), out=str(tmp_path / "store"), method="random", workers=1)
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "lr": 1e-5, "schedule": "constant"}
    options = TINY | still | {"images": str(tmp_path / "photos"), "proposals": str(tmp_path / "store"), "steps": 6}

    def launch(name: str, port: int) -> list[subprocess.Popen]:
        return [
            start(
                machine,
                tmp_path / f"{name}-{address}.log",
                *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=10"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{port}", f"--rdzv-id={name}"),
                # Namespaces share the host's name: it tells neither that the endpoint is its own.
                *(
                    f"--rdzv-conf=is_host={address == ADDRESSES[0]}",
                    f"--local-addr={address}",
                    "-m",
                    "siamese_detr.cli",
                    "pretrain",
                    "--no-progress",
                    "--resume",
                ),
                *flags(options | {"out": str(tmp_path / name)}),
            )
            for machine, address in zip(machines, ADDRESSES, strict=True)
        ]

    def end(name: str, processes: list[subprocess.Popen]) -> None:
        try:
            codes = [process.wait(PATIENCE) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert codes == [0, 0], "".join((tmp_path / f"{name}-{a}.log").read_text()[-3000:] for a in ADDRESSES)

    end("whole", launch("whole", 29411))
    alone = Run(options | {"out": str(tmp_path / "alone")})
    assert alone.wait(PATIENCE) == 0, alone.text
    for one, two in zip(logged(tmp_path / "alone"), logged(tmp_path / "whole"), strict=True):
        losses = {name: value for name, value in one.items() if name.startswith("loss")}
        assert {name: two[name] for name in losses} == pytest.approx(losses, rel=2e-4)

    broken = launch("broken", 29412)
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit and not any(record["step"] >= 3 for record in logged(tmp_path / "broken")):
        time.sleep(0.005)
    os.kill(int((tmp_path / "broken" / ".lock").read_text().split()[1]), signal.SIGKILL)
    end("broken", broken)
    assert len((tmp_path / "broken" / "sessions.jsonl").read_text().splitlines()) == 2
    assert logged(tmp_path / "broken") == logged(tmp_path / "whole")
    ours, theirs = (
        load_file(list_checkpoints(tmp_path / name / "checkpoints")[-1] / "model.safetensors")
        for name in ("broken", "whole")
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


SERVER = """
import functools, http.server, sys
sys.path.insert(0, sys.argv[3])
from shard_files import Ranges
http.server.ThreadingHTTPServer((sys.argv[1], 8377), functools.partial(Ranges, directory=sys.argv[2])).serve_forever()
"""


@pytest.mark.promise("proposals")
def test_proposals_in_parts_on_two_machines(machines: list[list[str]], tmp_path: Path) -> None:
    """One machine serves a shard, both compute a part of its proposals: the store is that of one machine."""
    pytest.importorskip("aiohttp")
    from shard_files import jpeg

    (tmp_path / "web").mkdir()
    write_tar(tmp_path / "web" / "a.tar", {f"{n}.jpg": jpeg(n) for n in range(7)})
    server = start(
        machines[0],
        tmp_path / "server.log",
        "-c",
        SERVER,
        ADDRESSES[0],
        str(tmp_path / "web"),
        str(Path(__file__).parents[1]),
    )
    try:
        time.sleep(0.2)
        verb = ("-m", "siamese_detr.cli", "propose", "--max-boxes=20", "--workers=1", f"--out={tmp_path / 'parts'}")
        url = f"http://{ADDRESSES[0]}:8377/a.tar"
        parts = []
        for number, machine in enumerate(machines, 1):
            log = tmp_path / f"part-{number}.log"
            for _ in range(50):  # the server imports for a while
                part = start(machine, log, *verb, f"--images={url}", f"--part={number}/2")
                if part.wait(PATIENCE) == 0 or "cannot be read" not in log.read_text():
                    break
            parts.append(part.returncode)
        assert parts == [0, 0], "".join((tmp_path / f"part-{n}.log").read_text()[-2000:] for n in (1, 2))
    finally:
        server.kill()
        server.wait()
    propose(images=str(tmp_path / "web"), out=str(tmp_path / "one"), max_boxes=20, workers=1)
    one, two = ProposalStore.open(tmp_path / "one"), ProposalStore.open(tmp_path / "parts")
    assert len(one) == len(two) == 7
    for n in range(7):
        assert np.array_equal(one.row(n).boxes, two.row(n).boxes)
        assert one.row(n).path.rpartition("/")[2] == two.row(n).path.rpartition("/")[2]

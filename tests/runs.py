"""Real processes for tests of training runs: started in milliseconds, because a server imports everything once."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
import traceback
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = dict(
    backbone="random:test_efficientnet",
    hidden_size=16,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    ffn_size=16,
    num_queries=6,
    num_regions=3,
    view_size=48,
    crop_size=32,
    batch_size=4,
    steps=8,
    save_every=2,
    log_every=1,
    lr=1e-3,
    workers=0,
    device="cpu",
    progress=False,
)
"""Options of ``pretrain`` for a run of a second."""


context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["runs", "siamese_detr.training.pretrain", "siamese_detr.proposals.propose"])


def child(log: str, options: dict[str, Any], env: dict[str, str], kill_at_flush: int | None, verb: str) -> None:
    """Run a verb as a command would: its exit code is the process's."""
    import warnings

    import torch

    from siamese_detr import load_verb
    from siamese_detr.errors import UserError
    from siamese_detr.runtime import checkpoint

    multiprocessing.set_start_method("fork", force=True)  # data workers: as outside, not through another server
    os.environ.update(env)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if kill_at_flush is not None:
        flush, calls = checkpoint.flush, [0]

        def flush_or_die(path: Path) -> None:
            calls[0] += 1
            if calls[0] == kill_at_flush:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(path)

        checkpoint.flush = flush_or_die
    if "POISON" in env:
        from siamese_detr.training import loop

        loop.report_needs = lambda run: None  # it tries steps, too
    if env.get("POISON", "none") == env.get("RANK", "0"):
        poison(step=3)
    try:
        load_verb(verb)(**options)
    except UserError as error:
        os.write(2, f"error: {error}\n".encode())
        raise SystemExit(2) from None
    except Exception:
        os.write(2, traceback.format_exc().encode())
        raise SystemExit(1) from None


def poison(step: int) -> None:
    """Make the loss of an update a NaN, in this process."""
    from siamese_detr.pretext.siamese import SiamesePretext

    forward, calls = SiamesePretext.forward, [0]

    def poisoned(self: Any, *args: Any) -> Any:
        output = forward(self, *args)
        calls[0] += 1
        if calls[0] == step:
            output.loss = output.loss * float("nan")
        return output

    SiamesePretext.forward = poisoned  # type: ignore[method-assign]


class Run:
    """A running verb."""

    def __init__(
        self,
        options: dict[str, Any],
        env: dict[str, str] | None = None,
        kill_at_flush: int | None = None,
        verb: str = "pretrain",
    ) -> None:
        self.out = Path(options["out"])
        rank = (env or {}).get("RANK", "0")
        self.log = self.out.with_name(f"{self.out.name}-{rank}.log")
        self.process = context.Process(target=child, args=(str(self.log), options, env or {}, kill_at_flush, verb))
        self.process.start()

    def wait(self, timeout: float = 60) -> int | None:
        """The exit code (negative: the signal)."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running:\n{self.text}")
        return self.process.exitcode

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def until_step(self, step: int, timeout: float = 60) -> None:
        """Return once the run has logged ``step`` or ended."""
        end = time.monotonic() + timeout
        while self.process.is_alive() and time.monotonic() < end:
            records = logged(self.out)  # read once: a run that continues may cut them back at any moment
            if records and records[-1]["step"] >= step:
                return
            time.sleep(0.005)

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def team(
    options: dict[str, Any], processes: int, verb: str = "pretrain", env: dict[str, str] | None = None
) -> list[Run]:
    """A verb in several processes, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = (env or {}) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    env["LOCAL_WORLD_SIZE"] = str(processes)
    return [Run(options, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, verb=verb) for rank in range(processes)]


def saved(out: Path, step: int) -> dict[str, Any]:
    """The weights in a run's checkpoint of a step."""
    from safetensors.torch import load_file

    return load_file(out / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")


def with_photos(base: dict[str, Any], folder: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of a run's photos with proposals of its own, which a test may damage, and the options of a run on it."""
    from siamese_detr.proposals.propose import propose

    photos, store = folder / "photos", str(folder / "store")
    shutil.copytree(base["images"], photos)
    propose(images=str(photos), out=store, method="random", workers=1)
    return photos, {**base, "images": str(photos), "proposals": store}


def logged(out: Path) -> list[dict[str, Any]]:
    """The records of a run's log, without the clock."""
    path = out / "log.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:  # being written
            break
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]

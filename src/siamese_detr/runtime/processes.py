"""The processes of a run, on one machine or many."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import Tensor

from siamese_detr.errors import UserError
from siamese_detr.runtime.cores import usable_cores
from siamese_detr.runtime.hardware import choose_device
from siamese_detr.runtime.signals import ignore_signals
from siamese_detr.runtime.streams import reader_gone

DEATH_REPORTED = 1.0
"""Seconds within which PyTorch reports the death of a data process whose connection broke off."""


class Team:
    """The processes of this run.

    Args:
        state: Accelerate's.
    """

    def __init__(self, state: PartialState) -> None:
        self.state, self.main = state, state.is_main_process
        self.rank, self.size, self.device = state.process_index, state.num_processes, state.device
        # Groups of the hosts: they need not wait for the devices. One is patient, as computing proposals may take days.
        self._hosts: Any = None
        self._patient: Any = None
        if self.size > 1:
            with lost_process_explained():
                self._hosts = dist.new_group(backend="gloo")
                self._patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier(self._patient)

    def all(self, *here: bool) -> list[bool]:
        """Which statements are true in all processes."""
        if self.size == 1:
            return list(here)
        statements = torch.tensor(here, dtype=torch.int32)
        dist.all_reduce(statements, dist.ReduceOp.MIN, self._hosts)
        return [bool(statement) for statement in statements.tolist()]

    def any(self, here: bool) -> bool:
        """Whether a statement is true in some process."""
        (nowhere,) = self.all(not here)
        return not nowhere

    def sums(self, values: Tensor) -> list[float]:
        """Sums of values over all processes, computed on the devices; the host waits for its device once."""
        values = values.to(self.device)
        if self.size > 1:
            dist.all_reduce(values)
        return values.tolist()


def begin_worker(worker: int) -> None:
    """A data process's ``worker_init_fn``."""
    ignore_signals()


def join(device: str) -> bool:
    """Meet the other processes, if a launcher (torchrun, accelerate launch) started several; whether this is the main.

    Args:
        device: see :func:`choose_device`.
    """
    if not launched():
        return True
    return meet(device).is_main_process


def meet(device: str) -> PartialState:
    """Accelerate's state, for which the processes look for each other.

    Args:
        device: see :func:`choose_device`.

    Raises:
        UserError: there is no such device, or the same one is named for several processes.
    """
    place = choose_device(device)
    if place.index is not None and device != "auto":
        if launched():
            raise UserError(f"device {device} is one device, and there are several processes: give {place.type}")
        torch.accelerator.set_device_index(place.index)
    if not (dist.is_available() and dist.is_initialized()):  # an earlier command may have had another device
        AcceleratorState._reset_state(reset_partial_state=True)
    with lost_process_explained():
        return PartialState(cpu=place.type == "cpu")


def launched() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextlib.contextmanager
def lost_process_explained() -> Iterator[None]:
    """Turn the failure of a collective operation, which is how a process learns that another has ended, into one line.

    The process that ended, or whoever killed it, has said why; the launcher ends what still runs.

    Raises:
        UserError: in place of the communication library's error.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL's errors have a type; gloo's name one of its source files.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = str(error).splitlines()[0].rpartition("] ")[2].split(" This is ")[0]
        raise UserError(
            f"another process of this run ended or cannot be reached ({reason[:150]}): its own message, if it had time "
            "for one, tells why; checkpoints are intact, continue with --resume"
        ) from error


@contextlib.contextmanager
def machine_explained(then: str) -> Iterator[None]:
    """Turn what machines do to long runs into one line each.

    Args:
        then: what to do when that is fixed.

    Raises:
        UserError: memory ended, a data process was killed, nothing could be compiled, or the operating system refused.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of memory on the accelerator: raise accumulate, lower batch_size or the images' size, use bf16 or "
            f"checkpoint_activations, and {then}"
        ) from error
    # A data process that was killed while it handed a batch over shows as a connection that breaks off.
    except (MemoryError, RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, BrokenPipeError) and reader_gone():  # of our output, as in `| head`
            raise
        if "can't allocate memory" in str(error):  # PyTorch's words for the host's
            raise UserError(
                f"out of memory: raise accumulate, lower batch_size, workers or the images' size, and {then}"
            ) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason_given = " ".join(str(error).strip().split("\n\n")[0].split())[:300]
            raise UserError(
                f"torch.compile failed ({reason_given}): give it what it misses or leave out compile, and {then}"
            ) from error
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason: Exception = error
        if isinstance(error, ConnectionError | EOFError):
            # PyTorch raises what the signal of its death says wherever the main process then is: better here than in
            # the middle of cleaning up.
            try:
                time.sleep(DEATH_REPORTED)
            except RuntimeError as death:
                reason = death
        raise UserError(
            f"a data process ended ({' '.join(str(reason).split())[:200] or 'out of memory'}): if memory ran out, "
            f"lower workers; {then}"
        ) from error
    except OSError as error:
        raise UserError(f"{error}; fix that and {then}") from error


def default_workers() -> int:
    """All cores but one, shared by the processes of this machine, at most 8."""
    return max(1, min(8, (usable_cores() - 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

"""Numbers that are not finite: keep the state before the update, and find the operation that they come from."""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from siamese_detr.detection.matching import NonFiniteError
from siamese_detr.errors import UserError
from siamese_detr.files import write_json
from siamese_detr.messages import say
from siamese_detr.runtime.checkpoint import PREFIX, verify
from siamese_detr.runtime.lock import Locked, locked
from siamese_detr.runtime.processes import Team
from siamese_detr.training.run_config import RunConfig
from siamese_detr.training.state import RunState
from siamese_detr.training.task import Task, skip

if TYPE_CHECKING:
    from siamese_detr.training.loop import Loop


def keep_for_replay(
    state: RunState,
    task: Task,
    config: RunConfig,
    team: Team,
    losses: Sequence[str],
    norm: str,
    terms: Mapping[str, float],
) -> UserError:
    """Save the state before the update and what it takes to do the step again.

    Args:
        state, task, config, team: of the run.
        losses: of the micro-batches.
        norm: of the gradient.
        terms: of the losses being logged.

    Returns:
        what to stop with.
    """
    out, step = Path(config.out), state.step
    samples = itertools.islice(skip(task.batches, step * config.accumulate), config.accumulate)
    document = {
        "step": step,
        "seed": config.seed,
        "processes": team.size,
        "process": team.rank,
        "checkpoint": f"nonfinite/{PREFIX}{step}",
        "loss": losses,
        "terms": {name: str(float(value)) for name, value in terms.items()},
        "grad_norm": norm,
        "parameters": [
            name
            for name, parameter in state.model.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ],
        "samples": list(samples),
    }
    try:
        with locked(out / "nonfinite"):  # several processes may have met it
            state.write(out / "nonfinite", state.means.state(local=True))
            write_json(out / "nonfinite.json", document)
    except Locked:
        return UserError(f"loss or gradient is not finite at step {step + 1}: see the other processes")
    return UserError(
        f"loss or gradient is not finite at step {step + 1}: stopped before the update. Samples and state are in "
        f"{out / 'nonfinite.json'}; do that step again, to see which operation is at fault, with: "
        f"{replay_command(task.verb, out, team.size)}"
    )


def replay_command(verb: str, out: Path, world: int) -> str:
    """The command that does the step of ``out/nonfinite.json`` again, in as many processes."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    words = [f"torchrun --nproc-per-node={local}"] if world > 1 else []
    words += [f"--nnodes={world // local} ..."] if world > local else []
    words += ["-m siamese_detr.cli" if world > 1 else "siamese-detr", verb]
    options = {"config": out / "config.yaml", "out": out, "replay": out / "nonfinite.json"}
    return " ".join([*words, *(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())])


def replay(loop: Loop, document: Path) -> str:
    """Do the step that ended a run again from its saved state, watching for the first non-finite number.

    Args:
        loop: of the same task and configuration.
        document: the ``nonfinite.json`` of the run.

    Returns:
        what was found. No update is made and nothing is written.
    """
    try:
        values = json.loads(document.read_text(encoding="utf-8"))
        checkpoint = document.parent / values["checkpoint"]
        step = int(values["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {document}: give the nonfinite.json of a run ({error})") from error
    verify(checkpoint)
    if values.get("processes", 1) != loop.team.size:
        say(
            f"the step was done by {values['processes']} processes, and this is {loop.team.size}: dropout is drawn "
            "otherwise",
        )
    loop.state.restore(checkpoint, loop.team.device)
    loop.model.train()
    batches = loop.batches(step)
    with watch(loop.task.model) as found:
        try:
            update = loop.gradients(step, [next(batches) for _ in range(loop.config.accumulate)], replaying=True)
            losses = [loss.item() for loss in update.losses]
            outcome = f"loss {losses}, gradient norm {update.norm.item()}; no update made"
        except (RuntimeError, NonFiniteError) as error:
            outcome = str(error).splitlines()[0]
    return f"step {step + 1}: {outcome}" + "".join(f"\n  not finite: {name}" for name in found[:10])


@contextmanager
def watch(model: nn.Module) -> Iterator[list[str]]:
    """Within, the list fills with the modules whose output was not finite, in the order of the forward pass; the
    backward pass raises ``RuntimeError`` naming the operation whose gradient is NaN. Slow.
    """
    found: list[str] = []

    def hook(name: str) -> Any:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(bool(tensor.isfinite().all()) for tensor in tensors(output)):
                source = "from finite inputs" if all(bool(t.isfinite().all()) for t in tensors(inputs)) else "passed on"
                found.append(f"{name or 'the whole model'} ({type(module).__name__}, {source})")

        return check

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.autograd.set_detect_anomaly(True):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)

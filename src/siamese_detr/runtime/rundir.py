"""The run directory: begun once, refused when it is another's, and a record of what ran in it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from siamese_detr.config import write_config
from siamese_detr.errors import UserError
from siamese_detr.files import clean
from siamese_detr.messages import say
from siamese_detr.runtime.cores import usable_cores
from siamese_detr.runtime.journal import JsonLines

CONFIG = "config.yaml"
SESSIONS = "sessions.jsonl"
PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "timm",
    "safetensors",
    "numpy",
    "scipy",
    "numba",
    "pillow",
)


class RunConfig(Protocol):
    """What a verb's configuration must have to own a run directory."""

    resume: bool

    @property
    def schedule(self) -> str: ...

    def changes(self, before: dict[str, Any]) -> list[str]: ...


def check_place(out: Path) -> None:
    """Raise :class:`UserError` if ``out`` holds something that is no run; nothing is written."""
    try:
        visible = {path.name for path in out.iterdir() if not path.name.startswith(".")} - {"proposals"}
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}; choose another directory") from error
    if {CONFIG, SESSIONS} <= visible or not visible:
        return
    try:
        before = yaml.safe_load((out / CONFIG).read_text(encoding="utf-8")) if visible == {CONFIG} else None
    except (OSError, ValueError, yaml.YAMLError):
        before = None
    if not (isinstance(before, dict) and "resume" in before):
        raise UserError(f"{out} is not empty and holds no run: choose another directory")


def begin(out: Path, config: RunConfig) -> None:
    """Prepare ``out`` for a new run, or for one that goes on.

    Raises:
        UserError: there is a run already and ``config.resume`` is off; there is something else; or the run there began
            with settings that compute something else.
    """
    check_place(out)
    file = out / CONFIG
    # A run that stopped before it began (bad input) may begin again with other settings.
    if (out / SESSIONS).is_file():
        if not config.resume:
            raise UserError(f"{out} already holds a run: continue it with --resume, or choose another directory")
        try:
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
            changes = config.changes(dict(before))
        except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"cannot read {file}, so the run cannot be continued: {error}") from error
        if changes:
            raise UserError(f"--resume continues the run in {out} as it began, but {'; '.join(changes)}")
        if config.schedule != "constant" and any(
            before.get(n, getattr(config, n)) != getattr(config, n) for n in ("steps", "epochs")
        ):
            say(
                f"other steps or epochs than {out} began with: from here on, the learning rate's schedule "
                f"({config.schedule}) is that of the new length",
            )
        for folder in (out, out / "checkpoints"):
            clean(folder)
        return
    try:
        write_config(config, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def record_session(out: Path, **facts: Any) -> None:
    """Append to ``sessions.jsonl`` what is about to run, in which environment.

    Args:
        facts: JSON values to add, e.g. the step that the session starts from.
    """
    record = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "directory": os.getcwd(),
        "siamese_detr": installed("siamese-detr"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        **facts,
    }
    JsonLines(out / SESSIONS).append([record])


def check_session(out: Path, facts: Mapping[str, Any]) -> None:
    """Record this session; refuse to continue a run on something else than it began with.

    Args:
        facts: name for people -> a number, or the hash of a content.
    """
    before = sessions(out)
    for name, value in facts.items():
        if before and before[0].get(name, value) != value:
            what = f"{name} {before[0][name]}, and now there are {value}" if isinstance(value, int) else f"other {name}"
            raise UserError(
                f"{out} began with {what}: a run cannot be continued on something else; begin another one (with "
                "--init, from this one's detector)"
            )
    record_session(out, **facts)


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def sessions(out: Path) -> list[dict[str, Any]]:
    """What ran in ``out`` so far, oldest first."""
    return JsonLines(out / SESSIONS).read()

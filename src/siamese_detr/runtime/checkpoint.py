"""Checkpoints that are whole or not there: safetensors and JSON, written aside, checksummed, renamed into place.

``checkpoint-<step>/`` holds ``*.safetensors``, ``*.json`` and ``manifest.json``, which is written last and names the
size and SHA-256 of every other file. A process killed at any moment leaves either the complete directory or an ignored
temporary one. Pickles are neither written nor read: a directory that holds one is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from siamese_detr.errors import UserError
from siamese_detr.files import TEMPORARY, discard, flush

FORMAT = 1
"""Raised when what a checkpoint's files hold changes such that older ones cannot be continued. (The first releases
wrote no number: they are of format 1.)"""

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
SUFFIXES = (".safetensors", ".json")


class OtherFormat(UserError):
    """The checkpoint is whole, but another release of siamese-detr wrote it, and this one cannot continue it."""

    def __init__(self, checkpoint: Path, found: str) -> None:
        super().__init__(
            f"checkpoint {checkpoint} was written by another release of siamese-detr ({found}), and this one cannot "
            "continue it: continue with the release that the run's sessions.jsonl names, or begin another run from the "
            "detector that this one saved"
        )


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
    keep: int = 0,
) -> Path:
    """Write ``folder/checkpoint-<step>`` atomically and return it.

    Args:
        folder: where the checkpoints of a run live; made if missing.
        step: number of updates done.
        tensors: file stem -> named tensors, each written as ``<stem>.safetensors``.
        documents: file stem -> JSON-serialisable value, each written as ``<stem>.json``.
        keep: how many of the newest checkpoints remain (0: all). Older ones go only once the new one is in place.

    Raises:
        UserError: the files cannot be written (disk full, no permission). What was there before is untouched.
    """
    target = folder / f"{PREFIX}{step}"
    temporary = folder / f"{TEMPORARY}{target.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        for stem, named in tensors.items():
            save_file(unshared(named), temporary / f"{stem}.safetensors", metadata={"format": "pt"})
        for stem, document in documents.items():
            (temporary / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        files = {path.name: fingerprint(path) for path in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            shutil.copymode(temporary / MANIFEST, path)  # safetensors makes files that only their owner may read
            flush(path)
        flush(temporary)
        if target.exists():  # the same step again: a run that went back to an older checkpoint, or one found damaged
            discard(target)
        os.replace(temporary, target)
        flush(folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write checkpoint {target}: {error}; earlier checkpoints are intact: free disk space (or lower "
            "`keep`) and continue with --resume"
        ) from error
    prune(folder, step, keep)
    return target


def prune(folder: Path, step: int, keep: int) -> None:
    """Leave the ``keep`` newest checkpoints up to ``step`` (0: all). Later ones are of a run that went back, because
    they are damaged: they neither count nor go.
    """
    if keep > 0:
        for old in [path for path in list_checkpoints(folder) if step_of(path) <= step][:-keep]:
            discard(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint directories of ``folder``, oldest first, whether valid or not."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit() and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[len(PREFIX) :])


def verify(checkpoint: Path) -> None:
    """Raise :class:`UserError` unless every file of ``checkpoint`` is there, unchanged, and of a kind that is safe;
    :class:`OtherFormat` if only its format is in the way."""
    if not checkpoint.is_dir():
        raise UserError(f"there is no checkpoint {checkpoint}")
    for path in checkpoint.iterdir():
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"checkpoint {checkpoint} holds {path.name}: only safetensors and JSON are read, never pickles"
            )
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files, written = dict(manifest["files"]), manifest.get("format", 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged: {MANIFEST} is missing or unreadable") from error
    if written != FORMAT:
        raise OtherFormat(checkpoint, f"its format is {written!r}, this release's is {FORMAT}")
    if extra := {path.name for path in checkpoint.iterdir()} - files.keys() - {MANIFEST}:
        raise UserError(f"checkpoint {checkpoint} is damaged: {sorted(extra)[0]} does not belong to it")
    for name, expected in files.items():
        try:
            same = fingerprint(checkpoint / name) == expected
        except OSError as error:
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} cannot be read ({error})") from error
        if not same:
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} does not have the size or checksum recorded")


def latest_valid(folder: Path, report: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint of ``folder`` that verifies; each damaged one passed over goes to ``report``.

    Returns None where there is no checkpoint at all. Raises :class:`UserError` where there are some, all damaged
    (silently starting over would throw the run away), or one of another format.
    """
    checkpoints = list_checkpoints(folder)
    for checkpoint in reversed(checkpoints):
        try:
            verify(checkpoint)
            return checkpoint
        except OtherFormat:
            raise
        except UserError as error:
            report(f"{error}; trying the one before")
    if checkpoints:
        raise UserError(f"all {len(checkpoints)} checkpoints in {folder} are damaged; start again in another directory")
    return None


def read_tensors(checkpoint: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of ``<stem>.safetensors``, on the CPU; whatever else the file is, it is not read."""
    try:
        return load_file(checkpoint / f"{stem}.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{checkpoint / stem}.safetensors cannot be read or is not safetensors: {error}") from error


def read_document(checkpoint: Path, stem: str) -> Any:
    """The value of ``<stem>.json``."""
    return json.loads((checkpoint / f"{stem}.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def understood(checkpoint: Path) -> Iterator[None]:
    """Context for using what verified files hold: if it is not what this release writes, :class:`OtherFormat`."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError) as error:
        raise OtherFormat(checkpoint, f"{type(error).__name__}: {' '.join(str(error).split())[:150]}") from error


def fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def unshared(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, tied ones copied: safetensors stores no aliases, and ``load_state_dict`` needs none."""
    seen: set[int] = set()
    result = {}
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def pack_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors (``<parameter>:<key>``) and a JSON document (scalars, groups by name)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{order[index]}:{key}"] = value
    groups = [
        {key: [order[index] for index in value] if key == "params" else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"scalars": scalars, "param_groups": groups}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> None:
    """Restore what :func:`pack_optimizer` gave. Raises :class:`UserError` where the parameter groups differ."""
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    if groups != [group["params"] for group in document["param_groups"]]:
        raise UserError("the checkpoint's optimizer is of other parameters: --resume must continue the same run")
    index = {name: position for position, name in enumerate(name for group in groups for name in group)}
    state: dict[int, dict[str, Any]] = {}
    for entries in (tensors, document["scalars"]):
        for entry, value in entries.items():
            name, _, key = entry.rpartition(":")
            if isinstance(value, Tensor) and value.shape == parameters[name].shape:
                # In the parameter's memory format, channels last for some: fused optimisers ask for the same.
                value = torch.empty_like(parameters[name], dtype=value.dtype, device=value.device).copy_(value)
            state.setdefault(index[name], {})[key] = value
    position = 0
    param_groups = []
    for saved, group in zip(document["param_groups"], optimizer.param_groups, strict=True):
        # JSON has no tuples (Adam's betas): the types are those of the optimizer at hand.
        values = {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items() if k != "params"}
        param_groups.append(values | {"params": list(range(position, position + len(saved["params"])))})
        position += len(saved["params"])
    optimizer.load_state_dict({"state": state, "param_groups": param_groups})

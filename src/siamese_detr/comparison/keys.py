"""Keys of runs: hashes of everything that determines a result, so that nothing is run twice."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from siamese_detr.detectors.loading import find_detector
from siamese_detr.images.listing import ImageList

OPERATION = {
    *("out", "resume", "replay", "workers", "device", "progress", "report_to", "keep", "save_every", "log_every"),
    *("max_bad_share", "eval_batch_size", "checkpoint_activations", "kernels", "shard_size", "flush_seconds"),
    *("retry_failed", "bank_dir", "keep_bank", "compile", "pages"),
}
"""Settings of the verbs that do not change what is computed; they are not part of a key."""
PLACES = {"images", "proposals", "init", "train", "val", "train_images", "val_images", "model", "unlabelled"}
"""Settings that name files; a key has the files' content instead."""


def slug(name: str) -> str:
    """A folder name for an initialisation: its own name if possible, else its end and a hash."""
    if re.fullmatch(r"[\w.+-]{1,60}", name) and not name.startswith("."):
        return name
    short = re.sub(r"[^\w.+-]+", "-", name).strip("-.")[-40:]
    return f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def key_of(verb: str, options: Mapping[str, Any], **contents: str) -> str:
    """Twelve hexadecimal digits: a hash of all options that determine a result, and of what its files contain."""
    kept = {name: value for name, value in options.items() if name not in OPERATION | PLACES}
    text = json.dumps([verb, kept, contents], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def detector_key(source: str) -> str:
    """Hash of a detector's configuration and weights."""
    path = find_detector(source)
    files = [path] if path.is_file() else [path / "config.json", *path.glob("*.safetensors"), *path.glob("*.bin")]
    digest = hashlib.sha256()
    for file in sorted(files):
        with open(file, "rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def images_key(images: ImageList) -> str:
    """Hash of the list of images (not of their pixels)."""
    digest = hashlib.sha256()
    for path in images.paths:
        digest.update(path.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()

"""What a comparison consists of: proposals, pre-trainings, fine-tunings, each with a key of all that determines it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from siamese_detr.config import read_sources, validate, validate_value
from siamese_detr.detectors import plan_detector
from siamese_detr.detectors.build import DetectorPlan
from siamese_detr.errors import UserError
from siamese_detr.evaluation.inference import find_detector
from siamese_detr.images.listing import ImageList
from siamese_detr.proposals.propose import ProposeConfig
from siamese_detr.training.finetune_config import FinetuneConfig
from siamese_detr.training.pretrain_config import PretrainConfig

METHODS = ("siamese", "up-detr", "detreg")
OPERATION = {
    *("out", "resume", "replay", "workers", "device", "progress", "report_to", "keep", "save_every", "log_every"),
    *("max_bad_share", "eval_batch_size", "checkpoint_activations", "kernels", "shard_size", "flush_seconds"),
    *("retry_failed", "bank_dir", "compile"),
}
"""Settings of the verbs that do not change what is computed: they are no part of a key."""
SHARED = {
    *("detector", "backbone", "num_queries", "hidden_size", "heads", "encoder_layers", "decoder_layers", "ffn_size"),
    *("dropout", "attention_dropout", "activation_dropout", "detector_options"),
}
"""Settings of the detector, which pre-training and fine-tuning have in common."""
INLINE = re.compile(rf"((?:.*\+)?(?:{'|'.join(METHODS)})):(\w+=.*)")
"""A method and options of its pre-training, ``siamese:discrimination=none,iou=0.3``."""
OPTION = re.compile(r"(\w+)=(.*?)(?:,(?=\w+=)|$)")
NEW = ("scratch", "backbone")
"""What a new detector can start from."""


@dataclass(frozen=True)
class Init:
    """An initialisation.

    Args:
        name: as the user named it.
        start: ``scratch`` (everything random), ``backbone`` (only the backbone pre-trained) or the path of a detector.
        method: how it is pre-trained before fine-tuning; None: not at all.
        options: further options of this pre-training.
    """

    name: str
    start: str
    method: str | None
    options: Mapping[str, Any]

    @property
    def stored(self) -> bool:
        """Whether it starts from a stored detector, not from a new one."""
        return self.start not in NEW


@dataclass(frozen=True)
class Task:
    """One run of a verb.

    Args:
        name: for people, unique.
        verb: propose, pretrain or finetune.
        folder: where its runs are kept; this one in ``folder/run-<key>``.
        options: its complete configuration, without ``out`` and ``resume``.
        key: hash of all that determines its result.
        needs: names of the tasks whose output it reads.
        cell: (init, fraction, seed) of a fine-tuning.
    """

    name: str
    verb: str
    folder: Path
    options: Mapping[str, Any]
    key: str
    needs: tuple[str, ...] = ()
    cell: tuple[str, float, int] | None = None

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / f"run-{self.key}"


@dataclass(frozen=True)
class Protocol:
    """What a comparison is to do, validated.

    Args:
        out: its directory, absolute.
        images, images_key: unlabelled images, and the hash of their list.
        labels_key: hash of the training and validation labels.
        propose, pretrain, finetune: complete configurations, but for what differs between the initialisations.
        inits, fractions, seeds: the cells.
        by_fraction: further fine-tuning options at a label fraction, for all initialisations alike.
        counts: number of labelled images of each (fraction, seed).
        pretrain_each_seed: pre-train anew for every seed.
        inputs: what the images and labels hold, in words.
    """

    out: Path
    images: str
    images_key: str
    labels_key: str
    propose: ProposeConfig
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    inits: Sequence[Init]
    fractions: Sequence[float]
    seeds: Sequence[int]
    by_fraction: Mapping[float, Mapping[str, Any]]
    counts: Mapping[tuple[float, int], int]
    pretrain_each_seed: bool = False
    inputs: str = ""


def split_init(name: str) -> tuple[str, dict[str, str]]:
    """``siamese:iou=0.3`` as ``siamese`` and ``{"iou": "0.3"}``; any other name as it is, without options."""
    found = INLINE.fullmatch(name)
    return (found[1], dict(OPTION.findall(found[2]))) if found else (name, {})


def parse_init(name: str, variants: Mapping[str, Mapping[str, Any]]) -> Init:
    """The initialisation that ``name`` means.

    Args:
        name: ``scratch``, ``backbone``, a method, ``PATH`` or ``PATH+METHOD``, a method with options of its
            pre-training (``siamese:discrimination=none,iou=0.3``), or the name of a variant.
        variants: options of pre-training by initialisation; an entry with a ``method`` defines an initialisation.

    Raises:
        UserError: it means nothing.
    """
    options = dict(variants.get(name, {}))
    method = options.pop("method", None)
    if method is not None:
        if method not in METHODS:
            raise UserError(f"variant {name!r} has method {method!r}; there are: {', '.join(METHODS)}")
        start = str(options.pop("init", "backbone"))
        return Init(name, start, method, options)
    if name in NEW:
        if options:
            raise UserError(f"{name!r} is not pre-trained: it takes no pre-training options")
        return Init(name, name, None, {})
    bare, written = split_init(name)
    if written:  # what the variants say of the method holds for it with these options too
        options = {**variants.get(bare, {}), **options, **written}
    if bare in METHODS:
        return Init(name, "backbone", bare, options)
    path, plus, last = bare.rpartition("+")
    if plus and last in METHODS:
        return Init(name, path, last, options)
    if not Path(name).expanduser().exists():
        raise UserError(
            f"initialisation {name!r} is neither scratch, backbone, one of {', '.join(METHODS)} (alone or as in "
            "siamese:iou=0.3), a variant, nor the path of a detector (nor PATH+METHOD)"
        )
    return Init(name, name, None, {})


def resolve(
    kind: type[Any],
    recipe: str | None,
    overrides: Mapping[str, Any],
    fixed: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
) -> Any:
    """A verb's complete configuration: ``base``, recipe (name or YAML path), options, ``fixed``, the later winning.

    Options given as text are read as YAML where the field is no text: ``"[480, 512]"`` is a list.
    """
    source = f"{kind.__name__.removesuffix('Config').lower()} options"
    types = get_type_hints(kind)
    values = dict(base or {}) | read_sources(kind, recipe, None)
    for name, value in overrides.items():
        if name in fixed:
            raise UserError(f"{name} in {source} is not for you to set: the comparison sets it")
        if isinstance(value, str) and name in types:
            try:
                validate_value(name, value, types[name], source)
            except UserError:
                value = yaml.safe_load(value)
        values[name] = value
    return validate(kind, values | dict(fixed), source)


def tasks(protocol: Protocol) -> list[Task]:
    """All tasks of a comparison, those that others need first."""
    made: dict[str, Task] = {}
    for seed in protocol.seeds:
        for fraction in protocol.fractions:
            for init in protocol.inits:
                needs: tuple[str, ...] = ()
                if init.method is not None:
                    pretrained = pretrain_task(protocol, init, seed, made)
                    needs = (pretrained.name,)
                cell = finetune_task(protocol, init, fraction, seed, made[needs[0]] if needs else None)
                made[cell.name] = cell
    return sorted(made.values(), key=lambda task: ("propose", "pretrain", "finetune").index(task.verb))


def check_detectors(tasks: Sequence[Task]) -> None:
    """See that every detector that is to be made new can be, before hours of proposals and pre-training.

    Raises:
        UserError: one cannot, or has too few queries for the regions.
    """
    planned: dict[str, DetectorPlan] = {}
    for task in tasks:
        kind = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}.get(task.verb)
        if kind is None or task.options.get("init") or task.options.get("model"):
            continue
        config: Any = validate(kind, {**task.options, "out": "-"}, task.name)
        sizes = {name: value for name, value in config.sizes().items() if value is not None}
        key = json.dumps([config.detector, config.backbone, sizes], sort_keys=True)
        if key not in planned:
            with warnings.catch_warnings(action="ignore"):  # the runs give them
                planned[key] = plan_detector(config.detector, config.backbone, **sizes)
        if task.verb == "pretrain":
            try:
                config.check_queries(planned[key].size.num_queries)
            except UserError as error:
                raise UserError(f"{task.name}: {error}") from None


def propose_task(protocol: Protocol, method: str, made: dict[str, Task]) -> Task:
    name = f"proposals {method}"
    if name not in made:
        options = plain(protocol.propose) | {"images": protocol.images, "method": method}
        # With the images' place: a store finds its images only where they were. What reads it asks for the boxes alone.
        key = hash_of("propose", options, images=protocol.images_key)
        made[name] = Task(name, "propose", protocol.out / "proposals" / method, options, key)
    return made[name]


def pretrain_task(protocol: Protocol, init: Init, seed: int, made: dict[str, Task]) -> Task:
    base = plain(protocol.pretrain)
    seed = seed if protocol.pretrain_each_seed else base["seed"]
    name = f"pre-training {init.name}" + (f", seed {seed}" if protocol.pretrain_each_seed else "")
    if name in made:
        return made[name]
    overrides = dict(init.options)
    if init.method == "detreg":  # its paper's proposals, unless told otherwise
        overrides.setdefault("proposal_method", "selective-search")
    fixed: dict[str, Any] = {"images": protocol.images, "out": "-", "method": init.method, "seed": seed}
    start_key = ""
    if init.stored:
        fixed["init"], start_key = str(find_detector(init.start).absolute()), detector_key(init.start)
        overrides["detector"] = family_of(init.start)
    options = plain(resolve(PretrainConfig, None, overrides, fixed, base))
    if init.start == "scratch":
        options["backbone"] = random_backbone(options["backbone"])
    needs: tuple[str, ...] = ()
    store_key = str(options["proposals"])
    if options["proposals"] is None:
        store = propose_task(protocol, options["proposal_method"], made)
        boxes = {k: v for k, v in store.options.items() if k != "images"}
        needs, store_key = (store.name,), hash_of("propose", boxes)
        options["proposals"] = str(store.run)
    hashed = {k: v for k, v in options.items() if k not in ("proposals", "init", "images")}
    key = hash_of("pretrain", hashed, images=protocol.images_key, proposals=store_key, start=start_key)
    folder = protocol.out / "pretrained" / slug(init.name) / (f"seed-{seed}" if protocol.pretrain_each_seed else "")
    made[name] = Task(name, "pretrain", folder, options, key, needs)
    return made[name]


def finetune_task(protocol: Protocol, init: Init, fraction: float, seed: int, pretrained: Task | None) -> Task:
    fixed: dict[str, Any] = {"fraction": fraction, "seed": seed, "out": "-"}
    fixed |= {"train": protocol.finetune.train, "val": protocol.finetune.val, "model": None, "init": None}
    start_key = ""
    if pretrained is not None:
        fixed["model"], start_key = str(pretrained.run), pretrained.key
    elif init.stored:
        fixed["model"], start_key = str(find_detector(init.start).absolute()), detector_key(init.start)
    further = protocol.by_fraction.get(fraction, {})
    options = plain(resolve(FinetuneConfig, None, further, fixed, plain(protocol.finetune)))
    if init.start == "scratch" and fixed["model"] is None:
        options["backbone"] = random_backbone(options["backbone"])
    hashed = {k: v for k, v in options.items() if k not in ("train", "val", "train_images", "val_images", "model")}
    key = hash_of("finetune", hashed, labels=protocol.labels_key, start=start_key)
    folder = protocol.out / "cells" / slug(init.name) / f"{fraction:g}" / str(seed)
    name = f"fine-tuning {init.name}, {100 * fraction:g} %, seed {seed}"
    return Task(
        name, "finetune", folder, options, key, (pretrained.name,) if pretrained else (), (init.name, fraction, seed)
    )


def same_detector(
    pretrain: PretrainConfig, finetune: FinetuneConfig, told: Mapping[str, Any] | None = None
) -> FinetuneConfig:
    """``finetune`` such that it builds, from scratch, the detector that ``pretrain`` pre-trains.

    Args:
        told: fine-tuning options that the user gave; a recipe's yield silently.

    Raises:
        UserError: it was told to build another one.
    """
    wanted = {name: getattr(pretrain, name) for name in SHARED}
    for name in sorted(SHARED & (told or {}).keys()):
        if (value := getattr(finetune, name)) != wanted[name]:
            raise UserError(
                f"fine-tuning has {name}={value!r}, pre-training {wanted[name]!r}: all initialisations must be the "
                "same detector; set it in the pre-training options"
            )
    return dataclasses.replace(finetune, **wanted)


def same_input(pretrain: PretrainConfig, finetune: FinetuneConfig) -> FinetuneConfig:
    """``finetune`` with its image size said outright: a detector's own size would differ between initialisations."""
    square = finetune.square if finetune.square is not None else pretrain.view_size is not None
    size = finetune.image_size or pretrain.view_size or 800
    return dataclasses.replace(finetune, image_size=size, square=square)


def random_backbone(name: str) -> str:
    return name if name.startswith("random:") else f"random:{name}"


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON-like values, without where it goes."""
    values = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k not in ("out", "resume")}


def slug(name: str) -> str:
    """A folder name for an initialisation: itself if it can be one, else its end and a hash."""
    if re.fullmatch(r"[\w.+-]{1,60}", name) and not name.startswith("."):
        return name
    short = re.sub(r"[^\w.+-]+", "-", name).strip("-.")[-40:]
    return f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def hash_of(verb: str, options: Mapping[str, Any], **others: str) -> str:
    """Twelve hexadecimal digits of everything that determines a result."""
    kept = {name: value for name, value in options.items() if name not in OPERATION}
    text = json.dumps([verb, kept, others], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def family_of(directory: str) -> str:
    """The family of a stored detector, whatever the other initialisations are."""
    config = find_detector(directory) / "config.json"
    try:
        return str(json.loads(config.read_text(encoding="utf-8"))["model_type"]).replace("_", "-")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config} cannot be read: it is no detector's ({type(error).__name__})") from error


def detector_key(directory: str) -> str:
    """Hash of a detector's configuration and weights."""
    path = find_detector(directory)
    digest = hashlib.sha256()
    for file in sorted([path / "config.json", *path.glob("*.safetensors")]):
        with open(file, "rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def images_key(images: ImageList) -> str:
    """Hash of the list of images (not of their pixels)."""
    digest = hashlib.sha256()
    for path in images.paths:
        digest.update(path.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()

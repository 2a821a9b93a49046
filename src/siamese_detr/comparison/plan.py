"""The runs of a comparison: proposals, pre-trainings, fine-tunings, each with a key of all that determines it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from siamese_detr.comparison.compare_config import CompareConfig
from siamese_detr.comparison.inits import Init, parse_init, short_names, split_init
from siamese_detr.comparison.keys import detector_key, images_key, key_of, slug
from siamese_detr.config import effective, plain, read_sources, refuse_idle, validate, validate_value
from siamese_detr.detectors import plan_detector
from siamese_detr.detectors.build import DetectorPlan
from siamese_detr.detectors.loading import find_detector
from siamese_detr.detectors.structures import DetectorOptions
from siamese_detr.errors import UserError
from siamese_detr.images.labels import dataset_key, read_labels
from siamese_detr.images.listing import list_images
from siamese_detr.images.names import class_map
from siamese_detr.pretext import find_pretext
from siamese_detr.proposals.methods import find_method
from siamese_detr.proposals.propose import ProposeConfig
from siamese_detr.training.checks import FORWARD_SHARE
from siamese_detr.training.finetune_config import FinetuneConfig
from siamese_detr.training.labelled_dataset import repeat_factors
from siamese_detr.training.pretrain_config import PretrainConfig

VERBS = ("propose", "pretrain", "finetune")


@dataclass(frozen=True)
class Task:
    """One run of a verb.

    Args:
        name: for people, unique.
        verb: propose, pretrain or finetune.
        folder: where its runs are kept; this one in ``folder/run-<key>``.
        options: those of its configuration that have an effect, without ``out`` and ``resume``.
        key: hash of everything that determines its result.
        needs: names of the tasks whose output it reads.
        cell: (init, fraction, seed) of a fine-tuning.
        images: number of labelled images of a fine-tuning.
        steps: of a training.
        work: how long it takes, in images of fine-tuning's size trained on.
    """

    name: str
    verb: str
    folder: Path
    options: Mapping[str, Any]
    key: str
    needs: tuple[str, ...] = ()
    cell: tuple[str, float, int] | None = None
    images: int | None = None
    steps: int = 0
    work: float = 0.0

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / f"run-{self.key}"


class Plan:
    """All runs of a comparison. Making it reads every input, so that mistakes show before hours of training.

    Args:
        config: with nothing left to fill in: inits, fractions and seeds are given.

    Attributes:
        out: the directory of the comparison, absolute.
        tasks: the runs, those that others need first.
        named: the same by name.
        validation: the labels to measure on.
        inputs: what images and labels contain, in words.

    Raises:
        UserError: a mistake in the configuration, the images, the labels or the detectors.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.config, self.out = config, absolute(config.out)
        self.fractions, self.seeds = config.fractions or (), config.seeds or ()
        check(config)
        inits = [parse_init(name, config.pretrain_at) for name in config.inits or ()]
        self.images, train = absolute(config.images), str(absolute(config.train))
        val = str(absolute(config.val)) if config.val is not None else None  # finetune finds that of TRAIN
        # What differs between the runs is filled in later; here it is only reserved.
        reserved: dict[str, Any] = {"images": str(self.images), "out": "-"}
        self.propose: ProposeConfig = resolve(ProposeConfig, None, config.propose, reserved)
        reserved |= {"method": "siamese", "init": None}
        self.pretrain: PretrainConfig = resolve(PretrainConfig, config.pretrain_recipe, config.pretrain, reserved)
        reserved = {"train": train, "val": val, "out": "-", "fraction": 1.0, "seed": 0, "model": None, "init": None}
        reserved["unlabelled"] = None
        finetune: FinetuneConfig = resolve(FinetuneConfig, config.finetune_recipe, config.finetune, reserved)
        if any(not init.stored and init.method is None for init in inits):
            finetune = same_detector(self.pretrain, finetune, config.finetune)
        # A detector's own image size would differ between initialisations.
        square = finetune.square if finetune.square is not None else self.pretrain.view_size is not None
        size = finetune.image_size or self.pretrain.view_size or 800
        self.size, self.finetune = size, dataclasses.replace(finetune, image_size=size, square=square)
        self.finetune_at = {fraction_of(name, self.fractions): at for name, at in config.finetune_at.items()}
        self.labels = short_names(inits)
        self.read_inputs(unlabelled=any(init.method or init.then for init in inits))
        self.named: dict[str, Task] = {}
        for seed in self.seeds:
            for fraction in self.fractions:
                for init in inits:
                    self.add_finetuning(init, fraction, seed)
        self.tasks = sorted(self.named.values(), key=lambda task: VERBS.index(task.verb))
        check_detectors(self.tasks)

    def read_inputs(self, unlabelled: bool) -> None:
        """Read the labels and, if any run needs it, the list of unlabelled images."""
        config = self.config
        self.training = training = read_labels(self.finetune.train, self.finetune.train_images)
        if not self.finetune.find_validation():
            raise UserError(f"{config.train} has no validation split: give the labels to measure on with --val")
        self.validation = validation = read_labels(
            str(self.finetune.val), self.finetune.val_images, default_split="val"
        )
        class_map(training.class_names, validation.class_names)  # raises if there is no class in common
        self.labels_key = dataset_key(training, validation)
        self.counts = {(f, s): len(training.take(f, s)) for f in self.fractions for s in self.seeds}
        self.images_key, self.inputs = "", ""
        if unlabelled:
            images = list_images(str(self.images))
            self.images_key, self.image_count = images_key(images), len(images)
            self.inputs = f"unlabelled images: {len(images)} in {config.images}\n"
        self.inputs += (
            f"labels: {len(training)} images with {len(training.class_names)} classes in {config.train}; measured on "
            f"{len(validation)} images of {config.val or config.train}, at the {config.evaluation} evaluation"
        )

    def add(self, task: Task) -> Task:
        return self.named.setdefault(task.name, task)

    def add_proposals(self, method: str) -> Task:
        find_method(method)
        options = options_of(dataclasses.replace(self.propose, images=str(self.images), method=method))
        # With the place of the images: a store finds its images only there.
        key = key_of("propose", options, images=self.images_key, place=str(self.images))
        return self.add(
            Task(f"proposals {method}", "propose", self.out / "proposals" / method, options, key, work=self.image_count)
        )

    def add_pretraining(self, init: Init, seed: int) -> Task:
        each = self.config.pretrain_each_seed
        seed = seed if each else self.pretrain.seed
        overrides = dict(init.options)
        assert init.method is not None
        fixed: dict[str, Any] = {"images": str(self.images), "out": "-", "method": init.method, "seed": seed}
        start_key = ""
        if init.stored:
            fixed["init"], start_key = str(find_detector(init.start).absolute()), detector_key(init.start)
        base = plain(self.pretrain)
        paper_proposals = find_pretext(init.method).paper_proposals
        if paper_proposals not in (None, PretrainConfig.proposal_method):
            base["proposal_method"] = paper_proposals
        config: PretrainConfig = resolve(PretrainConfig, None, overrides, fixed, base)
        if init.start == "scratch":
            config = dataclasses.replace(config, backbone=random_backbone(config.backbone))
        needs: tuple[str, ...] = ()
        proposals_key = str(config.proposals)
        if config.proposals is None:
            store = self.add_proposals(config.proposal_method)
            needs, proposals_key = (store.name,), key_of("propose", store.options)
            config = dataclasses.replace(config, proposals=str(store.run))
        options = options_of(config)
        key = key_of("pretrain", options, images=self.images_key, proposals=proposals_key, start=start_key)
        name = f"pre-training {self.labels.get(init.pretrained, init.pretrained)}" + (f", seed {seed}" if each else "")
        folder = self.out / "pretrained" / slug(init.pretrained) / (f"seed-{seed}" if each else "")
        steps, area = config.total_steps(self.image_count), ((config.view_size or self.size) / self.size) ** 2
        work = steps * config.batch_size * 2 * area  # two views
        return self.add(Task(name, "pretrain", folder, options, key, needs, steps=steps, work=work))

    def add_finetuning(self, init: Init, fraction: float, seed: int) -> Task:
        base = plain(self.finetune)
        fixed: dict[str, Any] = {"fraction": fraction, "seed": seed, "out": "-", "model": None, "init": None}
        fixed |= {"train": base["train"], "val": base["val"]}
        fixed["unlabelled"] = str(self.images) if init.then == "self-training" else None
        start_key, needs = "", tuple[str, ...]()
        if init.method is not None:
            pretrained = self.add_pretraining(init, seed)
            fixed["model"], start_key, needs = str(pretrained.run), pretrained.key, (pretrained.name,)
        elif init.stored:
            fixed["model"], start_key = str(find_detector(init.start).absolute()), detector_key(init.start)
        config: FinetuneConfig = resolve(FinetuneConfig, None, self.finetune_at.get(fraction, {}), fixed, base)
        if init.start == "scratch" and fixed["model"] is None:
            config = dataclasses.replace(config, backbone=random_backbone(config.backbone))
        images = round(repeat_factors(self.training.take(fraction, seed), config.repeat_factor).sum())
        steps = config.total_steps(images)
        if init.then == "longer":
            steps += self.pretrain.total_steps(self.image_count)
            config = dataclasses.replace(config, steps=steps)
        options = options_of(config)
        contents = {"labels": self.labels_key, "start": start_key}
        if init.then == "self-training":
            contents["unlabelled"] = self.images_key
        key = key_of("finetune", options, **contents)
        folder = self.out / "cells" / slug(init.name) / f"{fraction:g}" / str(seed)
        label = self.labels[init.name]
        name, cell = f"fine-tuning {label}, {100 * fraction:g} %, seed {seed}", (label, fraction, seed)
        work = float(steps * config.batch_size * (2 if init.then == "self-training" else 1))
        work += FORWARD_SHARE * config.evaluations(images) * len(self.validation)
        count = self.counts[fraction, seed]
        return self.add(Task(name, "finetune", folder, options, key, needs, cell, count, steps, work))


def check(config: CompareConfig) -> None:
    """Raise UserError for values that cannot be meant."""
    for name in ("inits", "fractions", "seeds"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name} must have at least one value, and none twice, not {list(values or ())}")
    for fraction in config.fractions or ():
        if not 0 < fraction <= 1:
            raise UserError(f"fractions must be above 0 and at most 1, not {fraction}")
    if config.evaluation not in ("last", "best"):
        raise UserError(f"evaluation must be last or best, not {config.evaluation!r}")
    if config.parallel is not None and config.parallel < 1:
        raise UserError(f"parallel must be at least 1, not {config.parallel}")
    if unused := config.pretrain_at.keys() - with_methods(config.inits or ()):
        raise UserError(f"pretrain_at has {min(unused)!r}, which is not among inits")


def with_methods(inits: Sequence[str]) -> set[str]:
    """The initialisations, with and without inline options: the names that ``pretrain_at`` may have."""
    return {*inits, *(split_init(name)[0] for name in inits)}


def fraction_of(name: str, fractions: Sequence[float]) -> float:
    """The fraction that a key of ``finetune_at`` means; "1" is 1.0."""
    fraction = as_number(name)
    if fraction not in fractions:
        raise UserError(f"finetune_at has {name!r}, which is none of the fractions {list(fractions)}")
    return fraction


def as_number(name: str) -> float:
    """The number that ``name`` is; -1 if it is none."""
    try:
        return float(name)
    except ValueError:
        return -1.0


def check_detectors(tasks: Sequence[Task]) -> None:
    """Check that every new detector can be built, and has enough queries for the regions; UserError if not."""
    planned: dict[str, DetectorPlan] = {}
    for task in tasks:
        kind: Any = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}.get(task.verb)
        if kind is None or task.options.get("init") or task.options.get("model"):
            continue
        config: Any = validate(kind.variant(task.options), {**task.options, "out": "-"}, task.name)
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


def resolve(
    kind: type[Any],
    recipe: str | None,
    overrides: Mapping[str, Any],
    fixed: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
) -> Any:
    """A verb's complete configuration: ``base``, recipe (name or YAML path), options, ``fixed``, the later winning.

    Options given as text are read as YAML where the field is not text: ``"[480, 512]"`` is a list.

    Raises:
        UserError: an unknown option, a wrong value, an option in ``fixed``, or, over a ``base``, one without effect.
    """
    kind = kind.variant({**overrides, **fixed})
    source = f"{kind.__name__.removesuffix('Config').lower()} options"
    types = get_type_hints(kind)
    values = dict(base or {}) | read_sources(kind, recipe, None)
    for name, value in overrides.items():
        if name in fixed:
            raise UserError(f"compare sets {name} itself; remove it from the {source}")
        if isinstance(value, str) and name in types:
            try:
                validate_value(name, value, types[name], source)
            except UserError:
                value = read_yaml(name, value, source)
        values[name] = value
    made = validate(kind, values | dict(fixed), source)
    if base is not None:  # options of all runs need not have an effect in each
        refuse_idle(made, overrides)
    return made


def read_yaml(name: str, text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name}={text!r} in {source} is not valid YAML: {' '.join(str(error).split())}") from error


def same_detector(pretrain: PretrainConfig, finetune: FinetuneConfig, given: Mapping[str, Any]) -> FinetuneConfig:
    """``finetune`` such that it builds, from scratch, the detector that ``pretrain`` pre-trains.

    Args:
        given: fine-tuning options that the user gave; those of a recipe yield silently.

    Raises:
        UserError: the user asked for another detector.
    """
    wanted = {field.name: getattr(pretrain, field.name) for field in dataclasses.fields(DetectorOptions)}
    for name in sorted(wanted.keys() & given.keys()):
        if (value := getattr(finetune, name)) != wanted[name]:
            raise UserError(
                f"fine-tuning has {name}={value!r}, pre-training {wanted[name]!r}, but all initialisations must be "
                "the same detector; set it in the pre-training options only"
            )
    return dataclasses.replace(finetune, **wanted)


def absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()


def random_backbone(name: str) -> str:
    return name if name.startswith("random:") else f"random:{name}"


def options_of(config: Any) -> dict[str, Any]:
    """The options of a run that have an effect, without where it goes."""
    return {name: value for name, value in effective(config).items() if name not in ("out", "resume")}

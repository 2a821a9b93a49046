"""The options of ``compare``, apart from the verb so that ``--help`` need not load PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from siamese_detr.config import Options

Value = bool | int | float | str


@dataclass
class CompareConfig(Options):
    """Compare initialisations of a detector by what fine-tuning makes of them.

    Every initialisation gets the same fine-tuning, label parts and seeds. The differences come with 95 % intervals
    over the validation images and seeds. Options of the verbs are written with a dot,
    `--pretrain.steps 5000 --finetune.lr 1e-4 --finetune-at.0.1.epochs 50`, in YAML as a mapping. A table of ablations:
    `--inits siamese:discrimination=none siamese:discrimination=region siamese:discrimination=global siamese`.

    Args:
        images: unlabelled images to pre-train and self-train on: folder, list file (.txt) or COCO JSON.
        train: labels to fine-tune on: COCO JSON, VOC folder or YOLO data.yaml.
        out: directory of the comparison; results already there are not computed again.
        val: labels to measure on; default: those of TRAIN, where it has a split for it (a data.yaml,
            Roboflow's folders).
        inits: what to compare: scratch (everything random), backbone (pre-trained backbone, random Transformer: the
            papers' "scratch"), siamese, up-detr or detreg (pre-trained here), PATH (any detector that finetune takes,
            as it is), PATH+siamese (that detector after our pre-training); a method with options of pretrain of its
            own, siamese:iou=0.3,num_regions=5; or a name defined in pretrain_at. siamese+self-training,
            PATH+self-training, ...: the later part of the fine-tuning also learns from IMAGES (finetune's unlabelled).
            backbone+longer, PATH+longer: as many more steps as the pre-training has. Default: backbone siamese.
        fractions: parts of the training images, each above 0 to 1. Default: 0.01 0.1 1.
        seeds: of the part of the images, new weights and training; results are averaged over them. Default: 0 1.
        recipe: a whole comparison to start from: paper-table-1, paper-table-2, laptop, or a YAML file. Your options
            override its own; mappings are merged entry by entry. Add --dry-run to see what it does.
        propose: options of propose.
        pretrain_recipe: recipe of pretrain, a name or a YAML file.
        pretrain: further options of pretrain; those of the detector hold for all initialisations.
        pretrain_at: options of pretrain for one initialisation, by its name; with a method they define a new one (in
            YAML, `pretrain_at: {boxes only: {method: siamese, discrimination: none}}`).
        finetune_recipe: recipe of finetune, a name or a YAML file.
        finetune: further options of finetune.
        finetune_at: options of finetune for one label fraction, by its number; they hold for all initialisations.
        pretrain_each_seed: pre-train again for every seed (default: one pre-training serves all seeds).
        evaluation: count each cell's last evaluation, or its best (which flatters noisy runs).
        parallel: runs at a time (default: one per visible GPU, or one on the CPU).
        dry_run: only show the protocol, and what would be run.
    """

    COMMON: ClassVar = (
        *("images", "train", "out", "val", "inits", "fractions", "seeds", "recipe", "pretrain", "finetune", "dry_run"),
    )

    images: str
    train: str
    out: str
    val: str | None = None
    # None: not given, so that a recipe may fill it in.
    inits: tuple[str, ...] | None = None
    fractions: tuple[float, ...] | None = None
    seeds: tuple[int, ...] | None = None
    recipe: str | None = None
    propose: dict[str, Value] = field(default_factory=dict)
    pretrain_recipe: str | None = None
    pretrain: dict[str, Value] = field(default_factory=dict)
    pretrain_at: dict[str, dict[str, Value]] = field(default_factory=dict)
    finetune_recipe: str | None = None
    finetune: dict[str, Value] = field(default_factory=dict)
    finetune_at: dict[str, dict[str, Value]] = field(default_factory=dict)
    pretrain_each_seed: bool = False
    evaluation: str = "last"
    parallel: int | None = None
    dry_run: bool = False

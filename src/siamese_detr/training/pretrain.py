"""``pretrain``: unlabelled images and proposals -> a detector whose Transformer is pre-trained (paper, section 3)."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from siamese_detr.config import read_sources, verb
from siamese_detr.detectors.adapter import DetectorAdapter
from siamese_detr.detectors.build import build_detector
from siamese_detr.detectors.loading import load_detector
from siamese_detr.errors import UserError
from siamese_detr.images.listing import list_images
from siamese_detr.images.memory import from_memory
from siamese_detr.messages import say
from siamese_detr.pretext import build_pretext
from siamese_detr.pretext.base import Pretext, PretextOutput
from siamese_detr.proposals.methods import find_method
from siamese_detr.proposals.store import ProposalStore, Selection
from siamese_detr.randomness import seed_torch
from siamese_detr.runtime.journal import JsonLines
from siamese_detr.runtime.lock import locked
from siamese_detr.runtime.processes import Team, lost_process_explained, meet
from siamese_detr.runtime.rundir import begin, check_place, check_session, sessions
from siamese_detr.training.checks import check_batch_size, check_callbacks, check_precision, check_trackers
from siamese_detr.training.finetune_config import FinetuneConfig
from siamese_detr.training.loop import Loop
from siamese_detr.training.nonfinite import replay
from siamese_detr.training.optimizer import adamw
from siamese_detr.training.pretrain_config import PretrainConfig
from siamese_detr.training.source import Source, checksum, find_source
from siamese_detr.training.task import Batches, Callback, Task, sizes_vary
from siamese_detr.views.sampler import ViewBatchSampler
from siamese_detr.views.two_views import TwoViewDataset


@dataclass(frozen=True)
class PretrainResult:
    """What a run leaves.

    Args:
        out: the run directory.
        detector: the pre-trained detector, an ordinary Hugging Face directory.
        steps: updates done in all (of a replay: the last one logged).
        loss: the last logged mean of the loss (NaN if nothing was logged).
        skipped: images that could not be read (listed in ``skipped.jsonl``).
        replay: with ``--replay``: what was found.
    """

    out: Path
    detector: Path
    steps: int
    loss: float
    skipped: int = 0
    replay: str | None = None


class PretextTask(Task):
    """A pretext task: the frozen backbone runs without autograd, then the task on what it saw.

    Args:
        pretext: the model.
        config: of the run.
        source: where batches come from.
        views: the views of the store's images.
        batches: of the whole run.
    """

    verb = "pretrain"

    def __init__(
        self, pretext: Pretext, config: PretrainConfig, source: Source, views: TwoViewDataset, batches: Batches
    ) -> None:
        super().__init__(pretext, source.dataset, batches, source.collate, epoch_size=len(views))
        self.pretext, self.config, self.freeze, self.views = pretext, config, source.freeze, views

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Mapping[str, Tensor]]:
        features = self.freeze(batch)
        if self.config.compile and self.config.view_size is None:
            sizes_vary(features.maps, features.pixel_mask)
        output: PretextOutput = model(features)
        if "padded" not in batch:  # stored features do not tell
            return output.loss, output.terms
        return output.loss, {**output.terms, "padded_regions": batch["padded"].float().mean()}

    def largest(self, images: int) -> dict[str, Any] | None:
        dataset: Any = self.dataset
        if dataset is self.views:  # else a bank's, which are of one size
            sides = dataclasses.replace(self.views.config, short_sides=(max(self.views.config.short_sides),))
            dataset = TwoViewDataset(self.views.store, sides, self.views.seed)
        first = (dataset[(0, n)] for n in range(min(len(self.views), 10)))
        readable = [sample for sample in first if not self.collate([sample])["skipped"]]
        return self.collate([readable[n % len(readable)] for n in range(images)]) if readable else None

    def still_unreadable(self, path: str) -> bool:
        index = self.views.store.index(path)
        return index is not None and self.views[(0, index)].failure is not None

    def saved(self, step: int) -> None:
        """Write OUT/detector; an interrupted save leaves the one before."""
        out = Path(self.config.out)
        made = {"method": self.config.method, "pretrained_steps": step, "run": str(out.absolute())}
        provenance = {**made, "init": self.config.init, "pseudo_classes": self.pretext.config.class_names is not None}
        self.pretext.detector.save(out / "detector", provenance=provenance, **input_size(self.config))


@from_memory("images")
@verb(PretrainConfig)
def pretrain(config: PretrainConfig, *, callbacks: Sequence[Callback] = ()) -> PretrainResult:
    """Pre-train a detector's Transformer on unlabelled images (Siamese DETR, UP-DETR, DETReg or k-means classes).

    Writes OUT/detector, which `transformers` and `siamese-detr finetune` load. Killed at any moment, the same command
    with --resume continues exactly. On SIGTERM or SIGUSR1 the run saves itself and exits with code 75.

    Args:
        callbacks: objects that follow the run, see :class:`siamese_detr.training.task.Callback`.

    Returns:
        where the detector is, and how the run went.

    Raises:
        UserError: bad input or a run that cannot go on; one line with the remedy.
        Preempted: asked to stop; the run is saved (a SystemExit with code 75).
    """
    out = Path(config.out)
    team = Team(meet(config.device))
    # Mistakes are found before anything is written, and before hours of proposals.
    check_precision(config.precision, team.device, team.main)
    find_method(config.proposal_method)
    images = list_images(config.images, without=config.out)
    if team.main and config.proposals is not None:  # else propose reports them
        for problem in images.problems[:3]:
            say(f"left out: {problem}")
    seed_torch(config.seed)
    check_trackers(config.report_to)
    check_callbacks(callbacks)
    check_batch_size(config.batch_size, config.accumulate, team.size)
    pretext = build(config).to(team.state.device)
    pretext.detector.image_processor(**input_size(config))
    with lost_process_explained(), contextlib.ExitStack() as stack:
        if team.main and config.replay is None:
            check_place(out)
            stack.enter_context(locked(out))
            begin(out, config)
        begun = bool(sessions(out))
        if team.main:
            complete_proposals(config, out, begun)
        team.wait()
        store = open_proposals(config, out, images.root if begun else None)
        rows = store.select(images)
        steps = config.total_steps(len(rows))
        chosen = Selection(store, rows)
        dataset = TwoViewDataset(chosen, config.views(), config.seed)
        if team.main and config.replay is None:
            check_session(out, facts(config, store, rows, pretext.detector))
        source = find_source(config, pretext, dataset, team, steps)
        pretext.begin(source.samples(len(dataset), config.batch_size // config.accumulate, team.device))
        batch_size, count = config.batch_size // config.accumulate, steps * config.accumulate
        batches = ViewBatchSampler(chosen, config.views(), batch_size, count, config.seed)
        task = PretextTask(pretext, config, source, dataset, batches)
        optimizer = adamw(pretext, config.lr, config.weight_decay, config.decay_all)
        loop = Loop(task, config, optimizer, config, team, steps, callbacks=callbacks)
        if team.main:
            say(f"{len(rows)} images; {config.budget(len(rows))}")
        if config.replay is not None:
            diagnosis = replay(loop, Path(config.replay))
            say(diagnosis, team.main)
            return result(out, diagnosis)
        loop.run()
        if team.main and not config.keep_bank:
            shutil.rmtree(out / "feature_bank", ignore_errors=True)
    done = dataclasses.replace(result(out), steps=loop.state.step)
    if team.main:
        skipped = f", without {done.skipped} unreadable images ({out / 'skipped.jsonl'})" if done.skipped else ""
        recipe = f" --recipe {config.recipe_used}" if suits_finetune(config.recipe_used) else ""
        say(
            f"pre-trained for {done.steps} steps{skipped}. The detector is {done.detector}; fine-tune it with: "
            f"siamese-detr finetune{recipe} --train TRAIN.json --val VAL.json --model {out} --out OUT",
        )
    return done


def suits_finetune(recipe: str | None) -> bool:
    """Whether ``finetune`` takes this recipe, too."""
    try:
        return bool(read_sources(FinetuneConfig, recipe, None))
    except UserError:
        return False


def build(config: PretrainConfig) -> Pretext:
    """The pretext task around a new detector, or around the one to start from."""
    class_names = config.pretext().class_names
    if config.init is None:
        detector = build_detector(
            config.detector, config.backbone, class_names=class_names, seed=config.seed, **config.sizes()
        )
    else:
        detector = load_detector(config.init, class_names, **config.dropouts())
    if class_names is None:
        detector.reduce()
    else:
        detector.complete()
    config.check_queries(detector.num_queries)
    if config.checkpoint_activations:
        model = detector.model  # the newer name first: the older one warns where both exist
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return build_pretext(config.method, detector, config.pretext())


def complete_proposals(config: PretrainConfig, out: Path, begun: bool) -> None:
    """Bring the run's own store up to date; not where the images of a run that has begun have moved."""
    if config.proposals is not None or config.replay is not None:
        return
    try:
        there = ProposalStore.open(out / "proposals").settings
    except UserError:  # none yet, or a damaged one, which propose explains
        there = None
    if begun and there is not None and there.images_gone:
        say(
            f"the images were in {there.image_root}, which is gone: those there are now must be the same",
        )
        return
    method: str = config.proposal_method
    seed = config.seed
    if not config.uses_proposals:  # no box is used, so any will do
        method = there.method if there is not None else "random"
    if there is not None and there.method == method:
        seed = there.parameters.get("seed", seed)
    from siamese_detr.proposals.propose import ProposeConfig, propose

    # Images that could not be read may have been repaired since; a run that has begun goes on with those it has.
    propose(ProposeConfig(config.images, str(out / "proposals"), method, seed=seed, retry_failed=not begun))


def open_proposals(config: PretrainConfig, out: Path, images: Path | None) -> ProposalStore:
    """The store given, or the run's own; if its images are gone, they are taken to be in ``images`` now."""
    directory = config.proposals or out / "proposals"
    store = ProposalStore.open(directory)
    return ProposalStore.open(directory, images) if images is not None and store.settings.images_gone else store


def facts(config: PretrainConfig, store: ProposalStore, rows: np.ndarray, detector: DetectorAdapter) -> dict[str, Any]:
    """What a run must be continued on."""
    return {
        "images": len(rows),
        "images (as many)": store.images_key(rows),
        "proposals (method or its parameters)": store.settings.key(),
        "backbone": checksum(detector.backbone),
        "starting detector": "" if config.init is None else checksum(detector.model),
    }


def input_size(config: PretrainConfig) -> dict[str, Any]:
    """What the detector's image processor is told: the views' side, where all have one and the detector is new."""
    if config.init is None and config.view_size is not None:
        return {"shortest_edge": config.view_size, "square": True}
    return {}


def result(out: Path, replay: str | None = None) -> PretrainResult:
    """What the run directory says of the run."""
    log = [record for record in JsonLines(out / "log.jsonl").read() if "loss" in record]
    return PretrainResult(
        out=out,
        detector=out / "detector",
        steps=log[-1]["step"] if log else 0,
        loss=log[-1]["loss"] if log else float("nan"),
        skipped=len({record["path"] for record in JsonLines(out / "skipped.jsonl").read()}),
        replay=replay,
    )

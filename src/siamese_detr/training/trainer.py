"""The training loop of every run: Transformers' ``Trainer`` with checkpoints that hold no pickle and continue exactly.

What differs from the stock ``Trainer``, besides :mod:`.persistence`: every step seeds torch from its number, so there
is no random state to save; a non-finite loss or gradient stops the run before the update; SIGTERM and SIGUSR1 save at
the next step boundary; unreadable images are listed and counted; loss terms are averaged without a sync a step.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from siamese_detr.detection.matching import NonFiniteError
from siamese_detr.errors import UserError, too_many_unreadable
from siamese_detr.files import write_json
from siamese_detr.kernels import accelerate
from siamese_detr.randomness import seed_torch
from siamese_detr.runtime import checkpoint as checkpoints
from siamese_detr.runtime.gpu import send
from siamese_detr.runtime.journal import Journal, JsonLines
from siamese_detr.runtime.processes import begin_worker, machine_explained
from siamese_detr.runtime.signals import Locked, Preempted, RunLock, StopRequest
from siamese_detr.training.ahead import AheadLoader
from siamese_detr.training.diagnose import watch
from siamese_detr.training.persistence import FIRST, PersistentTrainer
from siamese_detr.training.settings import Batches, RankBatches, RunSettings, check_batch_size, skip

SHOWN = 10
"""Unreadable images that a process tells of on the screen; all are in ``skipped.jsonl``."""
GONE = 32
"""Unreadable images in a row, none readable between them, that end a run: then it is the disk, not single files."""


class BaseTrainer(PersistentTrainer):
    """Trains ``model`` on ``batches`` of ``dataset``; subclasses say in :meth:`terms` what the loss of a batch is.

    Args:
        model: the module whose state is saved; frozen parameters must have ``requires_grad`` False.
        settings: how the run is driven.
        optimizer: made from the model's parameters, with the base learning rates.
        dataset: indexed by the keys that ``batches`` holds.
        batches: ``settings.steps * settings.accumulate`` lists of keys, each of all processes together.
        collate: samples -> batch, a dict; ``batch["skipped"]``, if there, lists (path, reason) of unreadable images,
            which its tensors (samples first) are without.
        epoch_size: samples in an epoch (default: all of ``dataset``).
        options: passed on to the stock Trainer.
    """

    verb: str
    """The command whose run this is."""

    def __init__(
        self,
        model: nn.Module,
        settings: RunSettings,
        optimizer: torch.optim.Optimizer,
        dataset: Dataset,
        batches: Batches,
        collate: Callable[[list[Any]], Any],
        epoch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.batches = batches
        self.epoch_size = epoch_size or len(dataset)  # type: ignore[arg-type]
        self.journal: Journal | None = None
        self.stop = StopRequest()
        self.preempted: str | None = None
        self._micro: list[tuple[Tensor, Mapping[str, Tensor]]] = []  # loss and terms of the update's micro-batches
        self._left_out = 0  # micro-batches of which some process could read nothing
        self._last_left_out = False
        self._readable = self._unreadable = 0  # this process's images of the current update
        self._in_a_row = 0  # unreadable images of all processes since the last readable one
        self._listed: dict[str, str] = {}  # unreadable image -> reason, whichever process found it
        self._found = self._found_before = self._seen = 0
        self._start = 0
        self.replaying = False
        self._loader: AheadLoader | None = None
        self._began = time.monotonic()
        super().__init__(model, settings, optimizer, data_collator=collate, train_dataset=dataset, **options)
        self._hosts: Any = torch.distributed.new_group(backend="gloo") if self.args.world_size > 1 else None
        self.model_accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it when accumulating
        self.remove_callback(transformers.PrinterCallback)
        exchanged = accelerate(model, self.args.device, settings.kernels)
        if settings.kernels == "hub" and self.args.should_save:
            print(f"kernels: {', '.join(exchanged)}", file=sys.stderr)
        self.add_callback(_AtBoundary(self))
        check_batch_size(settings.batch_size, settings.accumulate, self.args.world_size)

    # ---- what subclasses define

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one micro-batch (a mean over it) and its named terms to log. ``model`` may be wrapped."""
        raise NotImplementedError

    def still_unreadable(self, path: str) -> bool:
        """Whether the image of that path, which could not be read before, is in the data set and still cannot."""
        return True

    def prepare_ahead(self, batch: dict[str, Any]) -> None:
        """Compute what can be computed of the next batch before the current update: a CUDA device then does so while
        the host learns whether there is to be one. Called only if images of the batch could be read.
        """

    # ---- the run

    def fit(self, resume: bool = False) -> None:
        """Train to the end; with ``resume`` from the newest valid checkpoint, if there is one.

        Raises:
            Preempted: SIGTERM or SIGUSR1 came; the run is saved.
            UserError: a non-finite number, too many unreadable images, no checkpoint that can be read, a full disk.
        """
        checkpoint = self._find_checkpoint() if resume else None
        self.saved_step = step = checkpoints.step_of(checkpoint) if checkpoint else 0
        if step > self.settings.steps:
            raise UserError(
                f"{self.settings.out} has done {step} updates already, more than the {self.settings.steps} asked for: "
                "ask for as many at least, or take it as it is"
            )
        self._start = step * self.settings.accumulate
        self._seen = step * self.settings.batch_size
        if self.args.should_save:
            checkpoints.prune(self.settings.checkpoints, step, self.settings.keep)  # a lower `keep` makes room now
            listed = self._skipped_lines().rewind(step, lambda record: self.still_unreadable(record["path"]))
            self._listed = {record["path"]: record["reason"] for record in listed}
            self._found_before = len(self._listed)
        self._fit(checkpoint, step)
        if self.preempted is not None:
            raise self._stopped()

    def _fit(self, checkpoint: Path | None, step: int) -> None:
        explained = machine_explained(f"continue {self.settings.out} with --resume")
        try:
            with self.stop, explained, contextlib.ExitStack() as stack:
                if self.args.should_save:
                    self.journal = stack.enter_context(contextlib.closing(Journal(self.settings.out, step)))
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except BaseException as error:
            # Data workers end with their iterator, which the traceback would keep alive: the process could not exit.
            traceback.clear_frames(error.__traceback__)
            if error.__cause__ is not None:
                traceback.clear_frames(error.__cause__.__traceback__)
            raise

    def stop_between_steps(self) -> None:
        """Save, if that is not done, and end the run, if any process was asked to stop. A collective.

        Raises:
            Preempted: so it is.
        """
        if self._everywhere(self.stop.requested is None):
            return
        self.preempted = self.stop.requested or "another process was asked to stop"
        if self.saved_step != self.state.global_step:
            self._save_checkpoint(self.model)
        raise self._stopped()

    def _stopped(self) -> Preempted:
        return Preempted(
            f"{self.preempted}: saved at step {self.state.global_step} of {self.settings.steps} in "
            f"{self.settings.out}; continue with the same command and --resume"
        )

    def replay(self, document: Path) -> str:
        """Do the step that ended a run again from its saved state, watching for the first non-finite number.

        Args:
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
        checkpoints.verify(checkpoint)
        if values.get("processes", 1) != self.args.world_size:
            print(
                f"the step was done by {values['processes']} processes, and this is {self.args.world_size}: dropout is "
                "drawn otherwise",
                file=sys.stderr,
            )
        self._start = step * self.settings.accumulate
        with watch(self.model) as found:
            try:
                self.replaying = True
                self.train(resume_from_checkpoint=str(checkpoint))
                outcome = f"step {step + 1} is done, and was finite"
            except _ReplayDone as done:
                outcome = str(done)
            except (RuntimeError, NonFiniteError) as error:
                outcome = f"{str(error).splitlines()[0]}"
        return f"step {step + 1}: {outcome}" + "".join(f"\n  not finite: {name}" for name in found[:10])

    def _find_checkpoint(self) -> Path | None:
        """The newest valid checkpoint, as the main process sees it."""
        step = -1
        if self.args.should_save:
            found = checkpoints.latest_valid(self.settings.checkpoints)
            step = checkpoints.step_of(found) if found else -1
            if found is None:
                self._note_lost_steps()
        step = int(self._across(torch.tensor([float(step + 1) if self.args.should_save else 0.0]))[0]) - 1
        return self.settings.checkpoints / f"{checkpoints.PREFIX}{step}" if step >= 0 else None

    def _note_lost_steps(self) -> None:
        """Refuse to begin a run anew of which checkpoints were lost; tell of steps after which none was saved yet."""
        out = self.settings.out
        last = max((record.get("step", 0) for record in JsonLines(out / "log.jsonl").read()), default=0)
        if (out / FIRST).exists():
            raise UserError(
                f"no checkpoint is left in {self.settings.checkpoints}, though the run saved some and its log goes to "
                f"step {last}: bring them back (is a disk not mounted?), or begin anew in another directory"
            )
        if last:
            print(f"{out} has no checkpoint yet: the {last} steps of its log are done again", file=sys.stderr)

    # ---- data

    def get_train_dataloader(self) -> DataLoader:
        assert self.train_dataset is not None
        workers = self.settings.workers
        self._loader = AheadLoader(
            self.train_dataset,
            self.args.device,
            batch_sampler=RankBatches(self.batches, self.args.process_index, self.args.world_size, self._start),
            collate_fn=self.data_collator,
            num_workers=workers,
            worker_init_fn=begin_worker,
            prefetch_factor=2 if workers else None,
        )
        return self._loader

    def _look_ahead(self) -> None:
        batch = None if self._loader is None else self._loader.peek()
        if batch is not None and _readable(batch):
            self.prepare_ahead(batch)

    # ---- a step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        position = len(self._micro) + self._left_out
        seed_torch(self.settings.seed, self.state.global_step, position, self.args.process_index)
        # A process with nothing to learn from would hold up the others' collectives: all leave that micro-batch out.
        self._last_left_out = not self._everywhere(self._note_skipped(inputs) > 0)
        if self._last_left_out:
            self._left_out += 1
            return torch.zeros((), device=self.args.device)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except NonFiniteError as error:  # found before the loss was: the other processes end with this one
            if self.replaying:
                raise
            self._count_terms()
            raise self._nonfinite([str(error)], "not computed", self.means.read(local=True)) from error

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, terms = self.terms(model, inputs)
        self._micro.append((loss.detach(), {name: term.detach() for name, term in terms.items()}))
        return (loss, terms) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _note_skipped(self, inputs: dict[str, Any]) -> int:
        """List the images of a micro-batch that could not be read, each once in a run; how many could be."""
        skipped = {str(path): str(reason) for path, reason in inputs.pop("skipped", None) or ()}
        readable = _readable(inputs)
        self._unreadable += len(skipped)
        self._readable += readable
        if not self.replaying and skipped.keys() - self._listed.keys():
            # Another process may have met them in another epoch.
            self._listed |= {record["path"]: record["reason"] for record in self._skipped_lines().read()}
            new = {path: reason for path, reason in skipped.items() if path not in self._listed}
            step = self.state.global_step + 1
            self._skipped_lines().append({"step": step, "path": path, "reason": new[path]} for path in new)
            self._listed |= new
            for path in list(new)[: max(0, SHOWN - self._found)]:
                print(f"skipping an image that cannot be read: {path}: {new[path]}", file=sys.stderr)
            self._found += len(new)
            if self._found - len(new) <= SHOWN < self._found:
                print(f"further ones are only listed, in {self._skipped_lines().path}", file=sys.stderr)
        return readable

    def _everywhere(self, here: bool) -> bool:
        """Whether something is so in all processes. Asked of the hosts: the devices need not have come so far."""
        if self._hosts is None:
            return here
        answer = torch.tensor(int(here))
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MIN, self._hosts)
        return bool(answer)

    def _count_terms(self) -> None:
        """Add the update's losses and terms to the means that are logged."""
        for loss, terms in self._micro:
            self.means.add({"loss": loss, **terms}, 1 / len(self._micro))

    def _mend_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Make the gradients the mean over those micro-batches that were not left out."""
        if not self._left_out:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # The processes' gradients are put together in the last micro-batch, which may be one of those left out.
        apart = self.args.world_size > 1 and self._last_left_out
        for gradient in gradients:
            if apart:
                torch.distributed.all_reduce(gradient)
                gradient /= self.args.world_size
            gradient *= (len(self._micro) + self._left_out) / len(self._micro)

    def _skipped_lines(self) -> JsonLines:
        return JsonLines(self.settings.out / "skipped.jsonl")

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Called between the backward pass and the update: the place to stop, for all processes alike."""
        if not self._micro:  # nothing could be read: no update
            self.accelerator.gradient_state._set_sync_gradients(False)
            norm = torch.zeros((), device=self.args.device)
            self._before_update(norm)
            return norm
        self.accelerator.unscale_gradients()
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        self._mend_gradients(parameters)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        self._before_update(norm)
        if self.settings.clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _before_update(self, norm: Tensor) -> None:
        """Stop on non-finite numbers before they spread, note requests to stop; one sync for all of it."""
        losses = torch.stack([loss for loss, _ in self._micro] or [norm.new_zeros(())]).float()
        if self.replaying:
            raise _ReplayDone(f"loss {losses.tolist()}, gradient norm {norm.item()}; no update made")
        self._count_terms()
        counts = [self._found_before + self._found, self._unreadable, self._readable]
        local = torch.tensor([self.stop.requested is not None, *counts], dtype=torch.float32)
        flags = torch.stack([(~losses.isfinite()).any().float(), (~norm.isfinite()).float()])
        bad_loss, bad_norm, stop, found, unreadable, readable = self._across(
            torch.cat([flags, send(local, flags.device)]), self._look_ahead
        )
        overflow = bad_norm and not bad_loss and self._scaler_can_lower()
        if (bad_loss or bad_norm) and not overflow:
            terms = self.means.read()  # a collective: every process
            if self.args.should_save:
                raise self._nonfinite([str(value) for value in losses.tolist()], str(norm.item()), terms)
            raise UserError("loss or gradient is not finite: stopped, see the main process")
        if self._micro:  # else there is no update, and nothing to log of it
            self.means.count += 1
            if not overflow:
                self.means.add({"grad_norm": norm})
        self._seen += self.settings.batch_size
        self._in_a_row = 0 if readable else self._in_a_row + int(unreadable)
        self._stop_if_too_many_bad(int(found))
        if stop and self.preempted is None:
            self.preempted = self.stop.requested or "another process was asked to stop"
        self._micro, self._left_out, self._readable, self._unreadable = [], 0, 0, 0

    def _scaler_can_lower(self) -> bool:
        """With fp16, gradients overflow until the loss scale fits: the scaler skips those steps. Below 1: an error."""
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1

    def _stop_if_too_many_bad(self, found: int) -> None:
        """End the run if ``found`` different images that cannot be read are too many, or if none can be any more."""
        if self._in_a_row >= min(GONE, self.epoch_size):
            path, reason = next(reversed(self._listed.items()), ("", "see the other processes"))
            raise UserError(
                f"none of the last {self._in_a_row} images can be read, up to step {self.state.global_step + 1}, e.g. "
                f"{path}: {reason}; is the disk still mounted? Continue {self.settings.out} with --resume"
            )
        seen = min(self._seen, self.epoch_size)
        if seen >= min(self.epoch_size, 1000) and found > self.settings.max_bad_share * seen:
            raise too_many_unreadable(found, seen, self._skipped_lines().path, self.settings.max_bad_share)

    def _nonfinite(self, losses: list[str], norm: str, terms: Mapping[str, Any]) -> UserError:
        """Save the state before the update and all that is needed to do this step again; what to stop with."""
        step, out = self.state.global_step, self.settings.out
        batches = skip(self.batches, step * self.settings.accumulate)
        document = {
            "step": step,
            "seed": self.settings.seed,
            "processes": self.args.world_size,
            "process": self.args.process_index,
            "checkpoint": f"nonfinite/{checkpoints.PREFIX}{step}",
            "loss": losses,
            "terms": {name: str(float(value)) for name, value in terms.items()},
            "grad_norm": norm,
            "parameters": [
                name
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None and not parameter.grad.isfinite().all()
            ],
            "samples": [next(batches) for _ in range(self.settings.accumulate)],
        }
        try:
            with RunLock(out / "nonfinite"):  # several processes may have come upon it
                self._write_checkpoint(out / "nonfinite", self.means.state(local=True))
                write_json(out / "nonfinite.json", document)
        except Locked:
            return UserError(f"loss or gradient is not finite at step {step + 1}: see the other processes")
        return UserError(
            f"loss or gradient is not finite at step {step + 1}: stopped before the update. Samples and state are in "
            f"{out / 'nonfinite.json'}; do that step again, to see which operation is at fault, with: "
            f"{self._command(replay=out / 'nonfinite.json')}"
        )

    def _command(self, **options: Any) -> str:
        """The command that repeats this run with other options."""
        world, local = self.args.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        words = [f"torchrun --nproc-per-node={local}"] if world > 1 else []
        words += [f"--nnodes={world // local} ..."] if world > local else []
        words += ["-m siamese_detr.cli" if world > 1 else "siamese-detr", self.verb]
        options = {"config": self.settings.out / "config.yaml", "out": self.settings.out, **options}
        return " ".join([*words, *(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())])

    # ---- logs

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "train_runtime" in logs:  # Trainer's summary at the end: nothing that is not in the logs before it
            return
        if "loss" in logs:
            rate = {"learning_rate": logs["learning_rate"]}
            epoch = {"epoch": self.state.global_step * self.settings.batch_size / self.epoch_size}
            logs = {**self.means.drain(), **rate, **epoch}
        if self.journal is not None:
            seconds = time.monotonic() - self._began
            self.journal.log(self.state.global_step, {**logs, "seconds": round(seconds, 3)})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)


def _readable(batch: dict[str, Any]) -> int:
    """How many images of a batch could be read."""
    return max((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), default=0)


class _ReplayDone(Exception):
    """Ends a replayed step before its update."""


class _AtBoundary(transformers.TrainerCallback):
    """What is due at the end of a step: an evaluation and the log of what led to it, that of the last steps, and, on a
    request to stop, a save and the end of training."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: Any,
    ) -> None:
        evaluates = self.trainer.settings.evaluates_at(state.global_step)
        control.should_evaluate = control.should_evaluate or evaluates
        control.should_log = control.should_log or evaluates or state.global_step >= state.max_steps
        if self.trainer.preempted is not None:
            if state.global_step >= state.max_steps:
                self.trainer.preempted = None  # the run is complete
            else:
                control.should_save = control.should_training_stop = True

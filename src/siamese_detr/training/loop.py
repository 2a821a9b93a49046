"""The training loop of every run, in the open: forward and backward, agree, update, log, evaluate, save.

A *task* says what is trained (:class:`~siamese_detr.training.task.Task`); this file says when. Accelerate gives
devices, autocast, distributed gradients, loss scaling and experiment trackers. Every micro-batch seeds torch from its
number, so there is no random state to save, and a run that was killed continues exactly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import send_to_device
from torch import nn

from siamese_detr.detection.matching import NonFiniteError
from siamese_detr.errors import UserError
from siamese_detr.kernels import accelerate
from siamese_detr.messages import say
from siamese_detr.randomness import seed_torch
from siamese_detr.runtime import checkpoint as checkpoints
from siamese_detr.runtime.gpu import send
from siamese_detr.runtime.journal import Journal
from siamese_detr.runtime.loading import Loader
from siamese_detr.runtime.processes import Team, default_workers, machine_explained
from siamese_detr.runtime.progress import ProgressBar
from siamese_detr.runtime.signals import Preempted, StopRequest
from siamese_detr.training.checks import check_batch_size, report_needs
from siamese_detr.training.nonfinite import keep_for_replay
from siamese_detr.training.optimizer import OptimizerConfig, lr_factor
from siamese_detr.training.run_config import RunConfig
from siamese_detr.training.state import Averages, RunState, newest_checkpoint, note_first
from siamese_detr.training.task import Callback, Callbacks, RankBatches, Task, Update
from siamese_detr.training.unreadable import UnreadableImages

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Verdict:
    """What all processes agree on before an update.

    Args:
        finite: no loss or gradient is infinite or NaN.
        overflow: the gradient is, because of fp16's loss scale, which is lowered then: the update is left out.
        stop: some process was asked to stop.
        unreadable: different unreadable images so far, unreadable and readable ones of this update.
    """

    finite: bool
    overflow: bool
    stop: bool
    unreadable: tuple[float, float, float]


class Loop:
    """Drives a task to its end.

    Args:
        task: what is trained.
        config: how the run is driven.
        optimizer: over the task's trainable parameters, with the base learning rates.
        schedule: of the learning rates, and the gradient clipping.
        team: the processes.
        steps: updates in all.
        save_every: updates between checkpoints, where ``config`` leaves that open.
        callbacks: follow the run.
    """

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        optimizer: torch.optim.Optimizer,
        schedule: OptimizerConfig,
        team: Team,
        steps: int,
        save_every: int = 1000,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_batch_size(config.batch_size, config.accumulate, team.size)
        self.task, self.config, self.team, self.steps = task, config, team, steps
        self.save_every = config.save_every or save_every
        self.workers = default_workers() if config.workers is None else config.workers
        self.clip = schedule.clip
        self.out = Path(config.out)
        self.accelerator = Accelerator(
            cpu=team.device.type == "cpu",
            mixed_precision=PRECISIONS[config.precision],
            dynamo_backend="inductor" if config.compile else "no",
            log_with=[name for name in config.report_to if name != "none"] or None,
            project_dir=self.out / "trackers",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)],
        )
        exchanged = accelerate(task.model, team.device, config.kernels)
        if config.kernels == "hub" and team.main:
            say(f"kernels: {', '.join(exchanged)}")
        self.model: nn.Module = self.accelerator.prepare(task.model)  # on the device, in autocast, in DDP, compiled
        self.optimizer: Any = self.accelerator.prepare(optimizer)  # lowers the loss scale where fp16 overflows
        factor = lr_factor(schedule.schedule, steps, schedule.drop_at, schedule.warmup)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        task.averages = Averages(task.model, config.ema) if config.ema else None
        self.state = RunState(task.model, optimizer, self.scheduler, self.accelerator.scaler, task.averages)
        self.callbacks = Callbacks(callbacks, team)
        self.unreadable = UnreadableImages(config, task.epoch_size)
        self.stop = StopRequest()
        self.journal: Journal | None = None
        self.bar: ProgressBar | None = None
        self._began = time.monotonic()

    # ---- the loop

    def _train(self) -> None:
        state, config = self.state, self.config
        self.model.train()
        if self.team.any(self.team.main and self.task.lacks_evaluation(state.step)):
            self._evaluate()
        if self.team.any(self.team.main and self.task.stopped_early(state.step)):
            return
        batches = self.batches(state.step)
        for step in range(state.step, self.steps):
            update = self.gradients(step, [next(batches) for _ in range(config.accumulate)])
            verdict = self._agree(update)
            if not verdict.finite:
                raise self._nonfinite(update)
            self.unreadable.check(step + 1, *verdict.unreadable)
            if update.losses:  # else no image could be read: no update
                state.means.count += 1
                if not verdict.overflow:
                    state.means.add({"grad_norm": update.norm})
                if self.clip > 0:
                    nn.utils.clip_grads_with_norm_(self.task.model.parameters(), self.clip, update.norm)
                self.optimizer.step()
            (rate, *_) = self.scheduler.get_last_lr()
            if not verdict.overflow:
                with contextlib.nullcontext() if update.losses else warnings.catch_warnings(action="ignore"):
                    self.scheduler.step()  # warns if there has been no update yet
            self.optimizer.zero_grad()
            state.step = step + 1
            if state.averages is not None:
                state.averages.update(state.step)
            if self._step_done(float(rate), verdict.stop):
                return

    def gradients(self, step: int, micro_batches: list[dict[str, Any]], replaying: bool = False) -> Update:
        """The forward and backward passes of an update: the gradient becomes that of the micro-batches' mean loss."""
        team, update = self.team, Update(norm=torch.zeros((), device=self.team.device))
        # A process with nothing to learn from would hold up the others' collectives: all leave that micro-batch out.
        readable = team.all(*(self.unreadable.take(batch, step + 1, not replaying) > 0 for batch in micro_batches))
        kept = [position for position, usable in enumerate(readable) if usable]
        for position in kept:
            seed_torch(self.config.seed, step, position, team.rank)
            batch = send_to_device(micro_batches[position], team.device, non_blocking=True)
            apart = position != kept[-1]  # the processes' gradients are averaged in the last backward pass
            with self.accelerator.no_sync(self.model) if apart else contextlib.nullcontext():
                try:
                    loss, terms = self.task.step(self.model, batch)
                except NonFiniteError as error:  # before there was a loss: the other processes end with this one
                    if not replaying:
                        raise self._nonfinite(update, str(error)) from error
                    raise
                self.accelerator.backward(loss / len(kept))
            update.losses.append(loss.detach())
            update.terms.append({name: term.detach() for name, term in terms.items()})
        if kept:
            self.accelerator.unscale_gradients(self.optimizer)
            gradients = [p.grad for p in self.task.model.parameters() if p.grad is not None]
            update.norm = nn.utils.get_total_norm(gradients)
        return update

    def _agree(self, update: Update) -> Verdict:
        """Sum over all processes what decides about the update: the step's one wait of the host for the device."""
        self._count_terms(update)
        losses = torch.stack([*update.losses, update.norm.new_zeros(())]).float()
        flags = torch.stack([(~losses.isfinite()).any().float(), (~update.norm.isfinite()).float()])
        local = torch.tensor([self.stop.requested is not None, *self.unreadable.counts()], dtype=torch.float32)
        bad_loss, bad_norm, stop, *unreadable = self.team.sums(torch.cat([flags, send(local, flags.device)]))
        # In fp16 gradients overflow until the loss scale fits. At a scale of 1 or less, that is an error.
        scaler = self.accelerator.scaler
        overflow = bool(bad_norm) and not bad_loss and scaler is not None and scaler.get_scale() > 1
        return Verdict(not (bad_loss or bad_norm) or overflow, overflow, bool(stop), tuple(unreadable))  # type: ignore[arg-type]

    def _step_done(self, rate: float, stop: bool) -> bool:
        """What is due after an update, in this order: log, evaluate, save, stop. Whether the run is complete."""
        step, last = self.state.step, self.state.step >= self.steps
        evaluates = self.task.evaluates_at(step)
        if self.bar is not None:
            self.bar.step(step)
        if evaluates or last or step % self.config.log_every == 0:
            epoch = step * self.config.batch_size / self.task.epoch_size
            self.log({**self.state.means.drain(), "learning_rate": rate, "epoch": epoch})
        if evaluates:
            self._evaluate()
            last = self.team.any(self.team.main and self.task.stopped_early(step)) or last
        failure = self.callbacks.failure()
        if stop or last or failure or step % self.save_every == 0:
            self.save()
        if failure:
            raise UserError(f"{failure}; saved at step {step} in {self.out}: fix the callback and continue with resume")
        if stop and not last:
            raise self._preempted()
        return last

    def _evaluate(self) -> None:
        try:
            self.task.evaluate(self)
        except Preempted:  # only now has the model its own weights again, if it was the averages that were evaluated
            if self.state.saved_step != self.state.step:
                self.save()
            raise

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        """This process's share of the micro-batches, from update ``start`` on."""
        loader = Loader(
            self.task.dataset,
            RankBatches(self.task.batches, self.team.rank, self.team.size, start * self.config.accumulate),
            self.task.collate,
            self.workers,
            pin_memory=self.team.device.type == "cuda",
        )
        return iter(loader)

    # ---- begin and end

    def run(self) -> None:
        """Train to the end; with ``config.resume`` from the newest valid checkpoint, if there is one.

        Raises:
            Preempted: SIGTERM or SIGUSR1 came; the run is saved.
            UserError: a non-finite number, too many unreadable images, no checkpoint that can be read, a full disk.
        """
        if self.config.resume:
            self._resume()
        step, team = self.state.step, self.team
        if team.main:
            checkpoints.prune(self.config.checkpoints, step, self.config.keep)  # a lower `keep` frees space now
            self.unreadable.resume(step, self.task.still_unreadable)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(machine_explained(f"continue {self.out} with --resume"))
                stack.enter_context(self.stop)
                report_needs(self)
                if team.main:
                    self.journal = stack.enter_context(contextlib.closing(Journal(self.out, step)))
                    if self.config.progress:
                        self.bar = stack.enter_context(ProgressBar(self.task.verb, self.steps, step))
                    for name, picture in self.task.pictures().items():
                        say(f"{name}: {self.journal.show(name, picture, step)}")
                stack.enter_context(self._trackers())
                self._train()
        except BaseException as error:
            # Data workers end with their iterator, which the traceback would keep alive: the process could not exit.
            for raised in (error, error.__cause__):
                traceback.clear_frames(raised.__traceback__ if raised is not None else None)
            raise

    def _resume(self) -> None:
        """Restore the newest valid checkpoint, as the main process finds it."""
        newest = newest_checkpoint(self.config) if self.team.main else None
        (found,) = self.team.sums(torch.tensor([0.0 if newest is None else newest + 1.0]))
        if not found:
            return
        step = int(found) - 1
        if step > self.steps:
            raise UserError(
                f"{self.out} has done {step} steps already, more than the {self.steps} asked for: ask for as many at "
                "least, or take it as it is"
            )
        self.state.restore(self.config.checkpoints / f"{checkpoints.PREFIX}{step}", self.team.device)

    def save(self) -> None:
        """Write a checkpoint; a collective."""
        means = self.state.means.state()
        error: UserError | OSError | None = None
        if self.team.main:
            try:
                self.state.write(self.config.checkpoints, means, self.config.keep)
                self.task.saved(self.state.step)
                note_first(self.out, self.state.step)
            except (UserError, OSError) as caught:
                error = caught
        if self.team.any(error is not None):
            raise error or UserError("the main process could not save: see its message")
        self.state.saved_step = self.state.step

    def stop_between_steps(self) -> None:
        """End the evaluation, and with it the run, if any process was asked to stop. A collective.

        Raises:
            Preempted: so it is; the loop saves.
        """
        if self.team.any(self.stop.requested is not None):
            raise self._preempted()

    def _preempted(self) -> Preempted:
        return Preempted(
            f"{self.stop.requested or 'another process was asked to stop'}: saved at step {self.state.step} of "
            f"{self.steps} in {self.out}; continue with the same command and --resume"
        )

    # ---- numbers

    def log(self, values: Mapping[str, float]) -> None:
        """Write values of the current step to ``log.jsonl``, the trackers and the progress bar."""
        values = {**values, "seconds": round(time.monotonic() - self._began, 3)}
        if self.journal is not None:
            self.journal.lines.append([{"step": self.state.step, **values}])
        self.track({f"train/{name}": value for name, value in values.items()})
        self.callbacks.call("on_log", self.state.step, values)
        if self.bar is not None:
            self.bar.step(self.state.step, values.get("loss"))

    def track(self, values: Mapping[str, float]) -> None:
        """Give values of the current step to TensorBoard and the other trackers."""
        self.accelerator.log(dict(values), step=self.state.step)
        if self.journal is not None:
            self.journal.track(self.state.step, values)

    @contextlib.contextmanager
    def _trackers(self) -> Iterator[None]:
        values = dataclasses.asdict(self.config)
        plain = {name: value for name, value in values.items() if isinstance(value, int | float | str)}
        self.accelerator.init_trackers("siamese-detr", plain)
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers:  # Accelerate's own way would end the process group, too
                tracker.finish()

    def _count_terms(self, update: Update) -> None:
        """Add the update's losses and terms to the means that are logged."""
        for loss, terms in zip(update.losses, update.terms, strict=True):
            self.state.means.add({"loss": loss, **terms}, 1 / len(update.losses))

    def _nonfinite(self, update: Update, reason: str | None = None) -> UserError:
        """Keep what the step needs to be done again; what to stop with."""
        if reason is not None:  # in this process alone
            self._count_terms(update)
            losses, norm, terms = [reason], "not computed", self.state.means.read(local=True)
        else:
            terms = self.state.means.read()  # a collective
            if not self.team.main:
                return UserError("loss or gradient is not finite: stopped, see the main process")
            losses, norm = [str(loss.item()) for loss in update.losses], str(update.norm.item())
        return keep_for_replay(self.state, self.task, self.config, self.team, losses, norm, terms)

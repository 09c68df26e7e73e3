"""CachedTrainer: a training loop for any model, on top of a session. It resumes at construction."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ckptcache.cache import TrainingCache
from ckptcache.errors import DuplicateName, InvalidValue
from ckptcache.metadata import CheckpointMetadata
from ckptcache.session import TrainingSession
from ckptcache.state.rng import preserved_rng

log = logging.getLogger("ckptcache")
Evaluation = float | tuple[float, Mapping[str, float]] | Mapping[str, float]


class Callback:
    """What may be hooked into a training; override what is needed. A callback with `state_dict` is saved."""

    def on_start(self, trainer: "CachedTrainer") -> None:
        """Training is about to begin, after the resume."""

    def before_step(self, trainer: "CachedTrainer", iteration: int) -> None:
        """An optimizer step is about to be made; `iteration` were made before."""

    def after_step(self, trainer: "CachedTrainer", iteration: int, loss: Tensor) -> None:
        """A step was made; `loss` is the mean over its batches, detached, perhaps still being computed."""

    def after_evaluation(self, trainer: "CachedTrainer", val_loss: float | None, metrics: Mapping[str, float]) -> None:
        """An evaluation was made, and a checkpoint offered."""

    def on_end(self, trainer: "CachedTrainer", summary: Mapping[str, Any]) -> None:
        """The session is closed, and its summary written."""


class CachedTrainer:
    """Trains a model, from the best checkpoint that fits, and saves as it goes.

    Args:
        model, optimizer: what is trained.
        loss: of (model, batch), a scalar tensor.
        batches: an iterable of batches, begun again when it ends. With `state_dict` its position is saved.
        evaluate: of the model: the validation loss; or that and a mapping of metrics; or a mapping with "val_loss".
        cache: where checkpoints are kept.
        scheduler: stepped after each optimizer step.
        scaler: a `torch.amp.GradScaler`.
        callbacks: see `Callback`.
        gradient_accumulation_steps: batches per optimizer step.
        grad_clip: largest global gradient norm; 0 does not clip.
        max_iters: iterations in all, over all sessions.
        session_iters: iterations in this session.
        eval_interval: iterations between evaluations; there is one at the end in any case.
        session_options: what `TrainingSession` takes: model_config, data_config, resume, checkpoint_interval, ...

    Raises:
        InvalidValue: a count is below 1, or neither `max_iters` nor `session_iters` is given.
        and what `TrainingSession` raises at entry.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss: Callable[[Any, Any], Tensor],
        batches: Iterable[Any],
        evaluate: Callable[[Any], Evaluation] | None = None,
        cache: TrainingCache,
        scheduler: Any = None,
        scaler: Any = None,
        callbacks: Iterable[Callback] = (),
        gradient_accumulation_steps: int = 1,
        grad_clip: float = 0.0,
        max_iters: int | None = None,
        session_iters: int | None = None,
        eval_interval: int = 100,
        **session_options: Any,
    ) -> None:
        _check_counts(gradient_accumulation_steps, eval_interval, max_iters, session_iters)
        self.model, self.optimizer, self.scheduler, self.scaler = model, optimizer, scheduler, scaler
        self.loss, self.batches, self.evaluate = loss, batches, evaluate
        self.callbacks = tuple(callbacks)
        self.gradient_accumulation_steps, self.grad_clip = gradient_accumulation_steps, grad_clip
        self.max_iters, self.session_iters, self.eval_interval = max_iters, session_iters, eval_interval
        self.session = TrainingSession(
            cache,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=scaler,
            loader=batches if hasattr(batches, "state_dict") else None,
            **_stateful_callbacks(self.callbacks),
            **session_options,
        )
        self.session.__enter__()
        self._stream = _endless(batches)

    # --- what it found ---------------------------------------------------------------------------

    @property
    def starting_iteration(self) -> int:
        """Where training starts: 0, or the iteration of the checkpoint that it resumed from."""
        return self.session.start_iteration

    @property
    def resumed_from(self) -> CheckpointMetadata | None:
        """The checkpoint that it resumed from; None after a fresh start."""
        return self.session.resumed_from

    @property
    def last_iteration(self) -> int | None:
        """The iteration at which this session will be finished; None: no end."""
        own = None if self.session_iters is None else self.starting_iteration + self.session_iters
        ends = [end for end in (self.max_iters, own) if end is not None]
        return min(ends, default=None)

    # --- training --------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train to the end of the session, and return its summary (what `training_summary.json` holds).

        Raises:
            KeyboardInterrupt, SystemExit(143): SIGINT or SIGTERM arrived; the state was saved before.
            SaveFailed: the last save failed.
        """
        try:
            with ExitStack() as stack:
                stack.push(self.session)
                self._train()
        finally:
            summary = self.session.summary()
            self._call("on_end", summary)
        return summary

    def close(self) -> None:
        """End the session without training; after `train` there is nothing left to do."""
        self.session.__exit__(None, None, None)

    def _train(self) -> None:
        self._call("on_start")
        self._evaluate_at_start()
        for iteration in self.session.steps(self.max_iters, session_iters=self.session_iters):
            self._call("before_step", iteration)
            loss = self._step()
            self.session.log(loss=loss)
            self._call("after_step", iteration + 1, loss)
            if (iteration + 1) % self.eval_interval == 0:
                self._evaluate_and_offer()
        is_trained = self.session.stop_reason not in ("signal", "nothing_to_do")
        if is_trained and self.session.evaluated_at != self.session.iteration:
            self._evaluate_and_offer()

    def _step(self) -> Tensor:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=next(self.model.parameters()).device)
        for _ in range(self.gradient_accumulation_steps):
            loss = self.loss(self.model, next(self._stream)) / self.gradient_accumulation_steps
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            scaled.backward()
            total += loss.detach()
        self._clip()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        return total

    def _clip(self) -> None:
        if self.grad_clip > 0:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)

    # --- evaluating ------------------------------------------------------------------------------

    def _evaluate_at_start(self) -> None:
        """Where this session starts from, measured; a restore that went wrong shows here."""
        is_due = self.last_iteration is None or self.starting_iteration < self.last_iteration
        if self.evaluate is not None and is_due:
            val_loss, metrics = self._evaluation()
            self.session.evaluated(val_loss, metrics)
            self._call("after_evaluation", val_loss, metrics)

    def _evaluate_and_offer(self) -> None:
        if self.evaluate is None:
            return
        val_loss, metrics = self._evaluation()
        self.session.checkpoint(val_loss=val_loss, metrics=metrics)
        self._call("after_evaluation", val_loss, metrics)

    def _evaluation(self) -> tuple[float | None, dict[str, float]]:
        """The loss and the metrics; evaluating more or less often never changes what is trained."""
        assert self.evaluate is not None  # noqa: S101 - both callers have looked
        self.model.eval()
        with preserved_rng(), torch.no_grad():
            found = self.evaluate(self.model)
        self.model.train()
        if isinstance(found, Mapping):
            metrics = {name: float(value) for name, value in found.items()}
            return metrics.pop("val_loss", None), metrics
        if isinstance(found, tuple):
            return float(found[0]), {name: float(value) for name, value in found[1].items()}
        return float(found), {}

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        is_empty = True
        for batch in batches:
            is_empty = False
            yield batch
        if is_empty:
            raise InvalidValue(name="batches", value=type(batches).__name__, reason="it gave no batch")


def _stateful_callbacks(callbacks: Iterable[Callback]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for callback in callbacks:
        name = f"callback_{type(callback).__name__}"
        if name in named:
            raise DuplicateName(name=name)
        if hasattr(callback, "state_dict"):
            named[name] = callback
    return named


def _check_counts(
    gradient_accumulation_steps: int, eval_interval: int, max_iters: int | None, session_iters: int | None
) -> None:
    counts = {
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "eval_interval": eval_interval,
        "max_iters": 1 if max_iters is None else max_iters,
        "session_iters": 1 if session_iters is None else session_iters,
    }
    for name, value in counts.items():
        if value < 1:
            raise InvalidValue(name=name, value=value, reason="it must be at least 1")
    if max_iters is None and session_iters is None:
        raise InvalidValue(name="max_iters", value=None, reason="give max_iters or session_iters, or it never ends")

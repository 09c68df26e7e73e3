"""CachedTrainer: a training loop for any model, on top of a session. It resumes at construction."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ckptcache.cache import TrainingCache
from ckptcache.errors import InvalidValue, SessionClosed
from ckptcache.metadata import CheckpointMetadata
from ckptcache.policy.divergence import DivergenceGuard
from ckptcache.recovery import Divergence
from ckptcache.session import TrainingSession
from ckptcache.state.rng import preserved_rng
from ckptcache.values import as_float

log = logging.getLogger("ckptcache")
_DEFAULT_GUARD = DivergenceGuard()
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
        evaluate: of the model: the validation loss; or that and a mapping of metrics; or a mapping with "val_loss",
            which may be None. Called in evaluation mode and without gradients.
        cache: where checkpoints are kept.
        scheduler: stepped after each optimizer step.
        scaler: a `torch.amp.GradScaler`.
        callbacks: see `Callback`.
        gradient_accumulation_steps: batches per optimizer step.
        grad_clip: largest global gradient norm; 0 does not clip.
        max_iters: iterations in all, over all sessions.
        session_iters: iterations in this session.
        eval_interval: iterations between evaluations; there is one at the start and one at the end in any case.
        divergence_guard: what counts as diverged, upon which training goes back to the best good checkpoint, see
            `DivergenceGuard`. None: the session ends as "diverged" at an evaluation whose loss is NaN or infinite.
        session_options: what `TrainingSession` takes: model_config, data_config, resume, checkpoint_interval, ...

    Raises:
        InvalidValue: a count is below 1, `grad_clip` below 0, or neither `max_iters` nor `session_iters` is given.
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
        divergence_guard: DivergenceGuard | None = _DEFAULT_GUARD,
        **session_options: Any,
    ) -> None:
        _check_counts(gradient_accumulation_steps, eval_interval, max_iters, session_iters)
        if not grad_clip >= 0:
            raise InvalidValue(name="grad_clip", value=grad_clip, reason="it must be at least 0")
        self.model, self.optimizer, self.scheduler, self.scaler = model, optimizer, scheduler, scaler
        self.loss, self.batches, self.evaluate = loss, batches, evaluate
        self.callbacks, self._guard = tuple(callbacks), divergence_guard
        self.gradient_accumulation_steps, self.grad_clip = gradient_accumulation_steps, grad_clip
        self.max_iters, self.session_iters, self.eval_interval = max_iters, session_iters, eval_interval
        self.session = TrainingSession(
            cache,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=scaler,
            loader=batches if hasattr(batches, "state_dict") else None,
            divergence_guard=divergence_guard,
            **_stateful_callbacks(self.callbacks),
            **session_options,
        )
        self.session.on("diverged", self._begin_batches_anew)
        self.session.__enter__()
        self._resumed_from = self.session.resumed_from
        if self.resumed_from is not None and not hasattr(batches, "state_dict"):
            log.warning("the batches have no state_dict: they begin anew")
        self._stream = _endless(batches)

    # --- what it found ---------------------------------------------------------------------------

    @property
    def starting_iteration(self) -> int:
        """Where training starts: 0, or the iteration of the checkpoint that it resumed from."""
        return 0 if self.resumed_from is None else self.resumed_from.iteration

    @property
    def resumed_from(self) -> CheckpointMetadata | None:
        """The checkpoint that it resumed from; None after a fresh start."""
        return self._resumed_from

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
            SessionClosed: it has been called before.
            InvalidValue: `batches` gave none, or `evaluate` no number.
        """
        if self.session.is_closed:
            raise SessionClosed(session=self.session.id)
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
        self.model.train()
        self._call("on_start")
        self._evaluate_at_start()
        self._train_to_the_end()
        while self.session.recover():  # the evaluation after the last step has told of a divergence
            self._train_to_the_end()

    def _train_to_the_end(self) -> None:
        for iteration in self.session.steps(self.last_iteration):
            self._call("before_step", iteration)
            loss = self._step()
            self.session.stepped()
            self.session.log(loss=loss)
            self._call("after_step", iteration + 1, loss)
            if (iteration + 1) % self.eval_interval == 0:
                self._evaluate_and_offer()
        is_trained = self.session.stop_reason not in ("signal", "nothing_to_do")
        if is_trained and self.session.evaluated_at != self.session.iteration:
            self._evaluate_and_offer()

    def _begin_batches_anew(self, divergence: Divergence) -> None:
        """What was drawn ahead belongs to the branch that was left."""
        if not divergence.stops:
            self._stream = _endless(self.batches)

    def _step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        total = self._backward()
        for _ in range(self.gradient_accumulation_steps - 1):
            total = total + self._backward()
        self._clip()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        return total

    def _backward(self) -> Tensor:
        """Gradients of the next batch added to those that are there; its share of the loss, detached."""
        loss = self.loss(self.model, next(self._stream)) / self.gradient_accumulation_steps
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()
        return loss.detach()

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
            val_loss, metrics = self._evaluation(self.evaluate)
            self.session.evaluated(val_loss, metrics)
            self._call("after_evaluation", val_loss, metrics)
            self._end_if_diverged(val_loss, guarded=False)

    def _evaluate_and_offer(self) -> None:
        if self.evaluate is None:
            self._look_at_loss()
            return
        val_loss, metrics = self._evaluation(self.evaluate)
        if val_loss is None:
            self.session.evaluated(None, metrics)
        else:
            self.session.checkpoint(val_loss=val_loss, metrics=metrics)
        self._call("after_evaluation", val_loss, metrics)
        self._end_if_diverged(val_loss)

    def _look_at_loss(self) -> None:
        """Without an evaluation the training loss is all there is to tell of a divergence."""
        loss = self.session.latest("loss")
        # With a scaler a loss that overflows is ordinary: the step is left out, and the scale halved.
        if loss is not None and self._guard is None and self.scaler is None and not math.isfinite(loss):
            self.session.evaluated(loss)  # so that nothing ever resumes from what is saved now
            self._end_if_diverged(loss)

    def _end_if_diverged(self, val_loss: float | None, *, guarded: bool = True) -> None:
        # What is broken before the first step isn't mended by another try.
        is_guarded = guarded and self._guard is not None
        if not is_guarded and val_loss is not None and not math.isfinite(val_loss):
            log.warning("the loss has diverged: it is %s at iteration %d", val_loss, self.session.iteration)
            self.session.stop("diverged")

    def _evaluation(self, evaluate: Callable[[Any], Evaluation]) -> tuple[float | None, dict[str, float]]:
        """The loss and the metrics; evaluating more or less often never changes what is trained."""
        with preserved_rng(), _evaluation_mode(self.model), torch.no_grad():
            found: Any = evaluate(self.model)
        if isinstance(found, Mapping) and "val_loss" in found:
            numbers = {name: value for name, value in found.items() if name != "val_loss"}
            return _measured(found["val_loss"], numbers)
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
            return _measured(*found)
        if found is None or isinstance(found, Mapping | tuple):
            reason = "give the validation loss, or it and a mapping of metrics, or a mapping with val_loss"
            raise InvalidValue(name="what evaluate returns", value=found, reason=reason)
        return _measured(found, {})

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and afterwards each module as it was: some may be frozen on purpose."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


def _measured(val_loss: Any, metrics: Mapping[str, Any]) -> tuple[float | None, dict[str, float]]:
    numbers = {str(name): as_float(value, name) for name, value in metrics.items()}
    return None if val_loss is None else as_float(val_loss, "val_loss"), numbers


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    count = 0
    while True:
        before = count
        for batch in batches:
            count += 1
            yield batch
        if count == before:
            ended = f"it ended after {count} batches and can't be begun again: give a DataLoader, a list, or the like"
            raise InvalidValue(
                name="batches", value=type(batches).__name__, reason=ended if count else "it gave no batch"
            )


def _stateful_callbacks(callbacks: Iterable[Callback]) -> dict[str, Any]:
    """Those with a state, by the names that they are saved under; of two of a class the second gets a number."""
    named: dict[str, Any] = {}
    for callback in callbacks:
        if hasattr(callback, "state_dict"):
            name = f"callback_{type(callback).__name__}"
            number = sum(key.partition("-")[0] == name for key in named)
            named[f"{name}-{number + 1}" if number else name] = callback
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

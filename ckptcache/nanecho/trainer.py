"""CachedNanEchoTrainer: the main job, a small GPT whose connections grow, trained on text."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ckptcache.cache import TrainingCache
from ckptcache.errors import InvalidValue
from ckptcache.nanecho.data import Corpus
from ckptcache.nanecho.model import NanEcho, parameter_groups
from ckptcache.nanecho.sampler import BlockSampler, evaluation_batches
from ckptcache.nanecho.schedule import ConnectionGrowth, learning_rate_at
from ckptcache.nanecho.settings import NanEchoConfig, TrainingSettings
from ckptcache.recovery import Divergence
from ckptcache.state.rng import seed_everything
from ckptcache.trainer import CachedTrainer, Callback


class Schedule(Callback):
    """Sets the optimizer's numbers and grows the connections, by the iteration and the settings in force."""

    def __init__(
        self,
        model: NanEcho,
        optimizer: torch.optim.Optimizer,
        settings: TrainingSettings,
        *,
        keep_saved_learning_rate: bool,
    ) -> None:
        self.optimizer = optimizer
        self._settings = settings
        self._growth = ConnectionGrowth.of(model.config, settings)
        self._model = model
        self._keeps_saved = keep_saved_learning_rate
        self._asked = settings.learning_rate
        self._saved: float | None = None

    def state_dict(self) -> dict[str, float]:
        """The learning rate that the schedule starts from: asked for once, and lowered perhaps since."""
        return {"learning_rate": self._settings.learning_rate}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go by the saved learning rate, if that is to be kept."""
        self._saved = state["learning_rate"]
        if self._keeps_saved:
            self._set_learning_rate(self._saved)

    def on_start(self, trainer: CachedTrainer) -> None:
        """Put the settings in force over those that the checkpoint's optimizer was saved with."""
        asked, now = self._asked, self._settings.learning_rate
        if self._saved is not None and self._keeps_saved and now != asked:
            trainer.session.tell(
                f"learning_rate is {now:g}, as saved; the default is {asked:g} (--learning_rate changes it)"
            )
        elif self._saved is not None and self._saved != now:
            trainer.session.tell(f"learning_rate is {now:g}, as asked; saved was {self._saved:g}")
        trainer.session.on("diverged", self._lower)
        fresh = parameter_groups(self._model, self._settings.weight_decay)
        for group, new in zip(trainer.optimizer.param_groups, fresh, strict=True):
            group["weight_decay"], group["betas"] = new["weight_decay"], self._settings.betas

    def _lower(self, divergence: Divergence) -> None:
        self._set_learning_rate(self._settings.learning_rate * divergence.learning_rate_factor)

    def _set_learning_rate(self, learning_rate: float) -> None:
        """The lowest rate, where one was asked for, stays below."""
        lowest = self._settings.min_learning_rate
        lowest = None if lowest is None else min(lowest, learning_rate)
        self._settings = replace(self._settings, learning_rate=learning_rate, min_learning_rate=lowest)

    def before_step(self, trainer: CachedTrainer, iteration: int) -> None:
        """Grow if it is due, and save that; then set the learning rate of the coming step."""
        target = self._growth.due(iteration, self._model.connection_ratio)
        if target is not None:
            trainer.session.staged()  # growing writes to weights that a save may still be copying
            if self._model.grow_connections(target):
                trainer.session.checkpoint(save_reason="growth")
        for group in trainer.optimizer.param_groups:
            group["lr"] = learning_rate_at(iteration, self._settings)


class CachedNanEchoTrainer(CachedTrainer):
    """Trains a NanEcho on a corpus, from the best checkpoint that fits.

    Args:
        config: what the model is.
        settings: how it is trained.
        corpus: the text.
        cache: where checkpoints are kept.
        callbacks: in addition to the schedule.
        keep_saved_learning_rate: whether a resume goes by the learning rate of the checkpoint, and not of `settings`.
        session_options: what `TrainingSession` takes: resume, summary_path, ...
    """

    def __init__(
        self,
        config: NanEchoConfig,
        settings: TrainingSettings,
        corpus: Corpus,
        cache: TrainingCache,
        *,
        callbacks: Iterable[Callback] = (),
        keep_saved_learning_rate: bool = False,
        **session_options: Any,
    ) -> None:
        seed_everything(settings.seed)
        self.device = torch.device(pick_device(settings.device))
        model = NanEcho(config).to(self.device)
        groups = parameter_groups(model, settings.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
        sampler = BlockSampler(
            corpus.train, block_size=config.block_size, batch_size=settings.batch_size, seed=settings.seed
        )
        self._eval_batches = evaluation_batches(
            corpus.val, config.block_size, settings.batch_size, settings.eval_batches
        )
        schedule = Schedule(model, optimizer, settings, keep_saved_learning_rate=keep_saved_learning_rate)
        super().__init__(
            model,
            optimizer,
            loss=self._loss,
            batches=sampler,
            evaluate=self._evaluate,
            cache=cache,
            callbacks=(schedule, *callbacks),
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            grad_clip=settings.grad_clip,
            max_iters=settings.max_iters,
            session_iters=settings.session_iters,
            eval_interval=settings.eval_interval,
            checkpoint_interval=settings.checkpoint_interval,
            max_seconds=settings.max_seconds,
            model_config=config,
            training_config=settings,
            data_config=corpus.data_config,
            seed=settings.seed,
            **session_options,
        )

    def _loss(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = (part.to(self.device, non_blocking=True) for part in batch)
        loss: Tensor = model(inputs, targets)[1]
        return loss

    def _evaluate(self, model: Any) -> Mapping[str, float]:
        """The mean cross-entropy in nats per token over the same batches each time, and the share of tokens
        whose likeliest prediction is right."""
        total, right, count = 0.0, 0, 0
        for inputs, targets in self._eval_batches:
            logits, loss = model(inputs.to(self.device), targets.to(self.device))
            total += float(loss) * targets.numel()
            right += int((logits.argmax(-1).cpu() == targets).sum())
            count += targets.numel()
        return {"val_loss": total / count, "accuracy": right / count}


def pick_device(wanted: str) -> str:
    """`wanted`, or for "auto" the fastest device there is.

    Raises InvalidValue where torch doesn't know `wanted`, or can't hold a tensor there.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=wanted).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise InvalidValue(name="device", value=wanted, reason=_why_not(wanted)) from error
    return wanted


def _why_not(device: str) -> str:
    # torch's own messages are paragraphs, and differ between its builds.
    usable = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    usable += ["mps"] if torch.backends.mps.is_available() else []
    return f"torch has no such device here; what it has is {', '.join(usable)}"

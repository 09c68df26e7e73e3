"""Trainings as users write them, one for each thing that a resume must get right, and ways to get each wrong."""

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset, TensorDataset

from ckptcache.cache import TrainingCache
from ckptcache.session import TrainingSession
from ckptcache.state.rng import seed_everything
from tests import jobs  # noqa: F401 - one thread, and all of torch imported before anything is forked
from tests.nanecho.test_trainer import made

ITERATIONS = 13
_SIZE = 4
DATA = TensorDataset(
    torch.from_numpy(np.random.default_rng(5).normal(size=(22, 6)).astype(np.float32)), torch.arange(22) % 3
)


class Batches:
    """Shuffled batches, one epoch after the other, fetched by torch's own workers.

    The position is that of the batch that was handed out last, whatever the workers have fetched ahead.
    """

    def __init__(self, workers: int, *, own_generator: bool = True) -> None:
        self.workers, self.own_generator = workers, own_generator
        self.epoch, self.done = 0, 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(self.epoch)).tolist()
            # Of a DataLoader's generator the workers' seed is drawn; without one of its own, from torch's.
            generator = torch.Generator() if self.own_generator else None
            left = Subset(DATA, order[self.done * _SIZE :])
            for batch in DataLoader(left, _SIZE, num_workers=self.workers, generator=generator) if len(left) else ():
                self.done += 1
                yield batch
            self.epoch, self.done = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]


class OwnDropout(nn.Module):
    """Dropout that draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(11)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (torch.rand(hidden.shape, generator=self.generator) > 0.3) if self.training else hidden


def stateful_loader(workers: int) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import RandomSampler

    # With one generator for both, the seed that each iter() draws for the workers would shift the next epoch's order.
    sampler = RandomSampler(DATA, generator=torch.Generator().manual_seed(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchdata 0.11 asks torch 2.13 for a name that is deprecated
        return StatefulDataLoader(
            DATA, batch_size=_SIZE, sampler=sampler, num_workers=workers, generator=torch.Generator()
        )


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def train(folder: str, feature: str = "dropout", workers: int = 0, wrong: str = "") -> None:
    """Train for `ITERATIONS` steps with one `feature`; `wrong` says what is left out or spoilt."""
    seed_everything(1 if wrong != "unseeded model" else random.SystemRandom().randrange(2**31))
    own = OwnDropout()
    drop = own if feature == "own generator" else nn.Dropout(0.3)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), drop, nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    loader = stateful_loader(workers) if feature == "torchdata" else Batches(workers, own_generator=wrong != "iter")
    extra = extras(feature, model, optimizer)
    if feature == "own generator":
        extra["noise"] = own.generator
    given = {"model": model, "optimizer": optimizer, "loader": loader, **extra}
    kept = {name: value for name, value in given.items() if name != wrong}
    with TrainingSession(TrainingCache(Path(folder) / "cache"), **kept) as session:
        batches = endless(loader)
        if wrong == "numpy":
            np.random.seed(1)
        for step in session.steps(ITERATIONS):
            loss = 0.0
            for _ in range(3 if feature == "accumulation" else 1):
                loss += backward(model, next(batches), extra.get("scaler"))
            update(step, model, optimizer, loss, extra)
            session.log(loss=loss, noise=np.random.random(), **average(extra, model))


def extras(feature: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a feature adds to what is saved."""
    schedulers = torch.optim.lr_scheduler
    if feature == "cosine":
        return {"scheduler": schedulers.CosineAnnealingLR(optimizer, ITERATIONS)}
    if feature == "plateau":
        return {"scheduler": schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)}
    if feature == "amp":
        return {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)}
    if feature == "ema":
        return {"ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)}
    return {}


def backward(model: nn.Module, batch: Any, scaler: Any) -> float:
    inputs, targets = batch
    with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
        loss = nn.functional.cross_entropy(model(inputs), targets)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.item()


def update(step: int, model: nn.Module, optimizer: Any, loss: float, extra: dict[str, Any]) -> None:
    if (scaler := extra.get("scaler")) is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad()
    if (scheduler := extra.get("scheduler")) is not None:
        is_plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(loss) if is_plateau else scheduler.step()
    if "ema" in extra:
        extra["ema"].update_parameters(model)


def average(extra: dict[str, Any], model: nn.Module) -> dict[str, float]:
    if "ema" not in extra:
        return {}
    with torch.no_grad():
        return {"ema_output": float(extra["ema"].eval()(DATA.tensors[0][:1]).sum())}


def grow(folder: str) -> None:
    """A nanEcho whose connections grow at iterations 4 and 8."""
    made(TrainingCache(Path(folder) / "cache"), max_iters=ITERATIONS).train()

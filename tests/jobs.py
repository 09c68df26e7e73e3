"""Small trainings that tests interrupt and compare: every source of chance is drawn from, nothing is left out."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ckptcache.cache import TrainingCache
from ckptcache.nanecho.sampler import BlockSampler
from ckptcache.session import TrainingSession
from ckptcache.state.rng import seed_everything

# A forked child that inherits a pool of threads waits for them for ever; and two cores are two workers' anyway.
torch.set_num_threads(1)
# Making the first optimizer imports half of torch, which takes seconds in each forked child that has to.
torch.optim.SGD([torch.zeros(1)], lr=0.1)
TOKENS = np.random.default_rng(7).integers(0, 32, 4000).astype(np.uint16)


class Net(nn.Module):
    """Embeds tokens, drops some, and predicts the next one; the buffer changes in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(16, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens).flatten(0, 1)
        return self.out(self.drop(self.norm(hidden)))


class Job:
    """A training whose every step draws from torch's, NumPy's and Python's generators."""

    def __init__(self, seed: int = 3) -> None:
        seed_everything(seed)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, gamma=0.9)
        self.loader = BlockSampler(TOKENS, block_size=8, batch_size=4, seed=seed)
        self.losses: dict[int, float] = {}
        self.batches: dict[int, list[int]] = {}
        self.draws: dict[int, tuple[float, float, float]] = {}

    def objects(self) -> dict[str, Any]:
        """What a session saves."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
        }

    def train_step(self, step: int) -> torch.Tensor:
        """One optimizer step; what it saw and drew is kept."""
        inputs, targets = self.loader.next_batch()
        self.draws[step] = (random.random(), float(np.random.random()), float(torch.rand(())))
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(inputs), targets.flatten())
        (loss * (1 + self.draws[step][0] * self.draws[step][1])).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.losses[step], self.batches[step] = loss.item(), inputs.flatten().tolist()
        return loss

    def run(
        self,
        cache: TrainingCache,
        max_iters: int,
        *,
        in_step: Callable[[TrainingSession, int], Any] | None = None,
        **options: Any,
    ) -> TrainingSession:
        """One session; `in_step` is called after each optimizer step, with the iterations taken."""
        with TrainingSession(cache, **self.objects(), **options) as session:
            for step in session.steps(max_iters):
                session.log(loss=self.train_step(step))
                if in_step is not None:
                    in_step(session, step + 1)
        return session

    def state(self) -> dict[str, Any]:
        """Everything that must be the same after the same steps."""
        return {
            **{name: value.state_dict() for name, value in self.objects().items()},
            "draws": (random.random(), float(np.random.random()), float(torch.rand(()))),
        }


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two trees differ, bit for bit."""
    if isinstance(a, torch.Tensor):
        if not (isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)):
            yield path
    elif isinstance(a, np.ndarray):
        if not (isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)):
            yield path
    elif isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            yield path
            return
        for key in a:
            yield from differences(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        if not isinstance(b, list | tuple) or len(a) != len(b):
            yield path
            return
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}[{i}]")
    elif a != b:
        yield path


def cache_at(folder: Path, **settings: Any) -> TrainingCache:
    """A cache that saves any improvement."""
    return TrainingCache(folder, **{"min_improvement_threshold": 0.0, **settings})


def as_python_would(body: Callable[[], object]) -> None:
    """Run `body` in a forked child and end as Python ends a program that an exception leaves."""
    try:
        body()
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    except KeyboardInterrupt:
        os._exit(130)

"""What the tests of the cache share: small models that were trained a little, and folders taken down byte by byte."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckptcache import TrainingCache
from ckptcache.metadata import CheckpointMetadata
from tests.faults import run_child

# A forked child that inherits a pool of threads waits for them for ever.
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534
CONFIG = {"n_layer": 1, "n_head": 2, "n_embd": 4, "vocab_size": 16, "block_size": 8}


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embed(tokens))
        return out


class Training:
    """A model with its optimizer and schedule, trained a few steps, so that all of them hold state."""

    def __init__(self, seed: int = 0, *, width: int = 4, steps: int = 3) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)
        self.width = width
        self.train(steps)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.randn(5, self.width)).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    @property
    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    @property
    def state(self) -> dict[str, Any]:
        """A copy of everything that the objects hold."""
        return frozen({name: value.state_dict() for name, value in self.objects.items()})


def frozen(tree: Any) -> Any:
    """A copy of a tree that shares nothing with it."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: frozen(value) for key, value in tree.items()}
    return type(tree)(frozen(value) for value in tree) if isinstance(tree, list | tuple) else tree


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal to the bit, NaN being equal to itself."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def tiny(value: float = 0.0, size: int = 4) -> dict[str, Any]:
    """A state that takes milliseconds to save."""
    return {"w": torch.full((size,), value)}


def save(cache: TrainingCache, loss: float | None, iteration: int = 1, **given: Any) -> CheckpointMetadata:
    """Save a tiny state whose value is its loss."""
    state = given.pop("state", None) or tiny(-1.0 if loss is None else float(loss))
    record = cache.save(state, iteration=iteration, val_loss=loss, **given)
    assert record is not None
    return record


def file_of(cache: TrainingCache, record: CheckpointMetadata | str) -> Path:
    """Where the file of a checkpoint is."""
    return cache.cache_dir / "checkpoints" / f"{record if isinstance(record, str) else record.id}.pt"


def flip(path: Path, position: int = -200) -> None:
    """Turn one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def ids(records: Any) -> list[str]:
    """The ids of records, in their order."""
    return [record.id for record in records]


def kinds(cache: TrainingCache, **how: Any) -> list[str]:
    """What the doctor finds, by kind."""
    return sorted(finding.kind for finding in cache.doctor(**how))


def temporary_files(folder: Path) -> list[str]:
    """The files of unfinished writes below a folder."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*.tmp")]


def let_in(folder: Path) -> Path:
    """Let a process without rights reach a folder of the test's; returns it."""
    for each in (folder, *folder.parents):
        if each.stat().st_uid == os.geteuid() and not each.stat().st_mode & 0o001:
            each.chmod(each.stat().st_mode | 0o011)
    folder.chmod(0o755)
    return folder


def as_nobody(body: Callable[[], object]) -> int:
    """Run `body` in a child that has no rights; 0 when it raised nothing."""

    def without_rights() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        body()

    return run_child(without_rights)


def python(code: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a program that uses the package, in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
        timeout=120,
    )

"""What is saved in the background is the state at the call, however training goes on meanwhile."""

import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from ckptcache import TrainingCache
from ckptcache.state import staging
from tests.campaigns import variants

CAMPAIGN = "bytes at the call"
PARTS = 6
SIZE = 150_000


class Counter(nn.Module):
    """Every element of it is the number of steps taken; forward passes count as well, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(SIZE) for _ in range(PARTS))
        self.register_buffer("passes", torch.zeros(SIZE))
        # A step takes away lr * grad, which is minus one, exactly.
        self.optimizer = torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.0)
        for weight in self.weights:
            weight.grad = torch.full((SIZE,), -1.0)

    def forward(self) -> None:
        self.passes += 1

    def train_on(self, steps: int) -> None:
        for _ in range(steps):
            self()
            self.optimizer.step()


@pytest.fixture(autouse=True)
def _staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a buffer takes is copied at the call, and all that is trained beside the training."""
    monkeypatch.setattr(staging, "AT_ONCE", SIZE * 8)


def save_while_training(folder: Path, saves: int, variant: variants.Variant = nullcontext) -> None:
    """Save again and again while training goes on, and compare what was saved with what was to be."""
    draw, model, wanted = random.Random(3), Counter(), {}
    with variant(), TrainingCache(folder, max_checkpoints=10_000) as cache:
        for _ in range(saves):
            model.train_on(draw.randrange(4))
            state = {"model": model, "optimizer": model.optimizer, "generator": torch.Generator().manual_seed(saves)}
            steps = int(model.passes[0])
            record = cache.save(state, iteration=steps, val_loss=1.0, blocking=False)
            wanted[record.id] = float(steps)
            model.train_on(draw.randrange(4))
            if len(wanted) == 20:
                compare(cache, wanted)
    compare(TrainingCache(folder, max_checkpoints=10_000), wanted)


def compare(cache: TrainingCache, wanted: dict[str, float]) -> None:
    """Then make room."""
    cache.wait_until_finished()
    for id, steps in wanted.items():
        for name, tensor in cache.load(id)["model"].items():
            assert tensor.unique().tolist() == [steps], f"{name} of {id} is not as it was after {steps:g} steps"
    wanted.clear()
    TrainingCache(cache.cache_dir, max_checkpoints=1, keep_latest=0).prune()


@pytest.mark.parametrize("saves", [20, pytest.param(200, marks=pytest.mark.campaign)])
def test_what_is_saved_is_the_state_at_the_call(quick_path, counted, saves):
    save_while_training(quick_path, saves)
    counted(CAMPAIGN, "saves while training went on", saves)


@pytest.mark.parametrize("variant", [variants.without_copying_at_the_call, variants.without_waiting_for_the_copy])
def test_counters_show_a_state_that_is_not_copied_in_time(quick_path, counted, variant):
    with pytest.raises(AssertionError, match="is not as it was"):
        save_while_training(quick_path, 60, variant)
    counted.caught(CAMPAIGN, variants.name_of(variant))

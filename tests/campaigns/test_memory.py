"""Too little memory to copy a state: it is saved all the same, or that is said and everything stays as it was."""

import os
import resource
import shutil
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptcache import TrainingCache
from ckptcache.errors import CkptCacheError
from tests.caches import same, save, temporary_files
from tests.campaigns import variants
from tests.faults import run_child

CAMPAIGN = "memory"
STATE_BYTES = 200_000_000
LEAST = 32_000_000
"""Bytes that Python and a thread need for themselves."""
SAVED, SAID = 0, 3


def plain_state() -> dict[str, Any]:
    """Tensors that anybody may change, and that are copied before the call returns."""
    torch.manual_seed(0)
    return {"model": {f"{i}": torch.rand(STATE_BYTES // 4 // 8) for i in range(8)}}


def trained_state() -> dict[str, Any]:
    """A model and its optimizer, which are copied beside the training."""
    torch.manual_seed(0)
    model = nn.ParameterList(torch.rand(STATE_BYTES // 4 // 2 // 8) for _ in range(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def held(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in state.items()}


def limit_memory(spare: int) -> None:
    """Let this process take so many bytes of addresses more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))


def save_with(folder: Path, state: dict[str, Any], spare: int, variant: variants.Variant = nullcontext) -> int:
    """Save in the background with so much memory to spare, then once more with all of it; how the first went."""

    def body() -> None:
        outcome = SAVED
        with TrainingCache(folder) as cache:
            # What is imported only now, and a thread's own memory, are no part of what is asked.
            save(cache, 8.0, 1, blocking=False)
            cache.wait_until_finished()
            limit_memory(spare)
            try:
                with variant():
                    cache.save(state, iteration=2, val_loss=1.0, blocking=False)
                    cache.wait_until_finished()
            except CkptCacheError as error:
                outcome = SAID
                assert "memory" in str(error)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            save(cache, 5.0, 3)
        os._exit(outcome)

    return run_child(body)


@pytest.mark.parametrize("levels", [2, pytest.param(20, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("made", [plain_state, trained_state])
@pytest.mark.timeout(600)
def test_a_save_without_memory_to_copy_is_whole_or_said_to_have_failed(quick_path, counted, levels, made):
    state, outcomes = made(), []
    for level in range(levels):
        folder = quick_path / f"{level}"
        spare = LEAST + int(1.5 * STATE_BYTES * level / max(1, levels - 1))
        outcomes.append(save_with(folder, state, spare))
        cache = TrainingCache(folder)
        there = {r.iteration: r for r in cache.checkpoints()}
        assert there.keys() == ({1, 2, 3} if outcomes[-1] == SAVED else {1, 3})
        assert outcomes[-1] != SAVED or same(plain(cache.load(there[2].id)), plain(held(state)))
        assert temporary_files(folder) == []
        assert cache.doctor() == []
        shutil.rmtree(folder)
    assert outcomes == [SAVED] * levels
    counted(CAMPAIGN, "limits at which 200 MB were saved", levels)


def plain(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "model": dict(state["model"])}


def test_a_save_that_insists_on_a_copy_is_found_out(quick_path, counted):
    assert save_with(quick_path / "c", trained_state(), LEAST, variants.insisting_on_a_copy) != SAVED
    counted.caught(CAMPAIGN, variants.name_of(variants.insisting_on_a_copy))

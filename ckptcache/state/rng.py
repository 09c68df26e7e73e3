"""Random number generators: those of the process, and generator objects, as plain values."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ckptcache.values import content_hash


def capture_rng() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators (and of each CUDA device's, and of MPS)."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put the global generators where `capture_rng` found them; call it last, for everything draws from them."""
    if "cuda" in state and torch.cuda.is_available():
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value, device)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def is_rng_state(state: object) -> bool:
    """Whether `state` is what `capture_rng` gives."""
    return isinstance(state, dict) and {"python", "numpy", "torch"} <= set(state)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(seed: int, *parts: str) -> int:
    """A seed of 31 bits that depends on `seed` and `parts` and on nothing else."""
    return int(content_hash([seed, *parts]), 16) % 2**31


def generator_access(value: Any) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    """How to read and write the state of a generator object; None for anything else.

    torch's, NumPy's and Python's generators have no `state_dict`, and can be registered all the same.
    """
    if isinstance(value, torch.Generator):
        return value.get_state, lambda state: _discard(value.set_state(state))
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    numpy_random = sys.modules["numpy"].random
    if isinstance(value, numpy_random.Generator):
        return lambda: value.bit_generator.state, lambda state: setattr(value.bit_generator, "state", state)
    if isinstance(value, numpy_random.RandomState):
        return lambda: value.get_state(legacy=False), value.set_state
    return None


def reseed_generator(value: Any, seed: int) -> bool:
    """Start a generator object anew from `seed`; False for anything else, which is left alone."""
    numpy_random = sys.modules["numpy"].random
    if isinstance(value, torch.Generator):
        value.manual_seed(seed)
    elif isinstance(value, random.Random | numpy_random.RandomState):
        value.seed(seed)
    elif isinstance(value, numpy_random.Generator):
        value.bit_generator.state = type(value.bit_generator)(seed).state
    else:
        return False
    return True


def _discard(_: object) -> None:
    """torch's setter returns the generator; the others return nothing."""


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn inside leaves the global generators as they were before."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)

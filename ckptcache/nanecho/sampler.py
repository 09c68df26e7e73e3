"""Batches of text whose order is a function of the seed and the position, so that resuming costs nothing."""

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ckptcache.errors import DataTooSmall, InvalidValue

Batch = tuple[Tensor, Tensor]
Indices = np.ndarray[Any, np.dtype[np.int64]]

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MAX_SEED = 2**63 - 1


class BlockSampler:
    """An endless iterator over batches of blocks, each epoch in another order and at other cuts.

    An epoch cuts the tokens into blocks, from an offset of its own, and visits each once: without
    replacement the model sees all text before any of it twice, which independent random windows
    don't give (an epoch of those misses a share 1/e of the text). The order is a keyed permutation that
    is evaluated at a point, not a shuffled array, so any position is reached at once, in no memory,
    and on every version of NumPy alike.

    Args:
        tokens: 1-d array of unsigned integers; may be memory-mapped.
        block_size: tokens per block.
        batch_size: blocks per batch.
        seed: from 0 to 2**63 - 1.

    Raises:
        DataTooSmall: `tokens` is no longer than one block, and a block needs its next token too.
        InvalidValue: a size or the seed is out of range.
    """

    def __init__(self, tokens: np.ndarray[Any, Any], *, block_size: int, batch_size: int, seed: int) -> None:
        _check_count("block_size", block_size, 1)
        _check_count("batch_size", batch_size, 1)
        _check_count("seed", seed, 0)
        _check_length(tokens, block_size)
        self._tokens, self._block_size, self._batch_size = tokens, block_size, batch_size
        # One count for all epochs, whatever their offset, so that an epoch begins at a multiple of it.
        self._blocks = max(1, (len(tokens) - block_size) // block_size)
        self._offsets = len(tokens) - self._blocks * block_size
        self._seed, self._position = seed, 0

    @property
    def position(self) -> int:
        """Batches consumed."""
        return self._position

    @property
    def batches_per_epoch(self) -> float:
        """Batches in which the tokens are seen once."""
        return self._blocks / self._batch_size

    def next_batch(self) -> Batch:
        """The batch at the position, which moves on by one: inputs and next tokens, int64 [batch_size, block_size]."""
        batch = self.batch_at(self._position)
        self._position += 1
        return batch

    def batch_at(self, position: int) -> Batch:
        """The batch that `next_batch` gives at `position`; moves nothing."""
        first = position * self._batch_size
        starts = [self._start(*divmod(first + i, self._blocks)) for i in range(self._batch_size)]
        return _cut(self._tokens, np.array(starts, dtype=np.int64), self._block_size)

    def _start(self, epoch: int, index: int) -> int:
        key = _mix(_mix(self._seed) ^ epoch)
        return _mix(key) % self._offsets + self._block_size * permuted(index, self._blocks, key)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def reseed(self, seed: int) -> Self:
        """Start at position 0 of another order."""
        _check_count("seed", seed, 0)
        self._seed, self._position = seed, 0
        return self

    def state_dict(self) -> dict[str, int]:
        """``{"seed": ..., "position": ...}``, plain values."""
        return {"seed": self._seed, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the sampler that gave `state` was.

        Raises:
            InvalidValue: `state` is not a sampler's; nothing was changed.
        """
        if set(state) != {"seed", "position"}:
            raise InvalidValue(name="the sampler's state", value=dict(state), reason="it needs a seed and a position")
        _check_count("seed", state["seed"], 0)
        _check_count("position", state["position"], 0)
        self._seed, self._position = state["seed"], state["position"]


def evaluation_batches(tokens: np.ndarray[Any, Any], block_size: int, batch_size: int, count: int) -> list[Batch]:
    """At most `count` batches spread evenly over `tokens`, the same each time, no token in two blocks.

    Where `tokens` has fewer blocks, each is there once; the last batch may then hold fewer than
    `batch_size`, so a mean over batches is to be weighted by their sizes.

    Returns:
        Pairs of inputs and next tokens, int64 [batch_size, block_size].

    Raises:
        DataTooSmall: `tokens` is no longer than one block.
        InvalidValue: a size or the count is below 1.
    """
    for name, value in (("block_size", block_size), ("batch_size", batch_size), ("count", count)):
        _check_count(name, value, 1)
    _check_length(tokens, block_size)
    blocks = min(count * batch_size, (len(tokens) - 1) // block_size)
    last = len(tokens) - 1 - block_size
    starts = np.arange(blocks, dtype=np.int64) * last // max(1, blocks - 1)
    return [_cut(tokens, starts[i : i + batch_size], block_size) for i in range(0, blocks, batch_size)]


def permuted(index: int, size: int, key: int) -> int:
    """Where a permutation of range(size) that `key` picks sends `index`.

    A balanced Feistel network on the next power of four, walked until it lands below `size`: Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002. Fewer than four walks on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(key + turn * _GOLDEN + right) & low)
        index = left << half | right
        if index < size:
            return index


def _mix(word: int) -> int:
    """The finaliser of SplitMix64: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014."""
    word = (word + _GOLDEN) & 0xFFFFFFFFFFFFFFFF
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    word = (word ^ word >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return word ^ word >> 31


def _cut(tokens: np.ndarray[Any, Any], starts: Indices, block_size: int) -> Batch:
    windows = np.stack([tokens[start : start + block_size + 1] for start in starts]).astype(np.int64)
    return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_SEED:
        raise InvalidValue(name=name, value=value, reason=f"it must be a whole number of at least {least}")


def _check_length(tokens: np.ndarray[Any, Any], block_size: int) -> None:
    if len(tokens) < block_size + 1:
        raise DataTooSmall(path="the token array", tokens=len(tokens), needed=block_size + 1)

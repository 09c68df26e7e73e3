"""What is the same, bit for bit: a short digest for every leaf of a tree of tensors and plain values."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from blake3 import blake3

DIGEST_LENGTH = 16
"""Hex digits of a digest: 64 bits, of which two that differ agree once in 10**19 times."""


def leaf_digests(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    """The dotted name and the digest of each leaf of a captured state, tensors as well as plain values."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaf_digests(value, f"{path}.{key}")
    elif type(tree) in (list, tuple) and any(isinstance(item, torch.Tensor | Mapping | list) for item in tree):
        for position, value in enumerate(tree):
            yield from leaf_digests(value, f"{path}.{position}")
    else:
        yield path, digest(tree)


def digest(value: Any) -> str:
    """16 hex digits of BLAKE3 over a value and its kind: bytes for tensors and arrays, `repr` for what has no parts.

    What neither has a value of its own nor parts is known by its class alone.
    """
    hasher = blake3()
    _update(hasher, value)
    return str(hasher.hexdigest()[:DIGEST_LENGTH])


def _update(hasher: Any, value: Any) -> None:
    hasher.update(f"{type(value).__name__}\n".encode())
    if isinstance(value, torch.Tensor):
        _update_by_tensor(hasher, value)
    elif isinstance(value, np.ndarray):
        hasher.update(f"{value.dtype}{list(value.shape)}".encode())
        hasher.update(value.tobytes())
    elif isinstance(value, Mapping):
        _update_by_parts(hasher, (part for item in value.items() for part in item))
    elif isinstance(value, list | tuple):
        _update_by_parts(hasher, value)
    elif isinstance(value, set | frozenset):
        _update_by_parts(hasher, sorted(value, key=repr))
    elif isinstance(value, bool | int | float | complex | str | bytes | type(None) | np.generic):
        hasher.update(repr(value).encode(errors="backslashreplace"))
    elif hasattr(value, "__dict__") and not callable(value):
        _update_by_parts(hasher, (part for item in vars(value).items() for part in item))


def _update_by_parts(hasher: Any, parts: Iterable[Any]) -> None:
    # Digested one by one, so that ["ab"] is not ["a", "b"].
    for part in parts:
        hasher.update(digest(part).encode())


def _update_by_tensor(hasher: Any, tensor: torch.Tensor) -> None:
    hasher.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    plain = tensor.detach()
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    plain = plain.resolve_conj().resolve_neg().to("cpu").contiguous().reshape(-1)
    if plain.numel():
        hasher.update(plain.view(torch.uint8).numpy())

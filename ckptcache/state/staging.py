"""Copying state out of the training loop's way, so that it can go on while the file is written."""

from typing import Any

import torch


def snapshot(state: Any, memo: dict[tuple[Any, ...], torch.Tensor] | None = None) -> Any:
    """A copy of a captured tree on the CPU that shares nothing with the live objects.

    Tensors that are one and the same in the tree (tied weights) stay one in the copy.
    """
    seen = memo if memo is not None else {}
    if isinstance(state, torch.Tensor):
        return _copied(state, seen)
    if isinstance(state, dict):
        return type(state)((key, snapshot(value, seen)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(snapshot(value, seen) for value in state)
    return state


def _copied(tensor: torch.Tensor, seen: dict[tuple[Any, ...], torch.Tensor]) -> torch.Tensor:
    if tensor.layout is not torch.strided:
        return tensor.to("cpu", copy=True)
    key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    if key not in seen or tensor.numel() == 0:
        seen[key] = tensor.to("cpu", copy=True)
    return seen[key]

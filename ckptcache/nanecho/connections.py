"""How many of a layer's connections are active, and in which order they become so; without a model."""

import torch
from blake3 import blake3
from torch import Tensor


def share_of(ratio: float, connections: int) -> int:
    """How many of a layer's `connections` are active at `ratio`; never none."""
    return max(1, round(ratio * connections))


def layer_seed(name: str, seed: int) -> int:
    """What the order of a layer's connections is drawn from: its `name` and the model's `connection_seed`."""
    return int.from_bytes(blake3(f"{seed}:{name}".encode()).digest(length=8), "little") >> 1


def order_of(connections: int, seed: int) -> Tensor:
    """The order in which a layer's `connections` become active, int64 [connections], of flat positions."""
    return torch.randperm(connections, generator=torch.Generator().manual_seed(seed))

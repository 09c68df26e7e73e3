"""What plain torch reads and writes, in any of its releases: imported by a test, and run by it with another release.

    python plain_torch.py read FILE...     what `torch.load` gives, mapped and not
    python plain_torch.py write FILE...    files of `torch.save`, and what they hold

Both print JSON: the release, and for each file what `described` says, under "loaded" and "mapped" or "saved".
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
"""Every one that a checkpoint may hold."""
LARGE = 4_500_000
"""Elements of four bytes: more than what is written in one block, and past the system's cache."""


def odd_tensors() -> dict[str, torch.Tensor]:
    """Of every kind of element, any bits; views, ties, and such as hold nothing."""
    weight = torch.arange(24.0).reshape(4, 6)
    made = {name: _any_bits(getattr(torch, name)) for name in DTYPES}
    made |= {f"{name} in every other place": tensor[1::2] for name, tensor in made.items()}
    made |= {"tied": weight, "tied too": weight, "turned": weight.t(), "a row of it": weight[2], "scalar": weight[1, 1]}
    return made | {"empty": torch.empty(0), "without width": torch.empty(3, 0, 2), "zero": torch.tensor(0.0)}


def _any_bits(dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.arange(24) % 3 == 0
    width = torch.empty(0, dtype=dtype).element_size()
    return (torch.arange(24 * width) * 37 % 251).to(torch.uint8).view(dtype)


def state(size: int = 6) -> dict[str, Any]:
    """What a training holds: all of the above, an optimizer of a few steps, numbers and texts."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(size, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 6))
    model[2].weight = model[2].weight if size != 6 else model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, size) / size).square().sum().backward()
        optimizer.step()
        scheduler.step()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    numbers = {"step": 3, "lr": 0.1, "large": 2**70, "infinite": float("-inf"), "nothing": None, "is_on": True}
    return {
        **{name: part.state_dict() for name, part in parts.items()},
        "odd": odd_tensors(),
        "generator": torch.get_rng_state(),
        "numbers": numbers,
        "nested": {"text": "ä\n", "list": [1, (2.5, "x")], 7: b"raw"},
    }


def described(value: Any) -> list[list[Any]]:
    """Every leaf with where it is; of tensors the layout, the bytes, and whose memory they share."""
    leaves: list[list[Any]] = []
    _describe(value, "", leaves, {})
    return leaves


def _describe(value: Any, place: str, leaves: list[list[Any]], memories: dict[int, int]) -> None:
    if isinstance(value, torch.Tensor):
        leaves.append([place, *_tensor(value, memories)])
    elif isinstance(value, Mapping):
        leaves.append([place, type(value).__name__, len(value)])
        for key, inner in value.items():
            _describe(inner, f"{place}/{key!r}", leaves, memories)
    elif isinstance(value, list | tuple):
        leaves.append([place, type(value).__name__, len(value)])
        for number, inner in enumerate(value):
            _describe(inner, f"{place}/{number}", leaves, memories)
    else:
        leaves.append([place, type(value).__name__, repr(value)])


def _tensor(tensor: torch.Tensor, memories: dict[int, int]) -> list[Any]:
    memory = tensor.untyped_storage().data_ptr()
    shared = memories.setdefault(memory, len(memories)) if tensor.numel() else None
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    layout = [str(tensor.dtype), [*tensor.shape], [*tensor.stride()], tensor.storage_offset(), tensor.requires_grad]
    return [type(tensor).__name__, *layout, shared, hashlib.sha256(data).hexdigest()]


def read(path: str) -> dict[str, Any]:
    return {
        "loaded": described(torch.load(path, weights_only=True)),
        "mapped": described(torch.load(path, weights_only=True, mmap=True)),
    }


def write(path: str) -> dict[str, Any]:
    made = state()
    if path.endswith("large.pt"):
        made["odd"]["large"] = torch.arange(float(LARGE))
    torch.save(made, path)
    return {"saved": described(made)}


if __name__ == "__main__":
    warnings.simplefilter("error")
    act = {"read": read, "write": write}[sys.argv[1]]
    print(json.dumps({"release": torch.__version__, "files": {path: act(path) for path in sys.argv[2:]}}))

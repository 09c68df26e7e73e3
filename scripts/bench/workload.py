"""What is trained and saved: a GPT of any size with its AdamW state, and steps of real training."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS, HEADS, CONTEXT = 12, 12, 1024
TOKENS_PER_WIDTH = 65.5
"""GPT-2's 50,304 tokens at its width of 768; narrower models get fewer, or they would be all embedding."""
COPIES = 3
"""AdamW keeps two moments of each parameter."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_size(text: str) -> int:
    """Bytes, as in ``10MB`` or ``1.5GB``; raises ValueError for anything else, and for less than 1 MB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.strip().upper())
    if found is None or (size := int(float(found[1]) * _UNITS[found[2]])) < 10**6:
        raise ValueError(f"{text!r} is no size of at least 1 MB: write it like 10MB or 1.5GB")
    return size


def width_for(size: int) -> int:
    """The width of the GPT whose parameters and AdamW state take about `size` bytes in float32."""
    wanted = size / (4 * COPIES)
    # parameters = (TOKENS_PER_WIDTH + 12 * BLOCKS) * width**2 + CONTEXT * width, but for a few small ones
    square = TOKENS_PER_WIDTH + 12 * BLOCKS
    width = ((CONTEXT**2 + 4 * square * wanted) ** 0.5 - CONTEXT) / (2 * square)
    return max(HEADS, round(width / HEADS) * HEADS)


class Block(nn.Module):
    """Attention and MLP of a pre-norm decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(batch, time, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        return cast(Tensor, x + self.out(F.gelu(self.fc(self.ln_2(x)))))


class GPT(nn.Module):
    """A decoder after GPT-2, whose output layer is the token embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(round(TOKENS_PER_WIDTH * width), width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))
        self.ln = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """The mean loss of predicting each token of `ids`, int64 [batch, time], from those before it."""
        x = self.tokens(ids[:, :-1]) + self.positions.weight[: ids.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@dataclass
class Training:
    """A model in training, its optimizer's state there from the start."""

    model: GPT
    optimizer: torch.optim.AdamW
    length: int
    """Tokens of the one sequence that a step trains on."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that a checkpoint has to hold."""
        for parameter in self.model.parameters():
            yield parameter
            state = self.optimizer.state.get(parameter, {})
            yield from (state[name] for name in sorted(state))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def gradients(self) -> None:
        """Forward and backward."""
        self.optimizer.zero_grad()
        ids = torch.randint(self.model.tokens.num_embeddings, (1, self.length + 1))
        self.model(ids).backward()

    def update(self) -> float:
        """The optimizer's step; returns how long it waited before its update."""
        begun: list[float] = []

        def closure() -> float:
            begun.append(time.perf_counter())
            return 0.0

        called = time.perf_counter()
        # The optimizer calls it once its hooks are through, which is the instant that is looked for.
        self.optimizer.step(closure)
        return begun[0] - called


def make_training(size: int, *, seed: int = 0, length: int = 64, is_fresh: bool = False) -> Training:
    """A GPT whose state takes about `size` bytes; a fresh one has no optimizer state yet, as at a program's start."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = GPT(width_for(size))
    model.to_empty(device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    training = Training(model, optimizer, length)
    for parameter in model.parameters():
        nn.init.zeros_(parameter) if is_fresh else nn.init.normal_(parameter, std=0.02)
    if not is_fresh:
        training.gradients()
        training.update()
        _fill_moments(optimizer)
    return training


def _fill_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's state the noise of a long training; after one step most of it would compress to nothing."""
    for parameter, state in optimizer.state.items():
        state["exp_avg"].copy_(parameter.detach()).mul_(1e-3)
        state["exp_avg_sq"].copy_(parameter.detach()).square_().mul_(1e-6)


def calibrate(training: Training, seconds: float) -> None:
    """Choose the length of the sequence so that a step takes about `seconds`."""
    short, long = 32, 128
    times = {length: min(_step_seconds(training, length) for _ in range(2)) for length in (short, long)}
    slope = max((times[long] - times[short]) / (long - short), 1e-6)
    length = short + (seconds - times[short]) / slope
    training.length = int(min(max(length, 8), CONTEXT))


def _step_seconds(training: Training, length: int) -> float:
    training.length = length
    start = time.perf_counter()
    training.gradients()
    training.update()
    return time.perf_counter() - start

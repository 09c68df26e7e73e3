"""NanEcho: a GPT in whose blocks only a fraction of the connections is active, and more become so in training.

A pre-norm decoder after Radford et al., "Language Models are Unsupervised Multitask Learners", 2019:
learned positions, the token embedding tied to the output (Press and Wolf, "Using the Output Embedding
to Improve Language Models", 2017), residual projections initialised smaller by sqrt(2 * n_layer).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckptcache.errors import InvalidValue
from ckptcache.nanecho.connections import layer_seed, order_of, share_of
from ckptcache.nanecho.growth import grown
from ckptcache.nanecho.settings import NanEchoConfig as NanEchoConfig

INITIAL_STD = 0.02


class MaskedLinear(nn.Linear):
    """A linear layer of which only some connections are active.

    `mask`, bool [out_features, in_features], says which. The others are held at 0 and get no
    gradient, so that no optimizer moves them or gathers momentum for them.
    """

    mask: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("mask", torch.ones(out_features, in_features, dtype=torch.bool))
        self._judged: tuple[Tensor, int, bool] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        weight = self.weight if self._fully_connected() else self.weight * self.mask
        return F.linear(x, weight, self.bias)

    def active(self) -> int:
        """How many connections are active."""
        return int(self.mask.count_nonzero())

    @torch.no_grad()
    def start(self, count: int, seed: int) -> None:
        """Leave the first `count` connections of the order that `seed` gives active, at their value."""
        self.mask.zero_()
        self._activate_next(count, seed)
        self.weight.mul_(self.mask)

    @torch.no_grad()
    def grow(self, count: int, seed: int) -> int:
        """Activate, at weight 0, the next connections of `seed`'s order until `count` are; how many became so."""
        missing = max(0, count - self.active())
        if missing:
            chosen = self._activate_next(missing, seed)
            self.weight.view(-1)[chosen] = 0.0
        return missing

    def _activate_next(self, count: int, seed: int) -> Tensor:
        # What is active already is skipped, not assumed: a mask restored from elsewhere never shrinks.
        flat = self.mask.view(-1)
        order = order_of(flat.numel(), seed).to(flat.device)
        chosen = order[~flat[order]][:count]
        flat[chosen] = True
        return chosen

    def _fully_connected(self) -> bool:
        # Asking the mask each time would cost a reduction, and on a GPU a wait. Its version tells of
        # every write, those of load_state_dict and of code that copies into buffers included.
        mask = self.mask
        if torch.compiler.is_compiling() or mask.is_inference():
            return False
        if self._judged is None or self._judged[0] is not mask or self._judged[1] != mask._version:
            self._judged = (mask, mask._version, bool(mask.all()))
        return self._judged[2]


class CausalSelfAttention(nn.Module):
    """Attention of each position to itself and those before it."""

    def __init__(self, config: NanEchoConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = MaskedLinear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = MaskedLinear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, n_embd] to the same."""
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, 3, self.n_head, width // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        return F.dropout(out, self.dropout, self.training)


class MLP(nn.Module):
    """Two layers with a GELU between, four times as wide inside."""

    def __init__(self, config: NanEchoConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.fc = MaskedLinear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = MaskedLinear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, n_embd] to the same."""
        out: Tensor = self.proj(F.gelu(self.fc(x)))
        return F.dropout(out, self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each on the normalised residual stream and added to it."""

    def __init__(self, config: NanEchoConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, n_embd] to the same."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class NanEcho(nn.Module):
    """The model. Masks and ratio are buffers, so `state_dict` and `load_state_dict` carry them exactly.

    The output layer is the token embedding itself and has no name of its own: a tensor under two
    names would be written twice, be refused by safetensors, and come apart under
    ``load_state_dict(assign=True)``.
    """

    ratio: Tensor

    def __init__(self, config: NanEchoConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.register_buffer("ratio", torch.tensor(config.connection_ratio, dtype=torch.float64))
        self.apply(_initialise)
        self._shrink_residual_projections()
        for layer, seed in self._masked_layers():
            layer.start(share_of(config.connection_ratio, layer.weight.numel()), seed)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict each position's next token.

        Args:
            idx: int64 [batch, time], tokens below `vocab_size`, time at most `block_size`.
            targets: int64 [batch, time], the token after each of `idx`; -1 is left out of the loss.

        Returns:
            Logits [batch, time, vocab_size], and the mean cross-entropy in nats per token, a scalar,
            or None without targets.

        Raises:
            InvalidValue: `idx` is longer than `block_size`.
        """
        logits = F.linear(self._hidden(idx), self.wte.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def _hidden(self, idx: Tensor) -> Tensor:
        time = idx.shape[1]
        if time > self.config.block_size:
            reason = f"the model's block_size is {self.config.block_size}"
            raise InvalidValue(name="the length of idx", value=time, reason=reason)
        x = self.wte(idx) + self.wpe(torch.arange(time, device=idx.device))
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.ln_f(x)
        return out

    # --- connections ---

    @property
    def connection_ratio(self) -> float:
        """The fraction of the blocks' connections that is active."""
        return float(self.ratio)

    def active_connections(self) -> int:
        """How many of the blocks' connections are active."""
        return sum(layer.active() for layer, _ in self._masked_layers())

    def grow_connections(self, to_ratio: float) -> int:
        """Activate connections until the fraction `to_ratio` of each layer's is active; none is ever deactivated.

        New connections start at weight 0, so the network computes the same after growth as before;
        their gradient depends on what is active on both sides of them, and is not 0. Which ones
        become active depends on the layer's name and `connection_seed` alone, not on the global
        random state. To be called between optimizer steps and after `TrainingSession.staged`, since it
        writes to parameters.

        Returns:
            How many connections became active.

        Raises:
            InvalidValue: `to_ratio` is not above 0 and at most `max_connections`.
        """
        if not 0 < to_ratio <= self.config.max_connections:
            reason = f"it must be above 0 and at most max_connections ({self.config.max_connections})"
            raise InvalidValue(name="to_ratio", value=to_ratio, reason=reason)
        if to_ratio <= self.connection_ratio:
            return 0
        grown = sum(layer.grow(share_of(to_ratio, layer.weight.numel()), seed) for layer, seed in self._masked_layers())
        self.ratio.fill_(to_ratio)
        return grown

    def grown_state_dict(
        self, donor_state: Mapping[str, Tensor], donor_config: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        """What a warm start makes of a smaller NanEcho's state for this one; `growth.grown` says how.

        Args:
            donor_state: the donor's tensors under this class's names.
            donor_config: the donor's configuration; without it nothing can be known of its heads, and only tensors
                of the same shape are taken.

        Returns:
            Tensors under this model's names and of its shapes; what is left out stays as it is.
        """
        return grown(donor_state, donor_config, self.config, self.state_dict())

    def _masked_layers(self) -> Iterator[tuple[MaskedLinear, int]]:
        for name, module in self.named_modules():
            if isinstance(module, MaskedLinear):
                yield module, layer_seed(name, self.config.connection_seed)

    def _shrink_residual_projections(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight"):
                nn.init.normal_(parameter, std=INITIAL_STD / math.sqrt(2 * self.config.n_layer))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.half()` would round the ratio, and MPS has no float64: seen as an integer it keeps
        # its bits, and where a device can't hold it, it stays where it was.
        ratio = self.ratio
        self.ratio = ratio.view(torch.int64)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            moved = self.ratio
            self.ratio = ratio if moved.device.type == "mps" else moved.view(torch.float64)
        return self

    # --- use ---

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `idx` by sampled tokens.

        Args:
            idx: int64 [batch, time], time at least 1; the last `block_size` of it are looked at.
            max_new_tokens: how many tokens to add.
            temperature: divides the logits; 0 always takes the likeliest token.
            top_k: sample among the likeliest `top_k` only.
            generator: random source on idx's device; None draws from the global one.

        Returns:
            int64 [batch, time + max_new_tokens].

        Raises:
            InvalidValue: `temperature` is below 0 or `top_k` below 1.
        """
        _check_sampling(temperature, top_k)
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                hidden = self._hidden(idx[:, -self.config.block_size :])[:, -1]
                token = _pick(F.linear(hidden, self.wte.weight).float(), temperature, top_k, generator)
                idx = torch.cat((idx, token), dim=1)
        finally:
            self.train(was_training)
        return idx


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups for AdamW: matrices and embeddings decay, biases and norms don't."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INITIAL_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _check_sampling(temperature: float, top_k: int | None) -> None:
    if not temperature >= 0:
        raise InvalidValue(name="temperature", value=temperature, reason="it must be at least 0")
    if top_k is not None and top_k < 1:
        raise InvalidValue(name="top_k", value=top_k, reason="it must be at least 1")


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row of `logits` [batch, vocab_size], as int64 [batch, 1]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)

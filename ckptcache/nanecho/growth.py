"""Growing what a smaller NanEcho has learned into a larger one that computes the same: a better start than chance.

Every function takes the donor's state and gives the larger model's; nothing is drawn at random, since what is
new and free to be anything comes from the larger model's own fresh state. The idea is Net2Net's (Chen, Goodfellow
and Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer", ICLR 2016): begin as the function that was
learned, and be free to leave it. All of it can be done at once, since each step keeps the function by itself.

**More layers.** A pre-norm block adds to the residual stream what its two projections give. With these at 0 it
is the identity (as the new blocks of Gong et al., "Efficient Training of BERT by Progressively Stacking", 2019, are
not; zero projections are those of Zhang, Dauphin and Ma, "Fixup Initialization", ICLR 2019). The projections' own
gradients are not 0, since what goes into them isn't, and after one step neither are those of the rest.

**Wider.** Let the stream be x, of width D, with mean m and variance v, and let the larger model's, of width D', be
c * (x, m, ..., m) with c = sqrt(D' / D). Its mean is c * m, and its variance c^2 * v * D / D' = v. So a
normalisation, whatever its epsilon, gives c * (x_i - m) / sqrt(v + eps) in the old places and 0 in the new ones,
and with its old weights divided by c exactly what it gave before. To keep the stream so, whoever writes to it
(embeddings, projections and their biases) is multiplied by c, and writes into each new place the mean over what it
writes into the old ones: c times the mean of the rows, of the weights as they are in effect. What reads it may have
any weights at the new places, where it finds 0. Logits are products with the token embedding, which is c times what
it was, so the last normalisation is divided by c twice; its new places meet the embedding's at 0.

**Heads, and wider heads.** An old head keeps its place among the heads and its dimensions come first; the weights
from there on are those of new dimensions. A new dimension of an old head has a query of 0, which adds nothing to a
score; since scores are divided by the root of a head's width, the old queries are multiplied by sqrt(h' / h). What
new dimensions and new heads attend to is read by the projection with weights of 0, and so is what a wider MLP's new
units give.

**Longer.** Positions from the old block size on are the old ones over again, as in Longformer (Beltagy, Peters and
Cohan, 2020, section 5); up to there nothing changes.

**More tokens.** A new token's embedding is the mean of the old ones (Hewitt, "Initializing New Word Embeddings for
Pretrained Language Models", 2021). Logits of old tokens stay; that of a new one is the mean of theirs, whose
exponential is at most the mean of their exponentials (Jensen), so that from V to V' tokens no old one's probability
falls below V / V' of what it was, and no loss rises by more than log(V' / V).

**Connections.** The donor's active ones stay active, a new weight that must not be 0 is active, and of the other new
ones the share that is active in the donor, in the layer's own order. `NanEcho.grow_connections` goes on from there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckptcache.errors import ConfigError
from ckptcache.nanecho.connections import layer_seed, order_of
from ckptcache.nanecho.settings import NanEchoConfig

State = Mapping[str, Tensor]
_SIZES = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")


def grown(donor: State, donor_config: Mapping[str, Any] | None, new: NanEchoConfig, fresh: State) -> dict[str, Tensor]:
    """A state for the model `new` that computes what the donor does, as far as that is possible.

    Args:
        donor: the donor's state by NanEcho's names.
        donor_config: the donor's configuration.
        new: the configuration of the model that is to be filled.
        fresh: its state as initialised, of which come the new weights that may be anything.

    Returns:
        Tensors by name, of the shapes in `fresh`. Left out is what can't be made of the donor's, and is to stay
        fresh: everything where `n_embd` shrinks; the attention where heads get fewer or narrower; the token embedding
        where the vocabulary shrinks. Of a longer block the first positions are taken, of more layers the first. Where
        the configuration is missing or doesn't tell the donor's sizes, it is what agrees in name and shape.
    """
    old = _config_of(donor, donor_config)
    if old is None:
        return {name: tensor for name, tensor in donor.items() if _fits(tensor, fresh.get(name))}
    if new.n_embd < old.n_embd:
        return {}
    growth = _Growth(old, new, _on_cpu(donor), _on_cpu(fresh))
    return {name: tensor for name in fresh if (tensor := growth.tensor(name)) is not None}


def _on_cpu(state: State) -> dict[str, Tensor]:
    # Sums are made in float64, which not every device has.
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _fits(tensor: Tensor, wanted: Tensor | None) -> bool:
    return wanted is not None and tensor.shape == wanted.shape


def _config_of(donor: State, config: Mapping[str, Any] | None) -> NanEchoConfig | None:
    """The donor's configuration, if it is whole and its embeddings are what it says."""
    if config is None or any(name not in config for name in _SIZES):
        return None
    try:
        old = NanEchoConfig.of(config)
    except ConfigError:
        return None
    sizes = {"wte.weight": (old.vocab_size, old.n_embd), "wpe.weight": (old.block_size, old.n_embd)}
    blocks = {name.split(".")[1] for name in donor if name.startswith("blocks.")}
    is_so = all(name in donor and tuple(donor[name].shape) == size for name, size in sizes.items())
    return old if is_so and len(blocks) == old.n_layer else None


@dataclass(frozen=True)
class _Growth:
    """One growth; `tensor` makes each tensor of the new model's state."""

    old: NanEchoConfig
    new: NanEchoConfig
    donor: State
    fresh: State

    @property
    def stretch(self) -> float:
        """c of the derivation: by how much the residual stream is larger."""
        return math.sqrt(self.new.n_embd / self.old.n_embd)

    @property
    def attention_grows(self) -> bool:
        """Whether no head is lost, and none gets narrower."""
        narrower = self.new.n_embd // self.new.n_head < self.old.n_embd // self.old.n_head
        return self.new.n_head >= self.old.n_head and not narrower

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of that name in the new model; None: it stays fresh."""
        if name == "ratio":
            return self.donor.get(name)
        if name == "wte.weight":
            return self._tokens()
        if name == "wpe.weight":
            return self._positions()
        layer, _, kind = name.rpartition(".")
        if layer.startswith("blocks.") and int(layer.split(".")[1]) >= self.old.n_layer:
            return self._new_block(layer, kind)
        if ".ln_" in name or layer == "ln_f":
            return self._norm(layer, kind)
        if ".attn." in name and not self.attention_grows:
            return None
        return self._linear(layer)[kind]

    # --- embeddings ------------------------------------------------------------------------------

    def _tokens(self) -> Tensor | None:
        if self.new.vocab_size < self.old.vocab_size:
            return None
        rows = self._written(self.donor["wte.weight"].double(), dim=1)
        more = self.new.vocab_size - self.old.vocab_size
        return torch.cat((rows, rows.mean(0, keepdim=True).expand(more, -1)))

    def _positions(self) -> Tensor:
        rows = self._written(self.donor["wpe.weight"].double(), dim=1)
        return rows[torch.arange(self.new.block_size) % self.old.block_size]

    def _written(self, values: Tensor, *, dim: int) -> Tensor:
        """What is written to the residual stream, along `dim`: stretched, and the mean in each new place."""
        mean = values.mean(dim, keepdim=True)
        places = [values, mean.expand(*(self._new_width if d == dim else -1 for d in range(values.dim())))]
        return torch.cat(places, dim) * self.stretch

    @property
    def _new_width(self) -> int:
        return self.new.n_embd - self.old.n_embd

    # --- layers ----------------------------------------------------------------------------------

    def _norm(self, layer: str, kind: str) -> Tensor:
        """A normalisation: in new places a weight of 1 and a bias of 0, as initialised."""
        values = self.fresh[f"{layer}.{kind}"].double().clone()
        values[: self.old.n_embd] = self._was(f"{layer}.{kind}", self.old.n_embd)
        is_last = layer == "ln_f"
        values[: self.old.n_embd] /= self.stretch ** (int(kind == "weight") + int(is_last))
        return values

    def _was(self, name: str, size: int) -> Tensor:
        """A vector of the donor's; a bias that it doesn't have is 0."""
        found = self.donor.get(name)
        return torch.zeros(size, dtype=torch.float64) if found is None else found.double()

    def _linear(self, layer: str) -> dict[str, Tensor]:
        """Weight, mask and bias of a layer that the donor has."""
        kind = ".".join(layer.split(".")[-2:])
        mask = self.donor[f"{layer}.mask"]
        weight = self.donor[f"{layer}.weight"].double() * mask
        rows, columns = self._places(kind)
        bias = self._was(f"{layer}.bias", weight.shape[0])
        if kind == "attn.qkv":
            scale = self._query_scale()
            weight, bias = weight * scale[:, None], bias * scale
        new_weight, new_bias = self._new_weights(layer, kind)
        if kind.endswith("proj"):
            weight, bias = self._written(weight, dim=0), self._written(bias, dim=0)
            rows = torch.arange(self.new.n_embd)
        new_weight[rows[:, None], columns] = weight
        new_bias[rows] = bias
        new_mask = self._mask(layer, new_weight, rows, columns, mask)
        # Inactive weights are held at 0, also where the donor has fewer active than a fresh model.
        return {"weight": new_weight * new_mask, "bias": new_bias, "mask": new_mask}

    def _new_weights(self, layer: str, kind: str) -> tuple[Tensor, Tensor]:
        """Weight and bias as initialised, but for what must be 0 to leave the function as it is."""
        weight = self.fresh[f"{layer}.weight"].double().clone()
        bias = torch.zeros(weight.shape[0], dtype=torch.float64)
        if f"{layer}.bias" in self.fresh:
            bias += self.fresh[f"{layer}.bias"].double()
        if kind.endswith("proj"):
            weight, bias = torch.zeros_like(weight), torch.zeros_like(bias)
        elif kind == "attn.qkv":
            added = self._added_queries()
            weight[added], bias[added] = 0.0, 0.0
        return weight, bias

    def _mask(self, layer: str, weight: Tensor, rows: Tensor, columns: Tensor, was: Tensor) -> Tensor:
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        is_new = torch.ones_like(mask)
        old_rows = rows[: was.shape[0]]
        mask[old_rows[:, None], columns] = was
        is_new[old_rows[:, None], columns] = False
        # The means over the old rows have to count.
        needed = torch.zeros_like(mask)
        extra = rows[was.shape[0] :]
        needed[extra[:, None], columns] = weight[extra[:, None], columns] != 0
        self._activate(mask, is_new & ~needed, layer)
        return mask | needed

    def _activate(self, mask: Tensor, free: Tensor, layer: str) -> None:
        """Of the connections in `free` activate the share that is active in the donor, in the layer's order."""
        order = order_of(mask.numel(), layer_seed(layer, self.new.connection_seed))
        chosen = order[free.view(-1)[order]]
        mask.view(-1)[chosen[: round(self._ratio * len(chosen))]] = True

    @property
    def _ratio(self) -> float:
        return float(self.donor["ratio"]) if "ratio" in self.donor else self.old.connection_ratio

    def _new_block(self, layer: str, kind: str) -> Tensor:
        """A tensor of a block that is the identity: both projections give 0."""
        fresh = self.fresh[f"{layer}.{kind}"]
        if kind == "mask":
            mask = torch.zeros(fresh.shape, dtype=torch.bool)
            self._activate(mask, torch.ones_like(mask), layer)
            return mask
        if layer.endswith(".proj"):
            return torch.zeros_like(fresh)
        if kind == "weight" and f"{layer}.mask" in self.fresh:
            return fresh * self._new_block(layer, "mask")
        return fresh

    # --- where what was goes ---------------------------------------------------------------------

    def _places(self, kind: str) -> tuple[Tensor, Tensor]:
        """Rows and columns of the new weight that hold the old one's."""
        stream = torch.arange(self.old.n_embd)
        if kind == "attn.qkv":
            new = self.new.n_embd
            heads = self._head_places()
            return torch.cat((heads, heads + new, heads + 2 * new)), stream
        if kind == "attn.proj":
            return stream, self._head_places()
        hidden = torch.arange(4 * self.old.n_embd)
        return (hidden, stream) if kind == "mlp.fc" else (stream, hidden)

    def _head_places(self) -> Tensor:
        """Of each dimension of the old heads, head by head, its place among those of the new ones."""
        return self._dimensions()[: self.old.n_head, : self.old.n_embd // self.old.n_head].reshape(-1)

    def _dimensions(self) -> Tensor:
        return torch.arange(self.new.n_embd).view(self.new.n_head, -1)

    def _added_queries(self) -> Tensor:
        """Rows of the new queries that belong to dimensions added to old heads."""
        return self._dimensions()[: self.old.n_head, self.old.n_embd // self.old.n_head :].reshape(-1)

    def _query_scale(self) -> Tensor:
        """Per row of the old qkv: sqrt(h' / h) for queries, 1 for keys and values."""
        wider = (self.new.n_embd / self.new.n_head) / (self.old.n_embd / self.old.n_head)
        scale = torch.ones(3 * self.old.n_embd, dtype=torch.float64)
        scale[: self.old.n_embd] = math.sqrt(wider)
        return scale

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ckptcache.nanecho.model import MaskedLinear, NanEcho, NanEchoConfig, parameter_groups

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 12, "vocab_size": 13, "block_size": 6, "connection_ratio": 0.4}


def config(**changes):
    return NanEchoConfig(**{**SMALL, **changes})


def trained(config, seed=0):
    """A model whose every tensor is as training leaves it: no two alike, connections grown, biases not 0."""
    torch.manual_seed(seed)
    model = NanEcho(config)
    if config.connection_ratio < 0.7:
        model.grow_connections(0.7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for layer in masked_layers(model):
            layer.weight.mul_(layer.mask)
    return model.eval()


def masked_layers(model):
    return [m for m in model.modules() if isinstance(m, MaskedLinear)]


def grown(donor, new, seed=1, donor_config=True):
    torch.manual_seed(seed)
    model = NanEcho(new).to(donor.wte.weight.dtype)
    given = vars(donor.config) if donor_config is True else donor_config
    state = model.grown_state_dict(donor.state_dict(), given)
    own = model.state_dict()
    assert all(tensor.shape == own[name].shape for name, tensor in state.items())
    model.load_state_dict({**own, **state})
    return model.eval(), state


def tokens(config, batch=5, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, config.block_size), generator=generator)


def furthest(donor, model):
    """By how much logits differ at most, as a share of how far those of the donor spread."""
    idx = tokens(donor.config)
    with torch.no_grad():
        was, now = donor(idx)[0], model(idx)[0][..., : donor.config.vocab_size]
    return float((was - now).abs().max() / was.std())


# --- the function stays --------------------------------------------------------------------------

GROWTHS = {
    "more layers": {"n_layer": 5},
    "wider": {"n_embd": 20, "n_head": 2},
    "more heads": {"n_embd": 24, "n_head": 4},
    "wider heads": {"n_embd": 26, "n_head": 2},
    "more heads and wider ones": {"n_embd": 40, "n_head": 5},
    "longer": {"block_size": 17},
    "more tokens": {"vocab_size": 19},
    "with biases": {"bias": True},
    "all at once": {"n_layer": 4, "n_embd": 30, "n_head": 3, "block_size": 9, "vocab_size": 20},
}


@pytest.mark.parametrize("name", GROWTHS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_grown_model_computes_what_the_donor_does(name, bias):
    donor = trained(config(bias=bias))
    model, state = grown(donor, config(**{"bias": bias, **GROWTHS[name]}))
    assert set(state) == set(model.state_dict())
    assert furthest(donor, model) < 1e-5
    double, _ = grown(donor.double(), config(**{"bias": bias, **GROWTHS[name]}))
    assert furthest(donor, double) < 1e-13


sizes = st.fixed_dictionaries(
    {
        "n_layer": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "width": st.integers(1, 5),
        "vocab_size": st.integers(2, 20),
        "block_size": st.integers(1, 8),
        "ratio": st.sampled_from([0.05, 0.3, 0.5, 1.0]),
    }
)
increments = st.fixed_dictionaries(
    {
        "n_layer": st.integers(0, 2),
        "heads": st.integers(0, 2),
        "width": st.integers(0, 4),
        "vocab_size": st.integers(0, 6),
        "block_size": st.integers(0, 9),
    }
)


@given(sizes, increments, st.booleans(), st.sampled_from([0.05, 0.5, 1.0]), st.integers(0, 99))
def test_whatever_the_sizes_are(size, more, bias, ratio, seed):
    def of(sizes, ratio):
        heads = sizes["heads"]
        return config(
            **{name: sizes[name] for name in ("n_layer", "vocab_size", "block_size")},
            n_head=heads, n_embd=2 * heads * sizes["width"], bias=bias, connection_ratio=ratio,
        )  # fmt: skip

    donor = trained(of(size, size["ratio"]), seed).double()
    model, _ = grown(donor, of({name: size[name] + more[name] for name in more}, ratio), seed + 1)
    assert furthest(donor, model) < 1e-10
    for layer in masked_layers(model):
        assert not layer.weight[~layer.mask].any()


def test_epsilon_is_no_matter():
    # So small a stream that a variance changed by the width would show beside the normalisation's 1e-5.
    donor = trained(config())
    with torch.no_grad():
        donor.wte.weight.mul_(1e-3)
        donor.wpe.weight.mul_(1e-3)
    model, _ = grown(donor.double(), config(n_embd=36))
    assert furthest(donor, model) < 1e-10


def test_what_an_inactive_connection_holds_is_no_matter():
    donor = trained(config())
    with torch.no_grad():
        for layer in masked_layers(donor):
            layer.weight.add_(torch.randn_like(layer.weight) * ~layer.mask)
    model, _ = grown(donor.double(), config(n_layer=3, n_embd=20))
    assert furthest(donor, model) < 1e-10
    assert not any(layer.weight[~layer.mask].any() for layer in masked_layers(model))


def test_without_growth_every_tensor_is_the_donors_to_the_bit():
    donor = trained(config(bias=True))
    _, state = grown(donor, config(bias=True, dropout=0.1))
    for name, tensor in donor.state_dict().items():
        assert torch.equal(state[name].to(tensor.dtype), tensor), name


def test_the_donor_is_left_alone_and_nothing_is_drawn_at_random():
    donor = trained(config())
    before = {name: tensor.clone() for name, tensor in donor.state_dict().items()}
    model = NanEcho(config(n_layer=3, n_embd=24))
    drawn = torch.get_rng_state()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.grown_state_dict(donor.state_dict(), vars(donor.config))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in donor.state_dict().items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


# --- what is new ---------------------------------------------------------------------------------


def test_positions_beyond_the_old_ones_are_those_over_again():
    donor = trained(config())
    model, _ = grown(donor, config(block_size=15))
    rows = donor.wpe.weight
    assert torch.equal(model.wpe.weight, torch.cat((rows, rows, rows))[:15])


def test_new_tokens_take_no_more_of_the_probability_than_their_share():
    donor = trained(config())
    model, _ = grown(donor, config(vocab_size=17))
    assert torch.allclose(model.wte.weight[13:], donor.wte.weight.mean(0).expand(4, -1), atol=1e-6)
    idx, targets = tokens(donor.config), tokens(donor.config, seed=4)
    with torch.no_grad():
        was, now = donor(idx)[0], model(idx)[0]
        rise = F.cross_entropy(now.flatten(0, 1), targets.flatten(), reduction="none")
        rise -= F.cross_entropy(was.flatten(0, 1), targets.flatten(), reduction="none")
    assert 0 < rise.max() <= math.log(17 / 13) + 1e-6


def test_a_longer_block_than_is_needed_gives_its_first_positions():
    donor = trained(config())
    model, _ = grown(donor, config(block_size=4))
    assert torch.equal(model.wpe.weight, donor.wpe.weight[:4])
    idx = tokens(donor.config)[:, :4]
    assert torch.equal(model(idx)[0], donor(idx)[0])


def test_connections_keep_their_share_and_grow_on():
    donor = trained(config())
    model, _ = grown(donor, config(n_layer=4, n_embd=24, n_head=4, connection_ratio=0.2))
    assert model.connection_ratio == pytest.approx(0.7)
    for layer in masked_layers(model.blocks[3]):
        assert layer.active() == round(0.7 * layer.mask.numel())
    for layer in masked_layers(model.blocks[0]):
        assert 0.69 < layer.active() / layer.mask.numel() < 0.86
    before = {name: b.clone() for name, b in model.named_buffers() if name.endswith("mask")}
    idx = tokens(donor.config)
    logits = model(idx)[0]
    assert model.grow_connections(0.9) > 0
    assert torch.allclose(model(idx)[0], logits, atol=1e-6)
    for name, buffer in model.named_buffers():
        if name.endswith("mask"):
            assert buffer[before[name]].all()
            assert int(buffer.count_nonzero()) == max(round(0.9 * buffer.numel()), int(before[name].count_nonzero()))


def test_donors_connections_stay_as_they_were():
    donor = trained(config())
    model, _ = grown(donor, config(n_embd=24, n_head=4))
    assert torch.equal(model.blocks[1].mlp.fc.mask[:48, :12], donor.blocks[1].mlp.fc.mask)
    assert torch.equal(model.blocks[1].mlp.proj.mask[:12, :48], donor.blocks[1].mlp.proj.mask)


def test_training_goes_on_and_everything_new_learns():
    donor = trained(config())
    model, _ = grown(donor, config(n_layer=4, n_embd=24, n_head=3, vocab_size=16, block_size=9))
    model.train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-3)
    idx, targets = tokens(model.config, batch=16), tokens(model.config, batch=16, seed=9)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        moved = parameter.detach() != start[name]
        mask = dict(model.named_buffers()).get(name.removesuffix("weight") + "mask")
        assert (moved if mask is None else moved[mask]).float().mean() > 0.95, name
    # Places of the stream that began as the same mean go ways of their own.
    new = model.wte.weight.detach()[:, 12:]
    assert (new.std(dim=1) > 0).all()


# --- what is not grown ---------------------------------------------------------------------------


def test_less_width_gives_nothing():
    donor = trained(config(n_embd=24))
    assert grown(donor, config())[1] == {}


@pytest.mark.parametrize("changes", [{"n_head": 4}, {"n_head": 1}, {"n_head": 6, "n_embd": 24}])
def test_heads_that_get_fewer_or_narrower_stay_fresh(changes):
    donor = trained(config())
    model, state = grown(donor, config(**changes))
    left_out = set(model.state_dict()) - set(state)
    assert left_out == {n for n in model.state_dict() if ".attn." in n}


def test_a_smaller_vocabulary_leaves_the_embedding_fresh_and_fewer_layers_take_the_first():
    donor = trained(config())
    model, state = grown(donor, config(vocab_size=9, n_layer=1))
    assert set(model.state_dict()) - set(state) == {"wte.weight"}
    assert torch.equal(model.blocks[0].mlp.fc.weight, donor.blocks[0].mlp.fc.weight)


@pytest.mark.parametrize("said", [None, {}, {"n_layer": 2}, {**SMALL, "n_embd": 16}, {**SMALL, "n_layer": 3}])
def test_without_a_configuration_that_tells_the_donors_sizes_only_what_fits_is_taken(said):
    donor = trained(config())
    _, state = grown(donor, config(n_layer=3, vocab_size=20), donor_config=said)
    assert set(state) == set(donor.state_dict()) - {"wte.weight"}

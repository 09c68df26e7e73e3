import io
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcache.errors import InvalidValue
from ckptcache.nanecho.model import MaskedLinear, NanEcho, NanEchoConfig, parameter_groups
from ckptcache.nanecho.sampler import BlockSampler

CONFIG = NanEchoConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=32, block_size=8)


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return NanEcho(NanEchoConfig(**{**vars(CONFIG), **changes}))


def tokens(batch=4, time=8, vocab=32, seed=1):
    return torch.randint(vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


def masked_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MaskedLinear)}


def masks(model):
    return {name: layer.mask.clone() for name, layer in masked_layers(model).items()}


def adamw(model, **options):
    return torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2, **options)


def step(model, optimizer, seed):
    idx, targets = tokens(seed=seed), tokens(seed=seed + 1000)
    optimizer.zero_grad()
    model(idx, targets)[1].backward()
    optimizer.step()


# --- the network ---------------------------------------------------------------------------------


def test_shapes_and_the_loss_of_an_untrained_model():
    model = make()
    logits, loss = model(tokens(), tokens(seed=2))
    assert logits.shape == (4, 8, 32)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(32), rel=0.05)
    assert model(tokens(time=3))[0].shape == (4, 3, 32)
    assert model(tokens())[1] is None


def test_no_position_sees_what_comes_after_it():
    model = make().eval()
    first, changed = tokens(), tokens()
    changed[:, 5:] = (changed[:, 5:] + 1) % 32
    before, after = model(first)[0], model(changed)[0]
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_a_target_of_minus_one_is_left_out_of_the_loss():
    model, idx, targets = make(), tokens(), tokens(seed=2)
    masked = targets.clone()
    masked[:, 4:] = -1
    expected = torch.nn.functional.cross_entropy(model(idx)[0][:, :4].flatten(0, 1), targets[:, :4].flatten())
    torch.testing.assert_close(model(idx, masked)[1], expected)


def test_the_output_is_tied_to_the_embedding_and_no_tensor_has_two_names():
    model = make()
    pointers = [t.data_ptr() for t in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    before = model(tokens())[0]
    with torch.no_grad():
        model.wte.weight[31] *= 2  # not among the inputs below, so only the output can move
    idx = tokens(vocab=31)
    torch.testing.assert_close(model(idx)[0][..., 31], make()(idx)[0][..., 31] * 2)
    assert before.shape == (4, 8, 32)


def test_more_than_one_block_is_refused():
    with pytest.raises(InvalidValue, match="block_size is 8"):
        make()(tokens(time=9))


@pytest.mark.parametrize("bias", [True, False])
def test_biases_are_there_when_asked_for(bias):
    assert any(name.endswith("bias") for name, _ in make(bias=bias).named_parameters()) is bias


def test_weight_decay_is_for_matrices_alone():
    decayed, spared = parameter_groups(make(bias=True), 0.1)
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(make(bias=True).parameters()))


def test_it_learns_a_small_text_by_heart():
    text = b"the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 4
    data = torch.tensor(list(text), dtype=torch.uint8).numpy()
    model = make(n_embd=32, vocab_size=128, block_size=16, connection_ratio=0.5)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-2)
    sampler = BlockSampler(data, block_size=16, batch_size=8, seed=0)
    losses = []
    for iteration in range(150):
        if iteration == 50:
            assert model.grow_connections(0.8) > 0
        loss = model(*sampler.next_batch())[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4.0
    assert sum(losses[-10:]) / 10 < 0.7
    start = torch.tensor([list(b"the quick brow")])
    assert bytes(model.generate(start, 2, temperature=0)[0].tolist()) == b"the quick brown "


# --- connections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9, 1.0])
def test_the_asked_fraction_is_active_at_first(ratio):
    model = make(connection_ratio=ratio)
    assert model.connection_ratio == ratio
    for layer in masked_layers(model).values():
        assert layer.active() == round(ratio * layer.weight.numel())


def test_growth_leaves_the_function_as_it_is_and_new_connections_learn():
    model, optimizer = make(connection_ratio=0.5), None
    optimizer = adamw(model)
    for seed in range(5):
        step(model, optimizer, seed)
    idx, before_masks = tokens(seed=50), masks(model)
    before = model(idx)[0]
    grown = model.grow_connections(0.8)
    assert grown == sum(round(0.8 * m.numel()) - round(0.5 * m.numel()) for m in before_masks.values())
    assert torch.equal(model(idx)[0], before)
    step(model, optimizer, 99)
    for name, layer in masked_layers(model).items():
        new = layer.mask & ~before_masks[name]
        assert (layer.weight[new] != 0).float().mean() > 0.9


def test_the_function_stays_when_inactive_weights_held_other_values():
    model = make(connection_ratio=0.5)
    with torch.no_grad():
        for layer in masked_layers(model).values():
            layer.weight += 3.0 * ~layer.mask
    before = model(tokens())[0]
    model.grow_connections(1.0)
    assert torch.equal(model(tokens())[0], before)


@pytest.mark.parametrize(
    "optimizer",
    [
        adamw,
        lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, weight_decay=0.1),
        lambda m: torch.optim.SGD(m.parameters(), lr=1e-1, momentum=0.9, weight_decay=0.1),
    ],
)
def test_inactive_connections_neither_move_nor_gather_momentum(optimizer):
    model = make(connection_ratio=0.5)
    optimizer = optimizer(model)
    for seed in range(5):
        step(model, optimizer, seed)
    for layer in masked_layers(model).values():
        off = ~layer.mask
        assert not layer.weight[off].any()
        assert layer.weight[layer.mask].all()
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            momentum = optimizer.state[layer.weight].get(key)
            assert momentum is None or not momentum[off].any()


def test_what_stands_at_inactive_connections_does_not_matter_not_even_after_training():
    plain, disturbed = make(connection_ratio=0.5), make(connection_ratio=0.5)
    with torch.no_grad():
        for layer in masked_layers(disturbed).values():
            layer.weight += torch.randn_like(layer.weight) * ~layer.mask
    assert torch.equal(plain(tokens())[0], disturbed(tokens())[0])
    for seed in range(3):
        for model, optimizer in ((plain, adamw(plain)), (disturbed, adamw(disturbed))):
            step(model, optimizer, seed)
    assert torch.equal(plain(tokens())[0], disturbed(tokens())[0])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5), st.integers(0, 2**63 - 1))
def test_masks_only_ever_grow(ratios, seed):
    model = make(connection_ratio=0.01, connection_seed=seed)
    history = [masks(model)]
    for ratio in ratios:
        model.grow_connections(ratio)
        history.append(masks(model))
    for earlier, later in itertools.pairwise(history):
        assert all(bool((later[name] | ~mask).all()) for name, mask in earlier.items())
    final = max(0.01, *ratios)
    assert model.connection_ratio == final
    assert all(int(m.sum()) == max(1, round(final * m.numel())) for m in history[-1].values())


def test_which_connections_grow_depends_on_the_seed_alone():
    in_one, in_steps = make(0, connection_ratio=0.3), make(7, connection_ratio=0.3)
    in_one.grow_connections(0.9)
    for ratio in (0.4, 0.55, 0.9):
        torch.rand(3)
        in_steps.grow_connections(ratio)
    assert all(torch.equal(mask, masks(in_steps)[name]) for name, mask in masks(in_one).items())
    other = make(0, connection_ratio=0.9, connection_seed=1)
    assert not any(torch.equal(mask, masks(other)[name]) for name, mask in masks(in_one).items())


def test_layers_of_the_same_shape_have_different_masks():
    first, second = (make().blocks[i].attn.qkv.mask for i in (0, 1))
    assert not torch.equal(first, second)


def test_growth_does_not_touch_the_global_random_state():
    model, before = make(), torch.get_rng_state()
    model.grow_connections(0.9)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mask_from_elsewhere_is_grown_and_never_cut():
    model = make(connection_ratio=0.5)
    model.load_state_dict(make(connection_ratio=0.5, connection_seed=9).state_dict())
    before = masks(model)
    model.grow_connections(0.75)
    for name, mask in masks(model).items():
        assert bool((mask | ~before[name]).all())
        assert int(mask.sum()) == round(0.75 * mask.numel())


def test_growing_to_less_does_nothing():
    model = make(connection_ratio=0.5)
    before = masks(model)
    assert model.grow_connections(0.4) == 0
    assert model.connection_ratio == 0.5
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())


@pytest.mark.parametrize("ratio", [0.0, -0.1, 0.91, 2.0, math.nan])
def test_growing_beyond_the_limits_is_refused(ratio):
    model = make(connection_ratio=0.5, max_connections=0.9)
    with pytest.raises(InvalidValue, match="to_ratio"):
        model.grow_connections(ratio)
    assert model.connection_ratio == 0.5


# --- state ---------------------------------------------------------------------------------------


def test_masks_and_ratio_come_back_exactly_and_growth_goes_on_the_same():
    model = make(connection_ratio=0.1)
    model.grow_connections(0.1 + 0.2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = make(5, connection_ratio=0.1)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.connection_ratio == 0.1 + 0.2
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(tokens())[0], again(tokens())[0])
    assert model.grow_connections(0.7) == again.grow_connections(0.7)
    assert all(torch.equal(mask, masks(again)[name]) for name, mask in masks(model).items())


def test_a_resumed_training_goes_on_bit_by_bit_like_one_that_never_stopped():
    def train(model, optimizer, seeds):
        for seed in seeds:
            if seed == 4:
                model.grow_connections(0.8)
            step(model, optimizer, seed)

    whole = make()
    train(whole, adamw(whole), range(8))
    first = make()
    first_optimizer = adamw(first)
    train(first, first_optimizer, range(3))
    second = make(5)
    second_optimizer = adamw(second)
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    train(second, second_optimizer, range(3, 8))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("assign", [True, False])
def test_a_sparse_state_counts_at_once_in_a_model_that_was_dense(assign):
    sparse, dense = make(connection_ratio=0.3), make(connection_ratio=1.0)
    dense(tokens())
    state = {k: v.clone() for k, v in sparse.state_dict().items()}
    with torch.no_grad():
        for name, layer in masked_layers(sparse).items():
            state[f"{name}.weight"] += 1.0 * ~layer.mask  # a model that took itself for dense would show these
    dense.load_state_dict(state, assign=assign)
    assert torch.equal(dense(tokens())[0], sparse(tokens())[0])


def test_masks_written_in_place_count_at_once():
    model = make(connection_ratio=1.0)
    before = model(tokens())[0]
    for layer in masked_layers(model).values():
        layer.mask.copy_(torch.zeros_like(layer.mask))
    assert not torch.equal(model(tokens())[0], before)


def test_casting_the_model_keeps_the_ratio_exact():
    model = make(connection_ratio=0.1).to(torch.bfloat16)
    assert model.ratio.dtype is torch.float64
    assert model.connection_ratio == 0.1
    assert model.wte.weight.dtype is torch.bfloat16
    assert torch.isfinite(model(tokens())[0]).all()


def test_an_untouched_configuration_gives_the_same_model_for_the_same_seed():
    assert all(torch.equal(value, make(3).state_dict()[key]) for key, value in make(3).state_dict().items())


# --- generating ----------------------------------------------------------------------------------


def test_generating_adds_tokens_and_leaves_the_training_as_it_was():
    model = make(dropout=0.5).train()
    before = torch.get_rng_state()
    out = model.generate(tokens(2, 3), 20, temperature=0.8, top_k=5, generator=torch.Generator().manual_seed(4))
    again = model.generate(tokens(2, 3), 20, temperature=0.8, top_k=5, generator=torch.Generator().manual_seed(4))
    assert out.shape == (2, 23)
    assert torch.equal(out[:, :3], tokens(2, 3))
    assert torch.equal(out, again)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_likeliest_are_sampled():
    model, idx = make(), tokens(1, 4)
    likeliest = set(model.eval()(idx)[0][0, -1].topk(2).indices.tolist())
    drawn = {int(model.generate(idx, 1, temperature=5.0, top_k=2)[0, -1]) for _ in range(60)}
    assert drawn == likeliest
    assert int(model.generate(idx, 1, temperature=0)[0, -1]) == int(model(idx)[0][0, -1].argmax())


@pytest.mark.parametrize(("options", "named"), [({"temperature": -1.0}, "temperature"), ({"top_k": 0}, "top_k")])
def test_generating_refuses_what_makes_no_sense(options, named):
    with pytest.raises(InvalidValue, match=named):
        make().generate(tokens(1, 2), 1, **options)

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptcache.errors import DataTooSmall, InvalidValue
from ckptcache.nanecho.sampler import BlockSampler, evaluation_batches, permuted

TEXT = np.arange(10_000, dtype=np.uint16)


def make(tokens=TEXT, block_size=16, batch_size=4, seed=1):
    return BlockSampler(tokens, block_size=block_size, batch_size=batch_size, seed=seed)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batches_are_blocks_and_the_tokens_after_them():
    x, y = make().next_batch()
    assert x.shape == y.shape == (4, 16)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(16).expand(4, 16))


def test_a_restored_sampler_continues_where_the_other_was():
    sampler = make()
    for _ in range(7):
        sampler.next_batch()
    state = json.loads(json.dumps(sampler.state_dict()))
    assert state == {"seed": 1, "position": 7}
    other = make(seed=99)
    other.load_state_dict(state)
    assert all(same(sampler.next_batch(), next(other)) for _ in range(300))
    assert other.state_dict() == sampler.state_dict()


def test_seeds_and_positions_give_different_batches():
    first = make().next_batch()
    assert not same(first, make(seed=2).next_batch())
    sampler = make()
    sampler.next_batch()
    assert not same(first, sampler.next_batch())


def test_reseeding_starts_another_order_at_its_beginning():
    sampler = make()
    sampler.next_batch()
    sampler.reseed(5)
    assert sampler.state_dict() == {"seed": 5, "position": 0}
    assert same(sampler.next_batch(), make(seed=5).next_batch())


def test_a_late_position_costs_no_more_than_an_early_one():
    tokens = np.zeros(50_000_000, dtype=np.uint8)
    sampler = make(tokens)
    begun = time.process_time()
    sampler.load_state_dict({"seed": 1, "position": 1_000_000})
    sampler.next_batch()
    assert time.process_time() - begun < 0.1
    assert sampler.position == 1_000_001


@given(st.integers(2, 400), st.integers(1, 30), st.integers(1, 7), st.integers(0, 2**63 - 1))
def test_an_epoch_sees_each_block_once(length, block_size, batch_size, seed):
    if length < block_size + 1:
        length = block_size + 1
    sampler = make(np.arange(length, dtype=np.uint16), block_size, batch_size, seed)
    blocks = round(sampler.batches_per_epoch * batch_size)
    drawn = [int(row[0]) for _ in range(3 * blocks // batch_size + 1) for row in sampler.next_batch()[0]]
    for epoch in range(3):
        starts = sorted(drawn[epoch * blocks : (epoch + 1) * blocks])
        assert starts == list(range(starts[0], starts[0] + blocks * block_size, block_size))
        assert starts[-1] + block_size < length


def test_epochs_differ_in_order_and_in_cuts_and_reach_every_token():
    sampler, blocks = make(np.arange(100, dtype=np.uint8), batch_size=1), 5
    batches = [sampler.next_batch() for _ in range(blocks * 200)]
    starts = np.array([int(x[0, 0]) for x, _ in batches]).reshape(200, blocks)
    assert len({tuple(np.argsort(epoch)) for epoch in starts}) > 60
    assert set(starts.min(axis=1).tolist()) == set(range(20))
    assert {token for _, y in batches for token in y[0].tolist()} == set(range(1, 100))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_the_permutation_is_one(size, key):
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_the_permutation_spreads_evenly():
    hits = np.zeros((8, 8))
    for key in range(4000):
        for index in range(8):
            hits[index, permuted(index, 8, key * 0x9E3779B97F4A7C15)] += 1
    assert abs(hits / 4000 - 1 / 8).max() < 0.03


def test_the_order_is_the_same_on_every_machine_and_version():
    assert make().next_batch()[0][:, 0].tolist() == [4579, 3731, 5667, 5411]


def test_one_block_is_enough():
    x, y = make(np.arange(17, dtype=np.uint8)).next_batch()
    assert x.tolist() == [list(range(16))] * 4
    assert y.tolist() == [list(range(1, 17))] * 4


def test_less_than_a_block_is_refused():
    with pytest.raises(DataTooSmall, match="16 tokens, and one block needs 17"):
        make(np.arange(16, dtype=np.uint8))
    with pytest.raises(DataTooSmall):
        evaluation_batches(np.arange(16, dtype=np.uint8), 16, 2, 2)


@pytest.mark.parametrize(
    "options", [{"block_size": 0}, {"batch_size": 0}, {"seed": -1}, {"seed": 1.5}, {"seed": 2**63}]
)
def test_sizes_and_seeds_out_of_range_are_refused(options):
    with pytest.raises(InvalidValue, match=next(iter(options))):
        make(**options)


@pytest.mark.parametrize(
    "state",
    [{}, {"seed": 1}, {"seed": 1, "position": -1}, {"seed": "1", "position": 1}, {"seed": 1, "position": 2, "x": 3}],
)
def test_a_foreign_state_is_refused_and_changes_nothing(state):
    sampler = make()
    sampler.next_batch()
    with pytest.raises(InvalidValue):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == {"seed": 1, "position": 1}


def test_evaluation_is_the_same_each_time_and_spread_over_the_data():
    first, second = (evaluation_batches(TEXT, 16, 4, 5) for _ in range(2))
    assert len(first) == 5
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    starts = [int(row[0]) for x, _ in first for row in x]
    assert starts[0] == 0
    assert starts[-1] == len(TEXT) - 17
    gaps = np.diff(starts)
    assert gaps.min() >= 16
    assert gaps.max() - gaps.min() <= 1


def test_evaluation_of_little_data_takes_each_block_once():
    batches = evaluation_batches(np.arange(100, dtype=np.uint8), 16, 4, 10)
    starts = [int(row[0]) for x, _ in batches for row in x]
    assert [len(x) for x, _ in batches] == [4, 2]
    assert np.diff(starts).min() >= 16

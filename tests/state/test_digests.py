"""Digests: equal for what is equal bit for bit, and for nothing else."""

from collections import OrderedDict

import numpy as np
import pytest
import torch

from ckptcache.state.digests import DIGEST_LENGTH, digest, leaf_digests

ONE_KIND_EACH = [
    torch.tensor([1.0, 2.0]),
    torch.tensor([[1.0, 2.0]]),
    torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    torch.tensor([1.0, 2.0], dtype=torch.float64),
    torch.tensor([1.0, 2.0 + 2**-22]),
    torch.tensor(1.0),
    torch.tensor([]),
    torch.tensor([], dtype=torch.int64),
    torch.tensor([0.0]),
    torch.tensor([-0.0]),
    torch.tensor([float("nan")]),
    torch.tensor([True]),
    torch.tensor([1 + 2j]),
    torch.tensor([1 + 2j]).conj(),
    np.array([1.0, 2.0]),
    np.array([1, 2]),
    1,
    1.0,
    True,
    None,
    "1",
    b"1",
    ["ab"],
    ["a", "b"],
    ("a", "b"),
    [["a"], "b"],
    {"a": 1},
    {"a": 2},
    {"b": 1},
    {1, 2},
    0.1 + 0.2,
    0.3,
]


def test_everything_that_differs_has_another_digest():
    found = [digest(value) for value in ONE_KIND_EACH]
    assert len(set(found)) == len(ONE_KIND_EACH)
    assert {len(text) for text in found} == {DIGEST_LENGTH}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(3, 2).T.contiguous().T.reshape(2, 3)),
        (torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous()),
        (torch.ones(2), torch.ones(4)[::2]),
        (torch.eye(3).to_sparse(), torch.eye(3)),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
        ({3, 1, 2}, {2, 3, 1}),
        ({"x": [torch.ones(1)]}, {"x": [torch.ones(1)]}),
    ],
)
def test_what_is_the_same_has_the_same_digest_however_it_lies_in_memory(one, other):
    assert digest(one) == digest(other)


def test_an_object_is_known_by_its_attributes():
    class Batch:
        def __init__(self, tokens):
            self.tokens = tokens

    assert digest(Batch(torch.ones(2))) == digest(Batch(torch.ones(2)))
    assert digest(Batch(torch.ones(2))) != digest(Batch(torch.zeros(2)))
    assert digest(print) == digest(len)  # nothing of it can be compared


def test_leaves_are_named_by_their_way():
    state = {"state": {0: {"exp_avg": torch.ones(2), "betas": (0.9, 0.95)}}, "groups": [{"lr": 0.1}], "parts": []}
    found = dict(leaf_digests(state, "optimizer"))
    assert list(found) == [
        "optimizer.state.0.exp_avg",
        "optimizer.state.0.betas",
        "optimizer.groups.0.lr",
        "optimizer.parts",
    ]
    assert found["optimizer.groups.0.lr"] == digest(0.1)
    assert list(leaf_digests(OrderedDict(w=torch.ones(1)), "model")) == [("model.w", digest(torch.ones(1)))]

"""Restoring into live objects: all of it or nothing, at no more memory than the file takes."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from ckptcache import TrainingCache
from ckptcache.errors import NotRestorable
from ckptcache.state.restore import apply


def trained(seed: int, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    train(model, optimizer, 3)
    return model, optimizer


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def held(*objects):
    return copy.deepcopy([each.state_dict() for each in objects])


def alike(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(alike(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(alike, left, right))
    return left == right


class Refusing(nn.Linear):
    def load_state_dict(self, *args, **kwargs):
        super().load_state_dict(*args, **kwargs)
        raise RuntimeError("not today")


@pytest.fixture
def cache(tmp_path):
    with TrainingCache(tmp_path / "cache") as cache:
        yield cache


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False, "amsgrad": True}])
def test_whatever_refuses_afterwards_model_and_optimizer_are_what_they_were(cache, options):
    model, optimizer = trained(0, **options)
    cache.save({"model": model, "optimizer": optimizer, "head": nn.Linear(4, 4)}, iteration=3, val_loss=1.0)
    model, optimizer = trained(1, **options)
    twin, twins_optimizer = trained(1, **options)
    before = held(model, optimizer)
    with pytest.raises(NotRestorable, match="not today"):
        cache.restore(
            {"model": model, "optimizer": optimizer, "head": Refusing(4, 4)}, resume=cache.checkpoints()[0].id
        )
    assert alike(held(model, optimizer), before)
    train(model, optimizer, 3)
    train(twin, twins_optimizer, 3)
    assert alike(held(model, optimizer), held(twin, twins_optimizer))


def test_an_optimizer_that_loads_in_a_way_of_its_own_is_what_it_was(cache):
    model, optimizer = trained(0)
    cache.save({"model": model, "optimizer": optimizer, "head": nn.Linear(4, 4)}, iteration=3, val_loss=1.0)
    model, optimizer = trained(1)

    def spoil(optimizer, state):
        for moments in optimizer.state.values():
            moments["exp_avg"].zero_()

    optimizer.register_load_state_dict_pre_hook(spoil)
    before = held(model, optimizer)
    with pytest.raises(NotRestorable):
        cache.restore(
            {"model": model, "optimizer": optimizer, "head": Refusing(4, 4)}, resume=cache.checkpoints()[0].id
        )
    assert alike(held(model, optimizer), before)


class Counting(torch.optim.SGD):
    """Keeps what belongs to no parameter beside what does, as torch allows."""

    def step(self, closure=None):
        self.state["steps"] = self.state.get("steps", 0) + 1
        self.state.setdefault("history", []).append(self.state["steps"])
        return super().step(closure)


def test_what_an_optimizer_keeps_beside_its_parameters_is_restored_and_put_back(cache):
    model = nn.Linear(8, 4)
    optimizer = Counting(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 3)
    cache.save({"optimizer": optimizer, "head": nn.Linear(4, 4)}, iteration=3, val_loss=1.0)
    train(model, optimizer, 2)
    before = held(optimizer)
    with pytest.raises(NotRestorable, match="not today"):
        cache.restore({"optimizer": optimizer, "head": Refusing(4, 4)}, resume=cache.checkpoints()[0].id)
    assert alike(held(optimizer), before)
    apply({"optimizer": optimizer}, cache.load(cache.checkpoints()[0].id), id="it")
    assert optimizer.state["steps"] == 3
    assert optimizer.state["history"] == [1, 2, 3]


@pytest.mark.parametrize("saved", [{1: torch.zeros(2)}, {"weight": 1, 2: None}, [torch.zeros(2)], 5])
def test_what_is_no_state_of_a_module_is_refused_by_name(saved):
    with pytest.raises(NotRestorable, match="'model' could not be restored"):
        apply({"model": nn.Linear(2, 2)}, {"model": saved}, id="it", uses_up=True)


@pytest.mark.parametrize("others", [{}, {"kept": {"weight": None}}])
def test_what_else_holds_the_models_tensors_gets_what_was_saved(cache, others):
    model, _ = trained(0)
    saved = copy.deepcopy(model.state_dict())
    cache.save({"model": model, "kept": {"weight": model[0].weight}}, iteration=3, val_loss=1.0)
    model, _ = trained(1)
    restored = cache.restore({"model": model, **others})
    assert alike(dict(model.state_dict()), dict(saved))
    kept = others["kept"] if others else restored.state["kept"]
    assert torch.equal(kept["weight"], saved["0.weight"])


def sparse(values: torch.Tensor) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.arange(len(values))[None], values, check_invariants=False)


@pytest.mark.parametrize(
    ("hold", "held_in"),
    [(lambda tensor: {tensor}, lambda held: next(iter(held))), (sparse, lambda held: held._values())],
    ids=["a set", "a sparse tensor"],
)
def test_what_holds_the_models_tensors_out_of_sight_gets_what_was_saved(cache, hold, held_in):
    model, saved = nn.Linear(8, 300), nn.Linear(8, 300)
    cache.save({"model": saved, "kept": hold(saved.bias.detach())}, iteration=3, val_loss=1.0)
    restored = cache.restore({"model": model})
    assert torch.equal(model.bias, saved.bias)
    assert torch.equal(held_in(restored.state["kept"]), saved.bias)


def test_a_state_that_is_needed_again_stays_as_it_is():
    model, optimizer = trained(0)
    state = dict(zip(("model", "optimizer"), held(model, optimizer), strict=True))
    for seed in (1, 2):
        other, others_optimizer = trained(seed)
        apply({"model": other, "optimizer": others_optimizer}, state, id="it")
        assert alike(held(other, others_optimizer), held(model, optimizer))


PEAK = """
import sys, torch
from ckptcache import TrainingCache
def grown(work):
    open("/proc/self/clear_refs", "w").write("5")
    before = read("VmRSS")
    work()
    return (read("VmHWM") - before) / 2**20
def read(name):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))
model = torch.nn.Linear(4096, 8192)
cache = TrainingCache(sys.argv[1])
cache.save({"model": model}, iteration=1, val_loss=1.0)
cache.restore({"model": torch.nn.Linear(4096, 8192)})
print(grown(lambda: cache.restore({"model": model})))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_takes_no_more_memory_than_the_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "cache")], capture_output=True, text=True, check=True
    )
    assert 100 < float(done.stdout) < 1.25 * 128

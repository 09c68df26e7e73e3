"""Exchanging what a module holds with what was saved: the same bits as `load_state_dict`, and back again."""

import _thread
import copy
import os
import signal
import threading
import time
from collections import OrderedDict

import pytest
import torch
from torch import nn

from ckptcache.state import exchange
from ckptcache.state.exchange import exchange_of


class Tied(nn.Module):
    """Of what torch itself offers, what loads by copying, in many shapes and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        self.norms = nn.Sequential(nn.BatchNorm1d(16), nn.InstanceNorm1d(4, track_running_stats=True), nn.LayerNorm(16))
        self.conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        self.low = nn.Linear(16, 16, dtype=torch.bfloat16)
        self.head = nn.Linear(16, 100, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("single", torch.rand(()))
        self.register_buffer("turned", torch.randn(5, 7).t())
        self.register_buffer("flags", torch.rand(33) > 0.5)
        self.register_buffer("complex", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("large", torch.randn(3, 1_100_003))


def saved_of(module: nn.Module) -> OrderedDict[str, torch.Tensor]:
    """A state_dict whose tensors are nobody else's, shared among themselves as the module's are."""
    return copy.deepcopy(module.state_dict())


@pytest.fixture
def made():
    torch.manual_seed(0)
    ours, theirs = Tied(), Tied()
    return ours, saved_of(theirs)


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[n], right[n]) and left[n].dtype == right[n].dtype and left[n].stride() == right[n].stride()
        for n in left
    )


def test_it_loads_what_was_saved_and_puts_back_what_was_there(made):
    ours, saved = made
    before, wanted = saved_of(ours), copy.deepcopy(saved)
    places = {name: tensor.data_ptr() for name, tensor in ours.state_dict().items()}
    change = exchange_of(ours, saved)
    change.run()
    assert same(ours.state_dict(), wanted)
    assert {name: tensor.data_ptr() for name, tensor in ours.state_dict().items()} == places
    assert ours.head.weight is ours.embed.weight
    change.undo()
    assert same(ours.state_dict(), before)


def test_what_never_ran_has_nothing_to_put_back(made):
    ours, saved = made
    before = saved_of(ours)
    exchange_of(ours, saved).undo()
    assert same(ours.state_dict(), before)


def test_torch_counts_the_change(made):
    ours, saved = made
    versions = [parameter._version for parameter in ours.parameters()]
    loss = ours.low(torch.ones(1, 16, dtype=torch.bfloat16, requires_grad=True)).sum()
    exchange_of(ours, saved).run()
    assert all(now._version > was for now, was in zip(ours.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class ShowsCopies(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({name: tensor.clone() for name, tensor in destination.items() if name.startswith(prefix)})


def shows_copies_itself() -> nn.Module:
    module = nn.Linear(3, 3)
    module.state_dict = lambda *_, **__: copy.deepcopy(nn.Module.state_dict(module))
    return module


@pytest.mark.parametrize("make", [lambda: ShowsCopies(3, 3), shows_copies_itself])
def test_a_module_whose_state_dict_holds_copies_is_loaded_itself(make):
    ours, wanted = make(), nn.Linear(3, 3)
    before = ours.weight.clone()
    change = exchange_of(ours, saved_of(wanted))
    change.run()
    assert torch.equal(ours.weight, wanted.weight)
    assert torch.equal(ours.bias, wanted.bias)
    change.undo()
    assert torch.equal(ours.weight, before)


def test_memory_that_a_parameter_has_left_is_put_back_too():
    ours, saved = nn.Linear(3, 3), saved_of(nn.Linear(3, 3))
    left, before = ours.weight.detach(), ours.weight.detach().clone()
    change = exchange_of(ours, saved)
    change.run()
    ours.weight.data = torch.zeros(3, 3)
    change.undo()
    assert torch.equal(left, before)
    assert not ours.weight.any()


class OwnWay(nn.Linear):
    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.loaded = True


class OwnState(nn.Linear):
    def get_extra_state(self):
        return torch.zeros(1)

    def set_extra_state(self, state):
        self.loaded = True


class OwnDict(nn.Linear):
    def load_state_dict(self, *args, **kwargs):
        return super().load_state_dict(*args, **kwargs)


def hooked() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_load_state_dict_post_hook(lambda *_: None)
    return module


def prehooked() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_load_state_dict_pre_hook(lambda *_: None)
    return module


def expanded() -> nn.Module:
    module = nn.Module()
    module.register_buffer("b", torch.zeros(1).expand(4))
    return module


def overlapping() -> nn.Module:
    module, memory = nn.Module(), torch.zeros(6)
    module.register_buffer("a", memory[:4])
    module.register_buffer("b", memory[2:])
    return module


@pytest.mark.parametrize(
    "make",
    [lambda: OwnWay(2, 2), lambda: OwnState(2, 2), lambda: OwnDict(2, 2), hooked, prehooked, expanded, overlapping],
    ids=["own way", "extra state", "own load_state_dict", "post-hook", "pre-hook", "expanded", "overlapping"],
)
def test_what_loads_in_a_way_of_its_own_is_left_to_it(make):
    module = make()
    assert exchange_of(nn.Sequential(module, nn.Linear(2, 2)), saved_of(nn.Sequential(module, nn.Linear(2, 2)))) is None


def changed(**entries):
    def change(saved):
        saved.update(entries)
        return saved

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: {name: saved[name] for name in list(saved)[1:]},
        changed(more=torch.zeros(1)),
        changed(weight=torch.zeros(3, 2)),
        changed(weight=torch.zeros(2, 2, dtype=torch.float64)),
        changed(weight=torch.zeros(2, 2).t()[:, [0, 1]].t().contiguous().t()),
        changed(weight=[[0.0, 0.0], [0.0, 0.0]]),
        lambda saved: {"weight": saved["weight"], "bias": saved["weight"][0]},
    ],
    ids=["missing", "more", "shape", "dtype", "strides", "no tensor", "sharing memory"],
)
def test_what_does_not_fit_is_left_to_torch(change):
    module = nn.Linear(2, 2)
    assert exchange_of(module, saved_of(module)) is not None
    assert exchange_of(module, change(saved_of(module))) is None


def test_a_module_whose_memory_was_given_away_is_left_to_torch():
    module = nn.Linear(2, 2)
    saved = saved_of(module)
    module.weight.untyped_storage().resize_(0)
    assert exchange_of(module, saved) is None


def test_a_module_that_shares_what_was_saved_apart_is_left_to_torch():
    ours, apart = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    ours[1].weight = ours[0].weight
    assert exchange_of(ours, saved_of(apart)) is None
    assert exchange_of(apart, saved_of(ours)) is None


class Interrupted(BaseException):
    pass


def interrupt(_, frame):
    """Interrupt the exchange, and neither the test nor what is cleaned up meanwhile, where nobody would hear of it."""
    if frame.f_code.co_filename != exchange.__file__:
        return
    while frame is not None and frame.f_code is not exchange.Exchange.run.__code__:
        frame = frame.f_back
    if frame is not None:
        raise Interrupted


@pytest.fixture
def interrupting():
    """Interrupt again and again, from a drawn instant on."""
    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds, 0.0007 if seconds else 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("threads", [1, 2])
def test_whatever_interrupts_it_can_be_put_back(made, monkeypatch, interrupting, threads):
    ours, saved = made
    monkeypatch.setattr(exchange, "processors", lambda: threads)
    monkeypatch.setattr(exchange, "_SPAN", 1 << 16)
    monkeypatch.setattr(exchange, "_BLOCK", 1 << 12)
    before, wanted, interrupted = saved_of(ours), copy.deepcopy(saved), 0
    for number in range(60):
        change = exchange_of(ours, saved)
        try:
            interrupting(0.0005 + number % 50 * 0.0002)
            change.run()
        except Interrupted:
            interrupted += 1
        interrupting(0)
        change.undo()
        assert same(ours.state_dict(), before)
        assert same(saved, wanted)
    assert interrupted > 10


def test_it_is_done_where_no_thread_can_be_started(made, monkeypatch):
    ours, saved = made
    wanted = copy.deepcopy(saved)

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    exchange_of(ours, saved).run()
    assert same(ours.state_dict(), wanted)


def test_several_threads_take_part(made, monkeypatch):
    ours, saved = made
    monkeypatch.setattr(exchange, "processors", lambda: 3)
    monkeypatch.setattr(exchange, "_SPAN", 1 << 14)
    taking, go_on = set(), exchange._Hand.go_on

    def watched(hand):
        taking.add(threading.get_ident())
        time.sleep(0.05)
        go_on(hand)

    monkeypatch.setattr(exchange._Hand, "go_on", watched)
    wanted = copy.deepcopy(saved)
    exchange_of(ours, saved).run()
    assert same(ours.state_dict(), wanted)
    assert len(taking) == 3


def test_a_forked_child_can_do_it(made):
    ours, saved = made
    before = saved_of(ours)
    exchange_of(ours, saved).run()
    child = os.fork()
    if child == 0:
        try:
            exchange_of(ours, saved).run()
        finally:
            os._exit(0 if torch.equal(ours.single, before["single"]) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_one_interrupt_comes_through_when_everything_has_changed_places(made, monkeypatch):
    ours, saved = made
    wanted, go_on = copy.deepcopy(saved), exchange._Hand.go_on
    monkeypatch.setattr(exchange, "processors", lambda: 1)
    calls = []

    def interrupted(hand):
        calls.append(hand)
        if len(calls) == 1:
            hand._taken.extend(next(hand._parts))
            raise Interrupted
        go_on(hand)

    monkeypatch.setattr(exchange._Hand, "go_on", interrupted)
    with pytest.raises(Interrupted):
        exchange_of(ours, saved).run()
    assert same(ours.state_dict(), wanted)

"""Every file holds exactly the state at its call, whatever training does meanwhile; and saving changes no training."""

import random
import time
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ckptcache import TrainingCache, TrainingSession
from ckptcache.state import pieces, staging
from ckptcache.storage import fs
from tests.caches import frozen, same
from tests.faults import swapped

KINDS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "single": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


class Net(nn.Module):
    """Parameters tied and frozen, buffers that a forward pass changes, one of them in a parameter's memory; dropout."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(32, 12, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("window", torch.arange(9.0)[4:7])
        self.register_buffer("shifted", self.norm.bias.detach()[3:5])

    def forward(self, tokens):
        self.calls += 1
        self.window.mul_(1.5)
        self.shifted.add_(0.125)
        return self.head(self.drop(self.norm(self.frozen(self.embed(tokens)))))


class Play:
    """A training that does as it is told, and remembers the state at each save."""

    def __init__(self, cache, kind):
        torch.manual_seed(3)
        self.cache, self.net = cache, Net()
        self.optimizer = KINDS[kind]([p for p in self.net.parameters() if p.requires_grad])
        self.objects = {"model": self.net, "optimizer": self.optimizer, "note": {"n": 0, "t": torch.zeros(2)}}
        self.saved, self.now = {}, 0
        self.train()

    def loss(self):
        return self.net(torch.randint(0, 12, (8,))).square().mean()

    def forward(self):
        with torch.no_grad():
            self.loss()

    def train(self):
        def closure():
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        self.optimizer.step(closure)

    def buffers(self):
        self.net.norm.running_mean.fill_(self.now)
        self.objects["note"]["n"] += 1
        self.objects["note"]["t"].add_(1)

    def clamp(self):
        self.cache.staged()
        self.clamp_unannounced()

    def pause(self):
        time.sleep(random.random() * 0.01)

    def clamp_unannounced(self):
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.mul_(0.9).clamp_(-0.5, 0.5)

    def swap(self):
        self.cache.staged()
        kept = frozen(self.net.state_dict())
        self.clamp_unannounced()
        self.forward()
        self.net.load_state_dict(kept)

    def save(self, *, blocking=False):
        self.now += 1
        record = self.cache.save(self.objects, iteration=self.now, val_loss=1.0, blocking=blocking)
        self.saved[record.id] = self.state()

    def save_at_once(self):
        self.save(blocking=True)

    def state(self):
        note = self.objects["note"]
        return frozen({"model": dict(self.net.state_dict()), "optimizer": self.optimizer.state_dict(), "note": note})

    def differing(self):
        """The saves whose file isn't the state at its call."""
        self.cache.wait_until_finished()
        return [id for id, state in self.saved.items() if not self.is_same(self.cache.load(id), state)]

    @staticmethod
    def is_same(found, state):
        return same({**found, "model": dict(found["model"])}, state)


ACTIONS = ("forward", "train", "train", "buffers", "clamp", "swap", "save", "save", "save_at_once")


class SlowDisk(fs.System):
    def write(self, fd, data):
        time.sleep(random.random() * 0.004)
        return super().write(fd, data)


@contextmanager
def slow_copies(monkeypatch):
    """Every tensor takes its time to be copied, so that training overtakes whatever it can."""
    copy = pieces._copy

    def slowly(*what):
        piece = copy(*what)
        return lambda: (time.sleep(random.random() * 0.002), piece())

    with monkeypatch.context() as patch, swapped(SlowDisk()):
        patch.setattr(staging, "AT_ONCE", 800)
        patch.setattr(pieces, "PIECE", 1024)
        patch.setattr(pieces, "_copy", slowly)
        yield


def played(folder, kind, actions):
    play = Play(TrainingCache(folder, max_checkpoints=100), kind)
    for action in actions:
        getattr(play, action)()
    return play


@pytest.fixture(scope="module", autouse=True)
def _slowly():
    with pytest.MonkeyPatch.context() as patch, slow_copies(patch):
        yield


@given(kind=st.sampled_from(sorted(KINDS)), actions=st.lists(st.sampled_from(ACTIONS), min_size=2, max_size=10))
def test_every_file_holds_exactly_the_state_at_its_call(tmp_path_factory, kind, actions):
    play = played(tmp_path_factory.mktemp("play"), kind, [*actions, "save", "train"])
    assert play.differing() == []
    assert play.cache.doctor() == []
    play.cache.close()


def without_waiting(monkeypatch):
    monkeypatch.setattr(staging.Staging, "settle", lambda self: None)
    monkeypatch.setattr(staging.Staging, "_has_changed", lambda self: False)


def without_buffers_copied(monkeypatch):
    monkeypatch.setattr(staging, "_clone", lambda storage: storage)


@pytest.mark.parametrize("broken", [without_waiting, without_buffers_copied])
def test_the_check_finds_a_save_that_is_not_the_state_at_its_call(tmp_path, monkeypatch, broken):
    broken(monkeypatch)
    plays = (played(tmp_path / str(number), "fused", ["save", "buffers", "train"] * 3) for number in range(20))
    assert any(play.differing() for play in plays)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_change_that_nobody_announced_is_in_the_file_whole_or_not_at_all(tmp_path, kind, monkeypatch):
    for number in range(4):
        play = played(tmp_path / str(number), kind, ["train", "save", "pause", "clamp_unannounced"])
        ((id, before),) = play.saved.items()
        # What was copied at the call stays as it was then; parameters and moments belong together.
        after = {**play.state(), "model": {**before["model"], **dict(play.net.named_parameters())}}
        after["model"]["norm.bias"] = before["model"]["norm.bias"]
        after["model"]["head.weight"] = after["model"]["embed.weight"]
        after = frozen(after)
        play.train()
        play.cache.wait_until_finished()
        found = play.cache.load(id)
        assert play.is_same(found, before) or play.is_same(found, after)


def test_the_check_of_changes_that_nobody_announced_finds_a_torn_file(tmp_path, monkeypatch):
    monkeypatch.setattr(staging.Staging, "_has_changed", lambda self: False)
    with pytest.raises(AssertionError):
        for attempt in range(20):  # on a busy machine the change may come after the copy
            folder = tmp_path / str(attempt)
            test_a_change_that_nobody_announced_is_in_the_file_whole_or_not_at_all(folder, "fused", monkeypatch)


# --- saving changes no training ------------------------------------------------------------------


def trained(folder, checkpoint_interval):
    """100 steps; what is saved between is copied while they go on."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(200, 200), nn.BatchNorm1d(200), nn.Dropout(0.1), nn.Linear(200, 200))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cache = TrainingCache(folder, max_checkpoints=9)
    options = {"checkpoint_interval": checkpoint_interval, "resume": "never"}
    with TrainingSession(cache, model=model, optimizer=optimizer, **options) as session:
        for _ in session.steps(100):
            optimizer.zero_grad()
            model(torch.randn(16, 200)).square().mean().backward()
            optimizer.step()
    return session, frozen([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])


def test_a_training_that_saves_every_20_steps_ends_with_the_same_bits_as_one_that_does_not(tmp_path, monkeypatch):
    # More than this is waited for at the call: it has to hold the buffers, and nothing of what is trained.
    monkeypatch.setattr(staging, "AT_ONCE", 50_000)
    monkeypatch.setattr(pieces, "PIECE", 50_000)
    often, often_state = trained(tmp_path / "often", 20)
    never, never_state = trained(tmp_path / "never", None)
    assert (often.record.saved, never.record.saved) == (5, 1)
    assert [r.iteration for r in often.cache.checkpoints()] == [100, 80, 60, 40, 20]
    assert same(often_state, never_state)
    found = often.cache.load("latest")
    assert same([dict(found["model"]), found["optimizer"]], [dict(often_state[0]), often_state[1]])

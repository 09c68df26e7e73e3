"""The training loop for any model: what it does with models, schedules, scalers, batches, evaluations and callbacks."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptcache.errors import InvalidValue, SessionClosed
from ckptcache.policy.divergence import DivergenceGuard
from ckptcache.trainer import CachedTrainer, Callback
from tests.jobs import cache_at, differences


def digits(count=256):
    """Pictures of 8 by 8 in which a bar stands at one of ten places, under noise; and which place it is."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(10, (count,), generator=generator)
    pictures = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for picture, label in zip(pictures, labels, strict=True):
        row, side = divmod(int(label), 2)
        picture[0, row : row + 3, side * 4 : side * 4 + 4] += 1.0
    return pictures, labels


PICTURES, LABELS = digits()


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(8 * 36, 10)
        )

    def forward(self, pictures):
        return self.layers(pictures)


class Recurrent(nn.Module):
    """Reads a picture row by row."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(8, 24, batch_first=True)
        self.out = nn.Linear(24, 10)

    def forward(self, pictures):
        return self.out(self.rnn(pictures[:, 0])[0][:, -1])


class Batches:
    """Batches in order, for ever, with a position that can be saved."""

    def __init__(self, size=16):
        self.size, self.position = size, 0

    def __iter__(self):
        return self

    def __next__(self):
        first = self.position * self.size % 192
        self.position += 1
        return PICTURES[first : first + self.size], LABELS[first : first + self.size]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def evaluate(model):
    logits = model(PICTURES[192:])
    accuracy = (logits.argmax(-1) == LABELS[192:]).float().mean()
    return nn.functional.cross_entropy(logits, LABELS[192:]), {"accuracy": accuracy}


def made(folder, *, kind=Convolutional, seed=1, lr=0.02, optimizer=None, scheduler=None, **options):
    torch.manual_seed(seed)
    model = kind()
    optimizer = (optimizer or torch.optim.AdamW)(model.parameters(), lr=lr)
    given = {"loss": loss_of, "batches": Batches(), "evaluate": evaluate, "eval_interval": 5, "max_iters": 10}
    given |= {"scheduler": None if scheduler is None else scheduler(optimizer)}
    return CachedTrainer(model, optimizer, cache=cache_at(folder, max_checkpoints=50), **{**given, **options})


def state_of(trainer):
    parts = {"model": trainer.model, "optimizer": trainer.optimizer, "scheduler": trainer.scheduler}
    return {name: part.state_dict() for name, part in parts.items() if part is not None}


# --- any model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Convolutional, Recurrent])
def test_a_model_learns_and_the_next_session_begins_where_it_ended(tmp_path, kind):
    first = made(tmp_path, kind=kind, max_iters=30).train()
    second = made(tmp_path, kind=kind, max_iters=60)
    assert (second.starting_iteration, second.resumed_from.iteration, second.last_iteration) == (30, 30, 60)
    summary = second.train()
    assert summary["first_val_loss"] == pytest.approx(first["last_val_loss"], abs=1e-6)
    assert summary["best_val_loss"] < first["best_val_loss"] < first["first_val_loss"]
    assert second.session.cache.best().metrics["accuracy"] > 0.5


def schedule(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)


@pytest.mark.parametrize("resume", ["best", "latest", "auto"])
def test_trained_in_pieces_is_as_trained_at_once(tmp_path, resume):
    whole = made(tmp_path / "whole", scheduler=schedule, max_iters=12, grad_clip=0.5, gradient_accumulation_steps=2)
    whole.train()
    for end in (3, 4, 9, 12):
        trainer = made(
            tmp_path / "pieces",
            scheduler=schedule,
            seed=1 if end == 3 else end,
            max_iters=end,
            grad_clip=0.5,
            gradient_accumulation_steps=2,
            resume=resume,
        )
        trainer.train()
    assert not list(differences(state_of(trainer), state_of(whole)))
    assert trainer.batches.position == whole.batches.position == 24


def test_max_iters_counts_in_all_and_session_iters_in_this_session(tmp_path):
    for end in (4, 8, 10):
        trainer = made(tmp_path, max_iters=10, session_iters=4)
        assert trainer.last_iteration == end
        assert trainer.train()["end_iteration"] == end
    summary = made(tmp_path, max_iters=10).train()
    assert (summary["stop_reason"], summary["saved"]) == ("nothing_to_do", 0)
    only = made(tmp_path, max_iters=None, session_iters=2)
    assert only.train()["end_iteration"] == 12


def test_a_trainer_trains_once_and_may_be_closed_without_training(tmp_path):
    trainer = made(tmp_path, max_iters=2)
    trainer.train()
    with pytest.raises(SessionClosed):
        trainer.train()
    trainer.close()
    looked_at = made(tmp_path, max_iters=4)
    looked_at.close()
    assert looked_at.session.summary()["end_iteration"] == 2
    with pytest.raises(SessionClosed):
        looked_at.train()


# --- steps ---------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, pictures):
        return self.layers(pictures)


def test_gradient_accumulation_equals_the_big_batch(tmp_path):
    big = made(tmp_path / "big", kind=Plain, batches=Batches(64), optimizer=torch.optim.SGD, lr=0.5)
    small = made(
        tmp_path / "small",
        kind=Plain,
        batches=Batches(16),
        optimizer=torch.optim.SGD,
        lr=0.5,
        gradient_accumulation_steps=4,
    )
    summaries = big.train(), small.train()
    for name, value in big.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], value, atol=1e-5, rtol=1e-5)
    assert summaries[0]["last_val_loss"] == pytest.approx(summaries[1]["last_val_loss"], abs=1e-5)
    curves = [t.session.record.curves["loss"] for t in (big, small)]
    assert [v for _, v in curves[0]] == pytest.approx([v for _, v in curves[1]], abs=1e-5)
    assert small.batches.position == 40


def test_gradients_are_clipped_to_their_norm(tmp_path):
    def moved(clip):
        trainer = made(tmp_path / str(clip), kind=Plain, optimizer=torch.optim.SGD, lr=1.0, max_iters=1, grad_clip=clip)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        moves = zip(trainer.model.parameters(), before, strict=True)
        return float(torch.cat([(p.detach() - b).flatten() for p, b in moves]).norm())

    assert moved(0.0) > 0.5
    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)


def test_the_scheduler_is_stepped_once_a_step_and_over_sessions(tmp_path):
    made(tmp_path, scheduler=schedule, gradient_accumulation_steps=2, max_iters=4).train()
    trainer = made(tmp_path, scheduler=schedule, gradient_accumulation_steps=2, max_iters=10)
    trainer.train()
    expected = 0.01 * (1 + math.cos(math.pi * 10 / 40))
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    assert trainer.session.cache.get("latest").learning_rate == pytest.approx((expected,))


def scaled(folder, **options):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return made(folder, scaler=scaler, **options)


def test_a_scaler_changes_no_gradient_and_its_scale_is_kept(tmp_path):
    plain = made(tmp_path / "plain", kind=Plain, grad_clip=0.5)
    plain.train()
    first = scaled(tmp_path / "scaled", kind=Plain, grad_clip=0.5, max_iters=4)
    first.train()
    second = scaled(tmp_path / "scaled", kind=Plain, grad_clip=0.5)
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert second.scaler.get_scale() == 2.0**11
    second.train()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_a_step_that_the_scaler_leaves_out_counts(tmp_path):
    def overflow_once(model, batch):
        overflow_once.calls += 1
        return loss_of(model, batch) * (float("inf") if overflow_once.calls == 3 else 1.0)

    overflow_once.calls = 0
    seen = []

    class Look(Callback):
        def after_step(self, trainer, iteration, loss):
            seen.append((trainer.session.iteration, iteration))

    trainer = scaled(tmp_path, kind=Plain, loss=overflow_once, callbacks=[Look()], max_iters=5, eval_interval=3)
    summary = trainer.train()
    assert seen == [(i, i) for i in range(1, 6)]
    assert (summary["end_iteration"], summary["stop_reason"]) == (5, "finished")
    assert trainer.scaler.get_scale() == 2.0**9
    assert math.isfinite(summary["last_val_loss"])


# --- batches -------------------------------------------------------------------------------------


def test_a_data_loader_is_begun_again_when_it_ends(tmp_path):
    seen = []

    def loss(model, batch):
        seen.append(len(batch[1]))
        return loss_of(model, batch)

    loader = DataLoader(TensorDataset(PICTURES[:40], LABELS[:40]), batch_size=16, shuffle=True)
    summary = made(tmp_path, batches=loader, loss=loss, max_iters=8).train()
    assert summary["end_iteration"] == 8
    assert seen == [16, 16, 8, 16, 16, 8, 16, 16]


def test_batches_that_begin_anew_after_a_resume_are_told_of(tmp_path, caplog):
    loader = DataLoader(TensorDataset(PICTURES[:40], LABELS[:40]), batch_size=16)
    told = "the batches have no state_dict: they begin anew"
    made(tmp_path, batches=loader, max_iters=1).train()
    assert told not in caplog.messages
    made(tmp_path, batches=loader, max_iters=2).train()
    assert caplog.messages.count(told) == 1
    caplog.clear()
    made(tmp_path, max_iters=3).train()
    assert told not in caplog.messages


def test_no_batch_at_all_is_said_in_a_sentence(tmp_path):
    with pytest.raises(InvalidValue, match="batches cannot be 'list': it gave no batch"):
        made(tmp_path, batches=[]).train()


def test_a_generator_that_runs_out_is_said_in_a_sentence(tmp_path):
    batches = ((PICTURES[i : i + 8], LABELS[i : i + 8]) for i in range(0, 24, 8))
    with pytest.raises(InvalidValue, match="it ended after 3 batches and can't be begun again"):
        made(tmp_path, batches=batches).train()


# --- evaluating ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "metrics"),
    [
        (1.5, {}),
        (torch.tensor(1.5, requires_grad=True), {}),
        ((1.5, {"accuracy": torch.tensor(0.5)}), {"accuracy": 0.5}),
        ({"val_loss": 1.5, "f1": 0.25}, {"f1": 0.25}),
    ],
)
def test_what_an_evaluation_may_return(tmp_path, found, metrics):
    trainer = made(tmp_path, evaluate=lambda model: found, max_iters=1)
    trainer.train()
    record = trainer.session.cache.best()
    assert (record.val_loss, record.metrics) == (1.5, metrics)


@pytest.mark.parametrize("found", [None, {"accuracy": 0.5}, (1.0, 2.0, 3.0), "good", (1.0, {"f1": "much"})])
def test_what_an_evaluation_may_not_return_is_said_at_the_start(tmp_path, found):
    trainer = made(tmp_path, evaluate=lambda model: found)
    with pytest.raises(InvalidValue):
        trainer.train()
    assert trainer.session.iteration == 0


def test_an_evaluation_without_a_loss_keeps_its_metrics(tmp_path):
    trainer = made(tmp_path, evaluate=lambda model: {"val_loss": None, "accuracy": 0.5}, max_iters=5)
    trainer.train()
    (record,) = trainer.session.cache.checkpoints()
    assert (record.save_reason, record.val_loss, record.metrics) == ("final", None, {"accuracy": 0.5})


def noisy(model):
    """Draws from the generators and leaves the model in training, as evaluations do by mistake."""
    torch.rand(7)
    model.train()
    with torch.enable_grad():
        return loss_of(model, (PICTURES[:8], LABELS[:8]))


def test_evaluating_more_or_less_often_changes_nothing_that_is_trained(tmp_path):
    class Dropping(Plain):
        def __init__(self):
            super().__init__()
            self.layers.insert(1, nn.Dropout(0.3))

    states = []
    for name, options in {
        "never": {"evaluate": None},
        "seldom": {"eval_interval": 7},
        "always": {"eval_interval": 1},
        "noisy": {"eval_interval": 2, "evaluate": noisy},
    }.items():
        trainer = made(tmp_path / name, kind=Dropping, max_iters=10, **options)
        trainer.train()
        states.append({**state_of(trainer), "drawn": torch.rand(3)})
    for state in states[1:]:
        assert not list(differences(state, states[0]))


def test_an_evaluation_sees_the_model_in_evaluation_and_frozen_parts_stay_frozen(tmp_path):
    seen = []

    class Freeze(Callback):
        def on_start(self, trainer):
            assert trainer.model.training
            trainer.model.layers[1].eval()

        def before_step(self, trainer, iteration):
            seen.append((trainer.model.training, trainer.model.layers[1].training))

    def look(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        return 1.0

    trainer = made(tmp_path, evaluate=look, callbacks=[Freeze()], max_iters=4, eval_interval=1)
    trainer.train()
    assert seen == [(True, False)] * 4


@pytest.mark.parametrize(("guard", "end"), [(None, 10), (DivergenceGuard(), 6)], ids=["unguarded", "guarded"])
def test_a_loss_that_is_not_a_number_ends_the_session_and_is_never_resumed_from(tmp_path, guard, end):
    first = made(tmp_path, max_iters=5)
    first.train()

    def explode(model, batch):
        return loss_of(model, batch) * float("nan")

    second = made(tmp_path, max_iters=50, loss=explode, divergence_guard=guard)
    summary = second.train()
    assert (summary["stop_reason"], summary["end_iteration"]) == ("diverged", end)
    assert second.starting_iteration == 5
    for resume in ("best", "latest", "auto"):
        third = made(tmp_path, max_iters=50, resume=resume)
        assert third.starting_iteration == 5
        assert all(p.isfinite().all() for p in third.model.parameters())
        third.close()


@pytest.mark.parametrize(("guard", "end"), [(None, 10), (DivergenceGuard(), 6)], ids=["unguarded", "guarded"])
def test_a_divergence_shows_in_the_training_loss_where_nothing_is_evaluated(tmp_path, guard, end):
    def explode(model, batch):
        return loss_of(model, batch) * float("inf")

    made(tmp_path, max_iters=5, evaluate=None).train()
    summary = made(tmp_path, max_iters=50, evaluate=None, loss=explode, divergence_guard=guard).train()
    assert (summary["stop_reason"], summary["end_iteration"]) == ("diverged", end)
    trainer = made(tmp_path, max_iters=50, evaluate=None)
    assert trainer.starting_iteration == 5
    trainer.close()


def test_a_model_that_is_broken_from_the_start_is_not_trained(tmp_path):
    summary = made(tmp_path, evaluate=lambda model: float("nan")).train()
    assert (summary["stop_reason"], summary["end_iteration"], summary["saved"]) == ("diverged", 0, 0)


# --- callbacks -----------------------------------------------------------------------------------


class Log(Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, trainer):
        self.calls.append(("start", trainer.starting_iteration))

    def before_step(self, trainer, iteration):
        self.calls.append(("before", iteration))

    def after_step(self, trainer, iteration, loss):
        assert loss.shape == ()
        assert not loss.requires_grad
        self.calls.append(("after", iteration))

    def after_evaluation(self, trainer, val_loss, metrics):
        self.calls.append(("evaluated", trainer.session.iteration))

    def on_end(self, trainer, summary):
        self.calls.append(("end", summary["stop_reason"]))


def test_callbacks_are_called_in_turn(tmp_path):
    log = Log()
    made(tmp_path, callbacks=[log], max_iters=3, eval_interval=2).train()
    assert log.calls == [
        *(("start", 0), ("evaluated", 0)),
        *(("before", 0), ("after", 1), ("before", 1), ("after", 2), ("evaluated", 2)),
        *(("before", 2), ("after", 3), ("evaluated", 3)),
        ("end", "finished"),
    ]


def test_the_end_is_told_of_an_error_too(tmp_path):
    class Fail(Log):
        def after_step(self, trainer, iteration, loss):
            raise ZeroDivisionError

    log = Fail()
    with pytest.raises(ZeroDivisionError):
        made(tmp_path, callbacks=[log]).train()
    assert log.calls[-1] == ("end", "error")


class Average(Callback):
    """A moving average of the weights."""

    def __init__(self, rate=0.5):
        self.rate, self.value = rate, torch.zeros(())

    def after_step(self, trainer, iteration, loss):
        self.value = self.value * self.rate + loss

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_the_state_of_callbacks_is_saved_and_two_of_a_class_are_told_apart(tmp_path):
    first = [Average(0.5), Average(0.9), Log()]
    made(tmp_path, callbacks=first, max_iters=3).train()
    second = [Average(0.5), Average(0.9), Log()]
    made(tmp_path, callbacks=second, max_iters=9).close()
    assert [a.value for a in second[:2]] == [a.value for a in first[:2]]
    assert second[0].value != second[1].value


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_iters": 0},
        {"session_iters": -1},
        {"eval_interval": 0},
        {"gradient_accumulation_steps": 0},
        {"max_iters": None},
        {"grad_clip": -1.0},
        {"checkpoint_interval": -5},
    ],
)
def test_settings_that_do_not_work_are_refused_at_construction(tmp_path, options):
    with pytest.raises(InvalidValue, match=next(iter(options))):
        made(tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_an_interval_at_the_end_holds_the_last_evaluation(tmp_path):
    trainer = made(tmp_path, max_iters=6, eval_interval=4, checkpoint_interval=3)
    summary = trainer.train()
    records = sorted(trainer.session.cache.checkpoints(), key=lambda r: r.order)
    assert [r.iteration for r in records] == [3, 4, 6]
    assert records[-1].val_loss == summary["last_val_loss"]
    assert (records[0].val_loss, records[0].last_val_loss_iteration) == (None, 0)

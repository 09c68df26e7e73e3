"""Settings of optimizers that hold whatever a checkpoint says."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from ckptcache.errors import InvalidValue, NotRestorable
from ckptcache.overrides import lowered, scale_learning_rate
from ckptcache.session import TrainingSession
from tests.jobs import cache_at


@pytest.fixture
def cache(tmp_path):
    return cache_at(tmp_path / "cache")


def step_of(model, optimizer, scheduler):
    def step():
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

    return step


def train(cache, iterations, *, lr=0.1, schedule=None, optimizer=torch.optim.SGD, rates=None, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    made = optimizer(model.parameters(), lr=lr)
    scheduler = None if schedule is None else schedule(made)
    step = step_of(model, made, scheduler)
    with TrainingSession(cache, model=model, optimizer=made, scheduler=scheduler, **options) as session:
        for _ in session.steps(iterations):
            if rates is not None:
                rates.append(float(made.param_groups[0]["lr"]))
            step()
    return session, made


def test_without_overrides_the_saved_rate_holds_and_both_are_said(cache):
    train(cache, 2)
    session, optimizer = train(cache, 4, lr=0.5)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert (
        'optimizer: lr is 0.1, as saved, where the program gave 0.5 (overrides={"lr": ...} lets the program win)'
        in session.messages
    )


def test_what_the_program_insists_on_wins_and_both_are_said(cache):
    train(cache, 2)
    session, optimizer = train(cache, 4, lr=0.5, overrides={"lr": 0.5, "momentum": 0.9})
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert "optimizer: lr is 0.5, as the program asks; saved was 0.1" in session.messages
    assert "optimizer: momentum is 0.9, as the program asks; saved was 0" in session.messages
    assert not any("as saved" in line for line in session.messages if ": lr" in line or ": momentum" in line)
    assert session.cache.get("latest").learning_rate == (0.5,)


def test_what_was_saved_as_it_is_asked_for_is_not_worth_a_line(cache):
    train(cache, 2)
    session, _ = train(cache, 4, overrides={"lr": 0.1})
    assert not any("lr is" in line for line in session.messages)


SCHEDULES = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 40),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n)),
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_under_a_schedule_the_course_is_kept_from_another_start(tmp_path, schedule):
    whole, before, after = [], [], []
    train(cache_at(tmp_path / "whole"), 10, lr=0.4, schedule=schedule, rates=whole)
    train(cache_at(tmp_path / "cut"), 5, lr=0.1, schedule=schedule, rates=before)
    train(cache_at(tmp_path / "cut"), 10, lr=0.1, schedule=schedule, rates=after, overrides={"lr": 0.4})
    assert before == pytest.approx([rate / 4 for rate in whole[:5]])
    assert after == pytest.approx(whole[5:])


def test_a_rate_that_was_lowered_on_a_plateau_stays_so_from_another_start(tmp_path):
    def plateau(rate, iterations, **options):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        with TrainingSession(cache_at(tmp_path / "cache"), **objects, resume="latest", **options) as session:
            for _ in session.steps(iterations):
                optimizer.step()
                scheduler.step(1.0)
        return session.messages, optimizer.param_groups[0]["lr"]

    assert plateau(0.4, 3)[1] == pytest.approx(0.1)
    assert plateau(0.4, 3, overrides={"lr": 0.4})[1] == pytest.approx(0.1)
    assert plateau(0.8, 3, overrides={"lr": 0.8})[1] == pytest.approx(0.2)
    messages, _ = plateau(0.8, 3)
    assert any(line.startswith("optimizer: lr is 0.4, as saved, where the program gave 0.8") for line in messages)


def test_a_rate_that_is_a_tensor_stays_the_same_tensor(cache):
    def fused(parameters, lr):
        return torch.optim.AdamW(parameters, lr=torch.tensor(lr))

    train(cache, 2, optimizer=fused)
    session, optimizer = train(cache, 4, optimizer=fused, overrides={"lr": 0.5})
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert float(optimizer.param_groups[0]["lr"]) == 0.5
    assert "optimizer: lr is 0.5, as the program asks; saved was 0.1" in "\n".join(session.messages).replace(
        "0.10000000149011612", "0.1"
    )


def test_one_of_several_optimizers_can_be_meant(cache):
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizers = {name: torch.optim.SGD(m.parameters(), lr=0.1) for name, m in (("a", first), ("b", second))}
    objects = {"model": first, "other": second, **optimizers}
    with TrainingSession(cache, **objects, overrides={"b": {"lr": 0.7}, "weight_decay": 0.2}):
        pass
    assert [o.param_groups[0]["lr"] for o in optimizers.values()] == [0.1, 0.7]
    assert [o.param_groups[0]["weight_decay"] for o in optimizers.values()] == [0.2, 0.2]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"learning_rate": 0.1}, "learning_rate.*optimizer has only .*lr"),
        ({"params": []}, "params"),
        ({"other": {"lr": 0.1}}, "other.*no optimizer of that name is registered, only optimizer"),
        ({"lr": "fast"}, "overrides.lr"),
    ],
    ids=str,
)
def test_what_names_no_setting_is_refused_at_entry(cache, overrides, named):
    with pytest.raises(InvalidValue, match=named):
        train(cache, 1, overrides=overrides)
    assert cache.checkpoints() == []
    with pytest.raises(InvalidValue, match="no optimizer is registered"):
        TrainingSession(cache, model=nn.Linear(1, 1), overrides={"lr": 0.1}).__enter__()


def test_lowering_reaches_rates_schedules_and_overrides():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    scheduler = lr_scheduler.StepLR(optimizer, 10)
    scale_learning_rate({"o": optimizer, "s": scheduler}, 0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.04)
    assert scheduler.base_lrs == pytest.approx([0.04])
    assert lowered({"lr": 1.0, "o": {"lr": 2.0, "momentum": 0.9}}, 0.5) == {
        "lr": 0.5,
        "o": {"lr": 1.0, "momentum": 0.9},
    }


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=20),
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.04, 0.4, step_size_up=4),
    ],
    ids=["one cycle", "cyclic"],
)
def test_lowering_lasts_where_a_schedule_has_a_highest_rate(schedule):
    def rates(factor):
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.4, momentum=0.9)
        scheduler = schedule(optimizer)
        scale_learning_rate({"o": optimizer, "s": scheduler}, factor)
        for _ in range(15):
            optimizer.step()
            scheduler.step()
            yield optimizer.param_groups[0]["lr"]

    assert list(rates(0.1)) == pytest.approx([rate * 0.1 for rate in rates(1.0)])


# --- schedulers that don't fit -------------------------------------------------------------------


def test_a_scheduler_of_an_optimizer_that_is_not_registered_is_refused(cache):
    model = nn.Linear(1, 1)
    registered, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    session = TrainingSession(cache, model=model, optimizer=registered, scheduler=lr_scheduler.StepLR(other, 1))
    with pytest.raises(
        InvalidValue, match=r"scheduler cannot be 'StepLR': it drives an optimizer that isn't registered"
    ):
        session.__enter__()


@pytest.mark.parametrize(
    ("other", "groups", "why"),
    [
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 5), 1, "CosineAnnealingLR, whose (T_max|eta_min) was not saved"),
        (lambda o: lr_scheduler.StepLR(o, 3), 2, "saved for 1 parameter groups, and its optimizer has 2"),
    ],
    ids=["another kind", "another count"],
)
def test_a_scheduler_that_differs_from_the_saved_one_is_not_filled_with_its_state(cache, other, groups, why):
    train(cache, 2, schedule=lambda optimizer: lr_scheduler.StepLR(optimizer, 3))
    layers = [nn.Linear(1, 1) for _ in range(groups)]
    optimizer = torch.optim.SGD([{"params": list(layer.parameters())} for layer in layers], lr=0.3)
    scheduler = other(optimizer)
    before = scheduler.state_dict()
    with pytest.raises(NotRestorable, match=why):
        cache.restore({"scheduler": scheduler}, resume=cache.get("latest").id)
    assert scheduler.state_dict() == before

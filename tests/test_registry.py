"""What a session is given to save: anything with a state, by its name; and what can't be, said at once."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptcache.errors import DuplicateName, InvalidValue, NotSavable
from ckptcache.session import TrainingSession
from tests.jobs import Job, cache_at, differences


@pytest.fixture
def cache(tmp_path):
    return cache_at(tmp_path / "cache")


class EarlyStopping:
    """Of the kind that people write: counts evaluations without progress."""

    def __init__(self, patience=3):
        self.patience, self.best, self.bad = patience, float("inf"), 0

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


class OnlySaves:
    def state_dict(self):
        return {"mood": 1}


def test_several_models_and_optimizers_an_average_and_whatever_has_a_state_come_back(cache):
    def made(seed):
        torch.manual_seed(seed)
        generator, critic = nn.Linear(4, 4), nn.Linear(4, 1)
        return {
            "generator": generator,
            "critic": critic,
            "generator_optimizer": torch.optim.AdamW(generator.parameters(), lr=1e-3),
            "critic_optimizer": torch.optim.SGD(critic.parameters(), lr=1e-2, momentum=0.9),
            "average": torch.optim.swa_utils.AveragedModel(generator),
            "stopping": EarlyStopping(),
        }

    first = made(1)
    with TrainingSession(cache, **first) as session:
        for _ in session.steps(3):
            loss = first["critic"](first["generator"](torch.ones(2, 4))).square().mean()
            loss.backward()
            first["generator_optimizer"].step()
            first["critic_optimizer"].step()
            first["average"].update_parameters(first["generator"])
            first["stopping"].bad += 1
    second = made(2)
    with TrainingSession(cache, **second) as session:
        states = [{name: value.state_dict() for name, value in objects.items()} for objects in (first, second)]
        assert not list(differences(*states))
        assert session.report.restored == (*first, "rng")
        assert second["critic_optimizer"].param_groups[0]["lr"] == 1e-2


def test_after_a_resume_it_is_said_what_was_restored_what_was_not_and_what_is_fresh(cache, caplog):
    Job().run(cache, 2, stopping=EarlyStopping(), old=EarlyStopping())
    with caplog.at_level(logging.INFO):
        session = Job().run(cache, 2, stopping=EarlyStopping(), new=EarlyStopping())
    assert "restored: model, optimizer, scheduler, loader, stopping, rng" in caplog.messages
    assert "in the checkpoint, and not asked for: old" in caplog.messages
    assert "not in the checkpoint, and so fresh: new" in caplog.messages
    assert session.report.fresh == ("new",)
    assert session.report.unused == ("old",)


def test_a_loader_without_a_state_is_taken_and_its_position_is_said_to_be_approximate(cache):
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=2)
    job = Job()
    objects = {**job.objects(), "loader": loader}
    with TrainingSession(cache, **objects) as session:
        assert not any("approximate" in line for line in session.messages), "nothing was resumed"
        for step in session.steps(2):
            job.train_step(step)
    assert "loader" not in cache.get("latest").contents
    with TrainingSession(cache, **objects) as session:
        [line] = [line for line in session.messages if "approximate" in line]
    assert "DataLoader has no state_dict" in line
    assert "begins anew" in line


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (OnlySaves(), "give its class load_state_dict"),
        (lambda: None, "function"),
        (open, "builtin"),
        (object(), "object"),
        (nn.Linear, "type"),
        ({"deep": [object()]}, r"thing\.deep\[0\]"),
        ({1, 2}, "changed in place"),
    ],
    ids=["no load_state_dict", "function", "builtin", "object", "class", "deep", "set"],
)
def test_what_could_not_be_restored_is_refused_at_entry_and_when_registered(cache, value, named):
    with pytest.raises((InvalidValue, NotSavable), match=f"thing.*({named})|{named}"):
        TrainingSession(cache, model=nn.Linear(1, 1), thing=value).__enter__()
    with TrainingSession(cache, model=nn.Linear(1, 1)) as session:
        with pytest.raises((InvalidValue, NotSavable), match="thing"):
            session.register("thing", value)
        session.register("thing", {"n": 1})


def test_a_name_can_be_given_once(cache):
    with TrainingSession(cache, model=nn.Linear(1, 1)) as session:
        with pytest.raises(DuplicateName, match="model"):
            session.register("model", nn.Linear(1, 1))
        session.register("other", nn.Linear(1, 1))
        with pytest.raises(DuplicateName, match="other"):
            session.register("other", 3)


def test_a_compiled_or_wrapped_model_takes_what_a_plain_one_saved_and_back(cache):
    def run(wrap, end):
        torch.manual_seed(end)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with TrainingSession(cache, model=wrap(model), optimizer=optimizer) as session:
            at_start = [p.detach().clone() for p in model.parameters()]
            for _ in session.steps(end):
                optimizer.zero_grad()
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
        return session, at_start, [p.detach().clone() for p in model.parameters()]

    _, _, ended = run(lambda model: model, 2)
    for end, wrap in enumerate((lambda m: torch.compile(m, backend="eager"), nn.DataParallel, lambda m: m), start=3):
        session, started, later = run(wrap, end)
        assert session.start_iteration == end - 1
        assert all(map(torch.equal, started, ended))
        ended = later


def test_a_model_of_another_dtype_does_not_fit_and_it_is_said_why(cache):
    Job().run(cache, 1)
    job = Job()
    job.model.double()
    session = job.run(cache, 1)
    assert session.start_iteration == 0
    assert any("saved float32" in line and "needed float64" in line for line in session.messages)


@pytest.mark.parametrize(
    ("written", "value", "meant"),
    [
        ("resum", "latest", "resume"),
        ("warm_starts", True, "warm_start"),
        ("maxseconds", 60, "max_seconds"),
        ("override", {"lr": 0.1}, "overrides"),
    ],
)
def test_a_misspelt_option_is_not_taken_for_a_value(cache, written, value, meant):
    with pytest.raises(InvalidValue, match=f"{written} cannot be .*there is no such option, but there is {meant};"):
        TrainingSession(cache, model=nn.Linear(2, 2), **{written: value})
    assert not cache.cache_dir.exists()


def test_values_and_objects_of_names_near_an_options_are_taken(cache):
    with TrainingSession(cache, model=nn.Linear(2, 2), scale=2.0, speed=1.0, summary={"n": 1}) as session:
        assert session.register("max_second", 3) == 3
        assert session.values == {"scale": 2.0, "speed": 1.0, "max_second": 3}


def test_a_folder_in_place_of_a_cache_is_refused_in_words(tmp_path):
    with pytest.raises(InvalidValue, match=r"it must be a TrainingCache: write TrainingCache\(FOLDER\)"):
        TrainingSession(str(tmp_path), model=nn.Linear(2, 2))


def forgotten(session):
    return [line for line in session.messages if "of nothing that is registered" in line]


def test_a_model_that_was_forgotten_is_missed_by_its_optimizer(cache):
    generator, critic = nn.Linear(2, 2), nn.Linear(2, 1)
    parts = {
        "generator": generator,
        "generator_optimizer": torch.optim.SGD(generator.parameters(), lr=0.1),
        "critic_optimizer": torch.optim.SGD(critic.parameters(), lr=0.1),
    }
    for _ in range(2):
        with TrainingSession(cache, **parts, resume="latest") as session:
            assert [line.split(":")[0] for line in forgotten(session)] == [
                "critic_optimizer changes 2 tensors of nothing that is registered so far"
            ]
            for _ in session.steps(session_iters=1):
                pass


@pytest.mark.parametrize("holder", ["model", "wrapped", "compiled", "tensors", "nested", "state of its own"])
def test_an_optimizer_of_what_is_registered_misses_nothing(cache, holder):
    class Whole(EarlyStopping):
        """May hold anything."""

    model = nn.Linear(2, 1)
    held = {
        "model": lambda: model,
        "wrapped": lambda: nn.Sequential(model),
        "compiled": lambda: torch.compile(model, backend="eager"),
        "tensors": lambda: dict(model.named_parameters()),
        "nested": lambda: {"deep": [model.weight, model.bias]},
        "state of its own": Whole,
    }[holder]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TrainingSession(cache, held=held, optimizer=optimizer, loader=iter([])) as session:
        assert not forgotten(session)

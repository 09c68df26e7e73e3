import logging
import math
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from torch import nn

from ckptcache import TrainingCache
from ckptcache.errors import (
    CheckpointDamaged,
    CheckpointMissing,
    CheckpointNotFound,
    Incompatible,
    InvalidName,
    InvalidValue,
    NotRestorable,
    SaveFailed,
)
from ckptcache.metadata import SessionRecord
from ckptcache.state.rng import capture_rng
from tests.caches import CONFIG, Training, file_of, flip, frozen, ids, listing, same, save, tiny


@pytest.fixture
def cache(tmp_path: Path) -> TrainingCache:
    return TrainingCache(tmp_path / "cache", max_checkpoints=9)


def chosen(cache: TrainingCache, resume: str) -> float | None:
    """The value that a restore under a policy puts into a tiny state; None for a fresh start."""
    target = tiny(77.0)
    restored = cache.restore(target, resume=resume)
    if restored is None:
        assert target["w"].tolist() == [77.0] * 4
        return None
    assert restored.report.restored == ("w",)
    return float(target["w"][0])


# --- policies ------------------------------------------------------------------------------------


def test_best_latest_never_and_what_is_named(cache):
    records = {loss: save(cache, loss, iteration=i) for i, loss in enumerate([3.0, 1.0, 2.0])}
    cache.name(records[3.0].id, "slot-1")
    assert chosen(cache, "best") == 1.0
    assert chosen(cache, "latest") == 2.0
    assert chosen(cache, "auto") == 1.0
    assert chosen(cache, "never") is None
    assert chosen(cache, records[3.0].id) == 3.0
    assert chosen(cache, "slot-1") == 3.0
    assert chosen(cache, records[1.0].id[:29]) == 1.0  # as far as the iteration, which no other has


def test_an_empty_cache_is_a_fresh_start_under_every_policy(cache):
    for policy in ("best", "latest", "auto", "never"):
        assert chosen(cache, policy) is None
    with pytest.raises(CheckpointNotFound):
        chosen(cache, "slot-1")


def sessions(cache: TrainingCache, *stop_reasons: str | None) -> None:
    """One session per stop reason, each with a good checkpoint and then a worse one."""
    for number, reason in enumerate(stop_reasons):
        session = cache.record_session(SessionRecord(id=f"sess_{number}"))
        save(cache, 10.0 * number + 1, iteration=10 * number, session=session)
        save(cache, 10.0 * number + 2, iteration=10 * number + 1, session=session)
        cache.record_session(session.changed(stop_reason=reason))


@pytest.mark.parametrize("reason", [None, "signal", "error", "max_seconds"])
def test_auto_goes_on_from_the_latest_of_an_interrupted_session(cache, reason):
    sessions(cache, "finished", reason)
    assert chosen(cache, "auto") == 12.0
    assert chosen(cache, "best") == 1.0
    assert any("sess_1 was cut short" in note for note in cache.restore(tiny(), resume="auto").notes)


@pytest.mark.parametrize("reason", ["finished", "diverged", "nothing_to_do"])
def test_auto_takes_the_best_where_nothing_was_interrupted(cache, reason):
    sessions(cache, None, reason)
    assert chosen(cache, "auto") == 1.0


def test_auto_leaves_a_session_alone_that_still_lives(cache):
    sessions(cache, "finished", None)
    cache.ledger.hold("sess_1")
    assert chosen(cache, "auto") == 1.0
    cache.close()
    assert chosen(cache, "auto") == 12.0


def leave_a_lease_of_elsewhere(cache: TrainingCache, session: str) -> None:
    lease = {"host": "elsewhere", "boot_id": "another", "pid": 1}
    (cache.cache_dir / "sessions" / f"{session}.lock").write_bytes(orjson.dumps(lease))


def test_auto_goes_on_with_a_session_of_another_machine_and_says_what_it_took_it_for(cache):
    sessions(cache, "finished", None)
    leave_a_lease_of_elsewhere(cache, "sess_1")
    (note,) = cache.restore(tiny(), resume="auto").notes
    assert "sess_1 ran on another machine" in note
    assert chosen(cache, "auto") == 12.0


def test_of_the_sessions_of_other_machines_only_the_newest_is_protected_as_running(cache):
    sessions(cache, None, None, None)
    for number in (0, 1):
        leave_a_lease_of_elsewhere(cache, f"sess_{number}")
    keeps = TrainingCache(cache.cache_dir, max_checkpoints=1, keep_latest=1).prune(dry_run=True).kept
    of = {r.id: r.session for r in cache.checkpoints()}
    assert {of[id] for id, reason in keeps.items() if "live" in reason} == {"sess_1"}


def test_auto_falls_back_to_the_best_when_the_interrupted_sessions_own_are_damaged(cache):
    sessions(cache, "finished", None)
    for record in cache.checkpoints():
        if record.session == "sess_1":
            flip(file_of(cache, record))
    assert chosen(cache, "auto") == 1.0
    assert cache.stats().quarantined == 2


def test_what_best_passes_by_is_said_with_the_way_to_it(cache):
    best, latest = save(cache, 1.0, iteration=5), save(cache, 2.0, iteration=9)
    notes = cache.restore(tiny()).notes
    assert len(notes) == 1
    assert best.id in notes[0]
    assert f"{latest.id} (iteration 9)" in notes[0]
    assert "resume=latest" in notes[0]
    assert cache.restore(tiny(), resume="latest").notes == ()


def test_one_that_does_not_fit_is_refused_by_name_and_passed_over_otherwise(cache):
    wide = save(cache, 0.1, state=tiny(0.1, size=9))
    fits = save(cache, 1.0)
    assert chosen(cache, "best") == 1.0
    with pytest.raises(Incompatible, match=r"float32\[9\], needed float32\[4\]"):
        chosen(cache, wide.id)
    assert chosen(cache, fits.id) == 1.0


def test_other_data_is_not_resumed_from_and_other_validation_bytes_come_after_the_comparable(cache):
    data = {"kind": "text", "val_digest": "a", "batch_size": 4}
    save(cache, 1.0, data_config=data)
    save(cache, 0.5, data_config={**data, "val_digest": "b"})
    save(cache, 0.1, data_config={**data, "kind": "images"})
    target = tiny()
    cache.restore(target, data_config={**data, "batch_size": 8})
    assert target["w"][0] == 1.0
    cache.restore(target, data_config={**data, "val_digest": "c"})
    assert target["w"][0] == 0.5, "the one used last, of those that can be resumed and not compared"
    assert cache.restore(target, data_config={"kind": "audio"}) is None


def test_a_part_that_is_not_asked_for_is_handed_out_and_one_that_is_not_there_stays(cache):
    model = nn.Linear(2, 2)
    cache.save({"model": model, "step": 7, "seen": np.arange(3)}, iteration=1, val_loss=1.0)
    extra = {"a": 1}
    restored = cache.restore({"model": nn.Linear(2, 2), "bag": extra})
    assert restored.state["step"] == 7
    assert restored.state["seen"].tolist() == [0, 1, 2]
    assert restored.report.fresh == ("bag",)
    assert restored.report.unused == ("step", "seen")
    assert extra == {"a": 1}


# --- past what is broken -------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_garbage(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("spoil", [flip, truncate, empty, replace_by_garbage])
@pytest.mark.parametrize("policy", ["best", "latest", "auto"])
def test_a_spoilt_best_goes_to_quarantine_and_the_next_best_is_taken_loudly(cache, caplog, spoil, policy):
    best, second = save(cache, 1.0), save(cache, 2.0)
    if policy == "latest":
        best, second = second, best
    spoil(file_of(cache, best))
    with caplog.at_level(logging.WARNING, "ckptcache"):
        target = tiny()
        restored = cache.restore(target, resume=policy)
    assert restored.record.id == second.id
    assert target["w"][0] == second.val_loss
    assert any(best.id in note for note in restored.notes)
    assert f"{best.id} failed verification and goes to quarantine" in caplog.text
    found = cache.get(best.id)
    assert found.decision == "quarantined"
    assert found.decision_reason
    kept = cache.cache_dir / "quarantine" / f"{best.id}.pt"
    assert kept.exists()
    assert found.decision_reason in kept.with_name(f"{kept.name}.reason.txt").read_text()
    assert cache.doctor() == []
    assert chosen(cache, policy) == second.val_loss
    with pytest.raises(CheckpointMissing, match=r"content|bytes|empty"):
        chosen(cache, best.id)


def test_a_best_whose_file_is_gone_is_passed_over_loudly_and_its_record_stays(cache, caplog):
    best, second = save(cache, 1.0), save(cache, 2.0)
    file_of(cache, best).unlink()
    with caplog.at_level(logging.WARNING, "ckptcache"):
        restored = cache.restore(tiny())
    assert restored.record.id == second.id
    assert f"{best.id} would have come first" in caplog.text
    assert any(best.id in note for note in restored.notes)
    assert cache.get(best.id).decision is None
    with pytest.raises(CheckpointMissing, match="gone"):
        chosen(cache, best.id)
    with pytest.raises(CheckpointMissing, match="gone"):
        cache.load(best.id)


def test_one_that_is_gone_and_would_not_have_come_first_is_not_mentioned(cache, caplog):
    worse, best = save(cache, 2.0), save(cache, 1.0)
    file_of(cache, worse).unlink()
    with caplog.at_level(logging.WARNING, "ckptcache"):
        assert cache.restore(tiny()).record.id == best.id
    assert caplog.text == ""


def test_when_all_are_spoilt_it_is_a_fresh_start_and_nothing_is_lost(cache):
    records = [save(cache, loss) for loss in (1.0, 2.0)]
    for record in records:
        flip(file_of(cache, record))
    assert chosen(cache, "best") is None
    assert {r.id for r in cache.checkpoints(everything=True)} == set(ids(records))
    assert len(list((cache.cache_dir / "quarantine").glob("*.pt"))) == 2


def test_one_that_is_named_and_spoilt_is_an_error_and_changes_no_object(cache):
    record = save(cache, 1.0)
    flip(file_of(cache, record))
    with pytest.raises(CheckpointDamaged, match="digest"):
        chosen(cache, record.id)
    assert cache.stats().quarantined == 1


@pytest.mark.parametrize("position", range(0, 1200, 37))
def test_no_flipped_bit_is_ever_loaded(tmp_path, position):
    cache = TrainingCache(tmp_path / "c")
    record = save(cache, 1.0)
    flip(file_of(cache, record), position)
    with pytest.raises(CheckpointDamaged):
        cache.load(record.id)


def test_a_candidate_that_another_process_evicts_meanwhile_makes_way_for_the_one_that_took_its_place(
    cache, monkeypatch
):
    old = save(cache, 2.0)
    choose = TrainingCache.choose
    raced = []

    def race(self, needed, policy):
        choice = choose(self, needed, policy)
        if not raced:
            raced.append(True)
            other = TrainingCache(self.cache_dir, max_checkpoints=1, keep_latest=0)
            save(other, 1.0)
        return choice

    monkeypatch.setattr(TrainingCache, "choose", race)
    assert chosen(cache, "best") == 1.0
    assert cache.get(old.id).decision == "evicted"


# --- all or nothing ------------------------------------------------------------------------------


class Refuses:
    """Takes its state, and then says no; as long as it is told to."""

    def __init__(self) -> None:
        self.state, self.no = {"a": 1}, False

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = dict(state)
        if self.no:
            self.no = False
            raise KeyError("no")


def test_a_restore_that_fails_in_one_object_leaves_all_as_they_were(cache):
    class Small(nn.Module):
        """Its state dict looks as it was saved; loading it fails half way."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def _load_from_state_dict(self, *given):
            raise RuntimeError("size mismatch, as it were")

    saved = Training(seed=1)
    others = {"z": Small(), "rng": capture_rng(), "bag": {"n": 1, "t": torch.zeros(2)}, "generator": torch.Generator()}
    others["nested"] = {"inner": {"opt": torch.optim.SGD(others["z"].parameters(), lr=0.1)}, "list": [torch.zeros(2)]}
    record = cache.save({**saved.objects, **others}, iteration=1)
    training, bag = Training(seed=2), {"n": 5, "list": [1], "t": torch.ones(2)}
    small = Small()
    generator = torch.Generator().manual_seed(9)
    nested = {"inner": {"opt": torch.optim.SGD(small.parameters(), lr=0.3)}, "list": [torch.ones(2)]}
    objects = {**training.objects, "bag": bag, "z": small, "generator": generator, "nested": nested}
    before = frozen(training.state), frozen(dict(small.state_dict())), frozen(bag), generator.get_state()
    identities = [id(bag["list"]), id(bag["t"]), id(nested["inner"]["opt"])]
    global_rng, rate = torch.get_rng_state(), nested["inner"]["opt"].param_groups[0]
    with pytest.raises(NotRestorable, match="'z' could not be restored") as caught:
        cache.restore(objects, resume=record.id)
    assert record.id in str(caught.value)
    assert same(before, (training.state, dict(small.state_dict()), bag, generator.get_state()))
    assert torch.equal(torch.get_rng_state(), global_rng)
    assert nested["inner"]["opt"].param_groups[0]["lr"] == rate["lr"] == 0.3
    assert nested["list"][0].tolist() == [1.0, 1.0]
    assert identities == [id(bag["list"]), id(bag["t"]), id(nested["inner"]["opt"])]
    assert cache.restore(objects) is None, "passed over, since it was not asked for by name"
    assert same(before, (training.state, dict(small.state_dict()), bag, generator.get_state()))


def test_a_shape_that_does_not_fit_in_a_plain_tree_leaves_all_as_they_were(cache):
    save(cache, 1.0, state={"model": nn.Linear(2, 2), "tree": {"a": torch.ones(2), "b": np.ones(3), "c": 1}})
    record = cache.get("latest")
    for tree in (
        {"a": torch.zeros(2), "b": np.zeros(4), "c": 0},
        {"a": torch.zeros(3), "b": np.zeros(3), "c": 0},
        {"a": torch.zeros(2, dtype=torch.float64), "b": np.zeros(3), "c": 0},
        {"a": torch.zeros(2), "b": np.zeros(3, dtype=np.int64), "c": 0},
        {"a": torch.zeros(2), "b": np.zeros(3), "c": [0]},
    ):
        model = nn.Linear(2, 2)
        before = frozen(dict(model.state_dict())), frozen(tree)
        with pytest.raises(NotRestorable):
            cache.restore({"model": model, "tree": tree}, resume=record.id)
        assert same(before[0], dict(model.state_dict()))
        assert same({k: v for k, v in before[1].items() if k != "b"}, {k: v for k, v in tree.items() if k != "b"})
        assert not tree["b"].any()


def test_objects_in_lists_and_mappings_are_restored_in_place_and_put_back_after_a_failure(cache):
    def tree():
        return {"pair": [nn.Linear(2, 2), {"rng": torch.Generator()}], "both": (Refuses(), Refuses()), "note": ["a"]}

    saved = tree()
    saved["pair"][1]["rng"].manual_seed(4)
    saved["both"][1].state = {"a": 2}
    record = cache.save({"tree": saved}, iteration=1, val_loss=1.0)
    target = tree()
    linear, generator = target["pair"][0], target["pair"][1]["rng"]
    target["both"][1].no, target["note"] = True, ["b", "c"]
    before = frozen(dict(linear.state_dict())), generator.get_state()
    with pytest.raises(NotRestorable, match="no"):
        cache.restore({"tree": target}, resume=record.id)
    assert same(before, (dict(linear.state_dict()), generator.get_state()))
    assert [r.state for r in target["both"]] == [{"a": 1}, {"a": 1}]
    assert target["note"] == ["b", "c"]
    cache.restore({"tree": target}, resume=record.id)
    assert target["pair"][0] is linear
    assert torch.equal(linear.weight, saved["pair"][0].weight)
    assert torch.equal(generator.get_state(), saved["pair"][1]["rng"].get_state())
    assert [r.state for r in target["both"]] == [{"a": 1}, {"a": 2}]
    assert target["note"] == ["a"]


def test_an_immutable_value_cannot_be_filled_and_says_so(cache):
    record = save(cache, 1.0, state={"w": torch.ones(2), "step": 5})
    with pytest.raises(InvalidValue, match=r"^step cannot be 0: .*keep it in a dict"):
        cache.restore({"w": torch.zeros(2), "step": 0}, resume=record.id)


def test_an_optimizer_of_another_kind_is_refused_and_named(cache):
    training = Training()
    record = cache.save(training.objects, iteration=1, val_loss=1.0)
    other = {"model": Training().model}
    other["optimizer"] = torch.optim.SGD(other["model"].parameters(), lr=0.1)
    with pytest.raises(Incompatible, match="optimizer"):
        cache.restore(other, resume=record.id)
    assert cache.restore(other) is None
    assert cache.restore({"model": Training().model}) is not None


# --- in a folder that others change --------------------------------------------------------------


def test_restoring_changes_nothing_on_the_disk(cache):
    save(cache, 1.0)
    save(cache, 2.0)
    before = listing(cache.cache_dir)
    for policy in ("best", "latest", "auto", "never"):
        chosen(cache, policy)
    cache.explain(tiny(), model_config=CONFIG)
    assert listing(cache.cache_dir) == before


def test_a_diverged_one_is_not_even_taken_as_the_latest(cache):
    save(cache, 1.0)
    bad = save(cache, math.nan)
    assert chosen(cache, "latest") == 1.0
    assert chosen(cache, bad.id) is not None, "by its id it is anybody's to look at"


def test_what_a_failed_save_left_behind_is_never_resumed_from(cache, monkeypatch):
    save(cache, 2.0)

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr("ckptcache.storage.index.IndexFile.commit", broken)
    with pytest.raises(SaveFailed):
        save(cache, 1.0)
    monkeypatch.undo()
    assert chosen(cache, "best") == 2.0
    assert cache.doctor() == []


def test_words_and_names_come_before_the_ids_of_files_that_were_taken_up(tmp_path):
    cache = TrainingCache(tmp_path / "c")
    own = cache.save({"w": torch.ones(2)}, iteration=1, val_loss=0.5)
    cache.name(own.id, "slot-1")
    for stem in ("best", "slot-1"):
        torch.save({"w": torch.zeros(2)}, tmp_path / "c" / "checkpoints" / f"{stem}.pt")
    cache.doctor(repair=True)
    assert cache.get("best").id == cache.get("slot-1").id == own.id
    with pytest.raises(InvalidName, match="has that id"):
        cache.name(own.id, "slot-1")

import importlib
import logging
import math
from collections import deque
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ckptcache import CacheConfig, TrainingCache
from ckptcache.errors import (
    AmbiguousId,
    CacheDirIsFile,
    CacheDirNotReadable,
    CacheDirNotWritable,
    CheckpointNotFound,
    CkptCacheError,
    ConfigError,
    IndexDamaged,
    IndexTooNew,
    InvalidId,
    InvalidName,
    InvalidValue,
    NotSavable,
)
from ckptcache.ledger import FULL_CURVES, SHORT_CURVE
from ckptcache.metadata import SessionRecord
from ckptcache.storage import reconcile
from ckptcache.values import MAX_CONFIG_DEPTH, MAX_JSON_DEPTH
from tests.caches import CONFIG, Training, as_nobody, file_of, ids, kinds, let_in, listing, save, tiny

NAN, INF = math.nan, math.inf


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.fixture
def cache(tmp_path: Path) -> TrainingCache:
    return TrainingCache(tmp_path / "cache", max_checkpoints=5)


# --- ranking -------------------------------------------------------------------------------------


def test_checkpoints_are_listed_best_first_and_the_best_is_the_lowest_loss(cache):
    records = [save(cache, loss, iteration=i) for i, loss in enumerate([3.0, 1.0, 2.0])]
    assert [r.val_loss for r in cache.checkpoints()] == [1.0, 2.0, 3.0]
    assert cache.best().id == records[1].id == cache.get("best").id
    assert cache.get("latest").id == records[2].id
    assert [r.sequence for r in records] == [1, 2, 3]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([NAN, 2.0, None], 2.0),
        ([INF, None, 2.0, -INF], 2.0),
        ([None, None], "latest"),
        ([None, NAN], None),
        ([NAN, INF, -INF], "none"),
        ([-5.0, 0.0], -5.0),
    ],
)
def test_a_diverged_loss_is_never_best_and_an_unknown_one_ranks_below_every_known(cache, losses, best):
    records = [save(cache, loss, iteration=i) for i, loss in enumerate(losses)]
    found = cache.best()
    if best == "none":
        assert found is None
        assert cache.restore(tiny(), resume="best") is None
        with pytest.raises(CheckpointNotFound):
            cache.get("best")
    elif best == "latest":
        assert found.id == records[-1].id
    else:
        assert found.val_loss == best
        sound = [x for x in losses if x is None or math.isfinite(x)]
        assert cache.restore(tiny(), resume="latest").record.val_loss == sound[-1]


def test_if_improved_saves_the_first_and_what_is_better_by_the_threshold(tmp_path):
    cache = TrainingCache(tmp_path / "c", min_improvement_threshold=0.1)
    kept = [cache.save(tiny(), iteration=i, val_loss=x, if_improved=True) for i, x in enumerate([2.0, 1.99, 1.0, 1.5])]
    assert [r is not None for r in kept] == [True, False, True, False]
    assert cache.save(tiny(), iteration=9, val_loss=NAN, if_improved=True) is None
    assert cache.save(tiny(size=5), iteration=9, val_loss=9.0, if_improved=True) is not None, "another model's first"
    assert len(cache.checkpoints()) == 3


def test_a_save_in_the_background_is_what_the_next_one_has_to_improve_on(cache):
    first = cache.save(tiny(), iteration=1, val_loss=1.0, if_improved=True, blocking=False)
    assert cache.save(tiny(), iteration=2, val_loss=1.0, if_improved=True, blocking=False) is None
    cache.close()
    assert ids(cache.checkpoints()) == [first.id]


def test_explain_says_of_each_checkpoint_why_it_would_or_would_not_be_resumed_from(cache):
    training = Training()
    good = save(cache, 1.0, state=training.objects, model_config=CONFIG)
    other = save(cache, 0.1, state=training.objects, model_config={**CONFIG, "n_head": 4})
    diverged = save(cache, NAN, state=training.objects, model_config=CONFIG)
    lost = save(cache, 0.5, state=training.objects, model_config=CONFIG)
    file_of(cache, lost).unlink()
    found = {e.record.id: e for e in cache.explain(training.objects, model_config=CONFIG)}
    assert [id for id, e in found.items() if e.eligible] == [good.id] == [id for id, e in found.items() if e.chosen]
    assert "n_head: saved 4, needed 2" in found[other.id].reason
    assert found[diverged.id].score.status == "diverged"
    assert "gone" in found[lost.id].reason
    assert found[good.id].score.parts["loss_score"] == 0.5
    assert found[good.id].to_json()["chosen"] is True


# --- what has gone wrong elsewhere ---------------------------------------------------------------


def test_pruning_by_size_keeps_the_best(tmp_path):
    cache = TrainingCache(tmp_path / "c", max_checkpoints=100, auto_cleanup=False, keep_latest=0)
    best = save(cache, 0.1, state=tiny(size=200_000))
    for loss in range(1, 6):
        save(cache, float(loss), iteration=loss, state=tiny(size=200_000 if loss % 2 else 100))
    TrainingCache(tmp_path / "c", max_cache_size_gb=0.001, keep_latest=0).prune()
    left = cache.checkpoints()
    assert left[0].id == best.id
    assert sum(r.size for r in left) <= 1_000_000


def test_a_token_count_among_the_metrics_does_not_decide_and_is_named(cache, caplog):
    worse = save(cache, 3.0, metrics={"accuracy": 0.1, "tokens": 5e9})
    better = save(cache, 1.0, metrics={"accuracy": 0.2, "tokens": 1e3})
    with caplog.at_level(logging.WARNING, "ckptcache"):
        assert ids(cache.checkpoints()) == [better.id, worse.id]
    assert "tokens" in caplog.text
    assert "accuracy" not in caplog.text


def test_a_model_without_critical_keys_is_told_from_another_by_its_tensors(cache):
    narrow, wide = Training(width=4), Training(width=6)
    saved = save(cache, 1.0, state=narrow.objects, model_config={"kind": "mlp"})
    assert cache.best(narrow.objects, model_config={"kind": "mlp"}).id == saved.id
    assert cache.best(wide.objects, model_config={"kind": "mlp"}) is None
    assert cache.restore(wide.objects, model_config={"kind": "mlp"}) is None


def test_a_cache_full_of_records_whose_files_are_gone_keeps_its_records(cache):
    saved = [save(cache, float(i), iteration=i, tags=[f"t{i}"]) for i in range(4)]
    for record in saved:
        file_of(cache, record).unlink()
    reopened = TrainingCache(cache.cache_dir, max_checkpoints=1)
    new = save(reopened, 0.5, iteration=9)
    reopened.prune()
    assert ids(reopened.checkpoints()) == [new.id]
    everything = {r.id: r for r in reopened.checkpoints(everything=True)}
    assert set(everything) == {*ids(saved), new.id}
    assert [everything[r.id].tags for r in saved] == [r.tags for r in saved]
    assert all(everything[r.id].decision is None for r in saved)


def test_a_file_that_comes_back_is_available_again(cache):
    record = save(cache, 1.0)
    data = file_of(cache, record).read_bytes()
    file_of(cache, record).unlink()
    assert cache.checkpoints() == []
    file_of(cache, record).write_bytes(data)
    assert ids(cache.checkpoints()) == [record.id]
    assert cache.doctor() == []


def test_equal_shapes_with_another_n_head_do_not_mix(cache):
    training = Training()
    two = save(cache, 1.0, state=training.objects, model_config=CONFIG)
    four = save(cache, 0.5, state=training.objects, model_config={**CONFIG, "n_head": 4})
    assert cache.restore(training.objects, model_config=CONFIG).record.id == two.id
    assert cache.restore(training.objects, model_config={**CONFIG, "n_head": 4}).record.id == four.id
    assert cache.restore(training.objects, model_config={**CONFIG, "n_head": 1}) is None
    assert cache.stats().groups == 2


# --- keeping -------------------------------------------------------------------------------------


def test_a_save_prunes_to_the_limit_and_says_what_went(cache):
    saved = [save(cache, float(10 - i), iteration=i) for i in range(7)]
    assert set(ids(cache.checkpoints())) == set(ids(saved[2:]))
    assert list(cache.last_evicted) == [saved[1].id]
    evicted = cache.get(saved[0].id)
    assert evicted.decision == "evicted"
    assert "max_checkpoints 5" in evicted.decision_reason
    assert not file_of(cache, evicted).exists()
    assert not file_of(cache, evicted).with_suffix(".json").exists()


def test_a_dry_run_says_exactly_what_prune_then_does_and_changes_nothing(tmp_path):
    cache = TrainingCache(tmp_path / "c", auto_cleanup=False)
    for i in range(8):
        save(cache, float(i % 3), iteration=i, state=tiny(size=4 + i % 2))
    cache.pin(cache.checkpoints()[-1].id)
    tight = TrainingCache(tmp_path / "c", max_checkpoints=3)
    before = listing(tmp_path)
    foreseen = tight.prune(dry_run=True)
    assert listing(tmp_path) == before
    assert tight.prune() == foreseen
    assert set(ids(cache.checkpoints())) == set(foreseen.kept)
    assert {r.id for r in cache.checkpoints(everything=True) if r.decision == "evicted"} == set(foreseen.evicted)
    assert tight.prune().evicted == {}
    assert all(foreseen.kept.values())
    assert cache.doctor() == []


def test_pins_and_names_protect_until_they_are_taken_off(tmp_path, caplog):
    cache = TrainingCache(tmp_path / "c", max_checkpoints=1, keep_latest=0)
    worst = save(cache, 9.0)
    cache.pin(worst.id)
    named = save(cache, 8.0)
    cache.name(named.id, "slot-1")
    best = save(cache, 1.0)
    with caplog.at_level(logging.WARNING, "ckptcache"):
        save(cache, 5.0)
    assert set(ids(cache.checkpoints())) == {worst.id, named.id, best.id}
    assert "all of them protected" in caplog.text
    cache.unpin(worst.id)
    assert cache.unname("slot-1") == named.id
    assert set(cache.prune().evicted) == {worst.id, named.id}
    assert ids(cache.checkpoints()) == [best.id]


def test_a_name_moves_and_protects_what_it_points_to_now(tmp_path):
    cache = TrainingCache(tmp_path / "c", max_checkpoints=2, keep_latest=0)
    first, second = save(cache, 3.0), save(cache, 2.0)
    cache.name(first.id, "slot")
    assert cache.names() == {"slot": first.id}
    cache.name("latest", "slot")
    assert cache.get("slot").id == second.id
    save(cache, 1.0)
    assert cache.get(first.id).decision == "evicted"
    assert TrainingCache(tmp_path / "c").names() == {"slot": second.id}


def test_tags_and_notes_are_kept(cache):
    record = save(cache, 1.0, tags=["a"], notes="first", extra={"by": "me"})
    cache.tag(record.id, "b", "a")
    cache.tag(record.id, "a", remove=True)
    cache.note(record.id, "second")
    found = TrainingCache(cache.cache_dir).get(record.id)
    assert (found.tags, found.notes, found.extra) == (("b",), "second", {"by": "me"})


def test_records_without_a_file_go_beyond_max_records_and_the_others_stay(tmp_path):
    cache = TrainingCache(tmp_path / "c", max_checkpoints=2, max_records=4)
    saved = [save(cache, float(10 - i), iteration=i) for i in range(8)]
    assert set(ids(cache.checkpoints(everything=True))) == set(ids(saved[-4:]))


def test_stats_count_what_is_there(tmp_path):
    cache = TrainingCache(tmp_path / "c", max_checkpoints=3)
    saved = [save(cache, float(10 - i), iteration=i) for i in range(5)]
    cache.pin(saved[-1].id)
    cache.name(saved[-2].id, "x")
    file_of(cache, saved[-2]).unlink()
    stats = cache.stats()
    assert (stats.checkpoints, stats.records, stats.evicted, stats.missing) == (2, 5, 2, 1)
    assert (stats.pinned, stats.named, stats.groups, stats.quarantined) == (1, 1, 1, 0)
    assert stats.bytes == sum(file_of(cache, r).stat().st_size for r in (saved[-1], saved[-3]))
    assert stats.to_json()["max_checkpoints"] == 3


def test_rerank_shows_what_would_move_under_other_weights_and_changes_nothing(tmp_path):
    cache = TrainingCache(tmp_path / "c")
    low_loss = save(cache, 1.0, metrics={"accuracy": 0.1})
    accurate = save(cache, 2.0, metrics={"accuracy": 0.9})
    before = listing(tmp_path)
    moves = {m.id: (m.place_before, m.place_after) for m in cache.rerank(quality_weight_loss=0.0)}
    assert listing(tmp_path) == before
    assert cache.best().id == accurate.id
    assert moves == {accurate.id: (1, 1), low_loss.id: (2, 2)}
    moves = {m.id: (m.place_before, m.place_after) for m in cache.rerank(quality_weight_metrics=0.0)}
    assert moves == {low_loss.id: (2, 1), accurate.id: (1, 2)}


def test_a_scorer_of_the_users_own_ranks(tmp_path):
    cache = TrainingCache(CacheConfig(cache_dir=tmp_path / "c", best_fn=lambda r: r.metrics.get("bleu")))
    low, high = save(cache, 1.0, metrics={"bleu": 10.0}), save(cache, 5.0, metrics={"bleu": 30.0})
    assert ids(cache.checkpoints()) == [high.id, low.id]


# --- bad input leaves everything as it was -------------------------------------------------------


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (deque([1]), "deque"),
        (Path("x"), "Path"),
        (frozenset([1]), "frozenset"),
        (Colour.RED, "Colour"),
        (lambda: 0, "function"),
        (np.array([1, None], dtype=object), "object"),
        (np.array(["a"]), "<U1"),
        (np.ma.masked_array([1, 2], [0, 1]), "masked"),
        (object(), "object"),
        (bytearray(b"x"), "bytearray"),
        (2**3000, "2040 bits"),
        (b"", "empty bytes"),
        ({Colour.RED: 1}, "Colour"),
        ({("a", Colour.RED): 1}, "Colour"),
        ({"__ndarray__": 1}, "__ndarray__"),
        (torch.empty(2, device="meta"), "meta"),
        (np.datetime64("2020-01-01"), "date"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_read_back_is_refused_by_its_key_and_nothing_is_written(tmp_path, value, word):
    cache = TrainingCache(tmp_path / "c")
    save(cache, 1.0)
    before = listing(tmp_path)
    for state, key in (({"part": {"a": [0, value]}}, "part.a[1]"), ({"part": value}, "part")):
        with pytest.raises(NotSavable) as caught:
            cache.save(state, iteration=2, val_loss=0.5)
        assert repr(key) in str(caught.value)
        assert word in str(caught.value)
    assert listing(tmp_path) == before


def test_a_state_dict_of_the_users_own_is_refused_by_the_key_inside_it(tmp_path):
    class Loader:
        def state_dict(self):
            return {"position": 3, "files": deque(["a"])}

        def load_state_dict(self, state):
            raise NotImplementedError

    with pytest.raises(NotSavable, match=r"'loader\.files'"):
        TrainingCache(tmp_path / "c").save({"loader": Loader()}, iteration=1)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    "given",
    [
        {"iteration": -1},
        {"iteration": 1.5},
        {"iteration": "many"},
        {"iteration": None},
        {"iteration": True},
        {"iteration": NAN},
        {"iteration": 2**60},
        {"val_loss": "low"},
        {"val_loss": torch.zeros(3)},
        {"metrics": {"accuracy": "high"}},
        {"learning_rate": "fast"},
        {"last_val_loss_iteration": 0.5},
        {"tags": "baseline"},
        {"tags": [1]},
        {"notes": 5},
        {"parents": [None]},
        {"save_reason": None},
        {"save_reason": "because"},
        {"notes": "\ud800"},
        {"tags": ["\ud800"]},
        {"extra": {"f": object()}},
        {"extra": {"n": 2**70}},
        {"model_config": "gpt2"},
        {"model_config": {"f": print}},
        {"data_config": [1]},
    ],
    ids=lambda given: "{}={}".format(*next((k, type(v).__name__) for k, v in given.items())),
)
def test_a_wrong_argument_is_named_and_nothing_is_written(tmp_path, given):
    cache = TrainingCache(tmp_path / "c")
    save(cache, 1.0)
    before = listing(tmp_path)
    with pytest.raises(InvalidValue) as caught:
        cache.save(tiny(), **{"iteration": 1, **given})
    name = next(iter(given))
    assert str(caught.value).startswith(name)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"extra": {"a": {"\ud800": 1}}}, "a key of extra.a"),
        ({"model_config": {"\ud800": 1}}, "a key of model_config"),
        ({"metrics": {"\ud800": 1.0}}, "a name in metrics"),
        ({"model_config": {"deep": deep(MAX_CONFIG_DEPTH)}}, f"nested more than {MAX_CONFIG_DEPTH} deep"),
        ({"parents": ["Not An Id"]}, "'Not An Id' is not a checkpoint id"),
        ({"save_reason": "because"}, "improved, interval, final, signal, manual, growth"),
    ],
    ids=["key of extra", "key of a configuration", "metric", "depth", "parent", "reason"],
)
def test_what_would_make_the_index_unreadable_is_refused(tmp_path, given, said):
    cache = TrainingCache(tmp_path / "c")
    with pytest.raises((InvalidValue, InvalidId), match=said):
        cache.save(tiny(), **{"iteration": 1, **given})
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    "session",
    [
        SessionRecord(id="My Run"),
        SessionRecord(id="s", parent="Not An Id"),
        SessionRecord(id="s", start_iteration=-1),
        SessionRecord(id="s", stop_reason=5),
        SessionRecord(id="s", environment={"deep": deep(MAX_JSON_DEPTH + 1)}),
    ],
    ids=["id", "parent", "count", "text", "depth"],
)
def test_a_session_that_could_not_be_read_again_is_refused_and_the_index_stays(tmp_path, session):
    cache = TrainingCache(tmp_path / "c")
    save(cache, 1.0)
    before = (tmp_path / "c" / "metadata.json").read_bytes()
    with pytest.raises((InvalidValue, InvalidId)):
        cache.record_session(session)
    assert (tmp_path / "c" / "metadata.json").read_bytes() == before
    assert len(TrainingCache(tmp_path / "c").checkpoints()) == 1


@pytest.mark.parametrize(
    "act",
    [
        lambda c, id: c.pin(id),
        lambda c, id: c.unpin(id),
        lambda c, id: c.tag(id, "x"),
        lambda c, id: c.note(id, "x"),
        lambda c, id: c.name(id, "x"),
        lambda c, id: c.load(id),
        lambda c, id: c.get(id),
        lambda c, id: c.export(id, "x.pt"),
        lambda c, id: c.restore({}, resume=id),
    ],
)
def test_an_unknown_id_and_an_ambiguous_prefix_are_refused_and_nothing_is_written(tmp_path, act):
    cache = TrainingCache(tmp_path / "c")
    with pytest.raises(CheckpointNotFound, match="nothing_like_it"):
        act(cache, "nothing_like_it")
    assert listing(tmp_path) == {}, "not even the folder"
    first, second = save(cache, 1.0), save(cache, 2.0)
    before = listing(tmp_path)
    with pytest.raises(CheckpointNotFound, match="nothing_like_it"):
        act(cache, "nothing_like_it")
    with pytest.raises(AmbiguousId, match="fits 2 checkpoints") as caught:
        act(cache, "ckpt_")
    assert first.id in str(caught.value)
    assert second.id in str(caught.value)
    with pytest.raises(CheckpointNotFound):
        act(cache, "")
    assert listing(tmp_path) == before


def test_a_unique_prefix_is_enough(cache):
    record = save(cache, 1.0)
    save(cache, 1.0, iteration=7)
    assert cache.get(record.id[:-1] if record.id[:-1] != cache.get("latest").id[:-1] else record.id).id == record.id


@pytest.mark.parametrize("name", ["best", "latest", "never", "auto", "ckpt_x", "", "a b", "../x", "-x", "x" * 65])
def test_a_name_that_would_mean_something_else_is_refused(cache, name):
    record = save(cache, 1.0)
    before = listing(cache.cache_dir)
    with pytest.raises(InvalidName):
        cache.name(record.id, name)
    with pytest.raises(CheckpointNotFound):
        cache.unname("no-such-name")
    assert listing(cache.cache_dir) == before


def test_tags_and_notes_that_are_not_text_are_refused(cache):
    record = save(cache, 1.0)
    before = listing(cache.cache_dir)
    with pytest.raises(InvalidValue):
        cache.tag(record.id, 5)
    with pytest.raises(InvalidValue):
        cache.note(record.id, None)
    assert listing(cache.cache_dir) == before


def test_a_file_where_the_folder_is_meant(tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(CacheDirIsFile, match=str(file)):
        TrainingCache(file)
    with pytest.raises(CacheDirIsFile, match=str(file)):
        save(TrainingCache(file / "below"), 1.0)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "checkpoints").write_text("precious")
    with pytest.raises(CacheDirIsFile):
        save(TrainingCache(tmp_path / "c"), 1.0)
    assert file.read_text() == (tmp_path / "c" / "checkpoints").read_text() == "precious"


def test_looking_at_a_folder_that_is_not_there_makes_none(tmp_path):
    cache = TrainingCache(tmp_path / "c")
    assert cache.checkpoints() == []
    assert cache.best() is None
    assert cache.doctor() == []
    assert cache.doctor(repair=True) == []
    assert cache.restore(tiny()) is None
    assert cache.stats().records == 0
    assert cache.prune(dry_run=True).evicted == {}
    assert listing(tmp_path) == {}


def test_settings_that_do_not_work_are_all_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        TrainingCache(tmp_path, max_checkpoints=0, max_cache_size_gb=-1)
    assert "max_checkpoints" in str(caught.value)
    assert "max_cache_size_gb" in str(caught.value)
    with pytest.raises(ConfigError, match="max_checkpoints"):
        TrainingCache(CacheConfig(), max_checkpoints=3)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"schema_version": 99, "checkpoints": {}}', IndexTooNew),
        ("{not json", IndexDamaged),
        ('{"schema_version": 2, "checkpoints": {"x": {"val_loss": NaN}}}', IndexDamaged),
        ("[]", IndexDamaged),
        ("", IndexDamaged),
    ],
)
def test_an_index_that_cannot_be_read_is_never_written_over(tmp_path, text, error):
    (tmp_path / "metadata.json").write_text(text)
    cache = TrainingCache(tmp_path)
    for act in (lambda: save(cache, 1.0), cache.checkpoints, cache.best, cache.prune, lambda: cache.restore(tiny())):
        with pytest.raises(error) as caught:
            act()
        assert "metadata.json" in str(caught.value)
    assert (tmp_path / "metadata.json").read_text() == text
    assert [name for name in listing(tmp_path) if name.endswith((".pt", ".tmp"))] == []


def expect(error: type[CkptCacheError], act) -> None:
    with pytest.raises(error) as caught:
        act()
    assert len(str(caught.value)) > 20


def test_an_unwritable_folder_is_looked_at_and_refused_for_writing(tmp_path, requires):
    requires("root")
    cache = TrainingCache(tmp_path / "c")
    record = save(cache, 1.0, state=tiny(3.0))
    cache.close()
    before = listing(tmp_path)

    def as_another() -> None:
        found = TrainingCache(tmp_path / "c")
        target = tiny(0.0)
        assert found.restore(target).record.id == record.id
        assert target["w"][0] == 3.0
        assert ids(found.checkpoints()) == [record.id]
        assert found.doctor() == []
        for act in (
            lambda: save(found, 0.5),
            lambda: found.save(tiny(), iteration=1, blocking=False),
            lambda: found.pin(record.id),
            lambda: found.name(record.id, "x"),
            found.prune,
            lambda: save(TrainingCache(tmp_path / "new"), 1.0),
        ):
            expect(CacheDirNotWritable, act)
        found.close()

    let_in(tmp_path)
    assert as_nobody(as_another) == 0
    assert listing(tmp_path) == before


def test_a_folder_that_cannot_be_read_is_said_so(tmp_path, requires):
    requires("root")
    cache = TrainingCache(tmp_path / "c")
    save(cache, 1.0)
    let_in(tmp_path)
    (tmp_path / "c" / "checkpoints").chmod(0)
    assert as_nobody(lambda: expect(CacheDirNotReadable, TrainingCache(tmp_path / "c").checkpoints)) == 0
    (tmp_path / "c" / "checkpoints").chmod(0o755)
    (tmp_path / "c").chmod(0)
    assert as_nobody(lambda: expect(CkptCacheError, lambda: TrainingCache(tmp_path / "c").checkpoints())) == 0
    (tmp_path / "c").chmod(0o755)
    assert kinds(cache) == []


def test_two_objects_on_one_folder_see_each_others_saves(tmp_path):
    one, two = TrainingCache(tmp_path / "c"), TrainingCache(tmp_path / "c")
    first, second = save(one, 2.0), save(two, 1.0)
    assert ids(one.checkpoints()) == ids(two.checkpoints()) == [second.id, first.id]
    one.pin(first.id)
    two.tag(first.id, "x")
    assert (one.get(first.id).pinned, one.get(first.id).tags) == (True, ("x",))


def test_two_saves_that_draw_the_same_id_are_two_checkpoints(tmp_path, monkeypatch):
    drawn = iter(["aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr("ckptcache.metadata.secrets.token_hex", lambda n: next(drawn) if n == 2 else "0" * 2 * n)
    monkeypatch.setattr("ckptcache.drafting.new_checkpoint_id", fixed_id)
    cache = TrainingCache(tmp_path / "c")
    first, second = save(cache, 1.0), save(cache, 2.0)
    assert first.id != second.id
    assert cache.load(first.id)["w"][0] == 1.0
    assert cache.load(second.id)["w"][0] == 2.0


def fixed_id(iteration: int, architecture: str) -> str:
    from ckptcache import metadata

    return f"ckpt_20250101_000000_{iteration:08d}_{architecture[:8]}_{metadata.secrets.token_hex(2)}"


def test_an_export_into_the_cache_folder_is_no_checkpoint(cache):
    record = save(cache, 1.0, state={"model": nn.Linear(2, 2)})
    cache.export(record.id, cache.cache_dir / "mine.pt")
    for i in range(8):
        save(cache, 2.0, iteration=i, state={"model": nn.Linear(2, 2)})
    assert cache.best({"model": nn.Linear(2, 2)}).id == record.id
    assert len(cache.checkpoints()) == 5
    assert (cache.cache_dir / "mine.pt").exists()
    assert cache.doctor(repair=True) == []


def test_the_curves_of_old_sessions_are_kept_short(tmp_path):
    cache = TrainingCache(tmp_path / "c")
    curve = {"loss": tuple((i, 1.0 / (i + 1)) for i in range(200))}
    for number in range(FULL_CURVES + 3):
        cache.record_session(SessionRecord(id=f"sess_{number:03d}", curves=curve))
    lengths = [len(session.curves["loss"]) for session in cache.sessions()]
    assert lengths == [SHORT_CURVE] * 3 + [200] * FULL_CURVES
    oldest = cache.sessions()[0].curves["loss"]
    assert (oldest[0], oldest[-1]) == (curve["loss"][0], curve["loss"][-1])


def test_a_look_that_a_save_has_overtaken_is_taken_again(tmp_path, monkeypatch):
    looking, observe = importlib.import_module("ckptcache.ledger"), reconcile.observe
    reader, writer = (TrainingCache(tmp_path / "c", max_checkpoints=1) for _ in range(2))
    writer.save({"model": torch.zeros(2)}, iteration=1, val_loss=2.0)

    def overtaken(index, layout):
        monkeypatch.setattr(looking, "observe", observe)
        writer.save({"model": torch.zeros(2)}, iteration=2, val_loss=1.0)
        return observe(index, layout)

    monkeypatch.setattr(looking, "observe", overtaken)
    (found,) = reader.checkpoints()
    assert found.iteration == 2
    writer.close()

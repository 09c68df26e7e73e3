import json
import math
from pathlib import Path

import orjson
import pytest
import torch

from ckptcache import TrainingCache
from ckptcache.adoption import learn
from ckptcache.metadata import SCHEMA_VERSION
from ckptcache.storage import ptfile
from ckptcache.storage.fs import TempFile
from tests.caches import CONFIG, Training, as_nobody, flip, ids, let_in, listing, same, save, tiny

OLD = {"oldest_0001": (100, 3.0), "oldest_0002": (200, 1.0), "oldest_0003": (300, 2.0)}
DATA = {"dataset": "text", "batch_size": 8}


def write_oldest(root: Path, *, beside: bool = False) -> dict[str, Training]:
    """A cache as the oldest layout kept it, made with nothing but torch and json; the trainings that it holds."""
    folder = root if beside else root / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    trainings, records = {}, {}
    for number, (id, (iteration, loss)) in enumerate(OLD.items()):
        training = trainings[id] = Training(seed=number, steps=number + 1)
        metrics, moment = {"perplexity": math.exp(loss), "accuracy": 0.5}, f"2024-01-0{number + 1}T12:00:00"
        torch.save(
            {
                "model_state_dict": training.model.state_dict(),
                "optimizer_state_dict": training.optimizer.state_dict(),
                "scheduler_state_dict": training.scheduler.state_dict() if number else None,
                "iteration": iteration,
                "epoch": number,
                "train_loss": loss + 0.1,
                "val_loss": loss,
                "metrics": metrics,
                "timestamp": moment,
                "checkpoint_id": id,
            },
            folder / f"{id}.pt",
        )
        records[id] = {
            "checkpoint_id": id,
            "created_at": moment,
            "iteration": iteration,
            "epoch": number,
            "train_loss": loss + 0.1,
            "val_loss": loss,
            "learning_rate": 0.001,
            "model_config": {**CONFIG, "dropout": 0.1},
            "training_config": {"lr": 0.001},
            "data_config": DATA,
            "metrics": metrics,
            "tags": ["old"],
            "parent_checkpoint": "oldest_0001" if number else None,
            "notes": f"note {number}",
            "file_size_mb": 0.5,
            "quality_score": 0.4,
        }
    with (root / "metadata.json").open("w") as file:
        json.dump(records, file)
    return trainings


@pytest.fixture(params=[False, True], ids=["in checkpoints", "beside the index"])
def oldest(request, tmp_path) -> tuple[Path, dict[str, Training]]:
    return tmp_path / "old", write_oldest(tmp_path / "old", beside=request.param)


def test_it_is_listed_and_ranked_and_looking_changes_nothing(oldest):
    root, _ = oldest
    before = listing(root)
    cache = TrainingCache(root)
    assert ids(cache.checkpoints()) == ["oldest_0002", "oldest_0003", "oldest_0001"]
    assert ids([cache.best(), cache.get("latest"), cache.get("oldest_0003")]) == [
        *("oldest_0002", "oldest_0003", "oldest_0003")
    ]
    assert cache.stats().checkpoints == 3
    assert {f.kind for f in cache.doctor()} == {"sidecar"}, "written by the next repair"
    assert listing(root) == before


def test_it_is_restored_from_with_model_and_optimizer(oldest):
    root, trainings = oldest
    other = Training(seed=9)
    restored = TrainingCache(root).restore(other.objects, model_config=CONFIG, data_config=DATA)
    assert restored.record.id == "oldest_0002"
    assert same(other.state, trainings["oldest_0002"].state)
    assert restored.state["timestamp"] == "2024-01-02T12:00:00"
    chosen = TrainingCache(root).restore(
        {"model": other.model, "optimizer": other.optimizer}, resume="oldest_0001", model_config=CONFIG
    )
    assert chosen.record.id == "oldest_0001"
    assert same(other.state["optimizer"], trainings["oldest_0001"].state["optimizer"])


def test_another_model_is_not_restored_from_it(oldest):
    root, _ = oldest
    wide = Training(width=6)
    cache = TrainingCache(root)
    assert cache.restore(wide.objects) is None
    assert cache.restore(Training().objects, model_config={**CONFIG, "n_head": 4}) is None
    assert all("does not fit" in e.reason or "fits only in part" in e.reason for e in cache.explain(wide.objects))


def test_it_is_pruned_and_taken_into_the_present_schema_with_nothing_lost(oldest):
    root, trainings = oldest
    cache = TrainingCache(root, max_checkpoints=3, keep_latest=1)
    new = cache.save(
        trainings["oldest_0002"].objects, iteration=400, val_loss=0.5, model_config=CONFIG, data_config=DATA
    )
    left = cache.checkpoints()
    assert ids(left)[0] == new.id
    assert "oldest_0001" not in ids(left)
    assert list(root.rglob("oldest_0001.pt")) == []
    document = orjson.loads((root / "metadata.json").read_bytes())
    assert document["schema_version"] == SCHEMA_VERSION
    assert set(document["checkpoints"]) == {*OLD, new.id}
    for number, (id, (iteration, loss)) in enumerate(OLD.items()):
        record = cache.get(id)
        assert (record.iteration, record.val_loss, record.epoch) == (iteration, loss, number)
        assert (record.train_loss, record.learning_rate) == (loss + 0.1, (0.001,))
        assert (record.tags, record.notes, record.created_at) == (
            ("old",),
            f"note {number}",
            f"2024-01-0{number + 1}T12:00:00",
        )
        assert record.metrics == {"perplexity": math.exp(loss), "accuracy": 0.5}
        assert record.parents == (("oldest_0001",) if number else ())
        assert record.extra["file_size_mb"] == 0.5
        assert cache.configs(record) == {
            "model_config": {**CONFIG, "dropout": 0.1},
            "training_config": {"lr": 0.001},
            "data_config": DATA,
        }
    assert [cache.get(id).sequence for id in (*OLD, new.id)] == [1, 2, 3, 4]
    cache.doctor(repair=True)
    assert cache.doctor() == []


def test_once_read_its_files_are_vouched_for_and_rot_is_found(oldest):
    root, _ = oldest
    cache = TrainingCache(root)
    cache.restore(Training().objects, model_config=CONFIG)
    assert all(r.digest and r.size and r.fingerprint for r in cache.checkpoints())
    flip(next(root.rglob("oldest_0002.pt")))
    assert cache.restore(Training().objects, model_config=CONFIG).record.id == "oldest_0003"
    assert cache.get("oldest_0002").decision == "quarantined"


def test_a_spoilt_file_of_it_is_passed_over(oldest):
    root, trainings = oldest
    path = next(root.rglob("oldest_0002.pt"))
    path.write_bytes(path.read_bytes()[:1000])
    other = Training(seed=9)
    cache = TrainingCache(root)
    assert cache.restore(other.objects, model_config=CONFIG).record.id == "oldest_0003"
    assert same(other.state, trainings["oldest_0003"].state)
    assert cache.get("oldest_0002").decision == "quarantined"
    assert (root / "quarantine" / "oldest_0002.pt").exists()


def test_it_is_resumed_from_where_nothing_can_be_written(oldest, requires):
    requires("root")
    root, trainings = oldest
    let_in(root.parent)
    # Trained before the fork: autograd's threads don't live on in a child.
    before, other = listing(root), Training(seed=9)

    def child() -> None:
        cache = TrainingCache(root)
        for _ in range(2):
            assert cache.restore(other.objects, model_config=CONFIG, data_config=DATA).record.id == "oldest_0002"
            assert same(other.state, trainings["oldest_0002"].state)
        assert ids(cache.checkpoints()) == ["oldest_0002", "oldest_0003", "oldest_0001"]
        assert cache.best(other.objects, model_config=CONFIG).id == "oldest_0002"

    assert as_nobody(child) == 0
    assert listing(root) == before


def test_a_loss_of_nan_as_json_dump_wrote_it_is_diverged(tmp_path):
    write_oldest(tmp_path)
    text = (tmp_path / "metadata.json").read_text().replace('"val_loss": 1.0', '"val_loss": NaN')
    (tmp_path / "metadata.json").write_text(text)
    cache = TrainingCache(tmp_path)
    assert cache.best().id == "oldest_0003"
    save(cache, 9.0)
    assert cache.get("oldest_0002").val_loss != cache.get("oldest_0002").val_loss


def test_files_that_are_gone_keep_their_records(tmp_path):
    write_oldest(tmp_path)
    for path in tmp_path.rglob("*.pt"):
        path.unlink()
    cache = TrainingCache(tmp_path, max_checkpoints=1)
    assert cache.restore(Training().objects, model_config=CONFIG) is None
    save(cache, 1.0)
    assert set(OLD) <= set(ids(cache.checkpoints(everything=True)))


def test_a_file_dropped_among_the_checkpoints_is_taken_up_by_a_restore(tmp_path):
    cache = TrainingCache(tmp_path / "c")
    training, other = Training(seed=1), Training(seed=2)
    save(cache, 1.0)
    torch.save(training.model.state_dict(), tmp_path / "c" / "checkpoints" / "given.pt")
    assert cache.restore({"model": other.model}).record.id == "given"
    assert same(dict(other.model.state_dict()), dict(training.model.state_dict()))
    assert cache.get("given").tags == ("adopted",)
    assert cache.get("given").val_loss is None


def test_what_was_adopted_is_the_users_own_and_no_limit_deletes_it(tmp_path):
    cache = TrainingCache(tmp_path / "c", max_checkpoints=1, keep_latest=0)
    save(cache, 9.0)
    torch.save(Training(seed=1).model.state_dict(), tmp_path / "c" / "checkpoints" / "given.pt")
    cache.doctor(repair=True)
    assert cache.get("given").pinned
    for loss in (3.0, 2.0, 1.0):
        save(cache, loss)
    assert (tmp_path / "c" / "checkpoints" / "given.pt").exists()


def test_a_file_of_a_newer_version_is_passed_over_and_the_others_are_restored_from(tmp_path, caplog):
    cache, other = TrainingCache(tmp_path / "c"), TrainingCache(tmp_path / "newer")
    record, newer = save(cache, 2.0), save(other, 1.0)
    content = torch.load(tmp_path / "newer" / "checkpoints" / f"{newer.id}.pt", weights_only=True)
    content["ckptcache"]["record"]["schema_version"] = SCHEMA_VERSION + 1
    path = tmp_path / "c" / "checkpoints" / f"{newer.id}.pt"
    torch.save(content, path)
    assert cache.restore(tiny()).record.id == record.id
    assert f"{newer.id} is passed over" in caplog.text
    assert path.exists()


def test_a_pin_made_while_a_file_is_read_stays(oldest, monkeypatch):
    root, _ = oldest
    cache, read = TrainingCache(root), ptfile.read

    def pin_and_read(path, **known):
        if path.stem == "oldest_0001":
            TrainingCache(root).pin(path.stem)
        return read(path, **known)

    monkeypatch.setattr(ptfile, "read", pin_and_read)
    learn(cache.ledger, list(OLD), [])
    assert cache.get("oldest_0001").pinned
    assert all(cache.get(id).digest and cache.get(id).fingerprint for id in OLD)


def test_what_a_writer_is_about_to_commit_is_not_taken_for_a_file_without_a_record(tmp_path, monkeypatch):
    writer, reader, seen = TrainingCache(tmp_path / "c"), TrainingCache(tmp_path / "c"), []
    save(writer, 2.0)
    publish = TempFile.publish

    def watched(self: TempFile) -> None:
        publish(self)
        catalog = reader.ledger.view()
        seen.append((self.final.suffix, catalog.observed.unrecorded))

    monkeypatch.setattr(TempFile, "publish", watched)
    record = save(writer, 1.0, iteration=7)
    monkeypatch.undo()
    assert [suffix for suffix, _ in seen] == [".json", ".pt", ".json"]
    assert not any(unrecorded for _, unrecorded in seen)
    learn(reader.ledger, [], [record.id])
    assert reader.get(record.id) == record, "the record inside the file knows neither sequence nor quality"

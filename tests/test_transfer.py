import gc
import io
import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ckptcache import TrainingCache
from ckptcache.errors import (
    CheckpointDamaged,
    CheckpointMissing,
    CheckpointNotFound,
    CkptCacheError,
    ExportFailed,
    NotACheckpoint,
    UnsafeCheckpoint,
)
from tests.caches import CONFIG, Tied, Training, as_nobody, file_of, flip, ids, let_in, listing, same, save, tiny
from tests.faults import CountingSystem, FailingSystem, swapped


@pytest.fixture
def cache(tmp_path: Path) -> TrainingCache:
    return TrainingCache(tmp_path / "cache")


@pytest.fixture
def training() -> Training:
    return Training(seed=1)


# --- export --------------------------------------------------------------------------------------


def test_a_model_exported_to_pt_loads_into_the_module_with_plain_torch(cache, training, tmp_path):
    record = cache.save(training.objects, iteration=3, val_loss=1.0)
    path = cache.export(record.id, tmp_path / "best.pt")
    assert path == tmp_path / "best.pt"
    other = Training(seed=2)
    other.model.load_state_dict(torch.load(path, weights_only=True))
    assert same(dict(other.model.state_dict()), dict(training.model.state_dict()))


def test_a_model_exported_to_safetensors_loads_with_plain_safetensors_and_says_where_it_is_from(
    cache, training, tmp_path
):
    record = cache.save(training.objects, iteration=3, val_loss=1.0)
    path = cache.export("best", str(tmp_path / "best.safetensors"))
    assert same(dict(sorted(load_file(path).items())), dict(sorted(training.model.state_dict().items())))
    with safe_open(path, "pt") as file:
        assert record.id in file.metadata()["ckptcache"]
        assert file.metadata()["format"] == "pt"


def test_with_the_optimizer_a_pt_holds_every_part(cache, training, tmp_path):
    state = {**training.objects, "step": 5, "order": np.arange(3)}
    cache.save(state, iteration=3, val_loss=1.0)
    found = torch.load(cache.export("best", tmp_path / "all.pt", optimizer=True), weights_only=True)
    assert list(found) == ["model", "optimizer", "scheduler", "step", "order"]
    other = Training(seed=2)
    for name, target in other.objects.items():
        target.load_state_dict(found[name])
    assert same(other.state, training.state)
    assert found["step"] == 5
    assert found["order"].tolist() == [0, 1, 2]


def test_with_the_optimizer_a_safetensors_holds_every_tensor(cache, training, tmp_path):
    cache.save(training.objects, iteration=3, val_loss=1.0)
    found = load_file(cache.export("best", tmp_path / "all.safetensors", optimizer=True))
    assert torch.equal(found["model.0.weight"], training.model[0].weight)
    moment = training.optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(found["optimizer.state.0.exp_avg"], moment)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_tied_weights_can_be_exported(cache, tmp_path, ending):
    tied, other = Tied(), Tied()
    cache.save({"model": tied}, iteration=1, val_loss=1.0)
    path = cache.export("best", tmp_path / f"m.{ending}")
    other.load_state_dict(load_file(path) if ending == "safetensors" else torch.load(path, weights_only=True))
    assert torch.equal(other.head.weight, tied.head.weight)


def test_a_strided_tensor_is_exported_as_it_looks(cache, tmp_path):
    saved = torch.arange(6.0).reshape(2, 3).t()
    cache.save({"model": {"w": saved}}, iteration=1, val_loss=1.0)
    assert torch.equal(load_file(cache.export("best", tmp_path / "m.safetensors"))["w"], saved)


def test_a_file_that_is_there_is_only_replaced_when_asked(cache, training, tmp_path):
    cache.save(training.objects, iteration=3, val_loss=1.0)
    path = tmp_path / "m.pt"
    path.write_text("precious")
    with pytest.raises(ExportFailed, match="there already"):
        cache.export("best", path)
    assert path.read_text() == "precious"
    cache.export("best", path, overwrite=True)
    assert "0.weight" in torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("name", "word"),
    [("m.bin", r"\.pt or \.safetensors"), ("m", r"\.pt or \.safetensors"), ("no/such/m.pt", "no such file")],
)
def test_where_it_cannot_be_exported_to_is_said(cache, training, tmp_path, name, word):
    cache.save(training.objects, iteration=3, val_loss=1.0)
    before = listing(tmp_path)
    with pytest.raises(ExportFailed, match=word):
        cache.export("best", tmp_path / name)
    assert listing(tmp_path) == before


def test_without_a_model_there_is_only_everything_to_export(cache, tmp_path):
    save(cache, 1.0)
    with pytest.raises(ExportFailed, match="export everything"):
        cache.export("best", tmp_path / "m.pt")
    assert torch.equal(torch.load(cache.export("best", tmp_path / "m.pt", optimizer=True))["w"], torch.ones(4))
    with pytest.raises(CheckpointNotFound):
        cache.export("slot-9", tmp_path / "x.pt")


def test_an_export_that_fails_at_any_operation_leaves_the_old_file_and_nothing_else(cache, training, tmp_path):
    record = cache.save(training.objects, iteration=3, val_loss=1.0)
    out = tmp_path / "out"
    out.mkdir()
    (out / "m.pt").write_text("precious")
    gc.collect()  # caches of earlier tests give their leases back, which counts as an operation too
    with swapped(CountingSystem()) as counting:
        cache.export(record.id, out / "other.pt")
    (out / "other.pt").unlink()
    for at, operation in enumerate(counting.operations):
        with (
            swapped(FailingSystem(at, 28)) as failing,
            pytest.raises(ExportFailed, match=r"(?i)no space left"),
        ):
            cache.export(record.id, out / "m.pt", overwrite=True)
        assert failing.hit
        assert os.listdir(out) == ["m.pt"]
        if operation != "fsync_folder":
            assert (out / "m.pt").read_text() == "precious"


def test_an_export_follows_the_umask_and_needs_no_rights_over_the_cache(cache, training, tmp_path, requires):
    requires("root")
    cache.save(training.objects, iteration=3, val_loss=1.0)
    cache.close()
    let_in(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    before = listing(cache.cache_dir)
    assert as_nobody(lambda: TrainingCache(tmp_path / "cache").export("best", tmp_path / "out" / "m.pt")) == 0
    assert (tmp_path / "out" / "m.pt").stat().st_uid != 0
    assert listing(cache.cache_dir) == before


# --- import --------------------------------------------------------------------------------------


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_a_bare_state_dict_becomes_the_part_model(cache, tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    path = written(tmp_path / "m.pt", model.state_dict())
    before = path.read_bytes()
    record = cache.import_(path, val_loss=0.5, iteration=40, tags=["mine"], model_config={"kind": "linear"})
    assert (record.iteration, record.val_loss, record.tags, record.contents) == (40, 0.5, ("mine",), ("model",))
    assert cache.restore({"model": other}, model_config={"kind": "linear"}).record.id == record.id
    assert torch.equal(other.weight, model.weight)
    assert path.read_bytes() == before
    assert cache.doctor() == []


def test_a_state_dict_of_a_wrapped_model_fits_the_plain_one(cache, tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    wrapped = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    cache.import_(written(tmp_path / "m.pt", wrapped))
    assert cache.restore({"model": other}) is not None
    assert torch.equal(other.weight, model.weight)


def test_a_file_like_lightnings_is_taken_up_with_its_step(cache, tmp_path):
    training = Training()
    path = written(
        tmp_path / "epoch=3-step=120.ckpt",
        {
            "epoch": 3,
            "global_step": 120,
            "pytorch-lightning_version": "2.6.6",
            "state_dict": training.model.state_dict(),
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {},
            "optimizer_states": [training.optimizer.state_dict()],
            "lr_schedulers": [],
            "hparams_name": None,
        },
    )
    record = cache.import_(path)
    assert (record.iteration, record.epoch) == (120, 3.0)
    assert record.tags == ("imported",)
    other = Training(seed=4)
    cache.restore({"model": other.model})
    assert same(dict(other.model.state_dict()), dict(training.model.state_dict()))
    assert same(cache.load(record.id)["optimizer_states"][0], training.optimizer.state_dict())


def test_a_file_of_the_oldest_layout_is_taken_up_with_what_it_says(cache, tmp_path):
    training = Training()
    path = written(
        tmp_path / "old.pt",
        {
            "model_state_dict": training.model.state_dict(),
            "optimizer_state_dict": training.optimizer.state_dict(),
            "scheduler_state_dict": None,
            "iteration": 77,
            "epoch": 2,
            "val_loss": 1.25,
            "metrics": {"accuracy": 0.5},
            "model_config": CONFIG,
        },
    )
    record = cache.import_(path)
    assert (record.iteration, record.epoch, record.val_loss, record.metrics) == (77, 2.0, 1.25, {"accuracy": 0.5})
    other = Training(seed=4)
    cache.restore({"model": other.model, "optimizer": other.optimizer}, model_config=CONFIG)
    assert same(other.state["optimizer"], training.state["optimizer"])


def test_a_file_of_another_cache_is_taken_up_with_its_record(cache, training, tmp_path):
    other = TrainingCache(tmp_path / "other")
    first = other.save(training.objects, iteration=9, val_loss=float("nan"), metrics={"a": 0.5}, model_config=CONFIG)
    record = cache.import_(file_of(other, first))
    assert record.id != first.id
    assert (record.iteration, record.metrics, record.extra) == (9, {"a": 0.5}, {"imported_from": first.id})
    assert record.val_loss != record.val_loss
    assert cache.configs(record)["model_config"] == CONFIG
    assert same(cache.load(record.id), other.load(first.id))
    assert ids(other.checkpoints(everything=True)) == [first.id]


def test_words_that_make_no_sense_are_left_in_the_file_and_out_of_the_record(cache, tmp_path):
    content = {
        "state_dict": {"w": torch.ones(2)},
        "iteration": -5,
        "epoch": "x",
        "val_loss": [1],
        "metrics": {"a": "b"},
    }
    record = cache.import_(written(tmp_path / "m.pt", content))
    assert (record.iteration, record.epoch, record.val_loss, record.metrics) == (0, None, None, {})
    assert cache.doctor() == []


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def zipped(path: Path, pickled: bytes, *, compress: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return path


def hostile(kind: str, folder: Path) -> Path:
    path, payload = folder / "hostile.pt", Runs(folder / "sentinel")
    if kind == "code":
        torch.save({"state_dict": payload}, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(payload))
    elif kind == "old torch format":
        torch.save({"m": payload}, path, _use_new_zipfile_serialization=False)
    elif kind == "zip of a pickle":
        zipped(path, pickle.dumps(payload, 2))
    elif kind == "compressed":
        zipped(path, pickle.dumps({"a": "x" * 10**6}, 2), compress=zipfile.ZIP_DEFLATED)
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "x")
    elif kind == "a list":
        torch.save([torch.ones(2)], path)
    elif kind == "claims gigabytes":
        buffer = io.BytesIO()
        torch.save({"w": torch.zeros(1)}, buffer)
        path.write_bytes(buffer.getvalue().replace(b"\x8a\x01\x01", b"\x8a\x05\xff\xff\xff\xff\x00"[:3]))
        path.write_bytes(path.read_bytes()[:-30])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(written(folder / "good.pt", {"w": torch.ones(1)}))
    elif kind == "masked name":
        torch.save({"ckptcache": {"format": 99, "record": {}}, "w": torch.ones(1)}, path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        *("code", "plain pickle", "old torch format", "zip of a pickle", "compressed", "other zip", "a list"),
        *("claims gigabytes", "empty", "text", "folder", "pipe", "link", "masked name"),
    ],
)
def test_what_is_no_honest_checkpoint_is_refused_with_no_side_effect(cache, tmp_path, kind, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    save(cache, 1.0)
    path = hostile(kind, tmp_path)
    before = listing(cache.cache_dir)
    with pytest.raises((NotACheckpoint, UnsafeCheckpoint, CheckpointDamaged)) as caught:
        cache.import_(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "sentinel").exists()
    assert listing(cache.cache_dir) == before


def test_a_file_that_is_not_there_is_said_so(cache, tmp_path):
    with pytest.raises(CheckpointMissing, match="no such file"):
        cache.import_(tmp_path / "none.pt")
    assert listing(tmp_path) == {}


def test_a_foreign_file_with_a_flipped_bit_is_taken_up_or_refused_and_never_worse(cache, tmp_path):
    path = written(tmp_path / "m.pt", {"state_dict": {"w": torch.ones(2)}, "iteration": 3, "metrics": {"a": 1.0}})
    whole, taken = path.read_bytes(), 0
    start, end = whole.index(b"data.pkl"), whole.index(b"PK", whole.index(b"data.pkl"))
    for position in range(start - 40, end):
        path.write_bytes(whole)
        flip(path, position)
        with suppress(CkptCacheError):
            cache.import_(path)
            taken += 1
    assert taken < end - start
    assert cache.doctor() == []


def test_a_hostile_file_put_among_the_checkpoints_is_never_run_and_ends_in_quarantine(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    good = save(cache, 1.0)
    hostile("code", tmp_path).rename(cache.cache_dir / "checkpoints" / "evil.pt")
    assert cache.restore(tiny()).record.id == good.id
    assert [f.kind for f in cache.doctor()] == ["unrecorded"]
    assert all(f.repaired for f in cache.doctor(repair=True))
    assert cache.doctor() == []
    assert (cache.cache_dir / "quarantine" / "evil.pt").exists()
    assert not (tmp_path / "sentinel").exists()

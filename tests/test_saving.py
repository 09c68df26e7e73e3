import copy
import errno
import gc
import logging
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ckptcache import TrainingCache
from ckptcache.errors import CacheDirNotWritable, NoSpace, NotSavable, SaveFailed
from ckptcache.saving import Saver
from ckptcache.state.rng import capture_rng
from ckptcache.storage import fs
from tests.caches import (
    CONFIG,
    Tied,
    Training,
    file_of,
    ids,
    listing,
    python,
    same,
    save,
    temporary_files,
    tiny,
)
from tests.faults import FailingSystem, swapped


@pytest.fixture
def cache(tmp_path: Path) -> TrainingCache:
    return TrainingCache(tmp_path / "cache", max_checkpoints=5)


# --- exact ---------------------------------------------------------------------------------------


def test_model_optimizer_and_schedule_come_back_to_the_bit_and_train_on_alike(cache):
    training = Training(seed=1)
    saved = training.state
    cache.save(training.objects, iteration=3, val_loss=1.0, model_config=CONFIG)
    other = Training(seed=2, steps=1)
    assert not same(other.state, saved)
    restored = cache.restore(other.objects, model_config=CONFIG)
    assert same(other.state, saved)
    assert restored.report.restored == ("model", "optimizer", "scheduler")
    assert restored.report.fresh == restored.report.unused == ()
    for each in (training, other):
        torch.manual_seed(5)
        each.train(4)
    assert same(training.state, other.state)


def test_generators_of_every_kind_draw_the_same_again(cache):
    objects = {
        "rng": capture_rng(),
        "torch": torch.Generator().manual_seed(1),
        "numpy": np.random.default_rng(2),
        "legacy": np.random.RandomState(3),
        "python": random.Random(4),
        "nested": {"inner": [torch.Generator().manual_seed(5)]},
    }

    def draw() -> list[float]:
        return [
            *(torch.rand(1).item(), np.random.rand(), random.random()),
            torch.rand(1, generator=objects["torch"]).item(),
            *(objects["numpy"].random(), objects["legacy"].random_sample(), objects["python"].random()),
            torch.rand(1, generator=objects["nested"]["inner"][0]).item(),
        ]

    cache.save(objects, iteration=1, val_loss=1.0)
    first = draw()
    assert draw() != first
    targets = {key: value for key, value in objects.items() if key != "rng"}
    assert cache.restore(targets).report.restored == ("rng", "torch", "numpy", "legacy", "python", "nested")
    assert draw() == first
    cache.restore(targets, rng=False)
    assert draw()[3:] == first[3:]


def test_plain_values_arrays_and_special_tensors_come_back_as_they_were(cache):
    values = {
        "text": "é\x00",
        "numbers": [1, -(2**70), 2.5, 1j, float("inf"), True, None],
        "keys": {1: "a", (1, "b"): "c", None: "d", 2.5: "e", False: "f"},
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "torch": [torch.float16, torch.device("cpu"), torch.Size([2, 3])],
        "scalars": [np.float32(1.5), np.int64(7), np.bool_(True)],
    }
    tensors = {
        "bfloat": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "strided": torch.arange(12).reshape(3, 4).t(),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]).conj(),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    arrays = {
        "a": np.arange(6, dtype=np.uint16).reshape(2, 3)[:, ::-1],
        "zero": np.zeros(()),
        "big": np.arange(3, dtype=">f4"),
    }
    record = cache.save({"values": values, "tensors": tensors, "arrays": arrays}, iteration=1)
    found = cache.load(record.id)
    assert found["values"] == {**values, "scalars": [1.5, 7, True]}
    assert same(found["tensors"], {k: t.resolve_conj() for k, t in tensors.items()})
    for name, array in arrays.items():
        assert isinstance(found["arrays"][name], np.ndarray)
        np.testing.assert_array_equal(found["arrays"][name], array)


def test_tied_weights_stay_tied_and_are_written_once(cache):
    tied = Tied()
    record = cache.save({"model": tied}, iteration=1, val_loss=1.0)
    found = cache.load(record.id)["model"]
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    other = Tied()
    cache.restore({"model": other})
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, tied.head.weight)
    cache.save({"model": tied}, iteration=2, val_loss=0.5, blocking=False)
    cache.wait_until_finished()
    found = cache.load("latest")["model"]
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()


class Transposed(nn.Module):
    """What a library does that has changed how it stores a weight, as torch's own and torchvision's modules have."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"].t()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("how", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
@pytest.mark.parametrize("size", [1, 3 << 20], ids=["copied at once", "staged"])
def test_modules_are_told_by_which_version_of_them_they_were_saved(cache, how, size):
    model, other = (nn.Sequential(Transposed(), nn.Linear(1, size)) for _ in range(2))
    objects = {"model": how(model), "optimizer": torch.optim.SGD(model.parameters())}
    record = cache.save(objects, iteration=1, val_loss=1.0, blocking=False)
    cache.restore({"model": other})
    assert torch.equal(other[0].weight, model[0].weight)
    other[0].weight.data.zero_()
    other.load_state_dict(cache.load(record.id)["model"])
    assert torch.equal(other[0].weight, model[0].weight)
    cache.save({"model": model.state_dict()}, iteration=2, val_loss=0.5)
    other[0].weight.data.zero_()
    cache.restore({"model": other})
    assert torch.equal(other[0].weight, model[0].weight)


def test_a_state_dict_that_older_code_saved_is_still_converted(cache, tmp_path):
    model, other = Transposed(), Transposed()
    saved = model.state_dict()
    saved._metadata[""]["version"] = 1
    torch.save(saved, tmp_path / "old.pt")
    cache.import_(tmp_path / "old.pt", iteration=1, val_loss=1.0)
    cache.restore({"model": other})
    assert torch.equal(other.weight, model.weight.t())


def test_a_schedule_with_milestones_comes_back(cache):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    first, second = (torch.optim.lr_scheduler.MultiStepLR(optimizer, m) for m in ([2, 4, 4], [7]))
    for blocking in (True, False):
        cache.save({"scheduler": first}, iteration=1, val_loss=1.0, blocking=blocking)
        cache.restore({"scheduler": second})
        assert second.state_dict() == first.state_dict()
        assert type(second.milestones) is type(first.milestones)


def test_a_wrapped_model_is_saved_as_the_model_inside(cache):
    plain = nn.Linear(3, 2)
    cache.save({"model": nn.DataParallel(plain)}, iteration=1, val_loss=1.0)
    other = nn.Linear(3, 2)
    assert cache.restore({"model": other}) is not None
    assert torch.equal(other.weight, plain.weight)


def test_what_is_loaded_owns_its_memory(cache):
    record = save(cache, 1.0)
    loaded = cache.load(record.id)
    file_of(cache, record).unlink()
    loaded["w"] += 1
    assert loaded["w"].tolist() == [2.0] * 4


def test_the_file_is_plain_torch_and_holds_its_own_record(cache):
    training = Training()
    record = cache.save(training.objects, iteration=3, val_loss=1.0, tags=["x"])
    content = torch.load(file_of(cache, record), weights_only=True, mmap=True)
    assert same(dict(content["model"]), dict(training.model.state_dict()))
    inside = content["ckptcache"]["record"]["checkpoints"][record.id]
    assert (inside["iteration"], inside["val_loss"], inside["tags"]) == (3, 1.0, ["x"])


def test_the_learning_rates_of_the_optimizer_are_recorded(cache):
    training = Training()
    assert cache.save(training.objects, iteration=1).learning_rate == (0.005,)
    assert cache.save(training.objects, iteration=1, learning_rate=[0.1, 0.2]).learning_rate == (0.1, 0.2)


def test_a_part_named_like_the_header_is_refused(cache):
    with pytest.raises(NotSavable, match="ckptcache"):
        cache.save({"ckptcache": 1}, iteration=1)


def holding_itself():
    tree = {"a": []}
    tree["a"].append(tree)
    return tree


@pytest.mark.parametrize("value", [np.longdouble(1), np.clongdouble(1), holding_itself()])
def test_what_has_no_end_or_no_plain_form_is_refused_by_its_part(cache, value):
    with pytest.raises(NotSavable, match="'part"):
        cache.save({"part": {"x": value}}, iteration=1)


@pytest.mark.parametrize("blocking", [True, False])
def test_what_torch_refuses_to_save_fails_the_save_and_does_not_hang(cache, blocking):
    weight = torch.ones(600_000, dtype=torch.complex64)
    with pytest.raises(SaveFailed, match="view the same data as different types"):
        cache.save({"a": weight, "b": torch.view_as_real(weight)}, iteration=1, blocking=blocking)
        cache.wait_until_finished()
    assert cache.doctor() == []


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_by_its_key(cache):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)
    with pytest.raises(NotSavable, match=r"'model\.n'.*nested"):
        cache.save({"model": {"n": nested}}, iteration=1)


# --- in the background ---------------------------------------------------------------------------


class Gate(fs.System):
    """Holds every write back until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def write(self, fd: int, data: memoryview) -> int:
        if threading.current_thread() is not threading.main_thread():
            self.opened.wait(20)
        return super().write(fd, data)


def test_what_is_saved_is_the_state_at_the_call_whatever_training_does_meanwhile(cache):
    training, extra = Training(), {"history": [1, 2], "array": np.ones(3), "set": {1}, "nested": {"t": torch.ones(2)}}
    objects = {**training.objects, "extra": extra, "generator": torch.Generator().manual_seed(3)}
    saved = training.state
    with swapped(Gate()) as gate:
        record = cache.save(objects, iteration=3, val_loss=1.0, blocking=False)
        assert ids(TrainingCache(cache.cache_dir).checkpoints()) == []
        training.train(3)
        with torch.no_grad():
            for tensor in (*training.model.parameters(), *training.model.buffers()):
                tensor.zero_()
        extra["history"].append(3)
        extra["array"][:] = 5
        extra["set"].add(2)
        extra["nested"]["t"].zero_()
        torch.rand(1, generator=objects["generator"])
        training.optimizer.param_groups[0]["lr"] = 99.0
        gate.opened.set()
        cache.wait_until_finished()
    found = cache.load(record.id)
    assert same({**found, "model": dict(found["model"])}["optimizer"], saved["optimizer"])
    assert same(dict(found["model"]), saved["model"])
    assert same(found["scheduler"], saved["scheduler"])
    assert (found["extra"]["history"], found["extra"]["set"]) == ([1, 2], {1})
    assert found["extra"]["array"].tolist() == [1, 1, 1]
    assert found["extra"]["nested"]["t"].tolist() == [1, 1]
    assert torch.equal(found["generator"], torch.Generator().manual_seed(3).get_state())


def test_a_counter_is_saved_whole_while_it_runs(cache):
    counters = {"w": torch.zeros(50_000), "b": torch.zeros(7)}
    saved = {}
    for step in range(30):
        for tensor in counters.values():
            tensor.fill_(step)
        if step % 3 == 0:
            saved[step] = cache.save(counters, iteration=step, val_loss=100.0 - step, blocking=False).id
    cache.wait_until_finished()
    kept = {r.iteration for r in cache.checkpoints()}
    assert kept == set(list(saved)[-5:])
    for step in kept:
        found = cache.load(saved[step])
        assert found["w"].unique().tolist() == found["b"].unique().tolist() == [step]


def test_the_record_of_a_save_in_the_background_is_the_one_that_is_committed(cache):
    record = cache.save(tiny(), iteration=1, val_loss=1.0, blocking=False)
    cache.wait_until_finished()
    found = cache.get(record.id)
    assert (found.iteration, found.val_loss) == (1, 1.0)
    assert found.size == file_of(cache, found).stat().st_size


def failed_in_the_background(cache: TrainingCache) -> None:
    cache.ledger.hold(cache.ledger.writer)  # signing the lease makes an fsync of its own
    with swapped(FailingSystem(0, errno.ENOSPC, "fsync")):
        cache.save(tiny(), iteration=1, val_loss=1.0, blocking=False)
        cache._saver.in_flight.wait()


def test_an_error_in_the_background_is_said_at_once_and_raised_by_the_next_call(cache, caplog):
    with caplog.at_level(logging.ERROR, "ckptcache"):
        failed_in_the_background(cache)
    assert "no space left" in caplog.text
    with pytest.raises(SaveFailed, match="no space left"):
        save(cache, 2.0)
    assert ids(cache.checkpoints(everything=True)) == []
    save(cache, 3.0)
    assert [r.val_loss for r in cache.checkpoints()] == [3.0]
    assert cache.doctor() == []


@pytest.mark.parametrize("ask", [TrainingCache.wait_until_finished, TrainingCache.close])
def test_an_error_in_the_background_is_raised_once_by_who_waits(cache, ask):
    failed_in_the_background(cache)
    with pytest.raises(SaveFailed, match="no space left"):
        ask(cache)
    cache.wait_until_finished()
    assert temporary_files(cache.cache_dir) == []


def test_a_folder_that_cannot_be_listed_fails_the_save_and_leaves_nothing_behind(cache, monkeypatch):
    save(cache, 2.0)
    before, scan = temporary_files(cache.cache_dir), fs.scan

    def refuse(folder, **how):
        if folder == cache.ledger.layout.checkpoints:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return scan(folder, **how)

    monkeypatch.setattr(fs, "scan", refuse)
    with pytest.raises(SaveFailed, match="open files"):
        save(cache, 1.0)
    assert temporary_files(cache.cache_dir) == before == []


def test_a_subfolder_that_is_a_link_is_refused_before_anything_is_written_or_removed(tmp_path):
    root, disk = tmp_path / "c", tmp_path / "disk"
    cache = TrainingCache(root, max_checkpoints=1, keep_latest=0)
    kept = save(cache, 3.0)
    (root / "checkpoints").rename(disk)
    (root / "checkpoints").symlink_to(disk)
    for again in (cache, TrainingCache(root, max_checkpoints=1, keep_latest=0)):
        with pytest.raises(CacheDirNotWritable, match="it is a link"):
            save(again, 1.0)
        with pytest.raises(CacheDirNotWritable, match="it is a link"):
            again.prune()
    assert [path.name for path in disk.iterdir() if path.suffix in (".pt", ".tmp")] == [f"{kept.id}.pt"]
    assert cache.load(kept.id)["w"][0] == 3.0


def test_an_error_that_nobody_foresaw_is_raised_too(cache, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr("ckptcache.saving.ptfile.write", broken)
    cache.save(tiny(), iteration=1, blocking=False)
    with pytest.raises(ZeroDivisionError):
        cache.wait_until_finished()
    assert temporary_files(cache.cache_dir) == []


def large(value: float = 1.0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """More than is copied at the call."""
    model = nn.Linear(2000, 1200)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2000)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("fails", [False, True])
def test_when_a_save_is_over_nothing_of_the_state_is_kept(cache, fails):
    model, optimizer = large()
    cache.ledger.hold(cache.ledger.writer)  # signing the lease makes a write of its own
    with swapped(FailingSystem(0, errno.ENOSPC, "write") if fails else fs.System()):
        cache.save({"model": model, "optimizer": optimizer}, iteration=1, blocking=False)
        cache._saver.in_flight.wait()
    storage = StorageWeakRef(model.weight.untyped_storage())
    del model, optimizer
    gc.collect()
    assert storage.expired()
    with pytest.raises(SaveFailed) if fails else nullcontext():
        cache.wait_until_finished()


def test_without_a_thread_to_be_had_it_is_saved_at_once_and_nothing_stays_in_flight(cache, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        record = cache.save(tiny(), iteration=1, val_loss=1.0, blocking=False)
        assert not cache.is_saving
    assert ids(cache.checkpoints()) == [record.id]
    assert record.size == file_of(cache, record).stat().st_size


def test_what_was_started_when_an_interrupt_comes_is_saved_whole(cache, monkeypatch):
    training, start = Training(), Saver._start

    def interrupted(saver, *arguments):
        start(saver, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Saver, "_start", interrupted)
        cache.save(training.objects, iteration=1, val_loss=1.0, blocking=False)
    saved = {name: copy.deepcopy(each.state_dict()) for name, each in training.objects.items()}
    training.train(3)
    cache.wait_until_finished()
    (record,) = cache.checkpoints()
    fresh = Training(1)
    cache.restore(fresh.objects, resume=record.id)
    assert torch.equal(fresh.model[0].weight, saved["model"]["0.weight"])


def test_whoever_waits_sees_an_unannounced_change_through_where_the_thread_that_saved_is_idle(cache):
    model, optimizer = large()
    cache.ledger.hold(cache.ledger.writer)  # whose lease is written by the thread that saves
    with ThreadPoolExecutor(1) as pool, swapped(Gate()) as gate:
        objects = {"model": model, "optimizer": optimizer}
        record = pool.submit(cache.save, objects, iteration=1, blocking=False).result()
        with torch.no_grad():
            model.weight.fill_(7.0)
        gate.opened.set()
        waiting = threading.Thread(target=cache.wait_until_finished, daemon=True)
        waiting.start()
        waiting.join(20)
        assert not waiting.is_alive()
    assert cache.load(record.id)["model"]["weight"].unique().tolist() == [7.0]


FROM_A_DAEMON = """
import sys, threading, torch
from ckptcache import TrainingCache
from ckptcache.state import staging
staging.AT_ONCE = 1000
model = torch.nn.Linear(300, 300)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
done = threading.Event()
def train():
    cache = TrainingCache(sys.argv[1])
    cache.save({"model": model, "optimizer": optimizer}, iteration=1, val_loss=1.0, blocking=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    done.set()
    threading.Event().wait()
threading.Thread(target=train, daemon=True).start()
done.wait()
"""


def test_the_interpreter_ends_though_a_daemon_that_saved_never_comes_by_again(tmp_path):
    ended = python(FROM_A_DAEMON, str(tmp_path / "c"))
    assert ended.returncode == 0
    assert [r.iteration for r in TrainingCache(tmp_path / "c").checkpoints()] == [1]


AT_EXIT = """
import sys, torch
from ckptcache import TrainingCache
cache = TrainingCache(sys.argv[1])
for step in range(3):
    cache.save({"w": torch.full((300_000,), float(step))}, iteration=step, val_loss=1.0, blocking=False)
raise SystemExit(int(sys.argv[2]))
"""


@pytest.mark.parametrize("status", [0, 3])
def test_what_is_in_flight_is_finished_before_the_interpreter_ends(tmp_path, status):
    ended = python(AT_EXIT, str(tmp_path / "c"), str(status))
    assert (ended.returncode, ended.stderr) == (status, "")
    cache = TrainingCache(tmp_path / "c")
    assert sorted(r.iteration for r in cache.checkpoints()) == [0, 1, 2]
    assert cache.doctor() == []
    assert list((tmp_path / "c" / "sessions").iterdir()) == []


def test_a_forked_child_saves_for_itself_and_leaves_the_parents_save_alone(cache):
    with swapped(Gate()) as gate:
        cache.save(tiny(1.0), iteration=1, val_loss=1.0, blocking=False)

        def child() -> None:
            fs.system = fs.System()
            save(cache, 2.0, iteration=2)
            cache.close()

        from tests.faults import run_child

        assert run_child(child) == 0
        gate.opened.set()
        cache.wait_until_finished()
    assert sorted(r.iteration for r in cache.checkpoints()) == [1, 2]
    assert cache.doctor() == []


# --- room ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocking", [True, False])
def test_too_little_room_is_said_before_anything_is_written(cache, monkeypatch, blocking):
    save(cache, 1.0)
    before = listing(cache.cache_dir)
    monkeypatch.setattr(fs, "free_bytes", lambda path: 1000)
    with pytest.raises(NoSpace, match="1000 are free"):
        cache.save(tiny(size=10_000), iteration=2, blocking=blocking)
    assert listing(cache.cache_dir) == before


class Undeletable(fs.System):
    """Removes no checkpoint."""

    def unlink(self, path: Path) -> None:
        if path.suffix == ".pt":
            raise OSError(errno.EIO, "input/output error", str(path))
        super().unlink(path)


def test_a_failed_eviction_is_said_survived_and_made_up_for(tmp_path, caplog):
    cache = TrainingCache(tmp_path / "c", max_checkpoints=2)
    for i in range(2):
        save(cache, float(9 - i), iteration=i)
    with swapped(Undeletable()), caplog.at_level(logging.WARNING, "ckptcache"):
        last = save(cache, 1.0, iteration=2)
    assert "removing what was evicted failed" in caplog.text
    assert last.id in ids(cache.checkpoints())
    assert len(cache.checkpoints()) == 2
    save(cache, 0.5, iteration=3)
    assert len(list((tmp_path / "c" / "checkpoints").glob("*.pt"))) == 2
    assert cache.doctor() == []


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        record = save(TrainingCache(tmp_path / "c"), 1.0)
    finally:
        os.umask(before)
    cache = TrainingCache(tmp_path / "c")
    assert file_of(cache, record).stat().st_mode & 0o777 == 0o640
    assert (cache.cache_dir / "metadata.json").stat().st_mode & 0o777 == 0o640


def test_where_the_disk_is_full_what_is_beyond_the_limits_makes_room(tmp_path, monkeypatch):
    root = tmp_path / "c"
    loose = TrainingCache(root, max_checkpoints=10)
    for number in range(4):
        save(loose, 4.0 - number, iteration=number)
    size = loose.get("best").size
    monkeypatch.setattr(fs, "free_bytes", lambda path: (3 - len(list(root.glob("checkpoints/*.pt")))) * size + 2**20)
    tight = TrainingCache(root, max_checkpoints=2)
    saved = save(tight, 0.5, iteration=9)
    kept = [record.iteration for record in tight.checkpoints()]
    assert saved.iteration in kept
    assert len(kept) == 2
    monkeypatch.setattr(fs, "free_bytes", lambda path: 0)
    with pytest.raises(NoSpace, match="ckptcache prune"):
        save(TrainingCache(root, max_checkpoints=10, auto_cleanup=False), 0.4, iteration=10)


def test_a_program_that_changes_its_folder_keeps_its_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = TrainingCache("runs/cache")
    save(cache, 1.0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    save(cache, 0.5)
    assert len(cache.checkpoints()) == 2
    assert list((tmp_path / "elsewhere").iterdir()) == []

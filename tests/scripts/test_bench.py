"""The benchmarks run and say what they measured. No time is asserted: that would test the machine."""

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from bench import cases, disk, loop, peers, restore, save, tabulate, workload  # noqa: E402

INDEX_CASES = {"open", "open and best", "best", "first commit", "commit", "save"}
SMALL = 10**6
QUICK = ("ckptcache", "torch")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def measured(benchmark, folder: Path, **settings) -> list[cases.Result]:
    """Every case of a benchmark in this process, at a small size."""
    options = cases.Options(**{"sizes": (SMALL,), "peers": QUICK, "repeats": 2, "step": 0.01, **settings})
    found = []
    for number, case in enumerate(benchmark.cases(options)):
        own = folder / f"{number}"
        own.mkdir()
        found += benchmark.measure(case, own)
    return found


# --- the index -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document() -> dict:
    done = bench("index", "--most", "10", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_case_is_measured(document):
    assert {result["name"] for result in document["results"]} == INDEX_CASES
    for result in document["results"]:
        assert (result["benchmark"], result["records"], result["repeats"]) == ("index", 10, 1)
        assert result["wall_ms"] > 0
        assert result["wall_ms"] == pytest.approx(result["disk_ms"] + result["beyond_disk_ms"], abs=0.01)


def test_only_what_writes_counts_as_disk(document):
    wrote = {result["name"] for result in document["results"] if result["disk_ms"] > 0}
    assert wrote == {"first commit", "commit", "save"}


def test_the_machine_is_described_and_not_named(document):
    assert set(document["machine"]) == {"processor", "cores", "memory_gb", "system", "python", "torch"}
    assert all(document["machine"].values())


# --- what is saved -------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "size"), [("10MB", 10**7), ("1.5GB", 1_500_000_000), ("500 mb", 5 * 10**8)])
def test_a_size_is_read_as_people_write_it(text, size):
    assert workload.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1GB", "10TB", "1kB", "ten"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="write it like 10MB"):
        workload.parse_size(text)


@pytest.mark.parametrize("size", [10**7, 5 * 10**7])
def test_the_state_is_about_as_large_as_asked_for(size):
    assert workload.make_training(size, length=4).nbytes == pytest.approx(size, rel=0.15)


def test_the_default_is_a_gpt_2_with_its_optimizer():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in workload.GPT(workload.width_for(1_500_000_000)).parameters())
    assert parameters == pytest.approx(124.4e6, rel=0.01)


def test_a_wait_in_the_optimizer_is_seen():
    training = workload.make_training(SMALL, length=4)
    training.gradients()
    assert training.update() < 0.1
    training.optimizer.register_step_pre_hook(lambda *_: time.sleep(0.2))
    training.gradients()
    assert training.update() > 0.2


# --- peers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_restores_what_it_saved_last(name, tmp_path, requires):
    module = peers.missing(name)
    requires(f"the module {module}", module is None)
    # In a process of its own: some start threads, and make every later fork of this one a warning.
    process = multiprocessing.get_context("spawn").Process(target=restore_what_was_saved_last, args=(name, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0


def restore_what_was_saved_last(name, tmp_path):
    training = workload.make_training(SMALL, length=4)
    peer = peers.PEERS[name](tmp_path / name)
    for _ in range(2):
        peer.save(training)
        peer.allow_step()
        peer.wait()
        training.gradients()
        training.update()
    peer.save(training)
    peer.wait()
    three = disk.disk_bytes(peer.files())
    peer.remove_older()
    assert training.nbytes < disk.disk_bytes(peer.files()) < 0.5 * three
    fresh = workload.make_training(SMALL, seed=1, length=4, is_fresh=True)
    peer.restore(fresh)
    for saved, restored in zip(training.tensors(), fresh.tensors(), strict=True):
        assert torch.equal(saved, restored)
    peer.close()


def test_every_peer_that_is_not_installed_is_named_in_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(peers.Torch, "needs", ("no_such_module",))
    found = measured(save, tmp_path)
    rows = {row["name"]: row for row in found}
    assert rows["torch"]["missing"] == "no_such_module"
    assert any(line.startswith("torch.save (not installed)") for line in save.report(found))
    for benchmark in (loop, restore):
        folder = tmp_path / benchmark.__name__
        folder.mkdir()
        assert any(row.get("missing") == "no_such_module" for row in measured(benchmark, folder))


# --- save, loop, restore -------------------------------------------------------------------------


def test_a_save_is_taken_apart(tmp_path):
    found = {row["name"]: row for row in measured(save, tmp_path)}
    assert set(found) == {"copy", "write + fsync", "O_DIRECT + fsync", *QUICK}
    for name in QUICK:
        row = found[name]
        assert row["blocked_ms"] >= row["call_ms"] > 0
        assert row["durable_ms"] >= row["finished_ms"] > 0
        assert row["processor_ms"] >= 0
        assert row["bytes"] < row["disk_bytes"] < 2 * row["bytes"]
        low, high = row["blocked_ms_quartiles"]
        assert low <= high
    assert found["ckptcache"]["durable"] == "yes"
    assert found["torch"]["durable"] == "no"


def test_the_table_compares_with_the_best_peer_and_the_raw_write():
    rows = [
        {"name": "write + fsync", "size": 1, "bytes": 1, "repeats": 1, "yardstick": True, "durable_ms": 30.0},
        {"name": "O_DIRECT + fsync", "size": 1, "bytes": 1, "repeats": 1, "yardstick": True, "durable_ms": 20.0},
        {"name": "ckptcache", "size": 1, "bytes": 1, "repeats": 1, "blocked_ms": 5.0, "durable_ms": 22.0},
        {"name": "torch", "size": 1, "bytes": 1, "repeats": 1, "blocked_ms": 10.0, "durable_ms": 60.0},
        {"name": "safetensors", "size": 1, "bytes": 1, "repeats": 1, "blocked_ms": 20.0, "durable_ms": 50.0},
    ]
    assert tabulate.ratios(rows, "blocked_ms") == ["", "", "0.50", "1.00", "2.00"]
    assert tabulate.ratios(rows, "durable_ms", save.raw_write(rows)) == ["1.50", "1.00", "1.10", "3.00", "2.50"]


def test_the_loop_tells_what_a_save_adds(tmp_path):
    found = {row["name"]: row for row in measured(loop, tmp_path)}
    assert set(found) == set(QUICK)
    for row in found.values():
        low, high = row["added_ms_quartiles"]
        assert low <= row["added_ms"] <= high
        assert row["finished_ms"] > 0
        assert row["step_ms"] > 0
    assert any("torch.save" in line for line in loop.report(list(found.values())))


def test_what_is_added_is_the_difference_to_as_many_steps_without_a_save():
    turns = loop.Turns()
    turns.saved.append(loop.Saved(loop.Window(10, 13.0, 25.0), 0.1, 0.1, 9.0))
    turns.around.append((loop.Window(5, 5.0, 10.0), loop.Window(5, 6.0, 12.0)))
    assert list(turns.added()) == [(2.0, 3.0)]


def test_a_save_that_fails_in_the_loop_is_not_passed_over(tmp_path, monkeypatch):
    def fail(self) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(peers.Torch, "wait", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        measured(loop, tmp_path, peers=("torch",))


def test_a_restore_is_measured_warm_and_cold(tmp_path):
    found = {row["name"]: row for row in measured(restore, tmp_path)}
    assert set(found) == {restore.MAPPED, restore.READ, *QUICK}
    for name in (restore.MAPPED, *QUICK):
        assert found[name]["warm_step_ms"] > found[name]["warm_ms"] > 0
        assert found[name]["cold_step_ms"] > found[name]["cold_ms"] > 0
    assert restore.report(list(found.values()))


def test_a_peer_that_restores_something_else_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.Torch, "restore", lambda self, training: None)
    with pytest.raises((RuntimeError, ValueError)):
        measured(restore, tmp_path, peers=("torch",))


# --- the command ---------------------------------------------------------------------------------


def test_tables_and_a_picture_for_people(tmp_path):
    picture = tmp_path / "bench.png"
    done = bench(
        "save", "index", "--size", "1MB,2MB", "--peers", "torch", "--repeats", "1", "--most", "0", "--plot", picture
    )
    assert done.returncode == 0, done.stderr
    assert "cores" in done.stdout.splitlines()[0]
    assert "how it grows" in done.stdout
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["save"] * 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_case_that_fails_is_named_and_the_others_are_measured(monkeypatch):
    case = cases.Case("restore", ("ckptcache",), (SMALL,), 0)
    rows = list(cases.run([case], None, lambda case: None))
    assert [row["failed"] for row in rows] == ["failed with exit code 1"]


@pytest.mark.parametrize(
    "arguments",
    [(), ("nothing",), ("save", "--size", "tiny"), ("save", "--peers", "nobody"), ("save", "--repeats", "0")],
)
def test_wrong_usage_is_told(arguments):
    done = bench(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr

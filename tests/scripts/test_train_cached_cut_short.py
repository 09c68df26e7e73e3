"""The main job, cut short by a signal and resumed with `auto`, ends as if nothing had happened."""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest

from ckptcache.cache import TrainingCache
from tests.faults import end_of, start_child, wait_until
from tests.jobs import differences

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "train_cached.py"
ITERATIONS = 60
OPTIONS = (
    *("--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--block_size", "16", "--batch_size", "4"),
    *("--max_iters", str(ITERATIONS), "--eval_interval", "20", "--checkpoint_interval", "7"),
    *("--connection_growth_interval", "11", "--max_checkpoints", "100", "--data_dir", "texts"),
)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for name in ("one", "two", "three"):
        Path(f"texts/{name}.txt").write_text(f"{name}\n{(ROOT / 'LICENSE').read_text()}")


def started(out, *more, pause=0.0):
    """The script in a forked child; with a pause in each iteration, so that a signal can arrive in the midst of it."""

    def body():
        for number in (1, 2):
            os.dup2(os.open(f"{out}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        sys.argv = [str(SCRIPT), *OPTIONS, "--out_dir", out, *more]
        if pause:
            slow_down(pause)
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            os._exit(stop.code or 0)

    return start_child(body)


def slow_down(pause):
    from ckptcache.nanecho.sampler import BlockSampler

    fast = BlockSampler.next_batch
    BlockSampler.next_batch = BlockSampler.__next__ = lambda self: (time.sleep(pause), fast(self))[1]


def final(out):
    """Its last record, and all that it trained."""
    with TrainingCache(f"{out}/cache") as cache:
        record = max(cache.checkpoints(everything=True), key=lambda r: r.order)
        return record, cache.load(record.id)


def cut_short(out, number):
    """Start it, and send it the signal once it has saved at iteration 14 or later."""
    child = started(out, pause=0.02)
    cache = TrainingCache(f"{out}/cache")
    has_saved = lambda: any(r.iteration >= 14 for r in cache.checkpoints(everything=True))  # noqa: E731
    wait_until(lambda: Path(out, "cache", "metadata.json").exists() and has_saved(), 60, "it did not save")
    os.kill(child, number)
    return end_of(child)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_cut_short_and_resumed_it_ends_with_the_same_loss_and_weights(number, code):
    assert end_of(started("undisturbed")) == 0
    assert cut_short("cut", number) == code
    assert max(r.iteration for r in TrainingCache("cut/cache").checkpoints(everything=True)) < ITERATIONS
    assert end_of(started("cut", "--resume", "auto")) == 0
    (expected, whole), (record, found) = final("undisturbed"), final("cut")
    assert "resumes from ckpt_" in Path("cut.txt").read_text()
    assert record.iteration == expected.iteration == ITERATIONS
    assert (record.train_loss, record.val_loss) == (expected.train_loss, expected.val_loss)
    assert list(differences(found, whole)) == []

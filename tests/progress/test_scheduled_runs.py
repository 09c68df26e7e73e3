"""A training that is started again and again on machines that know nothing of each other."""

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from ckptcache.cache import TrainingCache
from ckptcache.nanecho.data import load_corpus
from ckptcache.nanecho.settings import NanEchoConfig, TrainingSettings
from ckptcache.nanecho.trainer import CachedNanEchoTrainer
from ckptcache.progress.commit import commit
from ckptcache.progress.restore import restore
from tests.conftest import requires
from tests.progress.repos import clone as clone_of
from tests.progress.repos import committed, folder, git, run_of

RUNS, ITERATIONS, LOST = 6, 40, 3
NAME = "nanecho-cached-scheduled"


class Watched(CachedNanEchoTrainer):
    """Notes which batches it was trained on."""

    def __init__(self, *given, **options):
        self.seen = []
        super().__init__(*given, **options)

    def _loss(self, model, batch):
        self.seen.append(hashlib.blake2b(batch[0].numpy().tobytes(), digest_size=8).hexdigest())
        return super()._loss(model, batch)


def text(tmp_path):
    """Real text: some of the standard library's own source."""
    data = tmp_path / "text"
    data.mkdir()
    library = Path(json.__file__).parent.parent
    for name in ("argparse.py", "inspect.py", "typing.py", "tarfile.py", "subprocess.py"):
        shutil.copy(library / name, data / name)
    return data


def train(machine, data):
    """What train_cached.py does, watched."""
    run = run_of(machine, NAME)
    with TrainingCache(str(run.cache_dir)) as cache:
        corpus = load_corpus(data, cache.data, block_size=32)
        model = NanEchoConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=corpus.vocab_size)
        settings = TrainingSettings(
            batch_size=4,
            session_iters=ITERATIONS,
            max_iters=None,
            eval_interval=10,
            checkpoint_interval=10,
            device="cpu",
        )
        trainer = Watched(model, settings, corpus, cache, summary_path=run.summary)
        trainer.train()
    return trainer


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """Six scheduled runs in a row, each on a machine of its own; the cache that the third saved is lost."""
    requires("git")
    tmp_path = tmp_path_factory.mktemp("six")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
        origin = tmp_path / "origin.git"
        git(tmp_path, "init", "-q", "--bare", "-b", "main", str(origin))
        data, trainers, sizes, stored = text(tmp_path), [], [], None
        for number in range(1, RUNS + 1):
            machine = clone_of(origin, tmp_path / f"machine{number}")
            files = run_of(machine, NAME).cache_dir / "checkpoints"
            if stored is not None:
                shutil.copytree(stored, files)
            restore(folder(machine), NAME)
            trainers.append(train(machine, data))
            commit(folder(machine))
            if number != LOST:
                stored = files
            git(origin, "gc", "-q", "--prune=now")
            sizes.append(sum(f.stat().st_size for f in (origin / "objects").rglob("*") if f.is_file()))
    return origin, trainers, sizes


def test_the_best_val_loss_falls(six):
    best = [t.session.record.best_val_loss for t in six[1]]
    assert best[0] > best[1]
    assert best[-1] < best[1]


def test_each_goes_on_from_the_best_that_is_left(six):
    origin, trainers, _ = six
    index = committed(origin, NAME)
    sessions = [t.session.record for t in trainers]
    parents = [index.checkpoints[s.parent].session if s.parent else None for s in sessions]
    # Seeds come from the sessions' ids, so that a run may once be no better than the one before.
    assert parents[:2] == [None, sessions[0].id]
    assert all(parent in {s.id for s in sessions[:n]} for n, parent in enumerate(parents[1:], start=1))
    assert sessions[LOST - 1].id not in parents


def test_no_two_runs_see_the_same_batches(six):
    seen = [t.seen for t in six[1]]
    assert all(len(batches) == ITERATIONS for batches in seen)
    assert len({batch for batches in seen for batch in batches}) == RUNS * ITERATIONS


def test_no_record_is_lost(six):
    origin, trainers, _ = six
    index = committed(origin, NAME)
    assert {t.session.record.id for t in trainers} == set(index.sessions)
    assert all(t.session.record.best_checkpoint in index.checkpoints for t in trainers)


def test_the_repository_grows_by_kilobytes(six):
    sizes = six[2]
    growth = [after - before for before, after in pairwise(sizes)]
    assert max(growth) < 40_000, growth


def test_each_run_is_a_commit_that_says_what_it_came_to(six):
    origin, trainers, _ = six
    subjects = git(origin, "log", "--reverse", "--format=%s", "main").splitlines()
    assert len(subjects) == RUNS
    for trainer, subject in zip(trainers, subjects, strict=True):
        record = trainer.session.record
        told = f"Train {NAME} to iteration {record.end_iteration}: val_loss {record.last_val_loss:.4f}, best "
        assert subject.startswith(told)
    assert subjects[0].endswith("(the first)")
    assert "(improved from" in subjects[1]


def test_git_holds_no_checkpoint(six):
    files = git(six[0], "log", "--all", "--name-only", "--format=").splitlines()
    assert not any(line.endswith((".pt", ".bin")) for line in files)

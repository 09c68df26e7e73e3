"""A bare repository, clones of it, and trainings in them: real git, real checkpoint files."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from ckptcache.cache import TrainingCache
from ckptcache.metadata import SessionRecord
from ckptcache.progress.folder import ProgressFolder, Run
from ckptcache.session import TrainingSession
from ckptcache.storage.index import Index, parse

RUN = "a-run"
MODEL = {"n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 8, "block_size": 4}


def git(folder: Path, *arguments: str, check: bool = True) -> str:
    """What a git command prints."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


def bare(path: Path) -> Path:
    """A bare repository whose branch main has one commit."""
    git(path.parent, "init", "-q", "--bare", "-b", "main", str(path))
    first = clone(path, path.with_name(f"{path.name}-first"))
    (first / "train.py").write_text("pass\n")
    git(first, "add", ".")
    git(first, "commit", "-qm", "Begin")
    git(first, "push", "-q", "origin", "HEAD:main")
    return path


def clone(origin: Path, path: Path, *options: str) -> Path:
    """A clone in which somebody has a name."""
    git(path.parent, "clone", "-q", *options, origin.as_uri(), str(path))
    git(path, "config", "user.name", "Ada")
    git(path, "config", "user.email", "ada@example.org")
    git(path, "checkout", "-q", "-B", "main")
    return path


def folder(clone: Path) -> ProgressFolder:
    return ProgressFolder(clone / ".training-progress")


def run_of(clone: Path, name: str = RUN) -> Run:
    return folder(clone).run(name)


class Trained:
    """What a session came to."""

    def __init__(self, session: TrainingSession, cache: TrainingCache) -> None:
        self.record: SessionRecord = session.record
        self.parent = session.resumed_from
        self.start_iteration = session.start_iteration
        self.ids = [r.id for r in cache.checkpoints(everything=True) if r.session == session.record.id]


def train(
    clone: Path, losses: Sequence[float] = (3.0, 2.0), *, name: str = RUN, resume: str = "best", width: int = 4
) -> Trained:
    """A session that evaluates once per step and saves what improves; the run's folder is the clone's."""
    torch.manual_seed(0)
    model = torch.nn.Linear(width, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = run_of(clone, name)
    with TrainingCache(str(run.cache_dir)) as cache:
        config = {**MODEL, "n_embd": width}
        with TrainingSession(
            cache, model=model, optimizer=optimizer, model_config=config, resume=resume, summary_path=run.summary
        ) as session:
            left = list(losses)
            for _ in session.steps(session_iters=len(losses)):
                optimizer.zero_grad()
                model(torch.ones(1, width)).square().mean().backward()
                optimizer.step()
                session.checkpoint(val_loss=left.pop(0))
        return Trained(session, cache)


def committed(origin: Path, name: str = RUN, branch: str = "main") -> Index:
    """The record that the bare repository's branch holds."""
    path = f".training-progress/{name}/cache/metadata.json"
    return parse(git(origin, "show", f"{branch}:{path}").encode(), Path(path))

"""Real caches, and two ways to run a command over one: in this process, and in one of its own."""

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import ckptcache
from ckptcache.cache import TrainingCache
from ckptcache.cli import main
from ckptcache.metadata import SessionRecord

ROOT = Path(ckptcache.__file__).parent.parent
WIDE = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 16, "block_size": 4}
NARROW = {**WIDE, "n_embd": 4}
DATA = {"kind": "text", "val_digest": "abc"}


def save(
    cache: TrainingCache, iteration: int, val_loss: float | None, config: dict[str, Any] = WIDE, **more: Any
) -> str:
    """Save a checkpoint of a model of the width of `config`; returns its id."""
    model = torch.nn.Linear(config["n_embd"], 2, bias=False)
    settings = {"model_config": config, "data_config": DATA, **more}
    record = cache.save({"model": model}, iteration=iteration, val_loss=val_loss, **settings)
    assert record is not None
    return record.id


def make(folder: Path) -> SimpleNamespace:
    """A cache of two architectures and three sessions, some of its checkpoints evicted or missing."""
    with TrainingCache(folder, max_checkpoints=4, auto_cleanup=False) as cache:
        first = cache.record_session(
            SessionRecord(id="sess_a", stop_reason="finished", end_iteration=200, first_val_loss=3.0, last_val_loss=2.0)
        )
        worst = save(cache, 100, 3.0, session=first, metrics={"accuracy": 0.2})
        best = save(cache, 200, 2.0, session=first, metrics={"accuracy": 0.5}, epoch=1.5, train_loss=1.9)
        curve = tuple((200 + i, 2.0 + (i % 7)) for i in range(50))
        second = SessionRecord(
            id="sess_b", parent=best, start_iteration=200, end_iteration=300, curves={"val_loss": curve}
        )
        second = cache.record_session(second)
        diverged = save(cache, 250, float("nan"), session=second)
        missing = save(cache, 300, 2.5, session=second, metrics={"accuracy": 0.4}, parents=[best])
        other = save(cache, 50, 4.0, NARROW)
        evicted = save(cache, 10, 9.0, metrics={"accuracy": 0.0})
        with cache.ledger.change() as change:
            cache.ledger.evict(change, {evicted: "rank 9, too low"})
        cache.name(best, "release-1")
        cache.tag(worst, "baseline")
    (folder / "checkpoints" / f"{missing}.pt").unlink()
    return SimpleNamespace(
        best=best, worst=worst, diverged=diverged, missing=missing, other=other, evicted=evicted, folder=folder
    )


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make(tmp_path_factory.mktemp("template") / "cache")


@pytest.fixture
def cache(template: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy of the template, with the ids in it."""
    shutil.copytree(template.folder, tmp_path / "runs" / "cache")
    return SimpleNamespace(**{**vars(template), "folder": tmp_path / "runs" / "cache"})


def ckptcache_cli(*args: str | Path, rc: int | None = 0) -> Result:
    """Run a command in this process and check its exit code; None allows any, but no exception."""
    result = CliRunner().invoke(main, [str(a) for a in args], prog_name="ckptcache")
    assert result.exception is None or isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert rc is None or result.exit_code == rc, result.output
    return result


@pytest.fixture
def cli(cache: SimpleNamespace) -> Callable[..., Result]:
    """Run a command over `cache` in this process."""
    return lambda *args, rc=0: ckptcache_cli("--cache-dir", cache.folder, *args, rc=rc)


@pytest.fixture
def cli_json(cli: Callable[..., Result]) -> Callable[..., Any]:
    """What a command prints as JSON; stdout must hold nothing else."""
    return lambda *args, rc=0: json.loads(cli(*args, "--json", rc=rc).stdout)


def environment(**more: str) -> dict[str, str]:
    mine = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    return {**mine, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **more}


def process(*args: str | Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with pipes."""
    env = environment(**settings.pop("env", {}))
    command = [sys.executable, "-m", "ckptcache.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, **settings)


def terminal(columns: int, *args: str | Path, typed: bytes = b"", **env: str) -> tuple[int, str]:
    """Run a command on a pseudo-terminal of so many columns; returns its exit code and all that it showed."""
    return on_terminal(columns, [sys.executable, "-m", "ckptcache.cli", *map(str, args)], typed, **env)


def on_terminal(columns: int, command: list[str], typed: bytes = b"", **env: str) -> tuple[int, str]:
    """Run any program on a pseudo-terminal of so many columns, likewise."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**env))
    os.close(theirs)
    os.write(ours, typed)
    shown = bytearray()
    while chunk := _read(ours):
        shown += chunk
    os.close(ours)
    return child.wait(timeout=60), shown.decode().replace("\r\n", "\n")


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # how Linux says that the other side has closed
        return b""

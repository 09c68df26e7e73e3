"""For the tests of a training: that it resumes exactly."""

import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from ckptcache.proof.proving import POLICIES, Child, Launch, Verdict, command_launcher, prove
from ckptcache.storage import fs


def assert_resumes_exactly(
    train: Callable[..., object] | Sequence[str],
    *args: Any,
    kills: int = 3,
    at: Sequence[int] = (),
    seed: int = 0,
    resume: str = "latest",
    timeout: float | None = 600.0,
    start: Literal["spawn", "fork"] = "spawn",
) -> Verdict:
    """Fail unless a training that is killed and resumed is, bit for bit, the one that never stopped.

    `train` is run once undisturbed; then, several times, it is killed with SIGKILL and resumed, each time in a process
    of its own and with its caches below a scratch folder. Batches, generators, what is logged, and the state of all
    that is registered with its session are compared after each iteration. ::

        def test_training_resumes_exactly():
            assert_resumes_exactly(train, "configs/tiny.toml", kills=5)

    Args:
        train: a function of a module, which opens a `TrainingSession` or a `CachedTrainer` and trains a few dozen
            iterations; or a command, as a list of strings.
        args: what the function is called with; they are sent to another process.
        kills: how many iterations to kill it at, drawn by `seed`.
        at: these iterations instead.
        resume: "latest", "auto", or "id" for the id of the checkpoint that was saved before the kill.
        timeout: seconds that each run may take.
        start: how processes are started; "fork" is quicker, and inherits all that this process has set, its generators
            among it.

    Returns:
        The verdict, for what else a test may want to know of it.

    Raises:
        AssertionError: something differs; the message names the first thing that does, and the usual cause.
        ValueError: `resume` is none of these.
        NothingToProve, ProofFailed, InvalidValue: see `ckptcache.proof.proving.prove`.
    """
    if resume not in POLICIES:
        raise ValueError(f"resume must be one of {', '.join(POLICIES)}, not {resume!r}")
    launch = _function_launcher(train, args, start) if callable(train) else command_launcher([*train, *args])
    verdict = prove(launch, kills=kills, at=at, seed=seed, resume=resume, timeout=timeout)
    if verdict.difference is not None:
        raise AssertionError("\n".join(verdict.lines()))
    return verdict


class _Process:
    def __init__(self, process: Any) -> None:
        self._process = process

    @property
    def pid(self) -> int | None:
        return None if self._process.pid is None else int(self._process.pid)

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code


def _function_launcher(train: Callable[..., object], args: Sequence[Any], start: str) -> Launch:
    def launch(variables: Mapping[str, str], output: Path) -> Child:
        # A function that can't be found by its name fails here, with a message that says so.
        context: Any = get_context(start)
        process = context.Process(target=_call, args=(train, tuple(args), dict(variables), str(output)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside idle threads, which was asked for
            process.start()
        return _Process(process)

    return launch


def _call(train: Callable[..., object], args: Sequence[Any], variables: Mapping[str, str], output: str) -> None:
    if hasattr(os, "setsid"):
        os.setsid()
    # Left open: the traceback of what `train` raises is written after this function.
    file = fs.new_file(Path(output))
    for number in (1, 2):
        os.dup2(file.fileno(), number)
    sys.stdout = sys.stderr = io.TextIOWrapper(file, errors="backslashreplace", write_through=True)
    os.environ.update(variables)
    train(*args)

"""What one save costs: how long the loop stands still, how long until it is durable, processor, memory, disk."""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import disk, meters
from bench.cases import Case, Options, Result, figures, result
from bench.peers import PEERS, Peer, missing
from bench.tabulate import memory_ratios, named, ratios, times, yes_no
from bench.workload import Training, make_training, parse_size
from ckptcache import words
from ckptcache.cli import tables

REPEATS = 3
SIZES = tuple(map(parse_size, ("10MB", "100MB", "500MB", "1.5GB")))
FULL_SIZES = (*SIZES, *map(parse_size, ("3GB", "6GB")))
TOGETHER_BELOW = 10**9
"""States smaller than this share a process, which takes longer to start than they take to save."""
RAW = "raw"
LENGTH = 64
"""Tokens of a step's sequence."""
STEPS_BEFORE = 10
"""Steps from the beginning of a training to its first save, which are few."""


def cases(options: Options) -> list[Case]:
    """Every peer, and the system by itself, at every size; the largest first, so that want of room shows soon."""
    sizes = options.sizes or (FULL_SIZES if options.full else SIZES)
    small = tuple(sorted(size for size in sizes if size < TOGETHER_BELOW))
    groups = [*((size,) for size in sorted(sizes, reverse=True) if size >= TOGETHER_BELOW), *([small] if small else [])]
    names = (RAW, *(options.peers or PEERS))
    return [Case("save", (name,), group, options.repeats or REPEATS) for group in groups for name in names]


def measure(case: Case, folder: Path) -> list[Result]:
    """One peer, or the yardsticks."""
    name = case.names[0]
    found: list[Result] = []
    for size in case.sizes:
        own = folder / f"{size}"
        own.mkdir()
        if name == RAW:
            found += _yardsticks(case, size, own)
        elif (module := missing(name)) is not None:
            found.append(result(case, name, size, missing=module))
        else:
            found.append(_measure(case, name, size, own))
    return found


# --- a peer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """A save with nothing beside it, in seconds: until the call returned, it was finished, it was durable."""

    call: float
    finished: float
    durable: float
    processor: float


def _measure(case: Case, name: str, size: int, folder: Path) -> Result:
    training = make_training(size, length=LENGTH)
    kind = PEERS[name]
    with closing(kind(folder / name)) as peer:
        without = _resident(training)
        first = _first(peer, training)
        save_alone(peer, training)
        alone, steps, highest = [], [], 0
        for _ in range(case.repeats):
            _resident(training)
            meters.reset_highest()
            alone.append(save_alone(peer, training))
            highest = max(highest, meters.highest())
            steps.append(in_step(peer, training))
        disk_bytes = disk.disk_bytes(peer.files())
    return result(
        case,
        name,
        size,
        bytes=training.nbytes,
        **figures(
            {
                "call": [call for call, _ in steps],
                "wait": [wait for _, wait in steps],
                "blocked": [call + wait for call, wait in steps],
                "first": [first],
                "finished": [found.finished for found in alone],
                "durable": [found.durable for found in alone],
                "processor": [found.processor for found in alone],
            }
        ),
        memory_bytes=highest - without if highest else None,
        disk_bytes=disk_bytes,
        durable=kind.durable,
        verified=kind.verified,
        atomic=kind.atomic,
    )


def _first(peer: Peer, training: Training) -> float:
    """How long the loop stands still for the first save of a training, which has made a few steps."""
    peer.get_ready(training)
    for _ in range(STEPS_BEFORE):
        training.gradients()
        training.update()
    return sum(in_step(peer, training))


def _resident(training: Training) -> int:
    """Bytes held without gradients, as between two steps."""
    training.optimizer.zero_grad()
    gc.collect()
    return meters.resident()


def save_alone(peer: Peer, training: Training) -> Alone:
    """A save, waited for, and synced where the peer doesn't do so itself."""
    start, processor = time.perf_counter(), meters.processor_seconds()
    peer.save(training)
    call = time.perf_counter() - start
    peer.wait()
    finished, processor = time.perf_counter() - start, meters.processor_seconds() - processor
    if peer.durable != "yes":
        disk.sync(peer.files())
    durable = time.perf_counter() - start
    peer.remove_older()
    return Alone(call, finished, durable, processor)


def in_step(peer: Peer, training: Training) -> tuple[float, float]:
    """How long the loop stands still for a save before a step of training: at the call, and before the update."""
    call = meters.seconds(lambda: peer.save(training))
    training.gradients()
    wait = meters.seconds(peer.allow_step) + training.update()
    peer.wait()
    # What is still to be written is not to disturb what is measured next.
    disk.sync(peer.files())
    peer.remove_older()
    return call, wait


# --- the yardsticks ------------------------------------------------------------------------------


def _yardsticks(case: Case, size: int, folder: Path) -> list[Result]:
    nbytes = make_training(size).nbytes
    buffer = disk.touched(nbytes)
    path = folder / RAW
    source = np.frombuffer(buffer, dtype=np.uint8)
    target = np.ones_like(source)
    actions: dict[str, Callable[[], object]] = {
        "copy": lambda: np.copyto(target, source),
        "write + fsync": lambda: disk.write_and_sync(path, buffer, nbytes),
        "O_DIRECT + fsync": lambda: disk.write_directly(path, buffer, nbytes),
    }
    named = {name: result(case, name, size, bytes=nbytes, yardstick=True) for name in actions}
    return [{**named[name], **_yardstick(case.repeats, action, path)} for name, action in actions.items()]


def _yardstick(repeats: int, action: Callable[[], object], path: Path) -> dict[str, Any]:
    walls, processors = [], []
    for repeat in range(repeats + 1):
        path.unlink(missing_ok=True)
        processor = meters.processor_seconds()
        try:
            wall = meters.seconds(action)
        except OSError as error:
            return {"failed": str(error.strerror)}
        if repeat:
            walls.append(wall)
            processors.append(meters.processor_seconds() - processor)
    return figures({"durable": walls, "processor": processors})


def raw_write(results: Sequence[Result]) -> float | None:
    """Milliseconds of the faster way to write the same bytes durably."""
    found = [r["durable_ms"] for r in results if r.get("yardstick") and "fsync" in r["name"] and "durable_ms" in r]
    return min(found, default=None)


# --- the table -----------------------------------------------------------------------------------


def report(results: list[Result]) -> list[str]:
    """A table for the largest size, and how blocked and durable time grow."""
    sizes = sorted({r["size"] for r in results})
    return [*_one_size([r for r in results if r["size"] == sizes[-1]]), *(_growth(results, sizes) if sizes[1:] else [])]


def _one_size(rows: list[Result]) -> list[str]:
    raw = raw_write(rows)
    lines = tables.table(
        [
            named(rows),
            *times(rows, {"blocked": "blocked_ms", "first": "first_ms"}),
            tables.Column("× best", ratios(rows, "blocked_ms"), right=True),
            *times(rows, {"call": "call_ms", "wait": "wait_ms", "finished": "finished_ms"}, keep=20),
            *times(rows, {"durable": "durable_ms"}),
            tables.Column("× raw", ratios(rows, "durable_ms", raw), right=True),
            *times(rows, {"processor": "processor_ms"}),
            tables.Column("memory × state", memory_ratios(rows), keep=50, right=True),
            tables.Column("disk", [words.size(r.get("disk_bytes")) for r in rows], keep=30, right=True),
            tables.Column("durable by itself", [r.get("durable", "") for r in rows]),
            tables.Column("verified", yes_no(rows, "verified")),
            tables.Column("atomic", yes_no(rows, "atomic"), keep=40),
        ]
    )
    held = next((r["bytes"] for r in rows if "bytes" in r), rows[0]["size"])
    return [f"save: a state of {words.size(held)}, medians of {rows[0]['repeats']}", "", *lines, ""]


def _growth(results: list[Result], sizes: Sequence[int]) -> list[str]:
    names = list(dict.fromkeys(r["name"] for r in results))
    found = {(r["name"], r["size"]): r for r in results}
    rows = [found[name, sizes[-1]] for name in names if (name, sizes[-1]) in found]
    columns = [
        tables.Column(
            f"{what} {words.size(size)}",
            [_cell(found.get((row["name"], size), {}).get(f"{what}_ms")) for row in rows],
            right=True,
        )
        for what in ("blocked", "durable")
        for size in sizes
    ]
    return ["save: how it grows, in milliseconds", "", *tables.table([named(rows), *columns]), ""]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"

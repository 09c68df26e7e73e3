"""What a restore costs, into a live model and optimizer and to the end of the first step, page cache warm and cold."""

import gc
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import disk, meters
from bench.cases import Case, Options, Result, figures, result
from bench.peers import PEERS, Peer, TorchNoCrc, missing
from bench.tabulate import memory_ratios, named, ratios, times, yes_no
from bench.workload import Training, make_training, parse_size
from ckptcache import words
from ckptcache.cli import tables

REPEATS = 3
SIZE = parse_size("1.5GB")
MAPPED, READ = "torch.load(mmap) + copy", "one read of the file"
YARDSTICK = "mapped"
LENGTH = 32
"""Tokens of the first step's sequence."""


def cases(options: Options) -> list[Case]:
    """Every peer that restores in a way of its own, and the yardstick."""
    size = max(options.sizes or (SIZE,))
    names = [name for name in (options.peers or PEERS) if PEERS[name].restores_like is None]
    return [Case("restore", (name,), (size,), options.repeats or REPEATS) for name in (YARDSTICK, *names)]


def measure(case: Case, folder: Path) -> list[Result]:
    """One peer, or the yardstick."""
    name = case.names[0]
    if name != YARDSTICK and (module := missing(name)) is not None:
        return [result(case, name, case.sizes[0], missing=module)]
    with closing((_Mapped if name == YARDSTICK else PEERS[name])(folder / name)) as peer:
        nbytes = _save_and_check(peer, case.sizes[0])
        rows = [_restores(case, peer, MAPPED if name == YARDSTICK else name)]
        if name == YARDSTICK:
            rows.append(_reads(case, peer))
    return [{**row, "bytes": nbytes, "yardstick": name == YARDSTICK} for row in rows]


class _Mapped(TorchNoCrc):
    """Maps a file and copies what it holds, so that nothing goes on depending on the file."""

    def restore(self, training: Training) -> None:
        state = torch.load(self.path, weights_only=True, mmap=True)
        training.model.load_state_dict(state["model"])
        for held in state["optimizer"]["state"].values():
            held.update((name, tensor.clone()) for name, tensor in held.items())
        training.optimizer.load_state_dict(state["optimizer"])


def _save_and_check(peer: Peer, size: int) -> int:
    """Save a training, and see that what a restore gives is that training; returns its bytes."""
    training = make_training(size)
    peer.save(training)
    peer.wait()
    disk.sync(peer.files())
    fresh = _fresh(size)
    peer.restore(fresh)
    if not all(torch.equal(a, b) for a, b in zip(training.tensors(), fresh.tensors(), strict=True)):
        raise RuntimeError(f"{peer.title}: what was restored is not what was saved")
    return training.nbytes


def _fresh(size: int) -> Training:
    return make_training(size, seed=1, length=LENGTH, is_fresh=True)


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restored:
    """Seconds until everything was in place, and until the first step was done; processor seconds and bytes of memory
    that the restore took."""

    loaded: float
    stepped: float
    processor: float
    memory: int


def _restores(case: Case, peer: Peer, name: str) -> Result:
    size = case.sizes[0]
    warm = [_restore(peer, size, disk.read_once) for _ in range(case.repeats)]
    cold = [_restore(peer, size, disk.forget) for _ in range(case.repeats)]
    columns = {
        "warm": [found.loaded for found in warm],
        "warm_step": [found.stepped for found in warm],
        "cold": [found.loaded for found in cold],
        "cold_step": [found.stepped for found in cold],
        "processor": [found.processor for found in warm],
    }
    return result(
        case,
        name,
        size,
        **figures(columns),
        memory_bytes=max(found.memory for found in warm) or None,
        verified=peer.verified and name in PEERS,
    )


def _restore(peer: Peer, size: int, prepare: Callable[[list[Path]], None]) -> Restored:
    gc.collect()
    training = _fresh(size)
    prepare(peer.files())
    before = meters.resident()
    meters.reset_highest()
    start, processor = time.perf_counter(), meters.processor_seconds()
    peer.restore(training)
    loaded, processor = time.perf_counter() - start, meters.processor_seconds() - processor
    highest = meters.highest()
    training.gradients()
    training.update()
    return Restored(loaded, time.perf_counter() - start, processor, max(highest - before, 0))


def _reads(case: Case, peer: Peer) -> Result:
    warm, cold = [], []
    for _ in range(case.repeats):
        disk.read_once(peer.files())
        warm.append(meters.seconds(lambda: disk.read_once(peer.files())))
        disk.forget(peer.files())
        cold.append(meters.seconds(lambda: disk.read_once(peer.files())))
    return result(case, READ, case.sizes[0], **figures({"warm": warm, "cold": cold}))


# --- the table -----------------------------------------------------------------------------------


def report(results: list[Result]) -> list[str]:
    """The table: medians in milliseconds."""
    goal = sum(r["warm_ms"] for r in results if r.get("yardstick") and "warm_ms" in r)
    lines = tables.table(
        [
            named(results),
            *times(results, {"warm": "warm_ms"}),
            tables.Column("× best", ratios(results, "warm_ms"), right=True),
            tables.Column("× mapped + read", ratios(results, "warm_ms", goal), right=True),
            *times(results, {"warm + first step": "warm_step_ms", "cold": "cold_ms"}),
            *times(results, {"cold + first step": "cold_step_ms", "processor": "processor_ms"}),
            tables.Column("memory × state", memory_ratios(results), keep=50, right=True),
            tables.Column("verified", yes_no(results, "verified")),
        ]
    )
    held = next((r["bytes"] for r in results if "bytes" in r), results[0]["size"])
    return [f"restore: a state of {words.size(held)}, medians of {results[0]['repeats']}", "", *lines, ""]

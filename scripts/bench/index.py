"""What the index costs: to open a cache, to name the best checkpoint that fits, to commit one record."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cases import Case, Options, Result, figures
from bench.disktime import samples
from ckptcache.cache import TrainingCache
from ckptcache.cli import tables
from ckptcache.config import CacheConfig
from ckptcache.metadata import MAX_CURVE_POINTS, CheckpointMetadata, Fingerprint, SessionRecord
from ckptcache.storage.index import INDEX_NAME, Index, serialise
from ckptcache.storage.reconcile import sidecar_bytes

REPEATS = 15
SIZES = (10, 1_000, 10_000)
FULL_SIZES = (*SIZES, 100_000)
FILES = 5
FILE_BYTES = 4096
SAVES_PER_SESSION = 20
FULL_CURVES, SHORT_CURVE = 20, 20
"""As the ledger keeps them: so many sessions with whole curves, and so many points of the others'."""
MODEL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50304, "block_size": 1024, "dropout": 0.0}
DATA = {"kind": "text", "tokenizer": "gpt2", "train_digest": "blake3:1", "val_digest": "blake3:2"}
TRAINING = {"learning_rate": 6e-4, "batch_size": 12, "max_iters": 5000, "weight_decay": 0.1, "seed": 1337}
ENVIRONMENT = {"python": "3.12.3", "platform": "linux", "torch": "2.13.0", "device": "cpu", "git_commit": "0" * 40}


def cases(options: Options) -> list[Case]:
    """Every action at every size."""
    sizes = [size for size in (FULL_SIZES if options.full else SIZES) if options.most is None or size <= options.most]
    return [Case("index", (name,), (size,), options.repeats or REPEATS) for size in sizes for name in ACTIONS]


def measure(case: Case, folder: Path) -> list[Result]:
    """One action, in a cache that is made in `folder`."""
    # With a metric beyond [0, 1] each opening would print its warning.
    logging.getLogger("ckptcache").setLevel(logging.ERROR)
    cache, (count,) = folder / "cache", case.sizes
    make_cache(cache, count)
    found = samples(ACTIONS[case.names[0]](cache, count), case.repeats)
    columns = {
        "wall": [s.wall for s in found],
        "processor": [s.processor for s in found],
        "disk": [s.disk for s in found],
        "beyond_disk": [s.wall - s.disk for s in found],
    }
    named = {"benchmark": "index", "name": case.names[0], "records": count, "repeats": case.repeats}
    return [{**named, **figures(columns)}]


def report(results: list[Result]) -> list[str]:
    """The table: medians in milliseconds."""
    times = {"wall": "wall_ms", "of that disk": "disk_ms", "beyond disk": "beyond_disk_ms", "processor": "processor_ms"}
    rows = [r for r in results if "failed" not in r]
    return tables.table(
        [
            tables.Column("case", [r["name"] for r in rows]),
            tables.Column("records", [str(r["records"]) for r in rows], right=True),
            *(tables.Column(title, [f"{r[key]:.2f}" for r in rows], right=True) for title, key in times.items()),
        ]
    )


# --- what is measured ----------------------------------------------------------------------------


def _config(folder: Path, count: int) -> CacheConfig:
    return CacheConfig(cache_dir=str(folder), max_checkpoints=FILES, max_records=max(count, 1000))


def _open(folder: Path, count: int) -> Callable[[], object]:
    """A process's first look at a cache: what is recorded and what is there."""
    return lambda: TrainingCache(_config(folder, count)).view()


def _open_and_best(folder: Path, count: int) -> Callable[[], object]:
    """What a run does first: open, and name the best checkpoint that fits."""
    return lambda: TrainingCache(_config(folder, count)).best(model_config=MODEL, data_config=DATA)


def _best(folder: Path, count: int) -> Callable[[], object]:
    """The same in a process that has looked before."""
    cache = TrainingCache(_config(folder, count))
    return lambda: cache.best(model_config=MODEL, data_config=DATA)


def _first_commit(folder: Path, count: int) -> Callable[[], object]:
    """What a command does that changes one record: open, and commit, with nothing known from before."""
    notes = iter(range(1000))
    return lambda: TrainingCache(_config(folder, count)).note("latest", f"note {next(notes)}")


def _commit(folder: Path, count: int) -> Callable[[], object]:
    """One new record, put beside those that are there; the lowest goes once there are `max_records`."""
    cache, numbers = TrainingCache(_config(folder, count)), iter(range(count, 10 * count + 1000))

    def commit() -> None:
        with cache.ledger.change() as change:
            change.put(_record(next(numbers), _hashes(change.index), has_file=False))

    return commit


def _save(folder: Path, count: int) -> Callable[[], object]:
    """All that a save does, of a state of 16 bytes: capture, file, record, and eviction of what is beyond the limit."""
    import torch

    cache, numbers = TrainingCache(_config(folder, count)), iter(range(count, 10 * count + 1000))
    configs = {"model_config": MODEL, "training_config": TRAINING, "data_config": DATA}

    def save() -> object:
        number = next(numbers)
        return cache.save({"w": torch.zeros(4)}, iteration=100 * number, val_loss=_loss(number), **configs)

    return save


ACTIONS: dict[str, Callable[[Path, int], Callable[[], object]]] = {
    "open": _open,
    "open and best": _open_and_best,
    "best": _best,
    "first commit": _first_commit,
    "commit": _commit,
    "save": _save,
}


# --- a cache that has been used ------------------------------------------------------------------


def make_cache(folder: Path, count: int) -> None:
    """A cache of `count` records and their sessions, the newest few with files, the others evicted."""
    index = Index()
    names = _hashes(index)
    for number in range(count):
        record = _record(number, names, has_file=number >= count - FILES)
        index.checkpoints[record.id] = record
    sessions = -(-count // SAVES_PER_SESSION)
    for number in range(sessions):
        session = _session(number, names["config"], is_recent=number >= sessions - FULL_CURVES)
        index.sessions[session.id] = session
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    for record in list(index.checkpoints.values())[-FILES:]:
        (checkpoints / f"{record.id}.pt").write_bytes(bytes(FILE_BYTES))
        (checkpoints / f"{record.id}.json").write_bytes(sidecar_bytes(record, index))
    (folder / INDEX_NAME).write_bytes(serialise(index))


def _hashes(index: Index) -> dict[str, Any]:
    """The names under which the index keeps what all records share."""
    parameters = {f"transformer.h.{i}.attn.c_attn.weight": "float32[2304, 768]" for i in range(150)}
    fingerprint = Fingerprint(parameters=parameters, optimizers={"optimizer": {"class": "AdamW", "groups": [50, 100]}})
    configs = {"model_config": MODEL, "training_config": TRAINING, "data_config": DATA}
    held = {name: index.store_config(config) for name, config in configs.items()}
    return {**held, "fingerprint": index.store_fingerprint(fingerprint), "config": index.store_config(configs)}


def _loss(number: int) -> float:
    return 1.5 + 3 / (1 + number / 50) + (number * 7919 % 101) / 5000


def _record(number: int, names: dict[str, Any], *, has_file: bool) -> CheckpointMetadata:
    session, loss = number // SAVES_PER_SESSION, _loss(number)
    return CheckpointMetadata(
        id=f"ckpt_20260101_000000_{number:08d}_0a1b2c3d_{number % 65536:04x}",
        sequence=number + 1,
        created_at="2026-01-01T00:00:00Z",
        session=_session_id(session),
        parents=(f"ckpt_20260101_000000_{number - 1:08d}_0a1b2c3d_{(number - 1) % 65536:04x}",) if number else (),
        iteration=100 * number,
        epoch=number / 7,
        train_loss=loss - 0.0625,
        val_loss=loss,
        learning_rate=(6e-4 / (1 + number / 100), 6e-5),
        metrics={"accuracy": 1 / (1 + loss), "perplexity": 2.0**loss, "grad_norm": 1.0 + number % 13 / 10},
        quality_score=1 / (1 + loss),
        save_reason="improved" if number % 3 else "interval",
        **{name: value for name, value in names.items() if name != "config"},
        contents=("model", "optimizer", "scheduler", "rng", "loader"),
        tags=("baseline",) if number % 50 == 0 else (),
        decision=None if has_file else "evicted",
        decision_reason=None if has_file else "rank 6 of its group, and max_checkpoints is 5",
        size=FILE_BYTES,
        digest=f"blake3:{number:064x}",
        environment=ENVIRONMENT,
    )


def _session_id(number: int) -> str:
    return f"sess_20260101_000000_{number:08x}"


def _session(number: int, config: str | None, *, is_recent: bool) -> SessionRecord:
    start, points = 100 * SAVES_PER_SESSION * number, MAX_CURVE_POINTS if is_recent else SHORT_CURVE
    curve = tuple((start + 10 * i, 2.5 + 1 / (1 + i)) for i in range(points))
    return SessionRecord(
        id=_session_id(number),
        sequence=SAVES_PER_SESSION * number + 1,
        config=config,
        started_at="2026-01-01T00:00:00Z",
        ended_at="2026-01-01T01:00:00Z",
        start_iteration=start,
        end_iteration=start + 100 * SAVES_PER_SESSION,
        first_val_loss=2.75,
        last_val_loss=2.5,
        best_val_loss=2.5,
        saved=SAVES_PER_SESSION,
        seconds=3600.0,
        stop_reason="max_seconds",
        curves={"loss": curve, "val_loss": curve, "learning_rate": curve},
        environment=ENVIRONMENT,
    )

#!/usr/bin/env python3
"""What a warm start gains: a small NanEcho grown into a larger one, against the larger one from nothing.

For each seed it trains a donor, then the larger model twice at the same settings, once with the donor's weights and
once without, all by `scripts/train_cached.py`. The one that begins from nothing goes on for as many iterations again,
since the donor's had to be made, too. It prints a table in Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent
DONOR = {"n_layer": 4, "n_head": 4, "n_embd": 64, "block_size": 64, "batch_size": 16, "warmup_iters": 20}
GROWTHS = {
    "4 to 6 layers": {"n_layer": 6},
    "64 to 96 wide, 4 to 6 heads": {"n_embd": 96, "n_head": 6},
}


@dataclass(frozen=True)
class Run:
    """One session: its summary, and its validation losses by iteration."""

    summary: dict[str, Any]
    losses: dict[int, float]


@dataclass(frozen=True)
class Comparison:
    """One growth with one seed."""

    growth: str
    seed: int
    donor: float
    warm: Run
    fresh: Run


def main() -> int:
    given = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="ckptcache-growth-") as folder:
        found = [
            c for seed in given.seeds for c in compare(Path(folder) / str(seed), seed, given.iters, given.data_dir)
        ]
    sys.stdout.write("\n".join(table(found, given.iters)) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one comparison each (default: 1 2 3)")
    made.add_argument(
        "--iters", type=int, default=300, help="iterations of the donor, and of each start (default: 300)"
    )
    made.add_argument("--data_dir", help="what train_cached.py takes (default: Python's own source)")
    return made


def compare(folder: Path, seed: int, iters: int, data_dir: str | None) -> Iterator[Comparison]:
    """Each growth from one donor; the larger models see the same batches, warm and fresh."""
    common = {"seed": seed, "session_iters": iters, "eval_interval": max(1, iters // 6), "data_dir": data_dir}
    donor = train(folder / "donor", {**DONOR, **common})
    best = donor.summary["best_checkpoint"]
    for number, (growth, larger) in enumerate(GROWTHS.items()):
        settings = {**DONOR, **larger, **common, "seed": seed + 1000}
        warm = train(folder / f"warm{number}", {**settings, "warm_start": f"{folder / 'donor' / 'cache'}:{best}"})
        fresh = train(folder / f"fresh{number}", {**settings, "session_iters": 2 * iters})
        yield Comparison(growth, seed, donor.summary["best_val_loss"], warm, fresh)


def train(folder: Path, settings: dict[str, Any]) -> Run:
    """One run of train_cached.py in a folder of its own."""
    folder.mkdir(parents=True)
    config = folder / "settings.json"
    config.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    command = [
        sys.executable,
        str(SCRIPTS / "train_cached.py"),
        "--config",
        str(config),
        "--out_dir",
        str(folder),
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    summary = json.loads(done.stdout)
    index = json.loads((folder / "cache" / "metadata.json").read_text())
    curve = index["sessions"][summary["session"]]["curves"]["val_loss"]
    return Run(summary, dict(curve))


def table(found: Sequence[Comparison], iters: int) -> Iterator[str]:
    """A row per growth and seed, and the means."""
    half = sorted(found[0].warm.losses)[len(found[0].warm.losses) // 2]
    ends = [f"warm at {half}", f"fresh at {half}", f"warm at {iters}", f"fresh at {iters}", f"fresh at {2 * iters}"]
    yield row(["growth", "seed", "donor", "warm at 0", *ends])
    yield row(["---", *["---:"] * 8])
    for growth in dict.fromkeys(c.growth for c in found):
        rows = {c.seed: numbers(c, half, iters) for c in found if c.growth == growth}
        means = [statistics.fmean(column) for column in zip(*rows.values(), strict=True)]
        for seed, cells in (*rows.items(), ("mean", means)):
            shown = [f"{n:.7f}" for n in cells[:2]] + [f"{n:.4f}" for n in cells[2:]]
            yield row([growth, str(seed), *shown])


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def numbers(c: Comparison, half: int, iters: int) -> list[float]:
    """The columns of a row, but for the first two."""
    warm, fresh = c.warm.losses, c.fresh.losses
    return [
        c.donor,
        c.warm.summary["first_val_loss"],
        warm[half],
        fresh[half],
        warm[iters],
        fresh[iters],
        fresh[2 * iters],
    ]


if __name__ == "__main__":
    sys.exit(main())

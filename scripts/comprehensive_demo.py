#!/usr/bin/env python3
"""What a checkpoint cache saves, measured: five sessions that go on from the best of those before them,
beside five that start afresh with the same budget, over three seeds. Real training on real text.

Writes a table, a picture (PNG and SVG) and the numbers (JSON) to --out_dir.
"""

import argparse
import logging
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ckptcache import TrainingCache
from ckptcache.nanecho.data import Corpus, load_corpus
from ckptcache.nanecho.settings import NanEchoConfig, TrainingSettings
from ckptcache.nanecho.trainer import CachedNanEchoTrainer
from ckptcache.trainer import CachedTrainer, Callback

MODEL = NanEchoConfig(n_layer=2, n_head=4, n_embd=64, block_size=64)


@dataclass(frozen=True)
class Run:
    """One session: what it started with and what it came to."""

    seed: int
    session: int
    is_cached: bool
    start_iteration: int
    points: list[tuple[int, float]]
    """Iteration within the session, and val_loss."""

    @property
    def first(self) -> float:
        return self.points[0][1]

    @property
    def best(self) -> float:
        return min(loss for _, loss in self.points)

    def iterations_to(self, loss: float) -> int | None:
        """After how many of its own iterations it was at `loss` or below; None if never."""
        return next((i for i, value in self.points if value <= loss), None)


class Recorder(Callback):
    """Keeps every evaluation of a session."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.points: list[tuple[int, float]] = []
        self._progress, self._task = progress, task

    def after_step(self, trainer: CachedTrainer, iteration: int, loss: torch.Tensor) -> None:
        self._progress.advance(self._task)

    def after_evaluation(self, trainer: CachedTrainer, val_loss: float | None, metrics: Mapping[str, float]) -> None:
        if val_loss is not None:
            self.points.append((trainer.session.iteration - trainer.starting_iteration, val_loss))


def train(corpus: Corpus, folder: Path, settings: TrainingSettings, recorder: Recorder, resume: str) -> int:
    cache = TrainingCache(folder, max_checkpoints=4)
    trainer = CachedNanEchoTrainer(MODEL, settings, corpus, cache, callbacks=(recorder,), resume=resume)
    trainer.train()
    return trainer.starting_iteration


def measure(corpus: Corpus, seeds: list[int], sessions: int, iters: int, console: Console) -> list[Run]:
    runs = []
    with Progress(console=console, transient=True) as progress, tempfile.TemporaryDirectory() as scratch:
        task = progress.add_task("training", total=len(seeds) * sessions * 2 * iters)
        for seed in seeds:
            for session in range(1, sessions + 1):
                for is_cached in (True, False):
                    # A fresh start is another draw each time, as it is for those who train without a cache;
                    # the first sessions are one and the same, for there is nothing yet to resume.
                    own_seed = seed if is_cached or session == 1 else 1000 * session + seed
                    settings = TrainingSettings(
                        session_iters=iters, seed=own_seed, eval_interval=10, eval_batches=8, checkpoint_interval=iters
                    )
                    recorder = Recorder(progress, task)
                    folder = Path(scratch) / (f"cached-{seed}" if is_cached else f"fresh-{seed}-{session}")
                    start = train(corpus, folder, settings, recorder, "best" if is_cached else "never")
                    runs.append(Run(seed, session, is_cached, start, recorder.points))
    return runs


def compare(runs: list[Run], iters: int) -> list[dict[str, Any]]:
    """Per session, medians over the seeds; "saved" is how many iterations earlier the cached session was
    as good as the fresh one came to be with its whole budget."""
    rows = []
    for session in sorted({r.session for r in runs}):
        cached = {r.seed: r for r in runs if r.session == session and r.is_cached}
        fresh = {r.seed: r for r in runs if r.session == session and not r.is_cached}
        needed = {seed: cached[seed].iterations_to(fresh[seed].best) for seed in cached}
        own = {seed: fresh[seed].iterations_to(fresh[seed].best) or iters for seed in fresh}
        saved = [own[seed] - n for seed, n in needed.items() if n is not None]
        rows.append(
            {
                "session": session,
                "cached_first": statistics.median(r.first for r in cached.values()),
                "cached_best": statistics.median(r.best for r in cached.values()),
                "fresh_best": statistics.median(r.best for r in fresh.values()),
                "saved_iterations": statistics.median(saved) if saved else None,
                "saved_range": [min(saved), max(saved)] if saved else None,
                "seeds_as_good": len(saved),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], iters: int, seeds: int) -> Table:
    t = Table(title=f"{iters} iterations a session, medians over {seeds} seeds (val_loss in nats per byte)")
    for column in ("session", "cached: first", "cached: best", "fresh: best", "saved", "seeds as good"):
        t.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        losses = (f"{row[name]:.3f}" for name in ("cached_first", "cached_best", "fresh_best"))
        t.add_row(str(row["session"]), *losses, saved_text(row), f"{row['seeds_as_good']} of {seeds}")
    return t


def saved_text(row: dict[str, Any]) -> str:
    if row["saved_iterations"] is None:
        return "never as good"
    low, high = row["saved_range"]
    return f"{row['saved_iterations']:.0f}" + (f" ({low} to {high})" if low != high else "")


def conclusion(rows: list[dict[str, Any]], iters: int) -> str:
    saved = sum(row["saved_iterations"] or 0 for row in rows)
    last = rows[-1]
    return (
        f"Where a fresh start was after its {iters} iterations, the cached sessions were {saved:.0f} of "
        f"{len(rows) * iters} iterations earlier in all; they end at {last['cached_best']:.3f}, it at "
        f"{last['fresh_best']:.3f}."
    )


def draw(runs: list[Run], iters: int, out_dir: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "ckptcache"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5))
    styles = {True: ("#1763a6", "resumes the best (cached)"), False: ("#c0504d", "starts afresh each time")}
    for run in runs:
        colour, _ = styles[run.is_cached]
        offset = (run.session - 1) * iters
        axes.plot([offset + i for i, _ in run.points], [v for _, v in run.points], color=colour, lw=1.1, alpha=0.65)
    for colour, label in styles.values():
        axes.plot([], [], color=colour, label=label)
    for session in range(1, max(r.session for r in runs)):
        axes.axvline(session * iters, color="0.8", lw=0.8, zorder=0)
    axes.set(xlabel="iterations spent, over all sessions", ylabel="validation loss (nats per byte)")
    axes.set_title(f"Five sessions of {iters} iterations, {len({r.seed for r in runs})} seeds", loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    paths = [out_dir / "comprehensive_demo.png", out_dir / "comprehensive_demo.svg"]
    figure.savefig(paths[0], dpi=150)
    figure.savefig(paths[1], metadata={"Date": None})
    plt.close(figure)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", "--out-dir", type=Path, default=Path("out/comprehensive_demo"))
    parser.add_argument("--iters", type=int, default=100, help="iterations a session (default: 100)")
    parser.add_argument("--sessions", type=int, default=5, help="sessions (default: 5)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds (default: 3)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    console = Console(highlight=False)
    corpus = load_corpus(None, block_size=MODEL.block_size)
    seeds = list(range(1, options.seeds + 1))
    runs = measure(corpus, seeds, options.sessions, options.iters, Console(stderr=True))
    rows = compare(runs, options.iters)
    options.out_dir.mkdir(parents=True, exist_ok=True)
    console.print(table(rows, options.iters, options.seeds))
    console.print(conclusion(rows, options.iters), soft_wrap=True)
    numbers = options.out_dir / "comprehensive_demo.json"
    numbers.write_bytes(orjson.dumps({"rows": rows, "runs": [asdict(r) for r in runs]}, option=orjson.OPT_INDENT_2))
    for path in (*draw(runs, options.iters, options.out_dir), numbers):
        console.print(f"wrote {path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()

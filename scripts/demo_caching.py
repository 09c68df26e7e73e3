#!/usr/bin/env python3
"""A guided tour of ckptcache in under a minute: a small model, real text, a folder that is thrown away after."""

import argparse
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from ckptcache import TrainingCache, TrainingSession
from ckptcache.nanecho.data import Corpus, load_corpus
from ckptcache.nanecho.model import NanEcho
from ckptcache.nanecho.sampler import BlockSampler, evaluation_batches
from ckptcache.nanecho.settings import NanEchoConfig

console = Console(highlight=False)


def title(text: str) -> None:
    console.print()
    console.print(Markdown(f"## {text}"))


def say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


class Job:
    """A model, its optimizer and its batches: what any training script has."""

    def __init__(self, corpus: Corpus, **changes: Any) -> None:
        torch.manual_seed(1)
        self.config = NanEchoConfig(n_layer=1, n_head=2, n_embd=48, block_size=48, connection_ratio=1.0, **changes)
        self.data_config = corpus.data_config
        self.model = NanEcho(self.config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=4e-3)
        self.batches = BlockSampler(corpus.train, block_size=48, batch_size=16, seed=1)
        self.validation = evaluation_batches(corpus.val, 48, 16, 8)

    def train_step(self) -> torch.Tensor:
        loss = self.model(*self.batches.next_batch())[1]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> float:
        return sum(float(self.model(x, y)[1]) for x, y in self.validation) / len(self.validation)


def run_session(cache: TrainingCache, job: Job, max_iters: int) -> None:
    with TrainingSession(
        cache,
        model=job.model,
        optimizer=job.optimizer,
        loader=job.batches,
        model_config=job.config,
        data_config=job.data_config,
    ) as session:
        for line in session.messages:
            say(f"  {line}")
        for step in session.steps(max_iters):
            session.log(loss=job.train_step())
            if (step + 1) % 20 == 0:
                session.checkpoint(val_loss=job.evaluate())
    summary = session.summary()
    say(
        f"  trained iterations {summary['start_iteration']} to {summary['end_iteration']}, "
        f"best val_loss {summary['best_val_loss']:.3f}, {summary['saved']} checkpoints saved"
    )


def listing(cache: TrainingCache) -> None:
    for record in cache.checkpoints():
        loss = "-" if record.val_loss is None else f"{record.val_loss:.3f}"
        quality = "-" if record.quality_score is None else f"{record.quality_score:.4f}"
        say(f"  {record.id}  val_loss {loss}  quality {quality}  {record.save_reason}")


def tour(folder: Path) -> None:
    corpus = load_corpus(None, block_size=48)
    cache = TrainingCache(folder, max_checkpoints=4)

    title("1. A session trains, and saves what is better")
    run_session(cache, Job(corpus), max_iters=60)

    title("2. A new process finds the best checkpoint that fits, and goes on")
    run_session(cache, Job(corpus), max_iters=120)

    title("3. What is kept: at most 4, best first")
    listing(cache)

    title("4. Another model is told why nothing fits")
    other = Job(corpus, bias=True)
    for explanation in cache.explain(model=other.model, model_config=other.config, data_config=other.data_config)[:2]:
        say(f"  {explanation.record.id}: {explanation.reason}")

    title("5. Names and pins protect; a dry run says what would go")
    worst = cache.checkpoints()[-1]
    cache.name(worst.id, "before-lunch")
    plan = TrainingCache(folder, max_checkpoints=2).prune(dry_run=True)
    for id, reason in {**plan.kept, **plan.evicted}.items():
        say(f"  {'stays' if id in plan.kept else 'goes '}  {id}: {reason}")

    title("6. A damaged file is found before anything of it is read; the next best is used")
    best = cache.checkpoints()[0]
    path = cache.cache_dir / "checkpoints" / f"{best.id}.pt"
    flip_one_bit(path)
    job = Job(corpus)
    restored = cache.restore(
        {"model": job.model, "optimizer": job.optimizer}, model_config=job.config, data_config=job.data_config
    )
    for note in restored.notes if restored else ():
        say(f"  {note}")
    if restored is not None:
        say(f"  restored {restored.record.id}, val_loss {job.evaluate():.3f}")

    title("7. A checkpoint is torch's own file, and can leave")
    exported = cache.export("best", folder / "best.safetensors")
    say(f"  exported to {exported.name}, {exported.stat().st_size:,} bytes")
    parts = torch.load(cache.cache_dir / "checkpoints" / f"{cache.get('best').id}.pt", weights_only=True)
    say(f"  torch.load(..., weights_only=True) gives {', '.join(parts)}")


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the cache in DIR, to look at it afterwards")
    keep = parser.parse_args().keep
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    folder = keep or Path(tempfile.mkdtemp(prefix="ckptcache-demo-"))
    try:
        tour(folder / "cache")
        title("The same from the command line")
        say(f"  ckptcache --cache-dir {folder / 'cache'} ls      (run this demo with --keep DIR, and look)")
    finally:
        if keep is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()

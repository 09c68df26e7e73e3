#!/usr/bin/env python3
"""Train a small GPT on text, from the best checkpoint of all runs before.

Run it, stop it, run it again: each run goes on from the best checkpoint that fits its model and its
data, and keeps the best within a count and a size. Without --data_dir it trains on the source of
Python's own standard library.
"""

import argparse
import logging
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from ckptcache.config import CacheConfig, setting_help
from ckptcache.errors import CkptCacheError
from ckptcache.nanecho.settings import DEFAULT_SESSION_ITERS, NanEchoConfig, TrainingSettings, load_settings

OUT_DIR = "out/nanecho-cached"
EXAMPLES = """\
examples:
  train_cached.py                              300 iterations more, from the best so far
  train_cached.py --max_iters 2000             up to 2,000 iterations in all
  train_cached.py --force_fresh_start          begin at 0; nothing is removed
  train_cached.py --data_dir my_texts --json   one JSON object on stdout at the end

Dashes work as well as underscores. What is on the command line wins over --config, that over the default."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    where = p.add_argument_group("where")
    add(where, "--config", type=Path, metavar="FILE", help="options in a JSON or TOML file")
    add(where, "--data_dir", type=Path, help="train.bin and val.bin, or text files (default: Python's own source)")
    add(where, "--out_dir", type=Path, help=f"where the summary goes (default: {OUT_DIR})")
    add(where, "--cache_dir", type=Path, help="where checkpoints are kept (default: OUT_DIR/cache)")
    length = p.add_argument_group("how long")
    add(length, "--max_iters", type=int, help="iterations in all, over all sessions")
    add(length, "--session_iters", type=int, help=f"in this session (default: {DEFAULT_SESSION_ITERS}, without both)")
    add(length, "--max_seconds", type=float, help="stop, with a last save, after so many seconds")
    how = p.add_argument_group("how")
    for name, kind in (("batch_size", int), ("learning_rate", float), ("seed", int), ("device", str)):
        add(how, f"--{name}", type=kind, help=setting_help(TrainingSettings, name))
    for name in ("eval_interval", "checkpoint_interval", "connection_growth_interval"):
        add(how, f"--{name}", type=int, help=setting_help(TrainingSettings, name))
    model = p.add_argument_group("the model")
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        add(model, f"--{name}", type=int, help=setting_help(NanEchoConfig, name))
    cache = p.add_argument_group("the cache")
    for name, kind in (("max_checkpoints", int), ("max_cache_size_gb", float), ("min_improvement_threshold", float)):
        add(cache, f"--{name}", type=kind, help=setting_help(CacheConfig, name))
    add(cache, "--resume", metavar="best|latest|auto|never|ID", help="from which checkpoint (default: best)")
    add(cache, "--force_fresh_start", action="store_true", default=None, help="the same as --resume never")
    add(p, "--json", action="store_true", default=None, help="one JSON object on stdout at the end")
    return p


def add(group: Any, name: str, **options: Any) -> None:
    names = [name] + ([name.replace("_", "-")] if "_" in name else [])
    group.add_argument(*names, dest=name.lstrip("-"), **options)


def options_of(given: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for: the command line over the settings file."""
    asked = {name: value for name, value in vars(given).items() if value is not None}
    config = asked.pop("config", None)
    options = {**(load_settings(config) if config else {}), **asked}
    if options.get("max_iters") is None and options.get("session_iters") is None:
        options["session_iters"] = DEFAULT_SESSION_ITERS
    if options.get("force_fresh_start"):
        options["resume"] = "never"
    return options


def main() -> int:
    given = parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        return run(options_of(given))
    except CkptCacheError as error:
        print(f"train_cached.py: error: {error}", file=sys.stderr)
        return error.exit_code


def run(options: dict[str, Any]) -> int:
    settings = TrainingSettings.of(options)
    out_dir = Path(options.get("out_dir", OUT_DIR))
    limits = {f.name: options[f.name] for f in fields(CacheConfig) if f.name in options and f.name != "cache_dir"}
    config = CacheConfig(cache_dir=str(options.get("cache_dir", out_dir / "cache")), **limits)
    NanEchoConfig.of(options)  # what is wrong is said before torch is waited for

    from ckptcache.display import stderr_console

    console = stderr_console()
    trainer = prepare(options, settings, config, out_dir, console)
    code = 0
    try:
        trainer.train()
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    summary = trainer.session.summary()
    say_summary(summary, console)
    if options.get("json"):
        sys.stdout.write(orjson.dumps(summary, option=orjson.OPT_INDENT_2).decode() + "\n")
    return code


def prepare(
    options: dict[str, Any], settings: TrainingSettings, config: CacheConfig, out_dir: Path, console: Console
) -> Any:
    with console.status("loading torch and the text") if console.is_terminal else _nothing():
        from ckptcache.cache import TrainingCache
        from ckptcache.display import TrainingDisplay
        from ckptcache.nanecho.data import load_corpus
        from ckptcache.nanecho.trainer import CachedNanEchoTrainer

        cache = TrainingCache(config)
        block_size = NanEchoConfig.of(options).block_size
        corpus = load_corpus(options.get("data_dir"), cache.data, block_size=block_size)
        model = NanEchoConfig.of({**options, "vocab_size": corpus.vocab_size})
    console.print(f"text: {corpus.name}, {len(corpus.train):,} tokens to train on, {len(corpus.val):,} to validate")
    return CachedNanEchoTrainer(
        model,
        settings,
        corpus,
        cache,
        callbacks=(TrainingDisplay(console),),
        resume=options.get("resume", "best"),
        summary_path=out_dir / "training_summary.json",
    )


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def say_summary(summary: dict[str, Any], console: Console) -> None:
    first, last = summary["start_iteration"], summary["end_iteration"]
    reason = {
        "finished": "finished",
        "max_seconds": "stopped by --max_seconds",
        "signal": "stopped by a signal, and saved",
        "nothing_to_do": "nothing was left to do",
    }.get(summary["stop_reason"], summary["stop_reason"])
    console.print(f"{reason}: iterations {first} to {last} in {summary['seconds']:.0f} s", markup=False)
    if summary["best_val_loss"] is not None:
        console.print(
            f"val_loss: first {summary['first_val_loss']:.4f}, last {summary['last_val_loss']:.4f}, "
            f"best {summary['best_val_loss']:.4f}; {summary['saved']} saved, {summary['evicted']} evicted",
            markup=False,
        )
    if summary["failed_saves"]:
        console.print(f"{summary['failed_saves']} checkpoints could not be saved", style="bold red")
    console.print(f"go on:  python3 scripts/dev.py train{changed_options()}", markup=False)
    console.print(f"look:   ckptcache --cache-dir {summary['cache_dir']} ls", markup=False)


def changed_options() -> str:
    """What was on the command line, so that the next run is the same one."""
    import shlex

    kept = [a for a in sys.argv[1:] if a not in ("--force_fresh_start", "--force-fresh-start")]
    return "".join(f" {shlex.quote(a)}" for a in kept)


if __name__ == "__main__":
    sys.exit(main())

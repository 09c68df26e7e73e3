#!/usr/bin/env python3
"""Train a small GPT on text, from the best checkpoint of all runs before.

Run it, stop it, run it again: each run goes on from the best checkpoint that fits its model and its
data, and keeps the best within a count and a size. Without --data_dir it trains on the source of
Python's own standard library.
"""

import argparse
import contextlib
import difflib
import logging
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import orjson
from rich.console import Console

from ckptcache.config import CacheConfig, setting_help
from ckptcache.errors import CacheDirIsFile, CacheDirNotWritable, CkptCacheError, InvalidValue
from ckptcache.nanecho.settings import DEFAULT_SESSION_ITERS, NanEchoConfig, TrainingSettings, load_settings

OUT_DIR = "out/nanecho-cached"
STARTER = "CKPTCACHE_STARTED_BY"
"""What a program that starts this one was called as, such as `python3 scripts/dev.py train`."""
EXAMPLES = """\
examples:
  train_cached.py                              300 iterations more, from the best so far
  train_cached.py --max_iters 2000             up to 2,000 iterations in all
  train_cached.py --force_fresh_start          begin at 0; nothing is removed
  train_cached.py --n_layer 6 --warm_start     a larger model, from what smaller ones have learned
  train_cached.py --data_dir my_texts --json   one JSON object on stdout at the end

Dashes work as well as underscores. What is on the command line wins over --config, that over the default."""


# --- the command line ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, and names the nearest option where one is unknown."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"train_cached.py: error: {message}{self._nearest(message)} (--help lists all options)\n")

    def _nearest(self, message: str) -> str:
        _, found, unknown = message.partition("unrecognized arguments: ")
        names = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown.split(" ")[0].split("=")[0], names, n=1) if found else []
        return f": did you mean {near[0]}?" if near else ""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="train_cached.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = p.add_argument_group("where")
    add(where, "--config", type=Path, metavar="FILE", help="options in a JSON or TOML file")
    add(where, "--data_dir", help="train.bin and val.bin, or text files (default: Python's own source)")
    add(where, "--out_dir", help=f"where the summary goes (default: {OUT_DIR})")
    add(where, "--cache_dir", help="where checkpoints are kept (default: OUT_DIR/cache)")
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
    say = "where nothing can be resumed from, begin with the weights of ID (or DIR:ID), or of what fits best"
    add(cache, "--warm_start", nargs="?", const=True, metavar="ID", help=say)
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
    check_kinds(options)
    if "resume" in asked and "force_fresh_start" not in asked:
        options["force_fresh_start"] = False
    if options.get("max_iters") is None and options.get("session_iters") is None:
        options["session_iters"] = DEFAULT_SESSION_ITERS
    if options.get("force_fresh_start"):
        options["resume"] = "never"
    return options


def check_kinds(options: Mapping[str, Any]) -> None:
    """What a settings file may get wrong and no dataclass judges."""
    for name in ("data_dir", "out_dir", "cache_dir", "resume"):
        if name in options and not (isinstance(options[name], str) and options[name]):
            raise InvalidValue(name=name, value=options[name], reason="it must be text, and not empty")
    for name in ("force_fresh_start", "json"):
        if not isinstance(options.get(name, False), bool):
            raise InvalidValue(name=name, value=options[name], reason="it must be true or false")
    warm = options.get("warm_start", False)
    if not (isinstance(warm, bool) or (isinstance(warm, str) and warm)):
        raise InvalidValue(name="warm_start", value=warm, reason="it must be true, false, or the id of a checkpoint")


def check_folder(path: Path) -> None:
    """Whether `path` is a folder that can be written, or can become one; nothing is made yet."""
    try:
        there = next(folder for folder in (path, *path.parents) if folder.exists())
    except OSError as error:
        raise CacheDirNotWritable(path=path, reason=(error.strerror or str(error)).lower()) from error
    if not there.is_dir():
        raise CacheDirIsFile(path=there)
    if not os.access(there, os.W_OK | os.X_OK):
        raise CacheDirNotWritable(path=there, reason="permission denied, or a read-only file system")


# --- running -------------------------------------------------------------------------------------


def main() -> int:
    try:
        return run(options_of(parser().parse_args()))
    except CkptCacheError as error:
        say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def say_error(error: CkptCacheError) -> None:
    print(f"train_cached.py: error: {error}", file=sys.stderr)


def run(options: dict[str, Any]) -> int:
    settings = TrainingSettings.of(options)
    out_dir = Path(options.get("out_dir", OUT_DIR))
    limits = {f.name: options[f.name] for f in fields(CacheConfig) if f.name in options and f.name != "cache_dir"}
    config = CacheConfig(cache_dir=options.get("cache_dir", str(out_dir / "cache")), **limits)
    NanEchoConfig.of(options)  # what is wrong is said before torch is waited for
    for folder in (out_dir, Path(config.cache_dir)):
        check_folder(folder)

    from ckptcache.display import stderr_console

    console = stderr_console()
    trainer = prepare(options, settings, config, out_dir, console)
    code = train(trainer)
    summary = trainer.session.summary()
    say_summary(summary, console)
    if recoveries := trainer.session.recoveries:
        times = "once" if recoveries == 1 else f"{recoveries} times"
        say(console, f"went back to a good checkpoint {times}, because the loss had diverged")
    say_commands(summary, options, console, keep_learning_rate=recoveries == 0)
    if options.get("json"):
        sys.stdout.write(orjson.dumps(summary, option=orjson.OPT_INDENT_2).decode() + "\n")
    return code


def prepare(
    options: dict[str, Any], settings: TrainingSettings, config: CacheConfig, out_dir: Path, console: Console
) -> Any:
    with console.status("loading torch and the text") if console.is_terminal else contextlib.nullcontext():
        from ckptcache.cache import TrainingCache
        from ckptcache.display import ConsoleHandler, TrainingDisplay
        from ckptcache.nanecho.data import load_corpus
        from ckptcache.nanecho.trainer import CachedNanEchoTrainer, pick_device

        logging.getLogger().addHandler(ConsoleHandler(console))
        warnings.showwarning = lambda message, *_: logging.getLogger().warning("%s", message)
        pick_device(settings.device)
        cache = TrainingCache(config)
        block_size = NanEchoConfig.of(options).block_size
        data_dir = Path(options["data_dir"]) if "data_dir" in options else None
        corpus = load_corpus(data_dir, cache.data, block_size=block_size, vocab_size=options.get("vocab_size"))
        model = NanEchoConfig.of({**options, "vocab_size": corpus.vocab_size})
        trainer = CachedNanEchoTrainer(
            model,
            settings,
            corpus,
            cache,
            callbacks=(TrainingDisplay(console),),
            resume=options.get("resume", "best"),
            keep_saved_learning_rate="learning_rate" not in options,
            warm_start=options.get("warm_start", False),
            summary_path=out_dir / "training_summary.json",
        )
    say(console, f"text: {corpus.name}, {len(corpus.train):,} tokens to train on, {len(corpus.val):,} to validate")
    for note in corpus.notes:
        say(console, f"  {note}")
    return trainer


def train(trainer: Any) -> int:
    """Train to the end; the exit code."""
    try:
        summary = trainer.train()
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except CkptCacheError as error:
        say_error(error)
        return error.exit_code
    return 1 if summary["stop_reason"] == "diverged" else 0


# --- the end -------------------------------------------------------------------------------------


def say(console: Console, line: str, style: str | None = None) -> None:
    """One line, whole: what is typed again must not be broken."""
    console.print(line, style=style, markup=False, soft_wrap=True)


def say_summary(summary: dict[str, Any], console: Console) -> None:
    first, last = summary["start_iteration"], summary["end_iteration"]
    reason = {
        "finished": "finished",
        "max_seconds": "stopped, because its seconds are up",
        "signal": "stopped by a signal",
        "nothing_to_do": "nothing was left to do",
        "diverged": "stopped, because the loss has diverged (a lower --learning_rate may help)",
        "error": "ended by an error",
    }.get(summary["stop_reason"], summary["stop_reason"])
    say(console, f"{reason}: iterations {first} to {last} in {summary['seconds']:.0f} s")
    losses = {name: summary[f"{name}_val_loss"] for name in ("first", "last", "best")}
    if any(loss is not None for loss in losses.values()):
        shown = ", ".join(f"{name} {number(loss)}" for name, loss in losses.items() if loss is not None)
        say(console, f"val_loss: {shown}; {summary['saved']} saved, {summary['evicted']} evicted")
    if summary["failed_saves"]:
        say(console, f"{summary['failed_saves']} checkpoints could not be saved", style="bold red")


def number(loss: float | str) -> str:
    return loss if isinstance(loss, str) else f"{loss:.4f}"


def say_commands(
    summary: Mapping[str, Any], options: Mapping[str, Any], console: Console, *, keep_learning_rate: bool
) -> None:
    """What is to be typed in the same folder to go on, and to look."""
    command = os.environ.get(STARTER) or shlex.join([interpreter(), sys.argv[0]])
    # One that was too high has been lowered, and is saved so; on the command line it would win again.
    given = sys.argv[1:] if keep_learning_rate else without(sys.argv[1:], "learning_rate", values=1)
    arguments = arguments_to_go_on(given, summary, options)
    say(console, "go on:  " + " ".join([command, *map(shlex.quote, arguments)]))
    say(console, f"look:   {command_line_tool()} --cache-dir {shlex.quote(summary['cache_dir'])} ls")


def arguments_to_go_on(given: Sequence[str], summary: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """`given`, but for what would begin again or has been reached: a fresh start, an id, max_iters."""
    first, last = summary["start_iteration"], summary["end_iteration"]
    kept = without(given, "force_fresh_start", values=0)
    kept = without(kept, "warm_start", values=int(isinstance(options.get("warm_start"), str)))
    if options.get("resume", "best") not in ("best", "latest", "auto"):
        kept = without(kept, "resume", values=1)
        # A settings file that asks for a fresh start goes on asking.
        kept += ["--resume", "best"] if has(kept, "config") else []
    if options.get("max_iters") is not None and last >= options["max_iters"]:
        more = max(last - first, 1) if last > first else DEFAULT_SESSION_ITERS
        kept = [*without(kept, "max_iters", values=1), "--max_iters", str(last + more)]
    return kept


def has(arguments: Sequence[str], option: str) -> bool:
    return without(arguments, option, values=1) != list(arguments)


def without(arguments: Sequence[str], option: str, *, values: int) -> list[str]:
    """`arguments` without an option, however it is spelled, and the values that follow it."""
    names = (f"--{option}", f"--{option.replace('_', '-')}")
    kept, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in names:
            del rest[:values]
        elif argument.partition("=")[0] not in names:
            kept.append(argument)
    return kept


def interpreter() -> str:
    """This Python as it was typed, if that finds the same one again."""
    typed = sys.orig_argv[0]
    return typed if shutil.which(typed) == sys.executable else sys.executable


def command_line_tool() -> str:
    """The `ckptcache` of this Python, by its name alone where that finds it."""
    own = Path(sys.executable).with_name("ckptcache")
    # dev.py puts .venv on the PATH of what it starts, and not on that of whoever typed it.
    found = None if STARTER in os.environ else shutil.which("ckptcache")
    if found is not None and (Path(found) == own or not own.exists()):
        return "ckptcache"
    if not own.exists():
        return shlex.join([interpreter(), "-m", "ckptcache.cli"])
    return shlex.quote(str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own))


if __name__ == "__main__":
    sys.exit(main())

"""Run benchmarks and print their tables: see `python3 scripts/dev.py bench --help`."""

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

# Started as a folder, which puts that folder on the path, and neither its package nor the project.
_SCRIPTS = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(_SCRIPTS.parent), str(_SCRIPTS)]

from bench import cases  # noqa: E402
from ckptcache import words  # noqa: E402
from ckptcache.cli import output  # noqa: E402

BENCHMARKS = {
    "save": "one save: how long the loop stands still, until it is durable, processor, memory, disk",
    "loop": "what a save adds to a running training, on the wall and of the processor",
    "restore": "into a live model and optimizer, page cache warm and cold",
    "index": "open a cache, name the best compatible checkpoint, commit a record",
}
"""Each is a module beside this one."""
_CHECKPOINTS_AT_ONCE = 4


def main() -> int:
    # So that a temporary folder goes, and a case that is running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    arguments = parser().parse_args()
    if arguments.only:
        return _only(json.loads(arguments.only), Path(arguments.folder))
    names = _chosen(arguments.benchmarks)
    options = _options(arguments)
    start = time.monotonic()
    results = {name: _run(name, options, arguments.folder) for name in names}
    machine = cases.machine()
    document = {"machine": machine, "seconds": round(time.monotonic() - start, 1)}
    document["results"] = [each for found in results.values() for each in found]
    if arguments.plot:
        _module("picture").draw(document, Path(arguments.plot))
    if arguments.json:
        output.write_json(document)
    else:
        tables = [line for name, found in results.items() for line in _module(name).report(found)]
        output.write("".join(f"{line}\n" for line in [_machine_line(machine), "", *tables]))
    return 1 if any("failed" in each for each in document["results"]) else 0


def parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<9}{summary}" for name, summary in BENCHMARKS.items())
    made = argparse.ArgumentParser(
        prog="dev.py bench",
        description="Measure what things cost, beside what others take for the same: medians, one process per case.",
        epilog=f"benchmarks:\n{listed}\n  all      all of them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("benchmarks", nargs="*", metavar="benchmark", help="see below; several may be named")
    made.add_argument("--size", metavar="SIZE,...", help="bytes of the state, like 10MB or 500MB,1.5GB")
    made.add_argument(
        "--peers", metavar="NAME,...", help="only these, like ckptcache,torch; see scripts/bench/peers.py"
    )
    made.add_argument("--full", action="store_true", help="the largest sizes too, which take minutes")
    made.add_argument("--most", type=int, metavar="N", help="of the index, only cases of at most N records")
    made.add_argument("--repeats", type=_count, metavar="N", help="runs of each case (default: each benchmark's own)")
    made.add_argument("--step", type=float, default=0.7, metavar="S", help="seconds of a loop's step (default: 0.7)")
    made.add_argument("--folder", metavar="DIR", help="on whose disk to measure (default: that of temporary files)")
    made.add_argument("--json", action="store_true", help="print one JSON document")
    made.add_argument("--plot", metavar="FILE", help="draw a picture, such as bench.png")
    made.add_argument("--only", help=argparse.SUPPRESS)
    return made


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError(text)
    return count


def _chosen(given: list[str]) -> list[str]:
    names = list(BENCHMARKS) if "all" in given else given
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        what = f"there is no benchmark {unknown[0]!r}" if unknown else "name a benchmark"
        parser().error(f"{what}: {', '.join(BENCHMARKS)}, all")
    return list(dict.fromkeys(names))


def _options(arguments: argparse.Namespace) -> cases.Options:
    return cases.Options(
        full=arguments.full,
        repeats=arguments.repeats,
        sizes=_sizes(arguments.size) if arguments.size else None,
        peers=_peers(arguments.peers) if arguments.peers else None,
        most=arguments.most,
        step=arguments.step,
    )


def _sizes(given: str) -> tuple[int, ...]:
    try:
        return tuple(_module("workload").parse_size(each) for each in given.split(","))
    except ValueError as error:
        parser().error(str(error))


def _peers(given: str) -> tuple[str, ...]:
    known = _module("peers").PEERS
    names = given.split(",")
    if unknown := [name for name in names if name not in known]:
        parser().error(f"there is no peer {unknown[0]!r}: {', '.join(known)}")
    return tuple(names)


def _module(name: str) -> Any:
    # Not at the top: torch takes seconds to import, and the index is measured without it.
    return importlib.import_module(f"bench.{name}")


def _run(name: str, options: cases.Options, folder: str | None) -> list[cases.Result]:
    chosen = _module(name).cases(options)
    where = folder or tempfile.gettempdir()
    needed = _CHECKPOINTS_AT_ONCE * max((size for case in chosen for size in case.sizes), default=0)
    if needed > (free := shutil.disk_usage(where).free):
        parser().error(
            f"{name} takes up to {words.size(needed)} in {where}, where {words.size(free)} are free: --folder"
        )
    return list(cases.run(chosen, folder, _tell))


def _only(given: dict[str, Any], folder: Path) -> int:
    case = cases.Case(**{**given, "names": tuple(given["names"]), "sizes": tuple(given["sizes"])})
    # What peers print goes to stderr; of their warnings nobody here can do anything about.
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    found = _module(case.benchmark).measure(case, folder)
    with stdout:
        json.dump(found, stdout)
    return 0


def _tell(case: cases.Case) -> None:
    shown = "{} records".format if case.benchmark == "index" else words.size
    sizes = ", ".join(map(shown, case.sizes))
    print(f"{case.benchmark}: {', '.join(case.names)}: {sizes}", file=sys.stderr, flush=True)


def _machine_line(machine: dict[str, Any]) -> str:
    rest = f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}"
    hardware = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:g} GB"
    return f"{hardware}; {rest}; medians in milliseconds"


if __name__ == "__main__":
    sys.exit(main())

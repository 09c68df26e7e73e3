"""Run a benchmark and print its table: see `python3 scripts/dev.py bench --help`."""

import argparse
import importlib
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Started as a folder, which puts that folder on the path, and neither its package nor the project.
_SCRIPTS = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(_SCRIPTS.parent), str(_SCRIPTS)]

from bench import measure  # noqa: E402
from ckptcache.cli import output, tables  # noqa: E402

BENCHMARKS = ("index",)
"""Each is a module beside this one."""


def main() -> int:
    arguments = parser().parse_args()
    if arguments.only:
        return _only(measure.Case(**json.loads(arguments.only)), arguments.repeats)
    if arguments.benchmark is None:
        parser().error(f"name a benchmark: {', '.join(BENCHMARKS)}")
    cases = _module(arguments.benchmark).cases(arguments.full)
    chosen = [c for c in cases if arguments.most is None or c.records <= arguments.most]
    results = measure.run(chosen, arguments.repeats, _tell)
    machine = measure.machine()
    if arguments.json:
        output.write_json({"machine": machine, "results": results})
    else:
        output.write("".join(f"{line}\n" for line in [_machine_line(machine), "", *_table(results)]))
    return 0


def parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<9}{_module(name).SUMMARY}" for name in BENCHMARKS)
    made = argparse.ArgumentParser(
        prog="dev.py bench",
        description="Measure what things cost: medians, each case in a process of its own.",
        epilog=f"benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("benchmark", nargs="?", choices=BENCHMARKS, metavar="benchmark", help="see below")
    made.add_argument("--full", action="store_true", help="the largest sizes too, which take minutes")
    made.add_argument("--most", type=int, metavar="N", help="only cases of at most N records")
    made.add_argument("--repeats", type=int, default=15, metavar="N", help="runs of each case (default: 15)")
    made.add_argument("--json", action="store_true", help="print one JSON document")
    made.add_argument("--only", help=argparse.SUPPRESS)
    return made


def _module(name: str) -> Any:
    return importlib.import_module(f"bench.{name}")


def _only(case: measure.Case, repeats: int) -> int:
    with tempfile.TemporaryDirectory(prefix="ckptcache_bench_") as folder:
        found = _module(case.benchmark).measure(case, Path(folder) / "cache", repeats)
    json.dump([asdict(each) for each in found], sys.stdout)
    return 0


def _tell(case: measure.Case) -> None:
    print(f"{case.benchmark}: {case.name}, {case.records} records", file=sys.stderr, flush=True)


def _machine_line(machine: dict[str, Any]) -> str:
    rest = f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}"
    return f"{machine['processor']}, {machine['cores']} cores; {rest}; medians in milliseconds"


def _table(results: list[dict[str, Any]]) -> list[str]:
    times = {"wall": "wall_ms", "of that disk": "disk_ms", "beyond disk": "beyond_disk_ms", "processor": "processor_ms"}
    return tables.table(
        [
            tables.Column("case", [r["name"] for r in results]),
            tables.Column("records", [str(r["records"]) for r in results], right=True),
            *(tables.Column(title, [f"{r[key]:.2f}" for r in results], right=True) for title, key in times.items()),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

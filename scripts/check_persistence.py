#!/usr/bin/env python3
"""Whether three stages of one training, each on a machine of its own, kept what they should.

Stage 1 begins; stage 2 gets its files and its record, and must go on; stage 3 gets the record alone, and must begin
again and lose nothing of it. Each is given as the folder of its run as it was after the stage: training_summary.json
and cache/metadata.json. Prints what was expected and seen, and ends with 1 if anything is broken.
"""
# Only the standard library, so that a machine without torch can judge what the others did.

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BARS = "▁▂▃▄▅▆▇█"


class Unreadable(Exception):
    """A stage left no summary or no record."""


@dataclass(frozen=True)
class Stage:
    """What a stage left.

    Attributes:
        summary: `training_summary.json`.
        record: `metadata.json`.
    """

    summary: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def checkpoints(self) -> Mapping[str, Mapping[str, Any]]:
        """Id to record."""
        return self.record.get("checkpoints", {})

    @property
    def sessions(self) -> Mapping[str, Mapping[str, Any]]:
        """Id to record."""
        return self.record.get("sessions", {})

    @property
    def own(self) -> dict[str, Mapping[str, Any]]:
        """The checkpoints that its own session saved."""
        return {id: c for id, c in self.checkpoints.items() if c.get("session") == self.summary.get("session")}

    def loss(self, name: str) -> float | None:
        """`first_val_loss`, `last_val_loss` or `best_val_loss`; None where it was never measured."""
        value = self.summary.get(name)
        return None if value is None else float(value)  # JSON has "nan" and "inf" as text


@dataclass(frozen=True)
class Expectation:
    """What should be, what was seen, and whether that agrees."""

    text: str
    seen: str
    holds: bool


def read_stage(folder: Path) -> Stage:
    """The stage whose run lies in `folder`. Raises Unreadable."""
    return Stage(_read(folder / "training_summary.json"), _read(folder / "cache" / "metadata.json"))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise Unreadable(f"{path} holds no object")
    return found


# --- what should be ------------------------------------------------------------------------------


def expectations(one: Stage, two: Stage, three: Stage, iterations: int) -> list[Expectation]:
    """Everything that must hold after three stages of `iterations` each."""
    return [*_of_beginning(one, iterations), *_of_going_on(one, two, iterations), *_of_losing(one, two, three)]


def _of_beginning(one: Stage, iterations: int) -> list[Expectation]:
    start, end = one.summary.get("start_iteration"), one.summary.get("end_iteration")
    return [
        Expectation(f"stage 1 trains from 0 to {iterations}", f"{start} to {end}", (start, end) == (0, iterations)),
        Expectation("stage 1 saves, and its record says so", _count(one.own, "checkpoint"), bool(one.own)),
    ]


def _of_going_on(one: Stage, two: Stage, iterations: int) -> list[Expectation]:
    start, end, parent = (two.summary.get(name) for name in ("start_iteration", "end_iteration", "resumed_from"))
    before, after = one.loss("first_val_loss"), two.loss("first_val_loss")
    is_lower = before is not None and after is not None and after < before
    return [
        Expectation(f"stage 2 starts at {iterations}", str(start), start == iterations),
        Expectation("stage 2 resumes from a checkpoint of stage 1", str(parent), parent in one.own),
        Expectation("stage 2 starts at a lower loss than stage 1", f"{_number(after)}, {_number(before)}", is_lower),
        Expectation(f"stage 2 gets to {2 * iterations} or further", str(end), _at_least(end, 2 * iterations)),
        _kept("stage 1", one, "stage 2", two),
    ]


def _of_losing(one: Stage, two: Stage, three: Stage) -> list[Expectation]:
    start, parent = three.summary.get("start_iteration"), three.summary.get("resumed_from")
    is_fresh = start == 0 and parent is None
    ids = [stage.summary.get("session") for stage in (one, two, three)]
    are_there = len({*ids} & {*three.sessions}) == 3
    return [
        Expectation("stage 3 begins at 0, from no checkpoint", f"{start}, from {parent}", is_fresh),
        _kept("stage 1", one, "stage 3", three),
        _kept("stage 2", two, "stage 3", three),
        Expectation("the last record holds all three sessions", _count(three.sessions, "session"), are_there),
    ]


def _kept(name: str, before: Stage, later: str, after: Stage) -> Expectation:
    """Whether every checkpoint and session is there still, each checkpoint with the digest that it had."""
    lost = [*({*before.checkpoints} - {*after.checkpoints}), *({*before.sessions} - {*after.sessions})]
    common = {*before.checkpoints} & {*after.checkpoints}
    other = [id for id in common if before.checkpoints[id].get("digest") != after.checkpoints[id].get("digest")]
    seen = [f"{id} is lost" for id in sorted(lost)] + [f"{id} has another digest" for id in sorted(other)]
    whole = f"{_count(before.checkpoints, 'checkpoint')}, {_count(before.sessions, 'session')}"
    # A record that was never written can't be lost either.
    holds = not seen and bool(before.sessions)
    return Expectation(f"all of {name}'s record is in {later}'s", "; ".join(seen) or whole, holds)


def _at_least(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _count(things: Iterable[Any], noun: str) -> str:
    count = len(list(things))
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):.4f}"


# --- showing it ----------------------------------------------------------------------------------


def stage_rows(stages: Sequence[Stage]) -> list[list[str]]:
    """A row per stage, below a header."""
    rows = [["stage", "iterations", "first loss", "last loss", "resumed from", "checkpoints", "sessions"]]
    for number, stage in enumerate(stages, 1):
        s = stage.summary
        span = f"{s.get('start_iteration')} to {s.get('end_iteration')}"
        losses = [_number(stage.loss(name)) for name in ("first_val_loss", "last_val_loss")]
        counts = [str(len(stage.checkpoints)), str(len(stage.sessions))]
        rows.append([str(number), span, *losses, str(s.get("resumed_from") or "-"), *counts])
    return rows


def expectation_rows(found: Iterable[Expectation]) -> list[list[str]]:
    """A row per expectation, below a header."""
    return [["", "expected", "seen"], *([("ok" if e.holds else "BROKEN"), e.text, e.seen] for e in found)]


def checkpoint_rows(stages: Sequence[Stage]) -> list[list[str]]:
    """A row per checkpoint of the last record, in their order, below a header."""
    number = {stage.summary.get("session"): str(i) for i, stage in enumerate(stages, 1)}
    rows = [["checkpoint", "stage", "iteration", "val loss", "bytes", "saved because"]]
    for id, c in sorted(stages[-1].checkpoints.items(), key=lambda item: (item[1].get("sequence", 0), item[0])):
        numbers = [str(c.get("iteration", "-")), _number(c.get("val_loss")), f"{c.get('size') or 0:,}"]
        rows.append([f"`{id}`", number.get(c.get("session"), "-"), *numbers, str(c.get("save_reason", "-"))])
    return rows


def curve_rows(stages: Sequence[Stage]) -> list[list[str]]:
    """A row per stage and curve, below a header."""
    rows = [["stage", "curve", "from", "to", ""]]
    for number, stage in enumerate(stages, 1):
        curves = stage.sessions.get(str(stage.summary.get("session")), {}).get("curves", {})
        for name in sorted({"loss", "val_loss"} & {*curves}):
            values = [float(value) for _, value in curves[name]]
            rows.append([str(number), name, _number(values[0]), _number(values[-1]), spark(values)])
    return rows


def spark(values: Sequence[float], width: int = 40) -> str:
    """`values` as a line of bars, the lowest to the highest of them."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    chosen = [values[i * len(values) // width] for i in range(width)] if len(values) > width else values
    return "".join(BARS[round((v - low) / span * (len(BARS) - 1))] if math.isfinite(v) else "?" for v in chosen)


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table for a page."""
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(stages: Sequence[Stage], found: Sequence[Expectation]) -> str:
    """Everything as Markdown."""
    last = stages[-1]
    kept = [c for c in last.checkpoints.values() if c.get("decision") is None]
    size = sum(c.get("size") or 0 for c in last.checkpoints.values())
    broken = sum(not e.holds for e in found)
    return "\n".join(
        [
            "## Does training persist?\n",
            f"{'**No**' if broken else 'Yes'}: {len(found) - broken} of {len(found)} expectations hold.\n",
            as_markdown(expectation_rows(found)),
            "### Stages\n",
            as_markdown(stage_rows(stages)),
            "### The cache\n",
            f"{_count(last.checkpoints, 'checkpoint')} of {_count(last.sessions, 'session')} on record, "
            f"{len(kept)} of them never evicted, {size:,} bytes when they were saved.\n",
            as_markdown(checkpoint_rows(stages)),
            "### Curves\n",
            as_markdown(curve_rows(stages)),
        ]
    )


# --- the command line ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("stages", nargs=3, type=Path, metavar="FOLDER", help="the run's folder after stage 1, 2 and 3")
    made.add_argument("--iterations", type=int, default=10, help="how many each stage trains (default: 10)")
    made.add_argument("--report", type=Path, metavar="FILE", help="append the report to FILE, as Markdown")
    return made


def main() -> int:
    given = parser().parse_args()
    try:
        stages = [read_stage(folder) for folder in given.stages]
    except Unreadable as error:
        print(f"check_persistence.py: {error}", file=sys.stderr)
        return 1
    found = expectations(*stages, given.iterations)
    print(as_text(stage_rows(stages)))
    print(as_text(expectation_rows(found)))
    if given.report:
        with given.report.open("a", encoding="utf-8") as file:
            file.write(report(stages, found))
    broken = [e for e in found if not e.holds]
    for e in broken:
        print(f"broken: {e.text} (seen: {e.seen})", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

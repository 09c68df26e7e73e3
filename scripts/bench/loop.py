"""What a save adds to a training that goes on: windows of steps with and without one in turn, and their differences."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from bench import disk, meters
from bench.cases import Case, Options, Result, figures, memory, result
from bench.peers import PEERS, Peer, missing
from bench.tabulate import named, ratios, shown, times, yes_no
from bench.workload import Training, calibrate, make_training, parse_size
from ckptcache import words
from ckptcache.cli import tables

REPEATS = 4
SIZE = parse_size("1.5GB")
STEPS = 5
"""In a window; one with a save goes on until that is finished."""
MOST_STEPS = 60
STATES_TOGETHER = 10
"""How many times the state all peers together may need, with what they keep between saves."""


def cases(options: Options) -> list[Case]:
    """All peers in one process, so that they meet the same machine; one after another where memory doesn't suffice."""
    size = max(options.sizes or (SIZE,))
    names = options.peers or tuple(PEERS)
    groups = [names] if memory()[1] > STATES_TOGETHER * size else [(name,) for name in names]
    return [Case("loop", group, (size,), options.repeats or REPEATS, options.step) for group in groups]


def measure(case: Case, folder: Path) -> list[Result]:
    """Rounds in which each peer has its turn; before and after each turn, a window without a save."""
    here = [name for name in case.names if missing(name) is None]
    training = make_training(case.sizes[0])
    calibrate(training, case.step)
    with ExitStack() as stack:
        peers = {name: PEERS[name](folder / name) for name in here}
        for peer in peers.values():
            stack.callback(peer.close)
            _with_save(peer, training)
        turns = _turns(peers, training, case.repeats)
        step = _median_step(turns)
    return [_result(case, name, training, turns.get(name), step) for name in case.names]


# --- windows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Seconds of some steps of training, on the wall and of the processor."""

    steps: int
    wall: float
    processor: float


@dataclass(frozen=True)
class Saved:
    """A window that began with a save: how long that held the loop up, and until when it was finished, in seconds."""

    window: Window
    call: float
    wait: float
    finished: float


@dataclass
class Turns:
    """What one peer's windows gave, and the windows without a save around each."""

    saved: list[Saved] = field(default_factory=list)
    around: list[tuple[Window, Window]] = field(default_factory=list)

    def added(self) -> Iterator[tuple[float, float]]:
        """Seconds that each save added, on the wall and of the processor."""
        for saved, (before, after) in zip(self.saved, self.around, strict=True):
            share = saved.window.steps / (before.steps + after.steps)
            wall = saved.window.wall - share * (before.wall + after.wall)
            yield wall, saved.window.processor - share * (before.processor + after.processor)


def _turns(peers: dict[str, Peer], training: Training, rounds: int) -> dict[str, Turns]:
    turns = {name: Turns() for name in peers}
    before = _without_save(training)
    for number in range(rounds):
        # Whoever comes after a peer that leaves much behind should not always be the same.
        for name in _rotated(list(peers), number):
            saved = _with_save(peers[name], training)
            after = _without_save(training)
            turns[name].saved.append(saved)
            turns[name].around.append((before, after))
            before = after
    return turns


def _rotated(names: Sequence[str], by: int) -> Sequence[str]:
    start = by * 3 % max(len(names), 1)
    return [*names[start:], *names[:start]]


def _without_save(training: Training) -> Window:
    start, processor = time.perf_counter(), meters.processor_seconds()
    for _ in range(STEPS):
        training.gradients()
        training.update()
    return Window(STEPS, time.perf_counter() - start, meters.processor_seconds() - processor)


def _with_save(peer: Peer, training: Training) -> Saved:
    start, processor = time.perf_counter(), meters.processor_seconds()
    peer.save(training)
    call = time.perf_counter() - start
    watch = _Watch(peer)
    steps, wait = 0, 0.0
    while steps < STEPS or not (watch.is_finished or steps == MOST_STEPS):
        training.gradients()
        waited = meters.seconds(peer.allow_step) + training.update()
        wait += 0.0 if steps else waited
        steps += 1
    window = Window(steps, time.perf_counter() - start, meters.processor_seconds() - processor)
    finished = watch.join() - start
    # Dirty pages of this save are not to be written in the next window.
    disk.sync(peer.files())
    peer.remove_older()
    return Saved(window, call, wait, finished)


class _Watch:
    """Looks from a thread when a save is finished, for not everybody can be asked."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._finished = Event()
        self._at = 0.0
        self._error: BaseException | None = None
        self._thread = Thread(target=self._wait, name="bench-watch")
        self._thread.start()

    @property
    def is_finished(self) -> bool:
        return self._finished.is_set()

    def join(self) -> float:
        """When it was finished; raises what the save failed with."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._at

    def _wait(self) -> None:
        try:
            self._peer.wait()
        except BaseException as error:
            self._error = error
        self._at = time.perf_counter()
        self._finished.set()


# --- results -------------------------------------------------------------------------------------


def _median_step(turns: dict[str, Turns]) -> float:
    windows = sorted(w.wall / w.steps for turn in turns.values() for pair in turn.around for w in pair)
    return windows[len(windows) // 2] if windows else 0.0


def _result(case: Case, name: str, training: Training, turns: Turns | None, step: float) -> Result:
    if turns is None:
        return result(case, name, case.sizes[0], missing=missing(name))
    added = list(turns.added())
    return result(
        case,
        name,
        case.sizes[0],
        bytes=training.nbytes,
        step_ms=round(1000 * step, 1),
        tokens=training.length,
        **figures(
            {
                "added": [wall for wall, _ in added],
                "added_processor": [processor for _, processor in added],
                "blocked": [s.call + s.wait for s in turns.saved],
                "call": [s.call for s in turns.saved],
                "wait": [s.wait for s in turns.saved],
                "finished": [s.finished for s in turns.saved],
            }
        ),
        durable=PEERS[name].durable,
        verified=PEERS[name].verified,
    )


def report(results: list[Result]) -> list[str]:
    """The table: medians in milliseconds, quartiles beside what varies most."""
    some = next((r for r in results if "step_ms" in r), None)
    if some is None:
        return ["loop: nothing was measured", ""]
    ranges = [[_range(r.get(f"{key}_ms_quartiles")) for r in results] for key in ("added", "added_processor")]
    lines = tables.table(
        [
            named(results),
            *times(results, {"added": "added_ms"}),
            tables.Column("added quartiles", ranges[0], keep=30, right=True),
            tables.Column("× best", ratios(results, "added_ms"), right=True),
            *times(results, {"processor": "added_processor_ms"}),
            tables.Column("processor quartiles", ranges[1], keep=20, right=True),
            *times(results, {"blocked": "blocked_ms", "finished": "finished_ms"}),
            tables.Column("durable by itself", [r.get("durable", "") for r in results]),
            tables.Column("verified", yes_no(results, "verified")),
        ]
    )
    step = f"steps of {shown(some['step_ms'])} ms, medians of {some['repeats']} saves"
    return [f"loop: added to a running training, a state of {words.size(some['bytes'])}, {step}", "", *lines, ""]


def _range(quartiles: Sequence[float] | None) -> str:
    return "" if quartiles is None else f"{shown(quartiles[0])} to {shown(quartiles[1])}"

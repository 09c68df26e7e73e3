"""What a person sees of a training: a progress bar on a terminal, plain lines elsewhere; always on stderr."""

import logging
import math
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from ckptcache.startup import is_fallback
from ckptcache.trainer import CachedTrainer, Callback

_REFRESH = 0.25
"""Seconds between looks at the loss; on a GPU a look waits for the device."""
_FREE_COLUMNS = 5
"""Right of the bar."""


class TrainingDisplay(Callback):
    """Shows where a training is: loss, val loss, best, iterations per second, time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: Any = None
        self._best = math.inf
        self._val_loss: float | None = None
        self._started = self._looked = time.monotonic()
        self._first = 0

    def on_start(self, trainer: CachedTrainer) -> None:
        """Say what was found and chosen; begin the bar, where there is a terminal and something to do."""
        for line in () if is_fallback() else trainer.session.messages:
            self.console.print(line, style="dim" if line.startswith("  ") else None, markup=False, soft_wrap=True)
        if trainer.session.is_comparable and trainer.resumed_from is not None:
            self._best = _finite_or(trainer.resumed_from.val_loss, math.inf)
        self._first, end = trainer.starting_iteration, trainer.last_iteration
        self._started = time.monotonic()
        if self.console.is_terminal and (end is None or end > self._first):
            self._begin_bar(end)

    def _begin_bar(self, end: int | None) -> None:
        self._progress = _Bar(
            SpinnerColumn(),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
            transient=True,
        )
        self._task = self._progress.add_task("", total=end, completed=self._first, numbers="")
        self._progress.start()

    def after_step(self, trainer: CachedTrainer, iteration: int, loss: Tensor) -> None:
        """Move the bar on."""
        now = time.monotonic()
        if self._progress is not None and now - self._looked >= _REFRESH:
            self._looked = now
            self._progress.update(self._task, completed=iteration, numbers=self._numbers(float(loss), iteration))

    def after_evaluation(self, trainer: CachedTrainer, val_loss: float | None, metrics: Mapping[str, float]) -> None:
        """A line per evaluation, where there is no bar; of a loss that has diverged the trainer tells."""
        if val_loss is None or not math.isfinite(val_loss):
            return
        self._val_loss = val_loss
        is_best = val_loss < self._best
        self._best = min(self._best, val_loss)
        if self._progress is None:
            self.console.print(self._line(trainer, val_loss, is_best), markup=False, soft_wrap=True)

    def _line(self, trainer: CachedTrainer, val_loss: float, is_best: bool) -> str:
        iteration, end = trainer.session.iteration, trainer.last_iteration
        loss = trainer.session.latest("loss")
        shown = "" if loss is None else f"  loss {loss:.4f}"
        of = "" if end is None else f"/{end}"
        mark = "  best so far" if is_best and iteration > self._first else ""
        return f"iteration {iteration}{of}{shown}  val_loss {val_loss:.4f}{self._rate(iteration)}{mark}"

    def _numbers(self, loss: float, iteration: int) -> str:
        val = "" if self._val_loss is None else f"  val {self._val_loss:.4f}"
        best = "" if math.isinf(self._best) else f"  best {self._best:.4f}"
        return f"loss {loss:.4f}{val}{best}{self._rate(iteration)}"

    def _rate(self, iteration: int) -> str:
        seconds = time.monotonic() - self._started
        return f"  {(iteration - self._first) / seconds:.1f} it/s" if iteration > self._first and seconds > 0 else ""

    def on_end(self, trainer: CachedTrainer, summary: Mapping[str, Any]) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Bar(Progress):
    """Leaves some columns free: a ^C that is echoed there would wrap, and the bar could not be erased."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The one line that is shown."""
        yield _Narrowed(self.make_tasks_table(self.tasks))


class _Narrowed:
    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self._inner, options.update_width(max(20, options.max_width - _FREE_COLUMNS)))


def _finite_or(value: float | None, otherwise: float) -> float:
    return value if value is not None and math.isfinite(value) else otherwise


class ConsoleHandler(logging.Handler):
    """Sends log records through a console, so that they appear above a bar and not in it."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """One line per record."""
        try:
            style = "bold red" if record.levelno >= logging.ERROR else "yellow"
            self._console.print(record.getMessage(), style=style, markup=False, soft_wrap=True)
        except Exception:  # logging's own rule: a message that can't be shown must not end what it tells of
            self.handleError(record)


def stderr_console() -> Console:
    """Where everything but a result goes; lines are as long as they are when nobody watches."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())

"""The loss over all sessions as a picture: an SVG for the page, and a mermaid chart where no file can be shown."""

import importlib.util
import io
import math
import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from ckptcache import words
from ckptcache.metadata import SessionRecord, thin
from ckptcache.progress import losses
from ckptcache.progress.losses import Points
from ckptcache.progress.views import RunView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0969da", "#d1570a", "#1a7f37", "#8250df", "#bf3989", "#9a6700")
"""Of the newest sessions, the newest first."""
_OLDER, _INK, _GRID = "#b4bcc5", "#424a53", "#e6eaee"
_POINTS, _OLDER_POINTS, _OLDER_TOTAL, _TRAIN_POINTS, _STEPS = 55, 30, 420, 20, 40
_POINTS_WHEN_CROWDED = 8
_CROWDED = 0.35
"""Below this share of the width, the newest sessions are drawn once more by themselves."""
_FREE_FROM, _FREE_ABOVE = 0.42, 0.45
"""Shares of width and height from which on nothing may lie where they are drawn."""
_LOG_FROM = 20.0
"""From this ratio of the highest loss to the lowest on, the scale is logarithmic."""
_SETTINGS: Any = {
    "svg.hashsalt": "ckptcache",
    "svg.fonttype": "none",
    "path.simplify": False,
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.unicode_minus": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def is_drawable(view: RunView) -> bool:
    """Whether any session has a finite validation loss."""
    return bool(losses.drawable(view))


# --- the picture ---------------------------------------------------------------------------------


def svg(view: RunView) -> bytes | None:
    """The validation loss of all sessions by iteration; None without matplotlib, or with nothing to draw.

    The same view and the same matplotlib give the same bytes.
    """
    drawn = losses.drawable(view)
    if not drawn or importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    with matplotlib.rc_context():
        # A user's own matplotlibrc must not change what is committed.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        return _compact(_rendered(_figure(view, drawn)))


def _figure(view: RunView, drawn: Sequence[tuple[SessionRecord, Points]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.8, 3.7), facecolor="white")
    axes = figure.add_axes((0.07, 0.13, 0.7, 0.82))
    newest, older = drawn[: len(COLOURS)], drawn[len(COLOURS) :]
    is_crowded = _needs_inset(newest, drawn)
    _draw_older(axes, [found for _, found in older])
    _draw_newest(axes, view, newest, most=_POINTS_WHEN_CROWDED if is_crowded else _POINTS)
    _draw_lowest(axes, view, drawn)
    _scale(axes, [value for _, found in drawn for _, value in found])
    _legend(axes, len(older), has_resumed=any(_has_resumed(s) for s, _ in newest))
    if is_crowded:
        _draw_inset(figure, view, newest)
    return figure


def _needs_inset(newest: Sequence[tuple[SessionRecord, Points]], drawn: Sequence[tuple[SessionRecord, Points]]) -> bool:
    """Whether the newest sessions are too narrow to be told apart, and the upper right is free to draw them there."""
    whole = [point for _, found in drawn for point in found]
    recent = [i for _, found in newest for i, _ in found]
    start, end = min(i for i, _ in whole), max(i for i, _ in whole)
    values = [value for _, value in whole]
    scale = math.log if _is_logarithmic(values) else float
    floor = scale(min(values)) + _FREE_ABOVE * (scale(max(values)) - scale(min(values)))
    is_free = all(i < start + _FREE_FROM * (end - start) or scale(value) < floor for i, value in whole)
    return is_free and max(recent) - min(recent) < _CROWDED * (end - start)


def _draw_newest(
    axes: "Axes", view: RunView, newest: Sequence[tuple[SessionRecord, Points]], *, most: int = _POINTS
) -> None:
    short = words.short_ids([s.id for s, _ in newest], view.index.sessions)
    for (session, found), colour in reversed(list(zip(newest, COLOURS, strict=False))):
        _draw_session(axes, session, found, colour, _ascii(short[session.id]), session is newest[0][0], most)


def _draw_inset(figure: "Figure", view: RunView, newest: Sequence[tuple[SessionRecord, Points]]) -> None:
    """The newest sessions once more, larger: where loss falls, the upper right is free."""
    axes = figure.add_axes((0.39, 0.5, 0.37, 0.42))
    _draw_newest(axes, view, newest)
    _scale(axes, [value for _, found in newest for _, value in found], ticks=4)
    axes.set(xlabel="", ylabel="", title="the newest sessions")


def _draw_older(axes: "Axes", curves: Sequence[Points]) -> None:
    """All in one path, which takes a fraction of the bytes."""
    if not curves:
        return
    # Of more than the picture is wide in points, every second or third looks the same.
    curves = curves[:: 1 + len(curves) // _OLDER_TOTAL]
    each = max(2, min(_OLDER_POINTS, _OLDER_TOTAL // len(curves)))
    gap = (math.nan, math.nan)
    path = list(chain.from_iterable((*_line(found, each), gap) for found in curves))
    axes.plot(*zip(*path, strict=True), color=_OLDER, lw=0.8, solid_capstyle="round", label="older")


def _draw_session(
    axes: "Axes", session: SessionRecord, found: Points, colour: str, label: str, is_newest: bool, most: int
) -> None:
    if most == _POINTS and (train := _within(losses.points(session, "loss"), found)):
        axes.plot(*zip(*thin(train, _TRAIN_POINTS), strict=True), color=colour, lw=0.8, alpha=0.25)
    width = 2.2 if is_newest else 1.4
    axes.plot(*zip(*_line(found, most), strict=True), color=colour, lw=width, solid_capstyle="round", label=label)
    if most == _POINTS and _has_resumed(session):
        axes.plot(*found[0], "o", color=colour, ms=5, mfc="white", mew=1.4, zorder=4)


def _has_resumed(session: SessionRecord) -> bool:
    return session.parent is not None and not session.warm_start


def _within(train: Points, found: Points) -> Points:
    """The training loss where it doesn't leave the picture: it must not set the scale."""
    values = [value for _, value in found]
    margin = max(values) - min(values) or 1.0
    return [(i, v) for i, v in train if min(values) - margin <= v <= max(values) + margin]


def _line(found: Points, most: int) -> Sequence[tuple[int, float]]:
    """A single point is drawn as a line from itself to itself, whose round ends make a dot."""
    return (found[0], found[0]) if len(found) == 1 else thin(found, most)


def _draw_lowest(axes: "Axes", view: RunView, drawn: Sequence[tuple[SessionRecord, Points]]) -> None:
    together = losses.comparable(view)
    steps = losses.lowest(chain.from_iterable(found for session, found in drawn if session.id in together))
    if not steps:
        return
    iteration, value = steps[-1]
    end = max(found[-1][0] for _, found in drawn)
    path = [*thin(steps, _STEPS), (max(end, iteration), value)]
    xs, ys = zip(*path, strict=True)
    label = f"lowest: {words.number(value)} at {iteration}"
    axes.plot(xs, ys, color=_INK, lw=1.0, ls=(0, (4, 2)), drawstyle="steps-post", label=label, zorder=3)


def _scale(axes: "Axes", values: Sequence[float], ticks: int = 8) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if min(values) > 1e-12 and max(values) / min(values) > _LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 1e9 else f"{value:.4g}"))
    axes.minorticks_off()
    axes.tick_params(length=0)
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("iteration")
    axes.set_ylabel("val loss")


def _is_logarithmic(values: Sequence[float]) -> bool:
    return min(values) > 1e-12 and max(values) / min(values) > _LOG_FROM


def _legend(axes: "Axes", older: int, has_resumed: bool) -> None:
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    named = {label: handle for handle, label in zip(handles, labels, strict=True)}
    order = [label for label in reversed(labels) if label != "older"] + ["older"] * bool(older)
    shown = [words.count(older, "older session") if label == "older" else label for label in order]
    resumed = Line2D([], [], ls="", marker="o", color=_INK, ms=5, mfc="white", mew=1.4)
    axes.legend(
        [*(named[label] for label in order), *[resumed] * has_resumed],
        [*shown, *["resumed here"] * has_resumed],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        handlelength=1.8,
    )


def _ascii(text: str) -> str:
    """A label that every font can show and XML can hold; a leading _ would hide it from the legend."""
    return re.sub(r"[^A-Za-z0-9._ -]", "?", text[:40]).lstrip("_") or "?"


# --- its bytes -----------------------------------------------------------------------------------


def _rendered(figure: "Figure") -> str:
    stream = io.BytesIO()
    # Neither a date nor the version that drew it: what looks the same is the same.
    metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=metadata)
    return stream.getvalue().decode()


_COORDINATES = re.compile(r' (d|x|y|transform)="([^"]*)"')
_DECIMALS = re.compile(r"-?\d+\.\d+")
_FONTS = re.compile(r"'DejaVu Sans'[^;\"]*sans-serif")


def _compact(text: str) -> bytes:
    """A third of the bytes: a tenth of a point is finer than a screen, and one font family is enough."""
    text = _COORDINATES.sub(lambda found: f' {found[1]}="{_rounded(found[2])}"', text)
    text = _FONTS.sub("sans-serif", text)
    text = re.sub(r' transform="rotate\(0 [^"]*"|(?<=<g) id="[^"]*"| clip-path="[^"]*"', "", text)
    # Whatever is drawn lies within the axes.
    text = re.sub(r"<clipPath.*?</clipPath>|<g/>", "", text, flags=re.DOTALL)
    return re.sub(r"\n\s+", "\n", text).encode()


def _rounded(coordinates: str) -> str:
    numbers = _DECIMALS.sub(lambda found: f"{float(found[0]) + 0.0:.1f}".removesuffix(".0"), coordinates)
    # What follows the point that is moved to is a line without saying so.
    return " ".join(numbers.replace("-0 ", "0 ").replace("L ", "").split())


# --- the mermaid chart ---------------------------------------------------------------------------

_CHART_POINTS = 40
_PALETTE = (
    '%%{init: {"xyChart": {"width": 900, "height": 320}, '
    '"themeVariables": {"xyChart": {"plotColorPalette": "#3b8eea, #e0701c"}}}}%%'
)


def xychart(view: RunView) -> str | None:
    """The same as a mermaid `xychart-beta`, evaluation by evaluation; None with nothing to draw.

    Only sessions that can be compared with the newest are in it: the chart has one scale and no legend.
    """
    together = losses.comparable(view)
    values = [v for session, found in reversed(losses.drawable(view)) if session.id in together for _, v in found]
    if len(values) < 2:
        return None
    pairs = list(zip(values, losses.running_minimum(values), strict=True))
    shown = [pairs[i] for i, _ in thin([(i, 0.0) for i in range(len(pairs))], _CHART_POINTS)]
    low, high = min(values), max(v for v, _ in shown)
    margin = (high - low) * 0.05 or abs(low) * 0.05 or 1.0
    digits = max(0, min(12, 3 - math.floor(math.log10(margin))))
    rows = [", ".join(f"{v:.{digits}f}" for v in column) for column in zip(*shown, strict=True)]
    return "\n".join(
        [
            _PALETTE,
            "xychart-beta",
            f'    title "val loss, {_evaluations(len(values))}, and the lowest so far"',
            f'    x-axis "evaluation" 1 --> {len(values)}',
            f'    y-axis "val loss" {low - margin:.{digits}f} --> {high + margin:.{digits}f}',
            *(f"    line [{row}]" for row in rows),
        ]
    )


def _evaluations(number: int) -> str:
    return f"{number} evaluations of all sessions"

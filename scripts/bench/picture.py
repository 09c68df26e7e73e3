"""The figures as a picture: bars of what a save costs the loop, and how its times grow with the state."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases import Result
from bench.peers import PEERS
from bench.tabulate import shown, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, THEIRS, YARDSTICK, INK, GRID = "#d1570a", "#8c9aa8", "#d5dbe1", "#424a53", "#e6eaee"
_LINES = ("#0969da", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#57606a", "#3192aa", "#a40e26")
_SETTINGS: dict[str, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw what is in `document`; panels for which nothing was measured are left out."""
    import matplotlib

    found = [r for r in document["results"] if r["name"] in PEERS or r.get("yardstick")]
    panels = [panel for panel in _PANELS if panel[0](found)]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = _figure(found, panels, document["machine"])
        figure.savefig(path, dpi=110, metadata={"Software": None})


def _figure(found: list[Result], panels: Sequence[Any], machine: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(11.5, 0.6 + 3.6 * rows), facecolor="white", layout="constrained")
    for axes, (select, draw_panel) in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
        draw_panel(axes, select(found))
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}", fontsize=8, x=0.99, ha="right"
    )
    return figure


# --- what goes into a panel ----------------------------------------------------------------------


def _of(found: list[Result], benchmark: str, key: str) -> list[Result]:
    """Those of a benchmark that have a figure, at the largest size."""
    rows = [r for r in found if r["benchmark"] == benchmark and key in r]
    largest = max((r["size"] for r in rows), default=0)
    return [r for r in rows if r["size"] == largest]


def _blocked(found: list[Result]) -> list[Result]:
    return _of(found, "save", "blocked_ms")


def _added(found: list[Result]) -> list[Result]:
    return _of(found, "loop", "added_ms")


def _restored(found: list[Result]) -> list[Result]:
    return _of(found, "restore", "warm_ms")


def _growing(key: str) -> Any:
    def select(found: list[Result]) -> list[Result]:
        rows = [r for r in found if r["benchmark"] == "save" and key in r and r["name"] != "copy"]
        return rows if len({r["size"] for r in rows}) > 1 else []

    return select


# --- drawing -------------------------------------------------------------------------------------


def _bars(axes: "Axes", rows: list[Result], key: str, label: str) -> None:
    rows = sorted(rows, key=lambda r: -r[key])
    values = [r[key] for r in rows]
    spread = [r.get(f"{key}_quartiles", (r[key], r[key])) for r in rows]
    errors = [
        [max(v - q[0], 0) for v, q in zip(values, spread, strict=True)],
        [max(q[1] - v, 0) for v, q in zip(values, spread, strict=True)],
    ]
    colours = [_bar_colour(r) for r in rows]
    axes.barh([title(r) for r in rows], values, color=colours, xerr=errors, error_kw={"ecolor": INK, "elinewidth": 0.8})
    for place, (value, (_, high)) in enumerate(zip(values, spread, strict=True)):
        axes.annotate(f" {shown(value)}", (max(value, high, 0), place), va="center", fontsize=8)
    axes.set(title=label)
    axes.margins(x=0.14)
    _plain(axes, "x")


def _blocked_bars(axes: "Axes", rows: list[Result]) -> None:
    _bars(axes, rows, "blocked_ms", f"the loop stands still for a save, ms ({_size(rows)})")


def _processor_bars(axes: "Axes", rows: list[Result]) -> None:
    _bars(axes, rows, "added_processor_ms", f"processor time that a save adds to it, ms ({_size(rows)})")


def _added_bars(axes: "Axes", rows: list[Result]) -> None:
    _bars(axes, rows, "added_ms", f"a save adds to a running loop, ms ({_size(rows)})")


def _restored_bars(axes: "Axes", rows: list[Result]) -> None:
    _bars(axes, rows, "warm_ms", f"a restore, page cache warm, ms ({_size(rows)})")


def _bar_colour(row: Result) -> str:
    if row.get("yardstick"):
        return YARDSTICK
    return OURS if PEERS[row["name"]].is_ours else THEIRS


def _growth(key: str, label: str, *, has_legend: bool) -> Any:
    def draw_panel(axes: "Axes", rows: list[Result]) -> None:
        for name in dict.fromkeys(r["name"] for r in rows):
            own = sorted((r for r in rows if r["name"] == name), key=lambda r: r["bytes"])
            axes.plot([r["bytes"] / 1e6 for r in own], [r[key] for r in own], label=title(own[0]), **_line(own[0]))
        axes.set(xscale="log", yscale="log", xlabel="state, MB", title=label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        if has_legend:
            axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
        _plain(axes, "both")

    return draw_panel


def _line(row: Result) -> dict[str, Any]:
    name = row["name"]
    if row.get("yardstick"):
        return {"color": INK, "linestyle": ":" if "DIRECT" in name else "--", "linewidth": 1.2}
    if PEERS[name].is_ours:
        return {
            "color": OURS,
            "linestyle": "--" if "blocking" in name else "-",
            "linewidth": 2.0,
            "marker": "o",
            "ms": 4,
        }
    # By its place among all, so that it is the same in every panel.
    theirs = [other for other, kind in PEERS.items() if not kind.is_ours]
    return {"color": _LINES[theirs.index(name) % len(_LINES)], "linewidth": 1.0, "marker": "."}


def _size(rows: list[Result]) -> str:
    return f"{rows[0]['bytes'] / 1e9:.2f} GB"


def _plain(axes: "Axes", grid: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


_PANELS = (
    (_blocked, _blocked_bars),
    (_added, _added_bars),
    (_restored, _restored_bars),
    (_added, _processor_bars),
    (_growing("blocked_ms"), _growth("blocked_ms", "the loop stands still, ms", has_legend=False)),
    (_growing("durable_ms"), _growth("durable_ms", "until the checkpoint is durable, ms", has_legend=True)),
)
"""What each panel shows, and how it is drawn."""

"""The lineage as a tree, on a terminal or in a pipe.

It follows the sessions. One that goes on with the line stands below the one before it, so that a year of scheduled runs
is no deeper than one of them; only what branched off is indented, below the checkpoint that it came from.
"""

import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from ckptcache import words
from ckptcache.cli import output
from ckptcache.cli.lineage import Lineage
from ckptcache.metadata import CheckpointMetadata, SessionRecord

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text
    from rich.tree import Tree

_OUTSIDE = ""
"""Stands for the session of what was saved outside of one; no id is empty."""
_DEEPEST = 8
_LEAST_WIDTH = 32
"""Columns that text gets at least; a branch that would leave less isn't indented."""
_INDENT = 8
"""Columns that a branch is indented by: one step for the checkpoint that it came from, one for itself."""
_UNBROKEN = 100_000
"""Columns of a pipe."""


def lines(found: Lineage) -> list[str]:
    """The lines of the tree."""
    from rich.console import Console

    is_terminal = output.is_terminal()
    target = io.StringIO() if is_terminal else _Plain()
    console = Console(
        file=target,
        force_terminal=is_terminal,
        width=max(output.width(), _LEAST_WIDTH + _INDENT) if is_terminal else _UNBROKEN,
        color_system="auto" if output.has_colour() else None,
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
    )
    console.print(_Planting(found).tree(console.width))
    return [line.rstrip() for line in target.getvalue().splitlines()]


class _Plain(io.StringIO):
    """A pipe: rich draws with ASCII where a file says that it holds nothing else."""

    encoding = "ascii"


# --- who stands where ----------------------------------------------------------------------------


@dataclass
class _Family:
    """Sessions, and how they follow on each other.

    Attributes:
        sessions: by id, in their order; None for one whose record is gone.
        before: of a session that of the checkpoint which it resumed from.
        after: of a session those that resumed from its checkpoints.
        size: how many sessions came of each, itself among them.
    """

    sessions: dict[str, SessionRecord | None]
    before: dict[str, str]
    after: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    size: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for id, parent in self.before.items():
            self.after[parent].append(id)

    def roots(self) -> list[str]:
        """Those that came of none, and of each circle that an index may hold the first; to be asked for once."""
        first = [id for id in self.sessions if id not in self.before]
        found = {id for id in (*first, *self.sessions) if id not in self.size and self._measure(id)}
        return [id for id in self.sessions if id in found]

    def _measure(self, root: str) -> bool:
        reached, self.size[root] = [root], 1
        for id in reached:  # which grows meanwhile
            self.after[id] = [child for child in self.after[id] if child not in self.size]
            self.size |= dict.fromkeys(self.after[id], 1)
            reached += self.after[id]
        for id in reversed(reached):
            self.size[id] += sum(self.size[child] for child in self.after[id])
        return True

    def heir(self, id: str) -> str | None:
        """Which of those that came of a session goes on with its line.

        Not one that was rolled back, if there is another; of the rest that of which most has come, and then the latest.
        """
        return max(reversed(self.after[id]), key=self._claim, default=None)

    def _claim(self, id: str) -> tuple[bool, int]:
        session = self.sessions[id]
        return session is None or session.rolled_back is None, self.size[id]


def _family(found: Lineage) -> tuple[_Family, dict[str, list[CheckpointMetadata]]]:
    """The sessions, and the checkpoints of each."""
    own: defaultdict[str, list[CheckpointMetadata]] = defaultdict(list)
    for record in found.chosen:
        own[record.session or _OUTSIDE].append(record)
    known = {session.id: session for session in found.sessions}
    first = {id: records[0].order for id, records in own.items()}
    order = {**first, **{id: session.order for id, session in known.items()}}
    owner = {record.id: id for id, records in own.items() for record in records}
    before = {id: owner[s.parent] for id, s in known.items() if s.parent is not None and s.parent in owner}
    return _Family({id: known.get(id) for id in sorted(order, key=order.__getitem__)}, before), own


# --- the tree ------------------------------------------------------------------------------------


class _Planting:
    """Makes the tree of a lineage; without recursion, since an index from elsewhere may be as deep as it likes."""

    def __init__(self, found: Lineage) -> None:
        index = found.catalog.index
        self.found = found
        self.family, self.own = _family(found)
        self.short: dict[str, str] = {}
        if output.is_terminal():
            parents = [s.parent for s in found.sessions if s.parent is not None]
            self.short = words.short_ids([r.id for r in found.chosen] + parents, index.checkpoints, index.names)
            self.short |= words.short_ids([s.id for s in found.sessions], index.sessions)

    def tree(self, width: int) -> "Tree":
        """The tree, in which branches are indented as far as `width` columns allow."""
        from rich.tree import Tree

        deepest = max(0, min(_DEEPEST, (width - _LEAST_WIDTH - _INDENT // 2) // _INDENT))
        top = Tree("", hide_root=True)
        waiting = [(id, top, 0) for id in reversed(self.family.roots())]
        while waiting:
            id, place, depth = waiting.pop()
            nodes = self._plant(id, place)
            heir = self.family.heir(id)
            for child in reversed(self.family.after[id]):
                node = nodes.get(self._parent(child)) if depth < deepest else None
                if child != heir:
                    waiting.append((child, place, depth) if node is None else (child, node, depth + 1))
            if heir is not None:
                waiting.append((heir, place, depth))
        return top

    def _parent(self, id: str) -> str:
        session = self.family.sessions[id]
        return "" if session is None or session.parent is None else session.parent

    def _plant(self, id: str, place: "Tree") -> dict[str, "Tree"]:
        """Add a session and its checkpoints; returns the nodes of these."""
        node, nodes, before = place.add(self._session(id)), {}, self._parent(id)
        for is_shown, group in groupby(self.own.get(id, ()), self.found.is_shown):
            records = list(group)
            if not is_shown:
                node.add(_text((_left_out(records), "dim")))
                before = records[-1].id
                continue
            for record in records:
                nodes[record.id] = node.add(self._checkpoint(record, before))
                before = record.id
        return nodes

    # --- labels ----------------------------------------------------------------------------------

    def _session(self, id: str) -> "_Label":
        session = self.family.sessions[id]
        if session is None:
            told = "saved outside of a session" if id == _OUTSIDE else f"{id}, a session whose record is gone"
            return _text((told, "bold"))
        left = session.rolled_back is not None
        return _text(
            (self.short.get(id, id), "dim" if left else "bold cyan"),
            (f"  {', '.join(self._of_session(session))}", "dim" if left else ""),
        )

    def _of_session(self, session: SessionRecord) -> Iterator[str]:
        yield f"iterations {session.start_iteration} to {session.end_iteration}"
        first, last, best = session.first_val_loss, session.last_val_loss, session.best_val_loss
        if last is not None:
            since = "" if first in (None, last) else f"{words.number(first)} to "
            beside = "" if best in (None, last) else f" (best {words.number(best)})"
            yield f"val loss {since}{words.number(last)}{beside}"
        yield self.found.states[session.id]
        if session.parent is None:
            yield "weights of another cache" if session.warm_start else "fresh start"
        else:
            verb = "weights of" if session.warm_start else "from"
            gone = "" if session.parent in self.found.catalog.index.checkpoints else ", whose record is gone"
            yield f"{verb} {self.short.get(session.parent, session.parent)}{gone}"
        if session.rolled_back is not None:
            yield "rolled back"

    def _checkpoint(self, record: CheckpointMetadata, before: str) -> "_Label":
        status, marks = self.found.catalog.status(record), self.found.marks.get(record.id, [])
        told = [f"iteration {record.iteration}", _loss(record)]
        above = self.found.tree.parents[record.id]
        if above and before not in above:
            told.append(f"after {self.short.get(above[-1], above[-1])}")
        told += [] if status == "available" else [status]
        told += [] if record.rolled_back is None else ["rolled back"]
        style = "dim" if record.rolled_back is not None or status == "evicted" else _STYLES.get(status, "")
        shown = ", ".join(marks)
        return _text(
            (self.short.get(record.id, record.id), style or "cyan"),
            (f"  {', '.join(told)}", style),
            (f"  {shown}" if shown else "", "bold green" if "best" in marks else "bold"),
        )


_STYLES = {"missing": "yellow", "damaged": "red", "quarantined": "red"}


def _loss(record: CheckpointMetadata) -> str:
    return "not evaluated" if record.val_loss is None else f"val loss {words.number(record.val_loss)}"


def _left_out(records: list[CheckpointMetadata]) -> str:
    first, last = records[0].iteration, records[-1].iteration
    where = f"iteration {first}" if first == last else f"iterations {first} to {last}"
    return f"{len(records)} more, evicted ({where})"


def _text(*parts: tuple[str, str]) -> "_Label":
    from rich.text import Text

    return _Label(Text.assemble(*((output.clean(text), style) for text, style in parts)))


@dataclass(frozen=True)
class _Label:
    """A line of the tree; where it has to be broken, what follows is indented."""

    text: "Text"

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterator["Text"]:
        if self.text.cell_len <= options.max_width:
            yield self.text
            return
        for number, line in enumerate(self.text.wrap(console, max(options.max_width - 2, 1))):
            if number:
                line.pad_left(2)
            line.rstrip()
            yield line

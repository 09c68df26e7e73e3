"""Through which checkpoints the sessions of a run are connected, as a mermaid flowchart."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ckptcache import words
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.progress.labels import Labels, ending, iterations
from ckptcache.progress.markdown import printable
from ckptcache.progress.views import RunView

_INIT = '%%{init: {"flowchart": {"nodeSpacing": 30, "rankSpacing": 32, "wrappingWidth": 360}}}%%'
_CLASSES = (
    "classDef session fill:#ddf4ff,stroke:#0969da,color:#1f2328",
    "classDef available fill:#ffffff,stroke:#57606a,color:#1f2328",
    "classDef recorded fill:#f6f8fa,stroke:#8c959f,color:#57606a,stroke-dasharray:4 3",
    "classDef lost fill:#fff1f0,stroke:#cf222e,color:#57606a,stroke-dasharray:4 3",
    "classDef best fill:#dafbe1,stroke:#1a7f37,color:#1f2328,stroke-width:3px",
    "classDef bestrecorded fill:#dafbe1,stroke:#1a7f37,color:#1f2328,stroke-width:3px,stroke-dasharray:4 3",
    "classDef left fill:none,stroke:#8c959f,color:#8c959f",
    "classDef note fill:none,stroke:none,color:#8c959f",
)
_LOST = ("damaged", "quarantined")
_LABEL = 44


def mermaid(view: RunView, sessions: int = 12, labels: Labels | None = None) -> str:
    """The `sessions` newest sessions, and the checkpoints that they resumed from, ended with, or that are best.

    Nothing that stands in the index can end a label or add a node. "" without a session.
    """
    shown = view.sessions[:sessions]
    if not shown:
        return ""
    graph = _Graph(labels or Labels(view), {s.id: f"s{i}" for i, s in enumerate(reversed(shown))})
    for session in reversed(shown):
        graph.add_session(session, _last_of(view, session))
    if graph.labels.best is not None:
        graph.add_checkpoint(graph.labels.best.id)
    graph.add_older(len(view.sessions) - len(shown))
    return graph.text()


def drawn(view: RunView, sessions: Iterable[SessionRecord], checkpoints: Iterable[CheckpointMetadata]) -> str:
    """These sessions and checkpoints, and what the sessions resumed from, oldest first; as `mermaid` draws them."""
    shown = list(sessions)
    graph = _Graph(Labels(view), {s.id: f"s{i}" for i, s in enumerate(shown)})
    for session in shown:
        graph.add_session(session, None)
    for record in checkpoints:
        graph.add_checkpoint(record.id)
    return graph.text() if graph.nodes else ""


def _last_of(view: RunView, session: SessionRecord) -> CheckpointMetadata | None:
    own = (r for r in view.index.checkpoints.values() if r.session == session.id)
    return max(own, key=lambda r: r.order, default=None)


@dataclass
class _Graph:
    """Nodes and edges so far. Nodes are numbered: an id such as `end` would mean something to mermaid."""

    labels: Labels
    sessions: dict[str, str]
    checkpoints: dict[str, str] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)
    edges: list[str] = field(default_factory=list)
    from_older: list[str] = field(default_factory=list)

    def add_session(self, session: SessionRecord, last: CheckpointMetadata | None) -> None:
        """A session with the checkpoint that it came from, and the one that it ended with."""
        node, label = self.sessions[session.id], _label(_session_lines(session, self.labels.short(session.id)))
        if session.parent:
            self.edges.append(f"{self.add_checkpoint(session.parent)} --> {node}")
        self.nodes.append(f"{node}({label}):::{'session' if session.rolled_back is None else 'left'}")
        if last is not None:
            self.add_checkpoint(last.id)

    def add_checkpoint(self, id: str) -> str:
        """The node of a checkpoint, with an edge from the session that saved it."""
        if id in self.checkpoints:
            return self.checkpoints[id]
        node = self.checkpoints[id] = f"c{len(self.checkpoints)}"
        record = self.labels.view.index.checkpoints.get(id)
        if record is None:
            self.nodes.append(f"{node}[{_label([self.labels.short(id), 'its record is gone'])}]:::lost")
            return node
        self.nodes.append(f"{node}[{_label(self._checkpoint_lines(record))}]:::{self._class(record)}")
        if record.session in self.sessions:
            self.edges.append(f"{self.sessions[record.session]} --> {node}")
        elif record.session is not None:
            self.from_older.append(node)
        return node

    def add_older(self, count: int) -> None:
        """Say how many sessions are left out, and what comes from them."""
        if not count:
            return
        label = _label([f"{words.count(count, 'older session')}, not shown"])
        self.nodes.append(f"older([{label}]):::note")
        self.edges += [f"older -.-> {node}" for node in self.from_older]

    def text(self) -> str:
        """The flowchart."""
        return "\n".join([_INIT, "flowchart TD", *(f"    {line}" for line in (*self.nodes, *self.edges, *_CLASSES))])

    def _checkpoint_lines(self, record: CheckpointMetadata) -> Iterator[str]:
        marks, status = self.labels.marks(record), self.labels.status(record)
        yield ("★ " if "best" in marks[:1] else "") + self.labels.short(record.id)
        loss = "not evaluated" if record.val_loss is None else f"val loss {words.number(record.val_loss)}"
        yield f"iteration {record.iteration}, {loss}"
        if told := [*marks, *([status] if status != "available" else [])]:
            yield ", ".join(printable(mark, 24) for mark in told[:4])

    def _class(self, record: CheckpointMetadata) -> str:
        status = self.labels.status(record)
        if self.labels.best is not None and record.id == self.labels.best.id:
            return "best" if status == "available" else "bestrecorded"
        if status == "available":
            return "available" if record.rolled_back is None else "left"
        return "lost" if status in _LOST else "recorded"


def _session_lines(session: SessionRecord, short: str) -> Iterator[str]:
    yield short
    loss = f", val loss {words.number(session.last_val_loss)}" if session.last_val_loss is not None else ""
    yield f"iterations {iterations(session)}{loss}"
    if session.warm_start:
        yield "warm start, weights only"
    if session.stop_reason != "finished":
        yield printable(ending(session), 24)


def _label(lines: Iterable[str]) -> str:
    return f'"{"<br/>".join(escaped(line) for line in lines)}"'


def escaped(text: str) -> str:
    """`text` for a quoted label: what is no letter, digit or plain sign becomes mermaid's own entity."""
    return "".join(c if c.isalnum() or c in " ._-,★…" else f"#{ord(c)};" for c in printable(text, _LABEL))

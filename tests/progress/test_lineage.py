import dataclasses
import re

import pytest
from hypothesis import given, settings

from ckptcache.metadata import NamePointer
from ckptcache.progress.lineage import drawn, escaped, mermaid
from ckptcache.progress.views import view_of
from ckptcache.storage.index import Index
from tests.progress.runs import HOSTILE, add_session, hostile_run, last_checkpoint, run
from tests.strategies import indexes

NODE = re.compile(
    r'    (?P<id>[sc]\d+|older)(?P<shape>\(\[|\(|\[)"(?P<label>[^"\n]*)"(\]\)|\)|\]):::(?P<kind>[a-z]+)\Z'
)
EDGE = re.compile(r"    (?P<a>[sc]\d+|older) (-->|-\.->) (?P<b>[sc]\d+)\Z")


def parse(text):
    """Nodes and edges; each line must be one of those that we write."""
    nodes, edges = {}, []
    for line in text.splitlines()[2:]:
        if line.startswith("    classDef "):
            continue
        if node := NODE.match(line):
            assert node["id"] not in nodes
            nodes[node["id"]] = (node["label"].split("<br/>"), node["kind"])
        else:
            edge = EDGE.match(line)
            assert edge, line
            edges.append((edge["a"], edge["b"]))
    assert {end for edge in edges for end in edge} <= set(nodes)
    return nodes, edges


def named(nodes, beginning):
    return next(node for node, (lines, _) in nodes.items() if lines[0].removeprefix("★ ").startswith(beginning))


def test_sessions_are_connected_through_checkpoints():
    nodes, edges = parse(mermaid(run(2)))
    first, second = named(nodes, "sess_20260102_000000"), named(nodes, "sess_20260102_000001")
    between, last = named(nodes, "ckpt_20260102_000000"), named(nodes, "ckpt_20260102_000001")
    assert edges == [(first, between), (between, second), (second, last)]
    assert nodes[first][0][1] == "iterations 0 to 40, val loss 2.7778"
    assert nodes[last] == (["★ ckpt_20260102_000001", "iteration 80, val loss 1.7857", "best"], "best")
    assert nodes[between][1] == "available"


def test_older_sessions_are_counted_and_their_checkpoints_hang_on_them():
    nodes, edges = parse(mermaid(run(30)))
    assert sum(kind == "session" for _, kind in nodes.values()) == 12
    assert nodes["older"][0] == ["18 older sessions, not shown"]
    assert ("older", named(nodes, "ckpt_20260102_000017")) in edges
    assert "older" not in parse(mermaid(run(12)))[0]


def test_a_fresh_start_has_no_checkpoint_before_it():
    index = Index()
    add_session(index, [2.0])
    add_session(index, [3.0])
    _, edges = parse(mermaid(view_of("ci", index, frozenset())))
    assert len(edges) == 2
    assert all(a.startswith("s") for a, _ in edges)


def test_a_session_that_only_took_weights_says_so():
    view = run(2)
    last = view.sessions[0]
    view.index.sessions[last.id] = dataclasses.replace(last, warm_start=True)
    nodes, edges = parse(mermaid(view))
    assert "warm start, weights only" in nodes[named(nodes, last.id[:20])][0]
    assert len(edges) == 3


@pytest.mark.parametrize(
    ("fields", "kind", "told"),
    [
        ({}, "recorded", "only recorded"),
        ({"decision": "evicted"}, "recorded", "evicted"),
        ({"decision": "quarantined"}, "lost", "quarantined"),
        ({"pinned": True}, "recorded", "pinned, only recorded"),
    ],
)
def test_how_a_checkpoint_stands_is_seen(fields, kind, told):
    view = run(2, kept=1)
    id = min(view.index.checkpoints)
    view.index.checkpoints[id] = dataclasses.replace(view.index.checkpoints[id], **fields)
    lines, found = parse(mermaid(view_of("ci", view.index, view.available)))[0]["c0"]
    assert (lines[2], found) == (told, kind)


def test_names_are_shown_and_a_best_that_is_only_recorded_is_dashed():
    view = run(1, kept=0)
    view.index.names["baseline"] = NamePointer(checkpoint=last_checkpoint(view.index))
    text = mermaid(view)
    assert parse(text)[0]["c0"][0][2] == "best, baseline, only recorded"
    assert parse(text)[0]["c0"][1] == "bestrecorded"
    assert re.search("classDef bestrecorded .*dasharray", text)


def test_a_parent_whose_record_is_gone_is_said():
    index = Index()
    add_session(index, [2.0], parent="ckpt_20250101_000000_00000010_0123abcd_0000")
    nodes, _ = parse(mermaid(view_of("ci", index, frozenset())))
    assert nodes["c0"] == (["ckpt_20250101_000000", "its record is gone"], "lost")


def test_no_session_no_graph():
    assert mermaid(view_of("ci", Index(), frozenset())) == ""


def test_hostile_text_ends_no_label():
    text = mermaid(hostile_run())
    nodes, _ = parse(text)
    assert len(nodes) == 3
    assert "script>" not in text
    assert "`" not in text


def test_only_plain_characters_stand_as_they_are():
    for character in "\"'`[](){}<>|#;&%$*~@\\:=+-->":
        assert character == "-" or character not in escaped(character).replace("#", "", 1).replace(";", "", 1)
    assert escaped("a\nb\u202ec\x00") == "a b c"
    assert len(escaped(HOSTILE * 100)) < 44 * 8


@given(indexes())
@settings(max_examples=100, deadline=None)
def test_any_index_gives_a_graph_that_can_be_read(index):
    text = mermaid(view_of("ci", index, frozenset(index.checkpoints)))
    assert not text or parse(text)


def test_what_was_rolled_back_is_drawn_so_and_is_never_the_best():
    view = run(2)
    last, session = last_checkpoint(view.index), view.sessions[0]
    view.index.checkpoints[last] = view.index.checkpoints[last].changed(rolled_back=session.parent)
    view.index.sessions[session.id] = session.changed(rolled_back=session.parent)
    nodes, _ = parse(mermaid(view))
    assert nodes[named(nodes, last[:20])] == ([last[:20], "iteration 80, val loss 1.7857", "rolled back"], "left")
    assert nodes[named(nodes, session.id[:20])][1] == "left"
    assert nodes[named(nodes, session.parent[:20])][1] == "best"


def test_what_is_chosen_is_drawn_and_what_it_came_from():
    view = run(3)
    oldest = sorted(view.sessions, key=lambda s: s.order)
    nodes, edges = parse(drawn(view, oldest[1:2], ()))
    assert sorted(kind for _, kind in nodes.values()) == ["available", "session"]
    assert len(edges) == 1
    nodes, edges = parse(drawn(view, oldest, view.index.checkpoints.values()))
    assert (len(nodes), len(edges)) == (6, 5)
    assert drawn(view, (), ()) == ""


def test_hostile_text_adds_nothing_to_what_is_drawn():
    view = hostile_run()
    nodes, _ = parse(drawn(view, view.sessions, view.index.checkpoints.values()))
    assert len(nodes) == 3

import json
import re
import shutil
import time
from types import SimpleNamespace

import pytest

from ckptcache.cache import TrainingCache
from ckptcache.metadata import CheckpointMetadata, SessionRecord
from ckptcache.storage.index import Index, serialise
from cli.conftest import NARROW, ckptcache_cli, save, terminal

OVER = "2026-01-02T03:04:05Z"


def session(cache, id, parent=None, **fields):
    return cache.record_session(
        SessionRecord(id=id, parent=parent, **{"ended_at": OVER, "stop_reason": "finished", **fields})
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A line of three sessions, of which the third went on from a rollback, and one that was saved by hand."""
    folder = tmp_path_factory.mktemp("lineage") / "cache"
    with TrainingCache(folder, auto_cleanup=False) as cache:
        first = session(cache, "sess_a", end_iteration=300, first_val_loss=9.0, last_val_loss=3.0, best_val_loss=2.0)
        a = [save(cache, i, loss, session=first) for i, loss in ((50, 9.0), (100, 8.0), (200, 2.0), (300, 3.0))]
        second = session(cache, "sess_b", a[2], start_iteration=200, end_iteration=400, stop_reason="diverged")
        b = [save(cache, 300, 1.5, session=second, parents=[a[2]])]
        b.append(save(cache, 400, 1.0, session=second, parents=b))
        with cache.ledger.change() as change:
            cache.ledger.evict(change, dict.fromkeys((*a[:2], b[0]), "rank 9, the lowest"))
        cache.name(b[1], "slot-1")
        cache.rollback(a[2])
        third = session(cache, "sess_c", a[2], start_iteration=200, end_iteration=500, last_val_loss=0.5)
        c = save(cache, 500, 0.5, session=third, parents=[a[2]])
        other = save(cache, 7, None, NARROW)
        cache.pin(a[3])
    return SimpleNamespace(folder=folder, a=a, b=b, c=c, other=other)


@pytest.fixture
def cache(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "runs" / "cache")
    return SimpleNamespace(**{**vars(made), "folder": tmp_path / "runs" / "cache"})


# --- the tree ------------------------------------------------------------------------------------


def test_the_line_is_flat_and_a_branch_hangs_on_its_checkpoint(cli, cache):
    a, b, c, other = cache.a, cache.b, cache.c, cache.other
    assert cli("lineage").stdout.splitlines() == [
        "sess_a  iterations 0 to 300, val loss 9.0000 to 3.0000 (best 2.0000), finished, fresh start",
        "+-- 2 more, evicted (iterations 50 to 100)",
        f"+-- {a[2]}  iteration 200, val loss 2.0000",
        f"|   `-- sess_b  iterations 200 to 400, diverged, from {a[2]}, rolled back",
        "|       +-- 1 more, evicted (iteration 300)",
        f"|       `-- {b[1]}  iteration 400, val loss 1.0000, rolled back  =slot-1",
        f"`-- {a[3]}  iteration 300, val loss 3.0000, rolled back  pinned",
        f"sess_c  iterations 200 to 500, val loss 0.5000, finished, from {a[2]}",
        f"`-- {c}  iteration 500, val loss 0.5000",
        "saved outside of a session",
        f"`-- {other}  iteration 7, not evaluated  best, latest",
    ]


def test_all_lists_what_was_evicted(cli, cache):
    text = cli("lineage", "--all").stdout
    assert "more, evicted" not in text
    assert f"{cache.b[0]}  iteration 300, val loss 1.5000, evicted, rolled back" in text


def test_an_evicted_one_that_was_resumed_from_is_shown(cli, cache):
    with TrainingCache(cache.folder) as held, held.ledger.change() as change:
        held.ledger.evict(change, {cache.a[2]: "too low"})
    assert f"{cache.a[2]}  iteration 200, val loss 2.0000, evicted" in cli("lineage").stdout


def test_a_file_that_is_gone_a_rollback_in_force_and_a_session_that_runs_are_said(cli, cache):
    (cache.folder / "checkpoints" / f"{cache.c}.pt").unlink()
    with TrainingCache(cache.folder) as held:
        held.record_session(SessionRecord(id="sess_d", parent=cache.c))
        held.ledger.hold("sess_d")
        held.rollback(cache.a[2])
        text = cli("lineage").stdout
    assert f"{cache.c}  iteration 500, val loss 0.5000, missing, rolled back" in text
    assert f"{cache.a[2]}  iteration 200, val loss 2.0000  best, =rollback" in text
    assert "sess_d  iterations 0 to 0, running, from" in text


def test_with_an_id_only_what_it_came_from_and_what_came_of_it(cli_json, cli, cache):
    def shown(wanted):
        return {node["id"] for node in cli_json("lineage", wanted)["nodes"]}

    assert shown(cache.c) == {*cache.a[:3], cache.c, "sess_a", "sess_c"}
    assert shown(cache.a[2]) >= {"sess_a", "sess_b", "sess_c", cache.c, *cache.b}
    assert shown("slot-1") == shown("sess_b") == {"sess_a", "sess_b", *cache.a[:3], *cache.b}
    assert shown(cache.b[0]) == shown("slot-1")
    assert shown(cache.other) == {cache.other}
    assert cli("lineage", "nope", rc=3).stdout == ""


def test_a_parent_that_is_gone_is_said_so(cli, cache):
    with TrainingCache(cache.folder) as held:
        session(held, "sess_x", "ckpt_gone")
    assert "sess_x  iterations 0 to 0, finished, from ckpt_gone, whose record is gone" in cli("lineage").stdout


def test_what_a_record_holds_is_shown_and_not_sent(cli, cache):
    with TrainingCache(cache.folder) as held:
        session(held, "sess_x", stop_reason="\x1b[31m[bold]red[/]\x07\n+-- forged")
    text = cli("lineage").stdout
    assert r"\x1b[31m[bold]red[/]\x07\x0a+-- forged, fresh start" in text
    shown = terminal(200, "--cache-dir", cache.folder, "lineage", NO_COLOR="1")[1]
    assert r"\x1b[31m[bold]red[/]\x07\x0a+-- forged, fresh start" in shown
    assert not {"\x1b", "\x07"} & set(shown)


@pytest.mark.parametrize("is_here", [True, False])
def test_a_warm_start_is_told_from_a_resume_and_from_a_fresh_start(cli, cache, is_here):
    with TrainingCache(cache.folder) as held:
        session(held, "sess_w", cache.a[2] if is_here else None, warm_start=True)
    told = f"weights of {cache.a[2]}" if is_here else "weights of another cache"
    assert f"finished, {told}" in cli("lineage").stdout
    assert told.removeprefix("weights of ").split()[0] in cli("compare", "sess_w").stdout
    assert "a fresh start" not in cli("compare", "sess_w").stdout


def test_nothing_is_no_tree(tmp_path):
    TrainingCache(tmp_path).close()
    (tmp_path / "metadata.json").write_bytes(serialise(Index()))
    assert ckptcache_cli("--cache-dir", tmp_path, "lineage").stdout == ""
    assert ckptcache_cli("--cache-dir", tmp_path, "lineage", "--mermaid").stdout == ""
    found = json.loads(ckptcache_cli("--cache-dir", tmp_path, "lineage", "--json").stdout)
    assert found == {"nodes": [], "edges": [], "best": None, "latest": None, "rollback": None}


# --- JSON and mermaid ----------------------------------------------------------------------------


def test_json_is_nodes_and_edges(cli_json, cache):
    found = cli_json("lineage")
    nodes = {node["id"]: node for node in found["nodes"]}
    assert len(nodes) == 3 + 8
    assert (nodes["sess_b"]["kind"], nodes["sess_b"]["state"]) == ("session", "diverged")
    assert nodes["sess_b"]["rolled_back"] == cache.a[2]
    assert "curves" not in nodes["sess_b"]
    node = nodes[cache.b[1]]
    assert (node["kind"], node["status"], node["names"]) == ("checkpoint", "available", ["slot-1"])
    edges = {(edge["from"], edge["to"], edge["kind"]) for edge in found["edges"]}
    assert {(cache.a[2], "sess_b", "resumed"), ("sess_b", cache.b[0], "saved")} <= edges
    assert (cache.a[2], cache.c, "parent") in edges
    assert {end for edge in edges for end in edge[:2]} <= set(nodes)
    assert (found["latest"], found["rollback"]) == (cache.other, None)


def test_mermaid_draws_what_the_tree_shows(cli, cache):
    text = cli("lineage", "--mermaid").stdout
    nodes = re.findall(r'^    ([sc]\d+)[(\[]"([^"]*)"[)\]]:::(\w+)$', text, re.MULTILINE)
    assert sum(id.startswith("s") for id, _, _ in nodes) == 3
    assert sum(id.startswith("c") for id, _, _ in nodes) == 5
    kinds = {label.split("<br/>")[1]: kind for _, label, kind in nodes}
    assert kinds["iteration 400, val loss 1.0000"] == "left"
    assert kinds["iteration 200, val loss 2.0000"] == "available"
    assert next(kind for _, label, kind in nodes if "iterations 200 to 400" in label) == "left"
    assert text.count(" --> ") == 2 + 4


def test_mermaid_and_json_exclude_each_other(cli):
    assert "exclude" in cli("lineage", "--mermaid", "--json", rc=2).stderr


# --- terminals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 60, 80, 160])
def test_a_terminal_of_any_width_shows_all_of_it(cache, columns):
    code, text = terminal(columns, "--cache-dir", cache.folder, "lineage", NO_COLOR="1")
    assert code == 0
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= columns
    words = " ".join(re.sub("[│├└─]", " ", text).split())
    for told in ("2 more, evicted", "=slot-1", "pinned", "best, latest", "fresh start", "saved outside of a session"):
        assert told in words, told
    assert "├── " in text


def test_no_line_begins_where_a_session_does_unless_one_does(cache):
    text = terminal(60, "--cache-dir", cache.folder, "lineage", NO_COLOR="1")[1]
    assert [line[:4] for line in text.splitlines() if line[0] not in " │├└"] == ["sess", "sess", "save"]


# --- many ----------------------------------------------------------------------------------------


def written(folder, sessions, checkpoints):
    folder.mkdir()
    (folder / "metadata.json.lock").touch()
    index = Index(checkpoints={r.id: r for r in checkpoints}, sessions={s.id: s for s in sessions})
    (folder / "metadata.json").write_bytes(serialise(index))
    return folder


def scheduled(count, each):
    """`count` sessions of `each` checkpoints, each of which went on from the one before it."""
    sessions, checkpoints, parent = [], [], None
    for i in range(count):
        sessions.append(SessionRecord(id=f"sess_{i:04}", sequence=len(checkpoints) + i, parent=parent))
        for j in range(each):
            id = f"ckpt_{i:04}_{j:04}"
            after = (parent,) if parent else ()
            checkpoints.append(
                CheckpointMetadata(
                    id=id,
                    sequence=len(checkpoints) + i + 1,
                    session=sessions[-1].id,
                    parents=after,
                    iteration=i * each + j,
                )
            )
            parent = id
    return sessions, checkpoints


@pytest.mark.parametrize("shape", [(1000, 1), (10, 100)])
def test_a_thousand_are_quick_and_flat(tmp_path, shape):
    folder = written(tmp_path / "c", *scheduled(*shape))
    for form in ((), ("--json",), ("--mermaid",), ("ckpt_0005_0000",)):
        began = time.perf_counter()
        text = ckptcache_cli("--cache-dir", folder, "lineage", *form).stdout
        assert time.perf_counter() - began < 5
        assert text
    lines = ckptcache_cli("--cache-dir", folder, "lineage").stdout.splitlines()
    assert len(lines) == 1000 + shape[0]
    assert {line[:4] for line in lines} == {"sess", "`-- "} | ({"+-- "} if shape[1] > 1 else set())


@pytest.mark.parametrize("columns", [None, 80, 40])
def test_branches_of_branches_go_no_deeper_than_can_be_read(tmp_path, columns):
    # Each session was rolled back in favour of one that nothing came of, so that the long line hangs on each of them.
    sessions, checkpoints = scheduled(30, 1)
    sessions = [s.changed(rolled_back="ckpt_0000_0000") for s in sessions]
    sessions += [SessionRecord(id=f"side_{i:04}", sequence=999 + i, parent=f"ckpt_{i:04}_0000") for i in range(30)]
    folder = written(tmp_path / "c", sessions, checkpoints)
    if columns is None:
        text = ckptcache_cli("--cache-dir", folder, "lineage").stdout
        assert len(text.splitlines()) == 30 + 30 + 30
    else:
        text = terminal(columns, "--cache-dir", folder, "lineage", NO_COLOR="1")[1]
        assert max(map(len, text.splitlines())) <= columns
    assert text.count("side_") == 30
    deepest = max(len(line) - len(line.lstrip(" |`+-│├└─")) for line in text.splitlines())
    assert deepest == {None: 8 * 8 + 4, 80: 5 * 8 + 4 + 2, 40: 4 + 2}[columns]

import json

import pytest

from ckptcache.cache import TrainingCache


def test_pin_and_unpin(cli, cli_json, cache):
    assert cli("pin", cache.worst).stdout == f"{cache.worst} is pinned.\n"
    assert TrainingCache(cache.folder).get(cache.worst).pinned
    assert cli_json("unpin", cache.worst)["checkpoint"]["pinned"] is False


def test_a_name_points_and_moves(cli, cli_json, cache):
    assert cli("name", cache.worst, "slot-1").stdout == f"slot-1 is {cache.worst}.\n"
    moved = cli_json("name", cache.best, "slot-1")
    assert (moved["checkpoint"]["id"], moved["name"], moved["moved_from"]) == (cache.best, "slot-1", cache.worst)
    assert cli("name", cache.worst, "slot-1").stdout == f"slot-1 is {cache.worst}. It pointed to {cache.best} before.\n"
    assert TrainingCache(cache.folder).names() == {"release-1": cache.best, "slot-1": cache.worst}


def test_a_name_is_removed(cli_json, cli, cache):
    assert cli_json("unname", "release-1") == {"name": "release-1", "checkpoint": cache.best}
    assert cli("unname", "release-1", rc=3).stdout == ""


def test_tags_come_and_go(cli, cli_json, cache):
    assert cli("tag", cache.worst, "paper", "baseline").stdout == f"{cache.worst} has the tags baseline, paper.\n"
    assert cli_json("tag", cache.worst, "baseline", "--remove")["checkpoint"]["tags"] == ["paper"]
    assert cli("tag", cache.worst, "paper", "--remove").stdout == f"{cache.worst} has no tags.\n"


def test_a_note_is_kept_and_removed(cli, cli_json, cache):
    assert cli_json("note", "best", "with ünïcode")["checkpoint"]["notes"] == "with ünïcode"
    assert "notes         with ünïcode" in cli("show", cache.best).stdout
    assert cli_json("note", cache.best, "")["checkpoint"]["notes"] == ""


@pytest.mark.parametrize("name", ["a/b", "", "best", "ckpt_1", "../x", "-x", "a\nb", "x" * 65])
def test_a_name_that_cannot_be_one_is_refused(cli, cache, name):
    result = cli("name", cache.best, "--", name, rc=2)
    assert "cannot be the name of a checkpoint" in result.stderr
    assert TrainingCache(cache.folder).names() == {"release-1": cache.best}


def test_an_empty_tag_is_refused(cli, cache):
    assert "must not be empty" in cli("tag", cache.best, " ", rc=2).stderr


def test_marking_what_has_no_file_warns(cli, cache):
    result = cli("pin", cache.missing)
    assert result.stdout == f"{cache.missing} is pinned.\n"
    assert f"ckptcache: warning: {cache.missing} is missing: there is no file to resume from\n" in result.stderr


@pytest.mark.parametrize("command", ["pin nope", "unpin nope", "name nope x", "tag nope x", "note nope x"])
def test_an_unknown_checkpoint_is_3_and_json_says_why(cli, command):
    result = cli(*command.split(), "--json", rc=3)
    assert json.loads(result.stdout)["error"]["type"] == "CheckpointNotFound"


def test_what_is_written_beside_a_checkpoint_cannot_reach_the_terminal(cli, cache):
    cli("note", cache.best, "\x1b[2Jgone\nckpt_forged  1")
    cli("tag", cache.best, "[red]\x07")
    for command in (("show", cache.best), ("ls",), ("best",)):
        text = cli(*command).stdout
        assert "\x1b" not in text
        assert "\x07" not in text
        assert not any(line.startswith("ckpt_forged") for line in text.splitlines())
    assert r"\x1b[2Jgone\x0ackpt_forged" in cli("show", cache.best).stdout

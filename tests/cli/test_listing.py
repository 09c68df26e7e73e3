import json

import pytest

from ckptcache.cache import TrainingCache
from ckptcache.metadata import SessionRecord
from ckptcache.session import TrainingSession
from cli.conftest import WIDE, ckptcache_cli


def rows(text):
    """The rows of a table in a pipe, as mappings; titles and cells without spaces."""
    titles, *lines = [line.split() for line in text.splitlines()]
    return [dict(zip(titles, cells, strict=False)) for cells in lines]


# --- ls ------------------------------------------------------------------------------------------


def test_ls_prints_the_available_ones_best_first_within_groups(cli, cache):
    listed = rows(cli("ls").stdout)
    assert [r["id"] for r in listed] == [cache.best, cache.worst, cache.diverged, cache.other]
    assert [r["rank"] for r in listed] == ["1", "2", "3", "1"]
    assert [r["group"] for r in listed] == ["A", "A", "A", "B"]
    assert listed[0]["names"] == "release-1"
    assert listed[1]["tags"] == "baseline"


def test_ls_in_a_pipe_has_neither_colour_nor_boxes_nor_wrapped_lines(cli):
    text = cli("ls", "--all").stdout
    assert text.isascii()
    assert "\x1b" not in text
    assert len({len(line.split()) for line in text.splitlines()}) == 1


def test_ls_json_is_the_full_record_with_its_status(cli_json, cache):
    found = cli_json("ls")
    assert list(found) == ["checkpoints"]
    record = found["checkpoints"][0]
    assert record["id"] == cache.best
    assert record["status"] == "available"
    assert record["names"] == ["release-1"]
    assert record["val_loss"] == 2.0
    assert record["digest"].startswith("blake3:")
    assert record["notes"] == ""  # empty fields are there too


def test_ls_all_lists_what_has_no_file(cli_json, cache):
    statuses = {r["id"]: r["status"] for r in cli_json("ls", "--all")["checkpoints"]}
    assert statuses[cache.missing] == "missing"
    assert statuses[cache.evicted] == "evicted"
    assert len(statuses) == 6
    assert len(cli_json("ls")["checkpoints"]) == 4


def test_diverged_losses_are_json_all_the_same(cli_json, cache):
    losses = {r["id"]: r["val_loss"] for r in cli_json("ls")["checkpoints"]}
    assert losses[cache.diverged] == "nan"


def test_json_may_be_asked_for_before_the_command(cli, cli_json):
    assert json.loads(cli("--json", "ls").stdout) == cli_json("ls")


def test_an_empty_cache_lists_nothing(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert ckptcache_cli("ls", "--cache-dir", tmp_path).stdout == ""
    assert json.loads(ckptcache_cli("--cache-dir", tmp_path, "ls", "--json").stdout) == {"checkpoints": []}


# --- show ----------------------------------------------------------------------------------------


def test_show_resolves_configurations_and_kin(cli_json, cache):
    shown = cli_json("show", cache.best)
    assert shown["checkpoint"]["id"] == cache.best
    assert shown["configs"]["model_config"] == WIDE
    assert shown["configs"]["training_config"] is None
    assert shown["session"]["id"] == "sess_a"
    assert shown["children"] == {"sessions": ["sess_b"], "checkpoints": [cache.missing]}
    assert shown["path"] == str(cache.folder / "checkpoints" / f"{cache.best}.pt")


def test_show_for_a_person(cli, cache):
    text = cli("show", "release-1").stdout
    assert text.splitlines()[0] == cache.best
    for expected in (
        "n_embd 8",
        "sess_b",
        "epoch 1.5",
        "train_loss 1.9000",
        f"{cache.best}.pt",
        "names         release-1",
    ):
        assert expected in text


def test_show_says_why_a_checkpoint_is_gone(cli, cache):
    assert "status        evicted: rank 9, too low" in cli("show", cache.evicted).stdout
    assert "status        missing: its file is gone" in cli("show", cache.missing).stdout
    assert cache.missing in cli("show", cache.missing).stdout


@pytest.mark.parametrize("wanted", ["release-1", "best", "prefix"])
def test_a_checkpoint_is_found_by_name_word_or_prefix(cli_json, cache, wanted):
    wanted = cache.best[:-2] if wanted == "prefix" else wanted
    assert cli_json("show", wanted)["checkpoint"]["id"] == cache.best


def test_an_ambiguous_prefix_names_candidates(cli, cache):
    result = cli("show", "ckpt_", rc=2)
    assert result.stdout == ""
    assert result.stderr.startswith("ckptcache: error: 'ckpt_' fits 6 checkpoints (ckpt_")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("wanted", ["nope", "", "../../etc/passwd", "\x1b[31mred", "a" * 5000, "ckpt_\n", "𝔠kpt", "*"])
def test_an_unknown_or_hostile_id_is_refused_in_one_harmless_line(cli, wanted):
    result = cli("show", "--", wanted, rc=3)
    assert result.stdout == ""
    assert result.stderr.startswith("ckptcache: error: There is no checkpoint ")
    assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr


# --- best ----------------------------------------------------------------------------------------


def test_best_is_what_the_cache_says(cli_json, cache):
    expected = TrainingCache(cache.folder).best()
    assert cli_json("best")["checkpoint"]["id"] == expected.id == cache.best


def test_best_of_what_fits(cli_json, cli, cache, tmp_path):
    (tmp_path / "wide.json").write_text(json.dumps(WIDE))
    (tmp_path / "wide.toml").write_text("".join(f"{k} = {v}\n" for k, v in WIDE.items()))
    (tmp_path / "train.json").write_text(json.dumps({"model_config": WIDE, "seed": 1}))
    for given in ("wide.json", "wide.toml", "train.json"):
        assert cli_json("best", "--model-config", str(tmp_path / given))["checkpoint"]["id"] == cache.best
    assert cli_json("best", "--like", cache.worst)["checkpoint"]["id"] == cache.best
    assert cli_json("best", "--like", cache.other)["checkpoint"]["id"] == cache.other
    assert cli("best", "--like", cache.worst).stdout.startswith(cache.best)


def test_none_that_fits_is_null_and_3(cli_json, cli, tmp_path):
    (tmp_path / "huge.json").write_text(json.dumps({**WIDE, "n_embd": 4096}))
    assert cli_json("best", "--model-config", str(tmp_path / "huge.json"), rc=3) == {"checkpoint": None}
    result = cli("best", "--model-config", str(tmp_path / "huge.json"), rc=3)
    assert result.stdout == ""
    assert "no checkpoint to resume from" in result.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", "{"), ("a.toml", "x = = 1"), ("a.json", "[1]"), ("a.json", "\xff"), ("none.json", None)],
)
def test_a_bad_configuration_file_is_refused(cli, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    assert (
        f"{tmp_path / name} cannot be read as settings"
        in cli("best", "--model-config", str(tmp_path / name), rc=2).stderr
    )


# --- explain -------------------------------------------------------------------------------------


def test_explain_judges_by_the_newest_session(cli, cli_json, cache):
    found = cli_json("explain")
    assert found["judged_by"] == "what the newest session, sess_b, trained"
    assert found["model_config"] == WIDE
    assert [e["id"] for e in found["checkpoints"] if e["chosen"]] == [cache.best]
    assert {e["id"]: e["verdict"] for e in found["checkpoints"]}[cache.other] == "incompatible"
    assert found["evicted"] == 1
    assert cli("explain").stdout.startswith("Judged by what the newest session, sess_b, trained (")


def test_explain_takes_the_score_apart(cli, cli_json, cache):
    chosen = cli_json("explain")["checkpoints"][0]
    parts = chosen["score"]
    assert chosen["quality_score"] == pytest.approx(0.7 * parts["loss_score"] + 0.3 * parts["metrics_score"])
    assert cli_json("explain")["weights"] == {"loss": 0.7, "metrics": 0.3, "progress": 0.0}
    line = next(line for line in cli("explain").stdout.splitlines() if line.startswith("chosen  ckpt_"))
    assert "0.7 × loss_score 0.3333 (val_loss 2) + 0.3 × metrics_score 0.5 (accuracy) " in line
    assert line.endswith(" fits")


def test_explain_lists_in_the_order_of_resuming_with_every_reason(cli, cache):
    _judged, _titles, *lines = cli("explain").stdout.splitlines()
    ids = [next(word for word in line.split() if word.startswith("ckpt_")) for line in lines[:-1]]
    assert ids == [cache.best, cache.worst, cache.missing, cache.diverged, cache.other]
    assert "missing: its file is gone" in lines[2]
    assert "diverged: val_loss is nan" in lines[3]
    assert "does not fit: n_embd: saved 4, needed 8" in lines[4]
    assert lines[-1] == "1 evicted checkpoint not listed (`ckptcache ls --all`)."


def test_explain_like_another(cli_json, cli, cache, tmp_path):
    found = cli_json("explain", "--like", cache.other)
    assert found["judged_by"] == f"what {cache.other} was saved for"
    assert [e["id"] for e in found["checkpoints"] if e["eligible"]] == [cache.other]
    (tmp_path / "wide.json").write_text(json.dumps(WIDE))
    both = cli("explain", "--like", "best", "--model-config", str(tmp_path / "wide.json"), rc=2)
    assert "exclude each other" in both.stderr


def test_explain_without_sessions_judges_by_the_newest_checkpoint(tmp_path):
    from cli.conftest import save

    with TrainingCache(tmp_path) as cache:
        save(cache, 1, 2.0)
        newest = save(cache, 2, 3.0)
    found = json.loads(ckptcache_cli("explain", "--cache-dir", tmp_path, "--json").stdout)
    assert found["judged_by"] == f"what the newest checkpoint, {newest}, trained"
    assert all(e["eligible"] for e in found["checkpoints"])


def test_explain_of_nothing_says_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    text = ckptcache_cli("explain", "--cache-dir", tmp_path).stdout
    assert text.splitlines() == ["Judged by nothing: the cache is empty.", "There is no checkpoint to judge."]


# --- sessions ------------------------------------------------------------------------------------


def test_sessions_oldest_first_with_how_they_ended(cli, cli_json, cache):
    found = cli_json("sessions")["sessions"]
    assert [(s["id"], s["state"]) for s in found] == [("sess_a", "finished"), ("sess_b", "cut short")]
    assert found[1]["parent"] == cache.best
    assert len(found[1]["curves"]["val_loss"]) == 50
    listed = rows(cli("sessions").stdout)
    assert listed[0] | {"first": "3.0000", "last": "2.0000", "iterations": "0-200"} == listed[0]
    assert listed[1]["parent"] == cache.best


def test_a_session_that_lives_is_running(cli_json, cache):
    with TrainingCache(cache.folder) as own, TrainingSession(own, model=None, step={"n": 0}, resume="never") as session:
        states = {s["id"]: s["state"] for s in cli_json("sessions")["sessions"]}
        assert states[session.id] == "running"
    states = {s["id"]: s["state"] for s in cli_json("sessions")["sessions"]}
    assert states[session.id] == "finished"


def test_a_session_of_another_machine_is_not_guessed_at(cli_json, cache):
    with TrainingCache(cache.folder) as own:
        own.record_session(SessionRecord(id="sess_far"))
    (cache.folder / "sessions").mkdir(exist_ok=True)
    (cache.folder / "sessions" / "sess_far.lock").write_text('{"host": "elsewhere", "boot_id": "x", "pid": 1}')
    assert {s["id"]: s["state"] for s in cli_json("sessions")["sessions"]}["sess_far"] == "unknown"

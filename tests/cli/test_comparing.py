import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from ckptcache.cache import TrainingCache
from ckptcache.cli.compareview import find
from ckptcache.cli.sketch import ASCII, sketch
from ckptcache.elsewhere import Place, place
from ckptcache.errors import AmbiguousSession, InvalidValue, SessionNotFound
from ckptcache.metadata import SessionRecord
from ckptcache.session import TrainingSession
from cli.conftest import ckptcache_cli, environment, on_terminal, save, terminal
from tests.caches import as_nobody, let_in, listing

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ESCAPES = {"\x1b", "\x9b", "\x07", "\r"}


def train(folder, *, lr, iterations, resume="best", width=4):
    """A real training of a small model that is evaluated every ten iterations; returns its session's id."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    configs = {"model_config": {"n_embd": width}, "training_config": {"lr": lr, "batch": {"size": 16}}}
    with (
        TrainingCache(folder, min_improvement_threshold=0.0) as cache,
        TrainingSession(cache, model=model, optimizer=optimizer, resume=resume, **configs) as session,
    ):
        for step in session.steps(iterations):
            batch = torch.randn(16, width)
            optimizer.zero_grad()
            loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            session.log(loss=loss)
            if (step + 1) % 10 == 0:
                session.checkpoint(val_loss=loss.item(), metrics={"accuracy": step / 100})
    return session.id


@pytest.fixture(scope="module")
def trained_template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "cache"
    first = train(folder, lr=0.01, iterations=40)
    return folder, (first, train(folder, lr=0.003, iterations=60, resume="latest"))


@pytest.fixture
def trained(trained_template, tmp_path):
    """A copy of a cache that two sessions trained in, and their ids."""
    shutil.copytree(trained_template[0], tmp_path / "trained")
    return tmp_path / "trained", trained_template[1]


def ids_of(folder):
    """Ids of the available checkpoints in the order in which they were saved."""
    return [r.id for r in sorted(TrainingCache(folder).checkpoints(), key=lambda r: r.order)]


def json_of(*args, rc=0):
    return json.loads(ckptcache_cli(*args, "--json", rc=rc).stdout)


def shown(columns, *args, **env):
    code, text = terminal(columns, *args, **env)
    return code, COLOUR.sub("", text).splitlines()


# --- DIR:ID --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "windows", "expected"),
    [
        ("best", False, Place(None, "best")),
        ("runs/a:best", False, Place("runs/a", "best")),
        ("/tmp/with:colon:latest", False, Place("/tmp/with:colon", "latest")),
        ("C:\\runs\\cache:ckpt_1", True, Place("C:\\runs\\cache", "ckpt_1")),
        ("C:/runs:best", True, Place("C:/runs", "best")),
        ("a:best", False, Place("a", "best")),
        ("C:best", True, Place(None, "C:best")),
        (".:best", False, Place(".", "best")),
    ],
)
def test_an_argument_names_a_folder_before_its_last_colon(text, windows, expected):
    assert place(text, windows=windows) == expected


@pytest.mark.parametrize(
    ("text", "windows"),
    [("runs:", False), (":best", False), ("C:\\runs\\cache", True), ("C:/runs", False), (":", True)],
)
def test_a_folder_without_an_id_is_refused(text, windows):
    with pytest.raises(InvalidValue, match="write DIR:ID"):
        place(text, windows=windows)


# --- diff ----------------------------------------------------------------------------------------


def test_diff_shows_weights_settings_losses_and_descent(trained):
    folder, _ = trained
    *_, first_last, last = ids_of(folder)
    text = ckptcache_cli("--cache-dir", folder, "diff", first_last, last).stdout
    lines = text.splitlines()
    assert lines[0] == f"A  {first_last}"
    assert "B was trained on from A, " in text
    assert re.search(r"^iteration +\d+ +60 +\+\d+$", text, re.MULTILINE)
    assert re.search(r"^training_config.lr +0.01 +0.003$", text, re.MULTILINE)
    assert re.search(r"^accuracy +0\.\d+ +0.5900 ", text, re.MULTILINE)
    assert re.search(r"^0.weight +float32\[8, 4\] +0\.\d+ +0\.\d+ +0\.9\d+$", text, re.MULTILINE)
    assert re.search(
        r"^Model: 9 tensors, 9 changed; of its real numbers \|\|B - A\|\| is [\d.]+, [\d.]+ of ", text, re.M
    )
    assert re.search(r"^optimizer: 18 of 18 tensors", text, re.MULTILINE)
    assert re.search(r"^rng: ", text, re.MULTILINE)
    assert "optimizer.state" not in text
    assert "n_embd" not in text


def test_diff_numbers_agree_with_the_files(trained):
    folder, _ = trained
    *_, a, b = ids_of(folder)
    cache = TrainingCache(folder)
    before, after = cache.load(a)["model"]["0.weight"].double(), cache.load(b)["model"]["0.weight"].double()
    found = json_of("--cache-dir", folder, "diff", a, b)
    row = next(t for t in found["tensors"] if (t["part"], t["name"]) == ("model", "0.weight"))
    assert row["change"] == pytest.approx(float((after - before).norm()))
    assert row["relative"] == pytest.approx(float((after - before).norm() / before.norm()))
    assert (found["a"]["checkpoint"]["id"], found["b"]["checkpoint"]["id"]) == (a, b)
    assert found["lineage"]["relation"] == "ancestor"
    assert found["identical"] is False
    assert {part["name"] for part in found["parts"]} == {"model", "optimizer", "rng"}
    assert {"key": "training_config.lr", "a": 0.01, "b": 0.003} in found["configs"]


def test_json_holds_every_tensor_whatever_is_listed(trained):
    folder, _ = trained
    everything = json_of("--cache-dir", folder, "diff", "best", "latest")
    assert json_of("--cache-dir", folder, "diff", "best", "latest", "--top", "1") == everything
    assert json_of("--cache-dir", folder, "diff", "best", "latest", "--all") == everything
    assert {t["part"] for t in everything["tensors"]} == {"model", "optimizer", "rng"}


def test_diff_says_that_two_are_identical(trained):
    folder, _ = trained
    done = ckptcache_cli("--cache-dir", folder, "diff", "latest", "latest")
    assert "A and B have the same id." in done.stdout
    assert re.search(r"^Identical: all \d+ tensors and \d+ values are the same\.$", done.stdout, re.MULTILINE)
    assert "relative" not in done.stdout
    assert json_of("--cache-dir", folder, "diff", "latest", "latest")["identical"] is True


def test_diff_lists_as_many_tensors_as_asked_for(trained):
    folder, _ = trained
    *_, a, b = ids_of(folder)
    text = ckptcache_cli("--cache-dir", folder, "diff", a, b, "--top", "2").stdout
    assert "and 7 more (--top 9, or --json)\n" in text
    assert len(re.findall(r"^\S+ +(?:float32|int64)\[", text, re.MULTILINE)) == 2
    text = ckptcache_cli("--cache-dir", folder, "diff", a, b, "--all", "--top", "0").stdout
    assert len(re.findall(r"^optimizer.state.\d.\w+ +float32\[", text, re.MULTILINE)) == 18
    assert re.search(r"^optimizer.param_groups.0.lr|^rng\.", text, re.MULTILINE)


def test_models_of_other_shapes_are_compared_as_far_as_they_go(cli, cache):
    text = cli("diff", cache.best, cache.other).stdout
    assert re.search(r"^weight +float32\[2, 8\] -> float32\[2, 4\] +- +reshaped +-$", text, re.MULTILINE)
    assert re.search(r"^model_config.n_embd +8 +4$", text, re.MULTILINE)
    assert "Model: 1 tensor, 1 of another shape." in text
    assert "A and B have no recorded ancestor in common." in text


def test_a_checkpoint_of_another_cache_is_found_there(trained, tmp_path):
    folder, _ = trained
    other = tmp_path / "other" / "cache"
    shutil.copytree(folder, other)
    train(other, lr=0.1, iterations=80, resume="latest")
    found = json_of("--cache-dir", folder, "diff", "latest", f"{other}:latest")
    assert [found[side]["cache_dir"] for side in "ab"] == [str(folder), str(other)]
    assert found["lineage"]["relation"] == "ancestor"
    assert found["iteration"] == {"a": 60, "b": 80, "change": 20}
    text = ckptcache_cli("--cache-dir", folder, "diff", "latest", f"{other}:latest").stdout
    assert f"in {other}\n" in text


def test_two_caches_elsewhere_need_none_here(trained, tmp_path, monkeypatch):
    folder, _ = trained
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert json_of("diff", f"{folder}:latest", f"../{folder.name}:latest")["identical"] is True
    assert json_of("compare", f"../{folder.name}:latest")["sessions"]
    assert ckptcache_cli("diff", f"{folder}:latest", "latest", rc=3).stdout == ""


def test_nothing_is_changed_in_a_folder_that_cannot_be_written(trained):
    folder, _ = trained
    let_in(folder)
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = listing(folder)

    def look():
        ckptcache_cli("diff", f"{folder}:best", f"{folder}:latest")
        ckptcache_cli("compare", f"{folder}:latest", f"{folder}:best")

    try:
        look()
        assert listing(folder) == before
        if os.geteuid() == 0:
            assert as_nobody(look) == 0
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def test_looking_elsewhere_leaves_no_trace(trained):
    folder, _ = trained
    before = listing(folder)
    ckptcache_cli("diff", f"{folder}:best", f"{folder}:latest")
    ckptcache_cli("compare", f"{folder}:latest", f"{folder}:best")
    assert listing(folder) == before


@pytest.mark.parametrize(
    ("a", "code", "kind"),
    [
        ("nobody", 3, "CheckpointNotFound"),
        ("{folder}:nobody", 3, "CheckpointNotFound"),
        ("{folder}/none:best", 3, "CacheNotFound"),
        ("{folder}/metadata.json:best", 1, "CacheDirIsFile"),
        ("{folder}:", 2, "InvalidValue"),
        ("ckpt_", 2, "AmbiguousId"),
        ("{evicted}", 3, "CheckpointMissing"),
        ("{missing}", 3, "CheckpointMissing"),
        ("{folder}:{evicted}", 3, "CheckpointMissing"),
    ],
)
def test_what_cannot_be_compared_is_a_typed_error(cli, cache, a, code, kind):
    given = a.format(folder=cache.folder, evicted=cache.evicted, missing=cache.missing)
    for arguments in ((given, cache.best), (cache.best, given)):
        done = cli("diff", *arguments, "--json", rc=code)
        error = json.loads(done.stdout)["error"]
        assert error["type"] == kind
        if kind in ("CheckpointNotFound", "CacheNotFound"):
            assert str(cache.folder) in error["message"]


def test_a_damaged_file_is_4_and_one_elsewhere_stays_where_it_is(cli, cache):
    file = cache.folder / "checkpoints" / f"{cache.worst}.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before = listing(cache.folder)
    done = ckptcache_cli("diff", f"{cache.folder}:{cache.worst}", f"{cache.folder}:{cache.best}", "--json", rc=4)
    assert json.loads(done.stdout)["error"]["type"] == "CheckpointDamaged"
    assert listing(cache.folder) == before
    cli("diff", cache.worst, cache.best, rc=4)
    assert (cache.folder / "quarantine" / file.name).exists()
    assert "quarantined" in cli("diff", cache.worst, cache.best, rc=3).stderr


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_a_diff_fits_the_terminal(trained, columns):
    folder, _ = trained
    code, lines = shown(columns, "--cache-dir", folder, "diff", "best", "latest", "--all")
    assert code == 0
    wide = [line for line in lines if len(line) > columns]
    assert [line for line in wide if "ckpt_" not in line and str(folder) not in line] == []
    assert any("relative" in line for line in lines)


def test_without_colour_nothing_is_coloured(trained):
    folder, (first, second) = trained
    for args in (("diff", "best", "latest"), ("compare", first, second)):
        _, text = terminal(100, "--cache-dir", folder, *args, NO_COLOR="1")
        assert not COLOUR.search(text)
        _, text = terminal(100, "--cache-dir", folder, *args)
        assert COLOUR.search(text)


def test_a_small_comparison_shows_no_bar(trained):
    folder, _ = trained
    _, text = terminal(100, "--cache-dir", folder, "diff", "best", "latest", "--json")
    assert text.startswith("{")


def test_a_long_comparison_shows_a_bar_on_a_terminal_only(trained):
    folder, _ = trained
    code = (
        "import ckptcache.cli.bars as b; b._MANY_BYTES = 1; from ckptcache.cli import main; main(prog_name='ckptcache')"
    )
    command = [sys.executable, "-c", code, "--cache-dir", str(folder), "diff", "best", "latest"]
    piped = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert piped.stderr == ""
    code, text = on_terminal(100, command)
    assert code == 0
    assert {"reading", "comparing"} <= set(re.findall(r"reading|comparing", text))


# --- compare -------------------------------------------------------------------------------------


def test_compare_shows_sessions_side_by_side(trained):
    folder, (first, second) = trained
    text = ckptcache_cli("--cache-dir", folder, "compare", first, second).stdout
    assert text.splitlines()[0].split() == ["session", first, second]
    assert re.search(r"^resumed from +a fresh start +ckpt_", text, re.MULTILINE)
    assert re.search(r"^policy +best +latest$", text, re.MULTILINE)
    assert re.search(r"^iterations +0-40 +40-60$", text, re.MULTILINE)
    assert re.search(r"^ended +finished +finished$", text, re.MULTILINE)
    assert re.search(r"^training_config.lr +0.01 +0.003$", text, re.MULTILINE)
    assert "batch.size" not in text
    assert re.search(r"^torch +\S+ +\S+$", text, re.MULTILINE)
    assert re.search(r"^val loss over iterations 10 to 60, _ [\d.]+ to # [\d.]+$", text, re.MULTILINE)
    drawn = dict(line.split("  ", 1) for line in text.splitlines()[-2:])
    assert set(drawn[first].strip()) <= set(ASCII)
    assert len(drawn[second]) - len(drawn[second].lstrip()) > len(drawn[first].rstrip()) / 2


def test_compare_in_json_holds_everything(trained):
    folder, (first, second) = trained
    found = json_of("--cache-dir", folder, "compare", first, second)
    assert [s["session"]["id"] for s in found["sessions"]] == [first, second]
    assert [s["iterations"] for s in found["sessions"]] == [40, 20]
    assert found["sessions"][0]["session"]["curves"]["val_loss"]
    assert found["sessions"][1]["configs"]["training_config"]["lr"] == 0.003
    assert found["sessions"][0]["iterations_per_second"] > 0
    assert found["differing"] == [{"key": "training_config.lr", "values": [0.01, 0.003], "given": [True, True]}]


def test_one_session_may_be_compared_with_nothing(trained):
    folder, (_, second) = trained
    found = json_of("--cache-dir", folder, "compare", "latest")
    assert ([s["session"]["id"] for s in found["sessions"]], found["differing"]) == ([second], [])
    assert second in ckptcache_cli("--cache-dir", folder, "compare", "latest").stdout
    assert ckptcache_cli("--cache-dir", folder, "compare", rc=2).stdout == ""


def test_a_checkpoint_stands_for_the_session_that_saved_it(cache):
    catalog = TrainingCache(cache.folder).ledger.view()
    assert {find(catalog, wanted).id for wanted in (cache.best, "best", "release-1", "sess_a", "sess_a")} == {"sess_a"}
    assert {find(catalog, wanted).id for wanted in ("latest", "sess_b", cache.diverged)} == {"sess_b"}
    with pytest.raises(AmbiguousSession, match="sess_a, sess_b"):
        find(catalog, "sess_")
    with pytest.raises(SessionNotFound, match=re.escape(str(cache.folder))):
        find(catalog, "nobody")
    with pytest.raises(SessionNotFound, match=cache.other):
        find(catalog, cache.other)


@pytest.mark.parametrize(
    ("given", "code", "kind"),
    [("nobody", 3, "SessionNotFound"), ("sess_", 2, "AmbiguousSession"), ("{folder}x:latest", 3, "CacheNotFound")],
)
def test_a_session_that_is_not_there_is_a_typed_error(cli, cache, given, code, kind):
    done = cli("compare", "latest", given.format(folder=cache.folder), "--json", rc=code)
    assert json.loads(done.stdout)["error"]["type"] == kind


def test_sessions_of_two_caches_name_their_folders(trained, tmp_path):
    folder, (first, _) = trained
    shutil.copytree(folder, tmp_path / "copy")
    text = ckptcache_cli("--cache-dir", folder, "compare", first, f"{tmp_path / 'copy'}:{first}").stdout
    assert re.search(rf"^cache +{folder} +{tmp_path / 'copy'}$", text, re.MULTILINE)


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_a_comparison_fits_the_terminal(trained, columns):
    folder, (first, second) = trained
    code, lines = shown(columns, "--cache-dir", folder, "compare", first, second, first, second)
    assert code == 0
    # An id is not broken: beside the labels, the longest takes this much.
    assert [line for line in lines if len(line) > max(columns, 50)] == []
    headings = [line for line in lines if line.startswith("session ")]
    assert sum(len(line.split()) - 1 for line in headings) == 4
    assert any("▁" in line for line in lines)


def test_a_dumb_terminal_gets_curves_in_ascii(trained):
    folder, (first, second) = trained
    _, text = terminal(100, "--cache-dir", folder, "compare", first, second, TERM="dumb")
    assert text.isascii()


def test_sessions_that_never_ended_or_measured_are_compared(tmp_path):
    with TrainingCache(tmp_path) as cache:
        cache.record_session(SessionRecord(id="empty"))
        nan = float("nan")
        cache.record_session(SessionRecord(id="odd", first_val_loss=nan, curves={"val_loss": ((5, nan), (9, 1.0))}))
        save(cache, 1, None)
    found = json_of("--cache-dir", tmp_path, "compare", "empty", "odd")
    assert [s["state"] for s in found["sessions"]] == ["cut short", "cut short"]
    text = ckptcache_cli("--cache-dir", tmp_path, "compare", "empty", "odd").stdout
    assert "val loss over" not in text
    assert re.search(r"^first val loss +- +nan$", text, re.MULTILINE)


# --- what others wrote ---------------------------------------------------------------------------

HOSTILE = "\x1b[31m\x9b\r\n[/]\x07"


def test_hostile_text_is_shown_and_not_sent(tmp_path):
    folder = tmp_path / "cache"
    with TrainingCache(folder) as cache:
        session = cache.record_session(SessionRecord(id="s"), {"model_config": {HOSTILE: HOSTILE}})
        other = cache.record_session(SessionRecord(id="t", resume=HOSTILE, environment={HOSTILE: HOSTILE}))
        state = {"model": {HOSTILE: torch.ones(1)}, HOSTILE: {HOSTILE: HOSTILE}}
        more = {"metrics": {HOSTILE: 0.5}, "model_config": {HOSTILE: HOSTILE}}
        a = cache.save(state, iteration=1, val_loss=1.0, session=session, **more).id
        state = {"model": {HOSTILE: torch.zeros(1)}, HOSTILE: {HOSTILE: "x"}}
        b = cache.save(state, iteration=2, val_loss=1.0, session=other).id
    for args in (("diff", a, b, "--all"), ("compare", "s", "t")):
        for form in ((), ("--json",)):
            result = ckptcache_cli("--cache-dir", folder, *args, *form)
            assert not ESCAPES & set(result.output), args
        _, text = terminal(80, "--cache-dir", folder, *args, NO_COLOR="1")
        assert not (ESCAPES - {"\r"}) & set(text), args


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["configs"].update({key: [1] for key in index["configs"]}),
        lambda index: index["configs"].clear(),
        lambda index: [s.update(parent="gone", config="none") for s in index["sessions"].values()],
        lambda index: [r.update(parents=[id], learning_rate=["nan"]) for id, r in index["checkpoints"].items()],
        lambda index: [r.update(iteration=2**53, epoch=1e308) for r in index["checkpoints"].values()],
        lambda index: [
            s.update(curves={"val_loss": [[0, 1e308], [2**53, -1e308]]}) for s in index["sessions"].values()
        ],
        lambda index: index["fingerprints"].clear(),
        lambda index: [s.update(seconds=5e-324) for s in index["sessions"].values()],
    ],
    ids=["lists", "no configurations", "lost", "own parents", "huge", "huge curves", "no fingerprints", "no time"],
)
def test_whatever_an_index_holds_there_is_an_answer(trained, change):
    folder, (first, second) = trained
    *_, a, b = ids_of(folder)
    index = json.loads((folder / "metadata.json").read_text())
    change(index)
    (folder / "metadata.json").write_text(json.dumps(index))
    for args in (("diff", a, b), ("compare", first, second)):
        for form in ((), ("--json",)):
            result = ckptcache_cli("--cache-dir", folder, *args, *form)
            assert result.stdout


# --- curves --------------------------------------------------------------------------------------


def test_curves_share_one_scale():
    falling, flat = [(0, 8.0), (10, 4.0), (20, 1.0)], [(20, 1.0), (40, 1.0)]
    high, low = sketch([falling, flat], 41, ASCII)
    assert (high[0], high[20:].strip()) == (ASCII[-1], ASCII[0])
    assert low == " " * 20 + ASCII[0] * 21
    assert sketch([[], []], 10) == ["", ""]
    assert sketch([[(5, 1.0)]], 4, ASCII)[0].strip() == ASCII[0]

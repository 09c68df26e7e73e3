import re

import pytest

from ckptcache.cache import TrainingCache
from cli.conftest import ckptcache_cli, process, terminal

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def shown(columns, *args, **env):
    code, text = terminal(columns, *args, **env)
    return code, COLOUR.sub("", text).splitlines()


@pytest.mark.parametrize(
    ("command", "columns"),
    [
        *(
            (command, 100)
            for command in ("ls", "ls --all", "explain", "sessions", "prune --dry-run", "doctor --no-verify")
        ),
        *((command, 80) for command in ("ls --all", "explain", "sessions", "prune --dry-run")),
        *((command, 60) for command in ("ls --all", "explain")),
    ],
)
def test_nothing_is_wider_than_the_terminal(cache, columns, command):
    _, lines = shown(columns, "--cache-dir", cache.folder, *command.split())
    wide = [line for line in lines if len(line) > columns]
    # A path or an id that is longer than a small terminal is not broken.
    assert wide == [line for line in wide if columns < 100 and ("runs/cache" in line or "ckpt_" in line)]
    assert len(lines) > 1


@pytest.mark.parametrize("command", ["ls", "explain", "prune --dry-run --max-checkpoints 1"])
@pytest.mark.parametrize("columns", [100, 80])
def test_the_ids_shown_can_be_typed(cache, columns, command):
    code, lines = shown(columns, "--cache-dir", cache.folder, *command.split())
    assert code == 0
    ids = [word for line in lines for word in line.split() if word.startswith("ckpt_")]
    found = TrainingCache(cache.folder)
    assert {found.get(id).id for id in ids} >= {cache.best, cache.worst, cache.other, cache.diverged}
    assert all(len(id) < len(cache.best) for id in ids)


def test_a_wide_terminal_shows_everything(cache):
    _, lines = shown(200, "--cache-dir", cache.folder, "ls")
    assert lines[0].split() == [
        "group",
        "#",
        "id",
        "iteration",
        "val",
        "loss",
        "quality",
        "saved",
        "why",
        "size",
        "marks",
    ]
    assert cache.best in lines[2]
    assert lines[2].endswith("=release-1")


def test_the_best_of_a_narrow_terminal_is_kept(cache):
    _, lines = shown(60, "--cache-dir", cache.folder, "ls")
    assert "val loss" in lines[0]
    assert "size" not in lines[0]


def test_ls_ends_with_what_is_hidden_and_what_the_groups_are(cache):
    _, lines = shown(100, "--cache-dir", cache.folder, "ls")
    assert "Groups: A: n_embd 8, validation data" in " ".join(lines)
    assert "; B: n_embd 4, validation data" in " ".join(lines)
    assert "1 evicted, 1 missing (--all)" in re.sub(r"\s+", " ", " ".join(lines))


def test_explain_marks_the_chosen_one_and_shows_its_sum(cache):
    _, lines = shown(100, "--cache-dir", cache.folder, "explain")
    at = next(i for i, line in enumerate(lines) if line.startswith("→"))
    assert TrainingCache(cache.folder).get(lines[at].split()[2]).id == cache.best
    assert lines[at].endswith("quality 0.3833    exact         chosen: fits")
    assert lines[at + 1].strip() == "= 0.7 × loss_score 0.3333 (val_loss 2) + 0.3 × metrics_score 0.5 (accuracy)"
    assert sum(line.startswith("→") for line in lines) == 1


def test_sessions_draw_their_curve(cache):
    _, lines = shown(160, "--cache-dir", cache.folder, "sessions")
    assert re.search(r"cut short  [▁▂▃▄▅▆▇█]{24}$", lines[3])


@pytest.mark.parametrize("command", ["ls", "explain", "doctor --no-verify", "sessions"])
def test_colour_unless_unwanted(cache, command):
    assert "\x1b[" in terminal(100, "--cache-dir", cache.folder, *command.split())[1]
    assert "\x1b" not in terminal(100, "--cache-dir", cache.folder, *command.split(), NO_COLOR="1")[1]


def test_json_on_a_terminal_is_json(cache):
    _, text = terminal(100, "--cache-dir", cache.folder, "ls", "--json")
    assert text.startswith('{\n  "checkpoints": [\n')
    assert "\x1b" not in text


def test_a_dumb_terminal_gets_plain_text(cache):
    _, text = terminal(100, "--cache-dir", cache.folder, "ls", TERM="dumb")
    assert text == process("--cache-dir", cache.folder, "ls").stdout


# --- being asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_default_limits_are_asked_about_before_they_evict(cache, answer, code):
    arguments = ("--cache-dir", cache.folder, "prune", "--max-cache-size-gb", "0.000002")
    ended, text = terminal(100, *arguments, typed=answer)
    assert ended == code
    assert "would go" in text
    left = len(list((cache.folder / "checkpoints").glob("*.pt")))
    assert (left == 4) is (code == 1)


def test_limits_that_were_chosen_are_not_asked_about(cache):
    arguments = ("prune", "--max-cache-size-gb", "1", "--max-checkpoints", "2")
    code, text = terminal(100, "--cache-dir", cache.folder, *arguments)
    assert code == 0
    assert "?" not in text
    code, text = terminal(100, "--cache-dir", cache.folder, "prune", "--yes", CKPTCACHE_MAX_CHECKPOINTS="1")
    assert code == 0
    assert "?" not in text


def test_verifying_much_shows_a_bar_on_stderr_alone(tmp_path):
    from cli.conftest import save

    with TrainingCache(tmp_path) as cache:
        for iteration in range(10):
            save(cache, iteration, 1.0)
    code, text = terminal(100, "--cache-dir", tmp_path, "doctor")
    assert code == 0
    assert "verifying" in text
    assert ckptcache_cli("--cache-dir", tmp_path, "doctor").output == "Everything is in order.\n"

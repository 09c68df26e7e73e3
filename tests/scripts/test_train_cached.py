"""The main job as a user starts it: what it prints where, how it ends, and how it answers what it can't do."""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import numpy as np
import pytest

from ckptcache.cache import TrainingCache
from tests.faults import end_of, run_child, start_child, wait_until
from tests.jobs import differences  # noqa: F401 - imports all of torch once, and not in each child
from tests.terminal import Terminal
from tests.test_session import SUMMARY_KEYS

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "train_cached.py"
TINY = {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "block_size": 16,
    "batch_size": 4,
    "eval_batches": 2,
    "eval_interval": 5,
    "session_iters": 12,
    "data_dir": "texts",
    "out_dir": "out",
    "warmup_iters": 2,
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    # Not the package's own source: which checkpoint of twelve steps is the best would change with each edit of it.
    text = (ROOT / "LICENSE").read_text()
    for name in ("one", "two", "three"):
        (texts / f"{name}.txt").write_text(f"{name}\n{text}")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))


class Ended:
    """How a run ended."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def sentence(self):
        """What it says is wrong, which must be the one line that it prints."""
        assert self.out == ""
        assert "Traceback" not in self.err
        (line,) = self.err.splitlines()
        return line.removeprefix("train_cached.py: error: ")

    @property
    def summary(self):
        """The one JSON object on stdout."""
        found, end = json.JSONDecoder().raw_decode(self.out)
        assert self.out[end:].strip() == ""
        assert list(found) == SUMMARY_KEYS
        return found


def run(*arguments, as_user=None):
    """The script in a forked child, which need not import torch anew."""

    def body():
        for number, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        sys.argv = [str(SCRIPT), *map(str, arguments)]
        if as_user is not None:
            os.setgid(as_user)
            os.setuid(as_user)
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.code or 0)

    code = run_child(body)
    return Ended(code, Path("out.txt").read_text(), Path("err.txt").read_text())


def command(*arguments):
    return [sys.executable, str(SCRIPT), "--config", "tiny.json", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def tiny(*arguments, **options):
    return run("--config", "tiny.json", *arguments, **options)


def files_below(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# --- a run, and another --------------------------------------------------------------------------


def test_a_run_begins_fresh_and_the_next_goes_on_better_and_a_third_begins_again(tmp_path):
    first = tiny("--json")
    assert first.code == 0
    assert "starts fresh: there is nothing to resume from" in first.err
    assert (first.summary["start_iteration"], first.summary["end_iteration"]) == (0, 12)
    assert first.summary == json.loads(Path("out/training_summary.json").read_text())
    assert first.summary["cache_dir"] == "out/cache"

    second = tiny("--json")
    assert f"resumes from {second.summary['resumed_from']}: iteration 12" in second.err
    assert second.summary["resumed_from"] == first.summary["best_checkpoint"]
    assert second.summary["best_val_loss"] < first.summary["best_val_loss"]
    assert (second.summary["start_iteration"], second.summary["end_iteration"]) == (12, 24)

    before = files_below("out/cache/checkpoints")
    third = tiny("--json", "--force_fresh_start")
    assert (third.summary["start_iteration"], third.summary["resumed_from"]) == (0, None)
    assert before.items() <= files_below("out/cache/checkpoints").items()

    again = tiny("--json", "--n-embd=32", "--session-iters", "3")
    assert (again.summary["start_iteration"], again.summary["end_iteration"]) == (0, 3)
    assert again.err.count("n_embd: saved 16, needed 32") == 1
    assert again.err.count(": likewise") >= 2
    assert tiny("--json").summary["resumed_from"] == second.summary["best_checkpoint"]


def test_a_larger_model_begins_with_what_a_smaller_one_has_learned():
    donor = tiny("--json", "--connection_growth_interval", "4")
    best = donor.summary["best_checkpoint"]
    grown = tiny("--json", "--n_layer", "2", "--warm_start", "--min_improvement_threshold", "0")
    assert f"warm start from {best} (fits only in part: n_layer: saved 1, needed 2)" in grown.err
    assert "14 of 24 tensors taken, 0 resized, 10 fresh (blocks.1.*)" in grown.err
    summary = grown.summary
    assert (summary["start_iteration"], summary["parent"], summary["resumed_from"]) == (0, best, None)
    assert summary["first_val_loss"] == pytest.approx(donor.summary["best_val_loss"], abs=1e-5)
    assert summary["best_val_loss"] < summary["first_val_loss"]
    assert "--warm_start" not in commands(grown)[0]

    again = tiny("--json", "--n_layer", "2", "--warm_start")
    assert again.summary["start_iteration"] == 12
    assert "warm start" not in again.err
    hint = tiny("--n_layer", "3", "--session_iters", "1")
    assert re.search(r"\d+ checkpoints could give a warm start, weights only: .* --warm_start", hint.err)


def test_weights_can_come_from_a_checkpoint_that_is_named_also_in_another_cache():
    donor = tiny("--json")
    wanted = f"out/cache:{donor.summary['best_checkpoint']}"
    options = ("--n_embd", "24", "--out_dir", "other", "--force-fresh-start", f"--warm-start={wanted}")
    grown = tiny("--json", *options)
    assert f"warm start from {wanted} (fits only in part: n_embd: saved 16, needed 24)" in grown.err
    assert grown.summary["first_val_loss"] == pytest.approx(donor.summary["best_val_loss"], abs=1e-5)
    assert (grown.summary["parent"], grown.summary["resumed_from"]) == (None, None)

    ended = tiny("--n_embd", "8", "--warm_start", donor.summary["best_checkpoint"])
    assert ended.code == 3
    assert "can't give this run its weights: it has no parameter that this model has: wte.weight" in ended.err
    assert tiny("--n_embd", "8", "--warm_start", "ckpt_none").code == 3


def test_a_settings_file_may_ask_for_a_warm_start():
    tiny()
    Path("warm.json").write_text(json.dumps({**TINY, "n_layer": 2, "warm_start": True}))
    assert "warm start from ckpt_" in run("--config", "warm.json").err
    Path("warm.json").write_text(json.dumps({**TINY, "warm_start": 3}))
    assert run("--config", "warm.json").sentence.startswith("warm_start cannot be 3: it must be true, false, or the id")


def test_piped_it_prints_plain_lines_and_everything_but_the_result_on_stderr():
    ended = tiny()
    assert ended.out == ""
    assert "\x1b" not in ended.err
    assert "\r" not in ended.err
    lines = ended.err.splitlines()
    assert re.fullmatch(r"text: the text in texts, [\d,]+ tokens to train on, [\d,]+ to validate", lines[0])
    assert re.fullmatch(
        r"iteration 10/12  loss \d\.\d{4}  val_loss \d\.\d{4}  [\d.]+ it/s(  best so far)?", lines[5]
    ), lines
    assert lines[-4].startswith("finished: iterations 0 to 12 in ")
    assert lines[-3].startswith("val_loss: first ")


def test_notes_on_the_text_are_told():
    Path("texts/latin.txt").write_bytes(b"caf\xe9 " * 50)
    assert "  1 files were left out, because they are not UTF-8" in tiny("--session_iters", "1").err.splitlines()


def test_options_are_the_same_from_toml_json_and_the_command_line():
    Path("tiny.toml").write_text("".join(f"{k.replace('_', '-')} = {json.dumps(v)}\n" for k, v in TINY.items()))
    summaries = [
        run("--config", "tiny.toml", "--out_dir", "a", "--json").summary,
        run("--config", "tiny.json", "--out-dir", "b", "--json").summary,
        tiny("--out_dir", "c", "--cache-dir", "elsewhere", "--json", "--session_iters", "7", "--batch-size=2").summary,
    ]
    assert summaries[0]["last_val_loss"] == summaries[1]["last_val_loss"]
    assert [s["cache_dir"] for s in summaries] == ["a/cache", "b/cache", "elsewhere"]
    assert summaries[2]["end_iteration"] == 7
    (config,) = {json.dumps(c) for c in configs("elsewhere", "training_config")}
    assert json.loads(config)["batch_size"] == 2
    assert Path("c/training_summary.json").exists()


def configs(folder, kind):
    cache = TrainingCache(folder)
    return [cache.configs(record)[kind] for record in cache.checkpoints()]


def test_a_run_may_be_held_to_a_time():
    summary = tiny("--json", "--session_iters", "1000000", "--max_seconds", "1.5").summary
    assert (summary["stop_reason"], summary["saved"] > 0) == ("max_seconds", True)


def test_who_starts_it_may_hold_it_to_a_time(monkeypatch):
    monkeypatch.setenv("CKPTCACHE_MAX_SECONDS", "1.5")
    ended = tiny("--json", "--session_iters", "1000000")
    assert (ended.summary["stop_reason"], ended.summary["saved"] > 0) == ("max_seconds", True)
    assert "stopped, because its seconds are up" in ended.err
    monkeypatch.setenv("CKPTCACHE_MAX_SECONDS", "soon")
    assert tiny().code == 2


def test_limits_are_kept():
    tiny("--checkpoint_interval", "2", "--max_checkpoints", "2")
    assert len(TrainingCache("out/cache").checkpoints()) == 2


def test_nothing_left_to_do_is_said_and_the_command_to_go_on_does_more():
    options = ["--config", "more.json", "--max_iters", "4"]
    Path("more.json").write_text(json.dumps({k: v for k, v in TINY.items() if k != "session_iters"}))
    assert run(*options).code == 0
    ended = run(*options)
    assert (ended.code, "nothing was left to do: iterations 4 to 4" in ended.err) == (0, True)
    (go_on,) = [line for line in ended.err.splitlines() if line.startswith("go on:")]
    assert shlex.split(go_on)[-2:] == ["--max_iters", "304"]


def test_tokens_made_elsewhere_are_trained_on():
    Path("tokens").mkdir()
    for name in ("train", "val"):
        (np.arange(600, dtype="<u2") % 40).tofile(f"tokens/{name}.bin")
    Path("tokens/meta.json").write_text('{"vocab_size": 40}')
    assert tiny("--data_dir", "tokens", "--session_iters", "3").code == 0
    assert {c["vocab_size"] for c in configs("out/cache", "model_config")} == {40}


def test_two_trainers_in_one_cache_at_once():
    processes = [subprocess.Popen(command("--seed", n), env=ENVIRONMENT, stderr=subprocess.PIPE) for n in (1, 2)]
    errors = [process.communicate(timeout=200)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    cache = TrainingCache("out/cache")
    assert [s.stop_reason for s in cache.sessions()] == ["finished", "finished"]
    assert all(s.best_checkpoint for s in cache.sessions())
    assert cache.doctor() == []


# --- signals -------------------------------------------------------------------------------------


def started(*arguments):
    """A run of its own that trains until it is told to stop; once it has begun."""
    with contextlib.ExitStack() as stack:
        out, err = (stack.enter_context(Path(name).open("w")) for name in ("out.txt", "err.txt"))
        options = ("--session_iters", "1000000", "--eval_interval", "1000000", "--checkpoint_interval", "5")
        process = subprocess.Popen(command(*options, *arguments), env=ENVIRONMENT, stdout=out, stderr=err)
    wait_until(lambda: any(Path("out").rglob("*.pt")), 120, "it did not begin")
    return process


def ended(process):
    return Ended(process.wait(60), Path("out.txt").read_text(), Path("err.txt").read_text())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_it_saves_and_still_prints_its_object(number, code):
    process = started("--json")
    process.send_signal(number)
    stopped = ended(process)
    assert stopped.code == code
    assert "Traceback" not in stopped.err
    assert stopped.summary["stop_reason"] == "signal"
    record = TrainingCache("out/cache").get("latest")
    assert record.iteration == stopped.summary["end_iteration"]
    # It may arrive while that very iteration is being saved for another reason; it isn't saved twice.
    assert record.save_reason in ("signal", "interval", "improved")
    assert f"stopped by a signal: iterations 0 to {record.iteration}" in stopped.err


# --- on a terminal -------------------------------------------------------------------------------


class OnTerminal:
    """A run whose stderr, and the terminal that controls it, has 100 columns."""

    def __init__(self, *arguments, columns=100):
        self.master, slave = os.openpty()
        termios.tcsetwinsize(slave, (30, columns))
        environment = {**ENVIRONMENT, "TERM": "xterm-256color"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            command(*arguments), env=environment, preexec_fn=lambda: os.login_tty(slave), close_fds=False
        )
        os.close(slave)
        self.text, self.columns = "", columns

    def read_until(self, found, seconds=120):
        os.set_blocking(self.master, False)

        def look():
            with contextlib.suppress(BlockingIOError, OSError):
                self.text += os.read(self.master, 1 << 16).decode(errors="replace")
            return found(self.text)

        wait_until(look, seconds, f"the terminal shows only {self.text!r}")

    def screens(self):
        """What was shown after each refresh."""
        terminal = Terminal(self.columns)
        for part in re.split(r"(?=\r)", self.text):
            terminal.feed(part)
            yield terminal.shown()

    def type(self, characters):
        os.write(self.master, characters)

    def end(self):
        def is_over(text):
            return self.process.poll() is not None and "look:" in text

        try:
            self.read_until(is_over)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.master)
        return Terminal(self.columns).feed(self.text).shown()


BAR = re.compile(r"\S ━*[╸╺]?━*\s+\d+/40 loss \d\.\d{4}  val \d\.\d{4}  best \d\.\d{4}  [\d.]+ it/s (--:--|\d\d:\d\d)")


def test_on_a_terminal_a_bar_shows_how_it_goes_and_leaves_nothing():
    # Slow enough for the bar to be drawn: a larger model, evaluated now and then.
    run_ = OnTerminal("--session_iters", "40", "--n_embd", "128", "--n_layer", "4", "--block_size", "64")
    final = run_.end()
    assert run_.process.returncode == 0
    bars = [line for screen in run_.screens() for line in screen if BAR.fullmatch(line)]
    assert bars, run_.text
    assert max(map(len, bars)) <= 95
    assert not any("━" in line or "⠋" in line for line in final), final
    assert final[0].startswith("text: the text in texts")
    finished = next(i for i, line in enumerate(final) if line.startswith("finished: iterations 0 to 40"))
    assert final[finished - 1] == "starts fresh: there is nothing to resume from"
    assert final[finished + 1].startswith("val_loss: first ")
    assert run_.text.count("\x1b[?25l") == run_.text.count("\x1b[?25h") > 0  # the cursor is shown again


def test_an_interrupt_on_the_terminal_leaves_no_garbage_either():
    run_ = OnTerminal("--session_iters", "100000", "--eval_interval", "10000")
    run_.read_until(lambda text: "it/s" in text)
    run_.type(b"\x03")
    final = run_.end()
    assert run_.process.returncode == 130
    assert not any("━" in line or "^C" in line for line in final), final
    assert any(line.startswith("stopped by a signal: iterations 0 to ") for line in final)


# --- the commands at the end ---------------------------------------------------------------------


def commands(ended):
    found = dict(line.split(":", 1) for line in ended.err.splitlines() if line.startswith(("go on:", "look:")))
    return [shlex.split(found[name]) for name in ("go on", "look")]


def test_the_command_to_go_on_works_as_it_is_printed():
    first = subprocess.run(command("--force-fresh-start"), env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    go_on, look = commands(Ended(first.returncode, first.stdout, first.stderr))
    assert "--force-fresh-start" not in go_on
    second = subprocess.run([*go_on, "--json"], env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["start_iteration"] == 12
    assert look[-3:] == ["--cache-dir", "out/cache", "ls"]
    if (ROOT / "ckptcache" / "cli").exists():
        listing = subprocess.run(look, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
        assert (listing.returncode, "ckpt_" in listing.stdout) == (0, True), listing.stderr


def test_started_by_dev_py_the_command_is_the_one_that_was_typed():
    dev = os.path.relpath(ROOT / "scripts" / "dev.py")
    typed = [sys.executable, dev, "train", "--config", "tiny.json", "--session_iters", "2"]
    environment = {**ENVIRONMENT, "CKPTCACHE_PYTHON": sys.executable}
    done = subprocess.run(typed, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    # By its name where the shell finds it, since an interpreter's own path is seldom what was typed.
    name = Path(sys.executable).name
    assert commands(Ended(0, done.stdout, done.stderr))[0] == [name if shutil.which(name) else typed[0], *typed[1:]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--resume", "never", "--json"], ["--json"]),
        (["--resume=ckpt_x"], []),
        (["--warm_start", "--json"], ["--json"]),
        (["--warm-start", "ckpt_x", "--seed", "3"], ["--seed", "3"]),
        (["--warm-start=ckpt_x", "--seed", "3"], ["--seed", "3"]),
        (["--resume", "latest"], ["--resume", "latest"]),
        (["--force_fresh_start", "--seed", "3"], ["--seed", "3"]),
        (["--max-iters", "10"], ["--max_iters", "20"]),
        (["--config", "c.json", "--resume", "never"], ["--config", "c.json", "--resume", "best"]),
    ],
)
def test_the_command_to_go_on_asks_for_more_of_the_same(given, expected):
    script = runpy.run_path(str(SCRIPT))
    options = vars(script["parser"]().parse_args(given))
    options["resume"] = "never" if options["force_fresh_start"] else options["resume"] or "best"
    summary = {"start_iteration": 0, "end_iteration": 10}
    assert script["arguments_to_go_on"](given, summary, options) == expected


# --- what can't be done --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--n_embed", "3"], 2, "did you mean --n_embd?"),
        (["--batch_size", "many"], 2, "invalid int value: 'many'"),
        (["--batch_size", "-4"], 2, "batch_size must be a whole number of at least 1, not -4"),
        (["--learning_rate", "-0.1"], 2, "learning_rate must be above 0, not -0.1"),
        (["--max_iters", "-1"], 2, "max_iters must be a whole number of at least 1, not -1"),
        (["--max_seconds", "0"], 2, "max_seconds must be above 0"),
        (["--max_checkpoints", "0"], 2, "max_checkpoints must be a whole number of at least 1"),
        (["--n_head", "3"], 2, "n_embd must be a multiple of n_head"),
        (["--device", "abacus"], 2, "torch has no such device here"),
        (["--device", "CPU!"], 2, "device must be like auto, cpu"),
        (["--resume", "ckpt_nowhere"], 3, "There is no checkpoint 'ckpt_nowhere' in "),
        (["--data_dir", "empty"], 2, "empty holds no training data"),
        (["--data_dir", "nowhere"], 2, "there is no such folder"),
        (["--data_dir", "tiny.json"], 2, "it is a file, and a folder is needed"),
        (["--data_dir", "short"], 2, "one block needs 17"),
        (["--data_dir", "beyond"], 2, "holds token 300, and the vocabulary ends at 99"),
        (["--out_dir", "tiny.json"], 1, "tiny.json is a file, and a cache needs a folder"),
        (["--cache_dir", "tiny.json"], 1, "tiny.json is a file, and a cache needs a folder"),
        (["--config", "unknown.json"], 2, "'n_embed' (in unknown.json): did you mean 'n_embd'?"),
        (["--config", "broken.toml"], 2, "broken.toml cannot be read as settings"),
        (["--config", "nowhere.json"], 2, "nowhere.json cannot be read as settings: No such file"),
        (["--config", "number.json"], 2, "out_dir cannot be 3: it must be text"),
        (["--config", "word.json"], 2, "force_fresh_start cannot be 'yes': it must be true or false"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence_and_leaves_everything(arguments, code, sentence):
    Path("empty").mkdir()
    Path("short").mkdir()
    Path("short/a.txt").write_text("too short")
    Path("beyond").mkdir()
    for name in ("train", "val"):
        np.full(500, 300, dtype="<u2").tofile(f"beyond/{name}.bin")
    Path("beyond/meta.json").write_text('{"vocab_size": 100}')
    Path("unknown.json").write_text('{"n_embed": 3}')
    Path("broken.toml").write_text("n_embd = ")
    Path("number.json").write_text('{"out_dir": 3}')
    Path("word.json").write_text('{"force_fresh_start": "yes"}')
    before = files_below(".")

    result = tiny(*arguments, "--json")
    assert result.code == code, result.err
    assert sentence in result.sentence
    after = {p: d for p, d in files_below(".").items() if p.name not in ("out.txt", "err.txt")}
    # What was prepared of the text may stay in the cache's data folder.
    assert {p: d for p, d in after.items() if "data" not in p.parts} == before


def test_a_folder_that_may_not_be_written_is_said_in_a_sentence(requires, tmp_path):
    requires("root")
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        shutil.copytree(tmp_path, folder, dirs_exist_ok=True)
        for path, mode in ((folder, 0o777), (folder / "closed", 0o755), (folder / "hidden", 0o700)):
            path.mkdir(exist_ok=True)
            path.chmod(mode)
        os.chdir(folder)
        for closed in ("closed", "hidden"):
            result = tiny("--out_dir", f"{closed}/out", as_user=65534)
            assert result.code == 1, result.err
            assert "permission denied" in result.sentence
            assert not any((folder / closed).iterdir())
        os.chdir(tmp_path)


def test_a_last_save_that_fails_is_said_and_the_object_is_still_printed(requires):
    requires("root")
    disk = Path("disk")
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    requires("a tmpfs", mounted.returncode == 0)
    try:
        result = tiny("--json", "--cache_dir", "disk", "--n_embd", "64")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert (result.summary["stop_reason"], result.summary["saved"]) == ("error", 0)
    assert result.summary["failed_saves"] >= 1


def test_a_loss_that_diverges_ends_it_with_advice():
    result = tiny("--json", "--learning_rate", "1e30", "--session_iters", "200")
    assert result.code == 1
    assert result.summary["stop_reason"] == "diverged"
    assert "a lower --learning_rate may help" in result.err
    assert "Traceback" not in result.err


def test_a_learning_rate_that_is_far_too_high_is_recovered_from_and_not_asked_for_again():
    size = ("--n_layer", "2", "--n_embd", "64", "--n_head", "4", "--block_size", "64", "--batch_size", "16")
    tiny(*size, "--learning_rate", "4e-3", "--session_iters", "100")
    result = tiny(*size, "--json", "--learning_rate", "1", "--session_iters", "60")
    assert (result.code, result.summary["stop_reason"]) == (0, "finished")
    assert result.summary["end_iteration"] == 160
    assert re.search(r"went back to a good checkpoint (once|\d times), because the loss had diverged", result.err)
    assert "--learning_rate" not in next(line for line in result.err.splitlines() if line.startswith("go on:"))
    third = tiny(*size, "--resume", "latest", "--session_iters", "1")
    assert re.search(r"learning_rate is [\d.]+, as saved; the default is 0\.004", third.err)


def test_an_interrupt_while_it_loads_ends_without_a_traceback():
    def body():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open("err.txt", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        sys.argv = [str(SCRIPT), "--config", "tiny.json"]
        import ckptcache.nanecho.data as data

        data.load_corpus = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            os._exit(stop.code)

    assert end_of(start_child(body)) == 130
    assert "Traceback" not in Path("err.txt").read_text()


def test_the_help_lists_every_option_both_ways():
    result = run("--help")
    assert result.code == 0
    for name in ("--data_dir", "--data-dir", "--force_fresh_start", "--force-fresh-start", "--max-seconds"):
        assert name in result.out

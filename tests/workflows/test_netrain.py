"""netrain-cached as act runs it: the modes, that the next run goes on, and the confirmation of a fresh start."""

import re
import tomllib

import pytest

from tests.workflows.acting import ROOT, Github

pytestmark = pytest.mark.campaign
WORKFLOW = "netrain-cached.yml"
CI = "nanecho-cached-ci"


def test_a_run_goes_on_from_the_one_before_and_a_confirmed_fresh_start_begins_again(github: Github) -> None:
    github.publish(github.folder / "ckptcache")
    asked = {"training_type": "ci", "iterations": "2", "max_checkpoints": "1"}
    first, second = github.run(WORKFLOW, inputs=asked), github.run(WORKFLOW, inputs=asked)

    assert (first.code, second.code) == (0, 0), first.log + second.log
    summary = github.summary(CI)
    assert (summary["start_iteration"], summary["end_iteration"]) == (2, 4)
    assert summary["resumed_from"] in github.record(CI)["checkpoints"]
    assert len(github.subjects()) == 3
    assert "| iterations | 2 to 4 | 0 to 2 |" in github.job_summary("train")
    assert "### Checkpoints, best first" in github.job_summary("train")

    fresh = {**asked, "fresh_start": "true"}
    for typed in ("", "nanecho-cached-full"):
        refused = github.run(WORKFLOW, inputs={**fresh, "confirm_fresh_start": typed})
        assert refused.result_of("train") == "failed"
        assert f"To begin at 0, type the run's name, {CI}, and not '{typed}'." in refused.log
        assert "Check what is asked for" in refused.log
        assert "cached-training" not in refused.log.replace("./.github/actions", "")

    confirmed = github.run(WORKFLOW, inputs={**fresh, "confirm_fresh_start": CI})
    assert confirmed.code == 0, confirmed.log
    assert (github.summary(CI)["start_iteration"], github.summary(CI)["end_iteration"]) == (0, 2)
    assert len(github.record(CI)["sessions"]) == 3  # nothing is lost by it


@pytest.mark.parametrize(("event", "mode"), [("push", "ci"), ("schedule", "scheduled")])
def test_each_event_trains_in_its_mode(github: Github, event: str, mode: str) -> None:
    settings = github.folder / "ckptcache/.github/training" / f"{mode}.toml"
    settings.write_text(re.sub(r"(session_iters|n_layer) = \d+", r"\1 = 1", settings.read_text()))
    github.publish(github.folder / "ckptcache")
    ended = github.run(WORKFLOW, event)
    assert ended.code == 0, ended.log
    assert github.summary(f"nanecho-cached-{mode}")["end_iteration"] == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", "5; touch stolen"),
        ("iterations", "0"),
        ("max_checkpoints", "$(touch stolen)"),
        ("max_cache_size_gb", "1e3"),
    ],
)
def test_numbers_that_are_none_are_refused_before_anything_is_installed(github: Github, name: str, value: str) -> None:
    github.publish(github.folder / "ckptcache")
    ended = github.run(WORKFLOW, inputs={name: value})
    assert ended.result_of("train") == "failed"
    assert f"must be a number above 0, and not '{value}'." in ended.log
    assert not list(github.folder.rglob("stolen"))


def test_the_modes_and_their_budgets_fit_the_job_and_the_caches_of_the_repository() -> None:
    modes = {
        m: tomllib.loads((ROOT / ".github/training" / f"{m}.toml").read_text()) for m in ("ci", "scheduled", "full")
    }
    shapes = {m: tuple(s[k] for k in ("n_layer", "n_head", "n_embd", "batch_size")) for m, s in modes.items()}
    assert shapes == {"ci": (4, 4, 256, 2), "scheduled": (6, 6, 384, 4), "full": (8, 8, 512, 8)}
    assert [modes[m]["session_iters"] for m in ("ci", "scheduled")] == [500, 2000]
    assert all(s["out_dir"] == f".training-progress/nanecho-cached-{m}" for m, s in modes.items())
    for s in modes.values():
        # Weights and AdamW's two moments, of 12 matrices of width² each per layer and the embeddings.
        size = 3 * 4 * (12 * s["n_layer"] * s["n_embd"] ** 2 + (256 + 128) * s["n_embd"])
        assert s["max_checkpoints"] * size < s["max_cache_size_gb"] * 1e9
    assert 3 * sum(s["max_cache_size_gb"] for s in modes.values()) <= 10
    workflow = (ROOT / ".github/workflows" / WORKFLOW).read_text()
    budget, limit = (int(re.search(rf'{name}: "?(\d+)', workflow)[1]) for name in ("max-minutes", "timeout-minutes"))  # type: ignore[index]
    assert budget + 30 <= limit <= 360
    assert all(s.get("max_seconds", 0) <= budget * 60 for s in modes.values())

"""test-training-persistence as act runs it: three stages on clean machines, and what must make it fail."""

import re
from pathlib import Path

import pytest

from tests.workflows.acting import Github

pytestmark = pytest.mark.campaign
WORKFLOW = "test-training-persistence.yml"
RUN = "persistence-1001-1"


def without_step(action: Path, name: str) -> None:
    """Take a step out of the action."""
    text = action.read_text()
    changed = re.sub(rf"    - name: {re.escape(name)}\n.*?(?=    - name: |\Z)", "", text, flags=re.S)
    assert changed != text
    action.write_text(changed)


@pytest.mark.parametrize("event", ["pull_request", "workflow_dispatch"])
def test_three_stages_on_clean_machines_keep_what_they_should(github: Github, event: str) -> None:
    github.publish(github.folder / "ckptcache")
    ended = github.run(WORKFLOW, event)

    assert ended.code == 0, ended.log
    for job in ("Stage 1", "Stage 2", "Stage 3", "Check what was kept"):
        assert ended.result_of(job) == "succeeded", job
    # Nothing of it stays in the repository, and of a pull request nothing ever was there.
    assert github.branches() == ["main"]
    assert github.subjects() == ["Begin"]
    assert ended.result_of("Remove the branch") == ("succeeded" if event == "workflow_dispatch" else None)
    assert f"{RUN}-1-report" in github.artifacts()
    assert "Yes: 11 of 11 expectations hold." in github.job_summary("check")
    # Stage 3 is given no cache, and saves none.
    assert github.caches() == [f"ckptcache-{RUN}-1001-1-stage-1", f"ckptcache-{RUN}-1001-1-stage-2"]


@pytest.mark.parametrize("loss", ["the step is gone", "the cache is empty"])
def test_a_stage_that_does_not_get_the_files_makes_it_fail(github: Github, loss: str) -> None:
    if loss == "the step is gone":
        without_step(github.folder / "ckptcache/.github/actions/cached-training/action.yml", "Restore the files")
    else:
        github.environment["STAND_IN_CACHE_LOSES"] = "stage-2"
    github.publish(github.folder / "ckptcache")
    ended = github.run(WORKFLOW)

    assert ended.code != 0
    assert ended.result_of("Stage 2") == "succeeded"  # a training that begins again is no failure by itself
    assert ended.result_of("Check what was kept") == "failed"
    assert "broken: stage 2 starts at 10 (seen: 0)" in ended.log
    assert github.branches() == ["main"]  # tidied up in spite of it
    assert "**No**" in github.job_summary("check")

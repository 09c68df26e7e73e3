"""`assert_resumes_exactly` as a test of a training uses it."""

import sys
from pathlib import Path

import pytest

from ckptcache.cache import TrainingCache
from ckptcache.errors import NothingToProve
from ckptcache.testing import assert_resumes_exactly
from tests.jobs import Job


def train(folder, iterations):
    Job().run(TrainingCache(Path(folder) / "cache"), iterations)


def test_a_function_is_run_in_processes_of_its_own(tmp_path):
    verdict = assert_resumes_exactly(train, tmp_path, 5, kills=1)
    assert verdict.word == "identical"
    assert list(tmp_path.iterdir()) == []


def test_a_command_is_run_with_the_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    code = "import sys; from tests.test_testing import train; train(sys.argv[1], 1)"
    with pytest.raises(NothingToProve, match="did 1 iterations"):
        assert_resumes_exactly([sys.executable, "-c", code], str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_is_none_is_refused_before_anything_is_run():
    with pytest.raises(ValueError, match="latest, auto, id, not 'best'"):
        assert_resumes_exactly(["no-such-command"], resume="best")

"""The benchmarks run and say what they measured. No time is asserted: that would test the machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CASES = {"open", "open and best", "best", "first commit", "commit", "save"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def document() -> dict:
    done = bench("index", "--most", "10", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_case_is_measured(document):
    assert {result["name"] for result in document["results"]} == CASES
    for result in document["results"]:
        assert (result["benchmark"], result["records"], result["repeats"]) == ("index", 10, 1)
        assert result["wall_ms"] > 0
        assert result["wall_ms"] == pytest.approx(result["disk_ms"] + result["beyond_disk_ms"], abs=0.01)


def test_only_what_writes_counts_as_disk(document):
    wrote = {result["name"] for result in document["results"] if result["disk_ms"] > 0}
    assert wrote == {"first commit", "commit", "save"}


def test_the_machine_is_described_and_not_named(document):
    assert set(document["machine"]) == {"processor", "cores", "system", "python", "torch"}
    assert all(document["machine"].values())


def test_a_table_is_printed_for_people():
    done = bench("index", "--most", "0")
    assert done.returncode == 0, done.stderr
    assert "cores" in done.stdout.splitlines()[0]


def test_an_unknown_benchmark_is_a_usage_error():
    assert bench("nothing").returncode == 2
    assert bench().returncode == 2

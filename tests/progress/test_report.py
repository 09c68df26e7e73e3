from ckptcache.progress import report
from ckptcache.progress.restore import Restored
from tests.progress.runs import run

STEP_SUMMARY_LIMIT = 1024 * 1024
"""Bytes beyond which GitHub takes nothing of a step's summary."""


def test_what_was_refused_is_listed_with_the_reason():
    text = report.restored(Restored(run(2), {"a.pt": "its record has no digest"}, ["main is at 0123"]))
    assert "**refused** a.pt: its record has no digest; not read" in text
    assert "main is at 0123" in text
    assert "more" not in text


def test_however_much_was_refused_and_noted_the_job_s_summary_takes_it():
    refused = {f"{'<' * 200}{number}.pt": "<" * 300 for number in range(20_000)}
    notes = ["<" * 3000] * 20_000
    text = report.restored(Restored(run(2), refused, notes))
    assert len(text.encode()) < STEP_SUMMARY_LIMIT
    assert text.count("**refused**") >= 20
    assert f"{20_000 - text.count('**refused**')} more files were refused" in text
    assert "more notes" in text

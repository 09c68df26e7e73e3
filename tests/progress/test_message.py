from dataclasses import replace

from ckptcache.progress.message import RunChange, commit_message
from ckptcache.progress.views import view_of
from ckptcache.storage.index import Index
from ckptcache.storage.merging import merge
from tests.progress.runs import HOSTILE, add_session


def changed(**fields):
    index = Index()
    add_session(index, [3.0, 2.0], **fields)
    return RunChange(view_of("ci", Index(), frozenset()), view_of("ci", index, frozenset()))


def test_there_is_a_line_for_each_session():
    subject, empty, line, end = commit_message([changed()]).split("\n")
    assert subject == "Train ci to iteration 10: val_loss 2.0000, best 2.0000 (the first)"
    assert line.endswith("from a fresh start, iterations 0 to 10, val_loss 3.0000 to 2.0000, 0 saved, finished")
    assert (empty, end) == ("", "")


def test_nothing_in_a_record_adds_lines_to_the_message():
    for text in (HOSTILE, "x\n\nSigned-off-by: Eve <eve@example.org>", "nul\0", "\u202e\x1b[31m", "long" * 10_000):
        message = commit_message([changed(stop_reason=text)])
        assert len(message.splitlines()) == 3
        assert len(message) < 500
        assert all(character == "\n" or character.isprintable() for character in message)


def test_a_first_commit_of_a_long_history_stays_short():
    index = Index()
    for _ in range(300):
        add_session(index, [1e300])
    message = commit_message([RunChange(view_of("ci", Index(), frozenset()), view_of("ci", index, frozenset()))])
    assert "val_loss 1e+300, best 1e+300 (the first)" in message
    assert "ci: and 280 older sessions" in message
    assert len(message.splitlines()) == 23


def test_the_best_is_that_of_the_model_that_was_trained():
    """Another's sessions may count as later, and as better: they are of another model."""
    ours, theirs = Index(), Index()
    add_session(ours, [3.0, 2.0])
    add_session(theirs, [0.5])
    (id, record), other = next(iter(theirs.checkpoints.items())), theirs.store_config({"n_layer": 9})
    (session,) = theirs.sessions.values()
    other_id = f"{id}-other"
    theirs.sessions = {"sess_other": replace(session, id="sess_other", sequence=100)}
    theirs.checkpoints = {
        other_id: replace(record, id=other_id, session="sess_other", sequence=101, model_config=other)
    }
    known = view_of("ci", theirs, frozenset())
    first = view_of("ci", merge(Index(), theirs, ours), frozenset())
    assert known.best.val_loss == first.best.val_loss == 0.5
    assert subject(known, first).endswith("best 2.0000 (the first of its model and data)")
    add_session(ours, [1.5], parent=next(iter(ours.checkpoints)))
    second = view_of("ci", merge(Index(), theirs, ours), frozenset())
    assert subject(first, second).endswith("best 1.5000 (improved from 2.0000)")


def subject(before, after):
    return commit_message([RunChange(before, after)]).splitlines()[0]


def test_a_warm_start_says_whose_weights_it_had():
    line = commit_message([changed(parent="ckpt_donor", warm_start=True)]).split("\n")[2]
    assert ", with the weights of ckpt_donor, iterations 0 to 10," in line
    assert ", with the weights of another cache, " in commit_message([changed(warm_start=True)])

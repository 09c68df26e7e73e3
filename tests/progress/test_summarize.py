import json
import sys

from ckptcache.progress.commit import commit
from ckptcache.progress.summarize import summarize
from tests.progress.repos import RUN, folder, git, run_of, train
from tests.progress.repos import clone as clone_of


def summarized(machine):
    return summarize(folder(machine), folder(machine).runs())


def test_after_a_commit_there_is_nothing_to_make_anew(clone):
    train(clone)
    train(clone, [4.0], name="another")
    commit(folder(clone))
    summarized(clone)
    assert git(clone, "status", "--porcelain") == ""


def test_a_clone_without_files_makes_the_same_of_the_record(origin, clone, tmp_path):
    train(clone)
    commit(folder(clone))
    laptop = clone_of(origin, tmp_path / "laptop")
    for path in (folder(laptop).page, run_of(laptop).chart):
        path.write_text("lost")
    summarized(laptop)
    assert git(laptop, "status", "--porcelain") == ""


def test_without_a_summary_nothing_counts_as_kept(origin, clone, tmp_path):
    train(clone)
    commit(folder(clone))
    laptop = clone_of(origin, tmp_path / "laptop")
    for junk in ("{", "[]", '{"available": "all"}', '{"available": ["../x", 7]}'):
        run_of(laptop).summary.write_text(junk)
        (view,) = summarized(laptop)
        assert view.available == frozenset()
    assert json.loads(run_of(laptop).summary.read_text())["available"] == []


def test_without_matplotlib_the_page_draws_the_loss_itself(clone, monkeypatch):
    train(clone, [3.0, 2.5, 2.0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    summarized(clone)
    assert not run_of(clone).chart.exists()
    page = folder(clone).page.read_text()
    assert "loss.svg" not in page
    assert "xychart-beta" in page


def test_the_page_stands_outside_of_a_repository_too(tmp_path):
    train(tmp_path)
    (view,) = summarized(tmp_path)
    assert view.name == RUN
    assert f"{RUN}/loss.svg" in folder(tmp_path).page.read_text()

"""Committing records to a branch that others push to as well, without ever losing one of theirs or of ours.

Each attempt begins anew from what was fetched: records are merged in process, files made of them are
made again, and the commit goes on top. A push that comes too late is no failure but the next attempt.
"""

import logging
import random
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptcache.errors import CkptCacheError, GitFailed, ProgressNotFound, PushFailed, RunNotFound
from ckptcache.progress.derived import available_in, page_file, run_files
from ckptcache.progress.folder import ProgressFolder, Run, is_run_name
from ckptcache.progress.git import Outrun, Refused, Unreachable
from ckptcache.progress.message import RunChange, commit_message
from ckptcache.progress.record import Record, base_of, record_at
from ckptcache.progress.restore import local_record, open_ledger, settled, take_up
from ckptcache.progress.setup import completed, needed_lines, own_bytes
from ckptcache.progress.summarize import write_changed
from ckptcache.progress.target import Target, find_target
from ckptcache.progress.views import RunView, view_of
from ckptcache.storage.index import read_index_bytes

log = logging.getLogger("ckptcache")
PATIENCE = 180.0
"""Seconds after which a push that is always outrun is given up; ten clones at once need about ten."""
UNREACHABLE_ATTEMPTS = 4
_FIRST_DELAY, _LONGEST_DELAY = 0.2, 8.0
UNPUSHED = "refs/ckptcache/unpushed"


@dataclass(slots=True)
class Committed:
    """What came of it.

    Attributes:
        commit: its name; None when there was nothing to commit.
        pushed_to: ``branch of remote``; None for a clone without remote, on request, and where nothing was new.
        views: the runs that were committed.
        notes: what else is to be known, a sentence each.
    """

    commit: str | None
    pushed_to: str | None
    attempts: int
    message: str
    views: list[RunView] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As `ckptcache progress commit --json` prints it."""
        return {
            "commit": self.commit,
            "pushed_to": self.pushed_to,
            "attempts": self.attempts,
            "message": self.message if self.commit else None,
            "runs": [view.name for view in self.views],
            "notes": self.notes,
        }


def commit(
    folder: ProgressFolder,
    names: Sequence[str] = (),
    *,
    remote: str | None = None,
    branch: str | None = None,
    push: bool = True,
) -> Committed:
    """Commit the records of the runs `names` (all that are here, without any) and push them; never with force.

    The branch that is checked out follows, if it is the one that was pushed to and nothing of its own is in the way.

    Raises:
        PushFailed: after all attempts; the commit is in a bundle then.
        NotARepository, NoBranch: there is nowhere to commit to.
        ProgressNotFound, RunNotFound: there is nothing to commit.
        IndexDamaged: a record can't be read, and nothing in git's history stands in for it.
    """
    return _Committing(folder, chosen_runs(folder, names), find_target(folder.root, remote=remote, branch=branch)).run(
        push=push
    )


def chosen_runs(folder: ProgressFolder, names: Sequence[str]) -> list[Run]:
    """The runs `names`, or all that are here. Raises ProgressNotFound or RunNotFound."""
    there = {run.name: run for run in folder.runs()}
    if not folder.root.is_dir():
        raise ProgressNotFound(path=folder.root)
    for name in names:
        if folder.run(name).name not in there:
            raise RunNotFound(name=name, path=folder.root, names=", ".join(there) or "none")
    return [there[name] for name in (names or sorted(there))]


def delays(chance: random.Random) -> Iterator[float]:
    """Seconds to wait before each next attempt: longer and longer, and never the same for two who collided."""
    longest = _FIRST_DELAY
    while True:
        yield chance.uniform(0, longest)
        longest = min(longest * 1.6, _LONGEST_DELAY)


class _Committing:
    """One `commit`: what stays the same over its attempts."""

    def __init__(self, folder: ProgressFolder, runs: Sequence[Run], target: Target) -> None:
        self.folder, self.runs, self.target = folder, runs, target
        self.repository = target.repository
        self.ref = f"refs/ckptcache/pending/{secrets.token_hex(8)}"
        self.views: list[RunView] = []
        self.notes: list[str] = []
        self.message = ""
        self.made: str | None = None
        self.parent: str | None = None
        """The commit that it goes on from, which is all there is when nothing is new."""
        self.files: dict[str, bytes] = {}
        self.there: dict[str, str] = {}
        """Path and blob of what the commit goes on from."""

    def run(self, *, push: bool) -> Committed:
        try:
            attempts = self._push() if push and self.target.remote is not None else self._commit_here()
            return self._finished(attempts)
        finally:
            self.repository.delete_ref(self.ref)
            self.repository.forget_fetched()

    def _commit_here(self) -> int:
        branch = self.target.branch
        self._make(self.repository.tip(branch) or self.repository.head())
        if self.made is not None and self.repository.branch() != branch:
            self.repository.point(f"refs/heads/{branch}", self.made)
        elif self.made is not None and (reason := self._not_followed(self.made)):
            raise GitFailed(command="commit", reason=reason, path=self.folder.root)
        return 0

    def _finished(self, attempts: int) -> Committed:
        if attempts and self.repository.branch() == self.target.branch:
            self._follow()
        where = f"{self.target.branch} of {self.target.remote}" if attempts and self.made is not None else None
        return Committed(self.made, where, attempts, self.message, self.views, self.notes)

    def _follow(self) -> None:
        """Whatever is in the way of the branch here, the commit counts.

        It also follows what a command has pushed that was killed right after.
        """
        commit = self.made or self.parent
        reason = self._not_followed(commit) if commit else None
        if reason is not None and self.made is not None:
            how = "`git pull --no-rebase --autostash` brings it up to date"
            self.notes.append(f"the branch here was left where it is ({reason}): {how}")

    def _not_followed(self, commit: str) -> str | None:
        try:
            return self.repository.follow(commit, list(self.files))
        except GitFailed as error:
            return str(error.fields["reason"])

    # --- pushing ---------------------------------------------------------------------------------

    def _push(self) -> int:
        """Push until it counts; returns how many attempts it took."""
        remote, branch = self.target.remote or "", self.target.branch
        given_up, unreachable, attempt, reason, tip = time.monotonic() + PATIENCE, 0, 0, "", None
        for delay in delays(random.Random()):  # noqa: S311 - spreads attempts, keeps no secret
            attempt += 1
            try:
                tip = self.repository.fetch(remote, branch)
                self._make(tip or self.repository.head())
                if self.made is not None:
                    self.repository.push(remote, self.made, branch)
                return attempt
            except Outrun as error:
                reason = f"others were always faster; {error}"
                log.info("attempt %d came too late (%s): once more, from the new tip", attempt, error)
            except Unreachable as error:
                reason, unreachable = str(error), unreachable + 1
            except Refused as error:
                reason = str(error)
                break
            if time.monotonic() > given_up or unreachable >= UNREACHABLE_ATTEMPTS:
                break
            time.sleep(delay if not unreachable else delay + unreachable)
        raise self._left_in_bundle(tip, attempt, reason)

    def _left_in_bundle(self, tip: str | None, attempts: int, reason: str) -> CkptCacheError:
        remote, head = self.target.remote or "", self.repository.head()
        if self.made is None:
            self._make(tip or head)
        made = self.made or head or ""
        bundle = self.folder.root / f"unpushed-{made[:12]}.bundle"
        # A bundle holds names, and a name of its own says in every clone what it is.
        self.repository.point(UNPUSHED, made)
        if not self.repository.bundle(bundle, UNPUSHED, remote=remote, tip=tip):
            return GitFailed(command=f"fetch {remote}", reason=f"{reason}; nothing is new here", path=self.folder.root)
        return PushFailed(
            remote=remote,
            branch=self.target.branch,
            attempts=f"{attempts} attempt{'s' * (attempts != 1)}",
            reason=reason,
            commit=made[:12],
            bundle=bundle,
            ref=UNPUSHED,
        )

    # --- making a commit -------------------------------------------------------------------------

    def _make(self, parent: str | None) -> None:
        """Merge with what `parent` holds, and commit on it, if that changes anything."""
        self.parent = parent
        below = self.repository.relative(self.folder.root.resolve())
        self.there = self.repository.files(parent, below) if parent else {}
        changes = [self._merge(run, parent) for run in self.runs]
        self.views = [change.after for change in changes]
        records = [(run, read_index_bytes(run.index)) for run in self.runs if run.index.exists()]
        made = self._derived(parent)
        write_changed(made)
        # The records are only read: a training that goes on may have written a newer one since.
        made |= {run.index: content for run, content in records} | self._standing()
        self.files = {self.repository.relative(path): content for path, content in made.items()}
        changed = {path: content for path, content in self.files.items() if self._committed(path) != content}
        self.message = commit_message(changes)
        self.repository.delete_ref(self.ref)
        self.made = self.repository.commit(parent, changed, self.message, ref=self.ref) if changed else None

    def _derived(self, parent: str | None) -> dict[Path, bytes]:
        made: dict[Path, bytes] = {}
        for run, view in zip(self.runs, self.views, strict=True):
            made |= run_files(run, view)
        others = self._others(parent)
        charts = {run.name for run in self.runs if run.chart in made}
        charts |= {v.name for v in others if self.repository.relative(self.folder.run(v.name).chart) in self.there}
        name = self.repository.relative(self.folder.root)
        return made | page_file(self.folder, name, [*self.views, *others], charts)

    def _merge(self, run: Run, parent: str | None) -> RunChange:
        ours, theirs = local_record(run, self.repository), self._theirs(run, parent)
        ledger = open_ledger(run)
        if ours.mended:
            with ledger.file.held():
                ours = settled(ledger, run, self.repository)
        base = base_of(self.repository, parent, run.index)
        with ledger.change() as change:
            take_up(change, ours, base, theirs)
        self._note_mended(run, ours.mended)
        catalog = ledger.view()
        before = view_of(run.name, theirs.index, self._kept(run), catalog.config)
        # A clone without any file, such as a laptop's, knows nothing of what is kept elsewhere.
        after = RunView(run.name, catalog)
        return RunChange(before, after if after.available else view_of(run.name, after.index, before.available))

    def _note_mended(self, run: Run, how: str) -> None:
        note = f"the record of {run.name} was mended: {how}"
        if how and note not in self.notes:
            self.notes.append(note)

    def _standing(self) -> dict[Path, bytes]:
        """`.gitignore` and `.gitattributes` as others have them, and what they lack; what is here may be older."""
        found = {}
        for path, needed in needed_lines(self.folder).items():
            theirs = self._committed(self.repository.relative(path))
            here = completed(own_bytes(path) or theirs or b"", needed)
            write_changed({path: here})
            content = here if theirs is None else completed(theirs, needed)
            # Theirs, where it lacks nothing and differs from what is here, is for git to bring.
            if content == here or content != theirs:
                found[path] = content
        return found

    def _others(self, parent: str | None) -> list[RunView]:
        """The runs that aren't committed now, as the page's new version is to show them."""
        chosen, found = {run.name for run in self.runs}, []
        names = {path.split("/")[-3] for path in self.there if path.endswith("/cache/metadata.json")}
        for run in (Run(self.folder.root / name, name) for name in sorted(names - chosen) if is_run_name(name)):
            if self.repository.relative(run.index) in self.there:
                found.append(view_of(run.name, self._theirs(run, parent).index, self._kept(run)))
        return found

    def _theirs(self, run: Run, parent: str | None) -> Record:
        record, note = record_at(self.repository, parent, run.index)
        if note and note not in self.notes:
            self.notes.append(note)
        return record

    def _kept(self, run: Run) -> frozenset[str]:
        """Which checkpoints' files are kept, as the summary has it that the commit goes on from."""
        return available_in(self._committed(self.repository.relative(run.summary)))

    def _committed(self, path: str) -> bytes | None:
        return self.repository.blob(self.there[path]) if path in self.there else None

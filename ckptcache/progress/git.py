"""git, as far as a record needs it: always a subprocess, never through a shell, and nothing is ever forced.

Commits are made with `git fast-import`, on whatever tip was fetched: neither the work tree nor the
index is needed for that, so that neither a detached HEAD nor a half-staged change is in the way.
"""

import base64
import os
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ckptcache.errors import GitFailed, NotARepository
from ckptcache.storage import fs

TIMEOUT = 120.0
"""Seconds for one command; a cancelled job has five minutes in all, of which some must be left."""
_ASK_THE_REMOTE = ("fetch", "push")
_NO_REMOTE_BRANCH = "couldn't find remote ref"
_REFUSED = (
    *("permission", "denied", "error: 403", "error: 401", "authentication", "could not read username"),
    *("hook declined", "protected branch", "read-only", "unable to create temporary object directory"),
    *("does not appear to be a git repository", "repository not found", "refusing to", "deny updating"),
    *("' not allowed", "unable to find remote helper"),
)
"""What a remote says that it will go on saying; anything else may pass."""


class Unreachable(Exception):
    """The remote could not be asked, which may pass."""


class Refused(Exception):
    """The remote will not have it, whatever is tried."""


class Outrun(Exception):
    """Somebody else has pushed since the tip was fetched."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a git command gave."""

    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        """Its output, without the line's end."""
        return self.out.decode(errors="replace").strip()


class Repository:
    """The clone around a folder.

    Attributes:
        root: the top of the work tree.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        # Of its own, since git leaves a lock beside a name that it is killed at, which nobody ever takes away.
        self._fetched = f"refs/ckptcache/fetched/{secrets.token_hex(8)}"

    @classmethod
    def around(cls, path: Path) -> "Repository":
        """The repository whose work tree holds `path`, which need not exist yet. Raises NotARepository."""
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
        try:
            found = cls(there)._run("rev-parse", "--show-toplevel")
        except FileNotFoundError as error:
            raise NotARepository(path=path, reason="git is not installed") from error
        root = os.fsdecode(found.out.removesuffix(b"\n"))
        if found.code or not root:
            raise NotARepository(path=path, reason=_reason(found.err) or "it has no work tree")
        return cls(Path(root))

    def relative(self, path: Path) -> str:
        """`path` as git writes it. Raises NotARepository when it lies outside."""
        try:
            # Not where `path` itself may lead as a link: it is the name that git holds.
            return (path.parent.resolve() / path.name).relative_to(self.root.resolve()).as_posix()
        except ValueError as error:
            raise NotARepository(path=path, reason=f"it is outside of {self.root}") from error

    # --- running ---------------------------------------------------------------------------------

    def _run(self, *arguments: str, given: bytes = b"", environment: Mapping[str, str] | None = None) -> Answer:
        command = ["git", "-c", "gc.auto=0", "-c", "maintenance.auto=false", *arguments]
        # Its messages are told apart by their words, and nobody is there to type a password.
        env = {**os.environ, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", **(environment or {})}
        try:
            done = subprocess.run(
                command, cwd=self.root, input=given, capture_output=True, env=env, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired as error:
            reason = f"no answer within {TIMEOUT:g} seconds"
            if arguments[0] in _ASK_THE_REMOTE:
                raise Unreachable(reason) from error
            raise GitFailed(command=arguments[0], reason=reason, path=self.root) from error
        return Answer(done.returncode, done.stdout, done.stderr.decode(errors="replace"))

    def _ask(self, *arguments: str, given: bytes = b"", environment: Mapping[str, str] | None = None) -> Answer:
        """Run what has to work. Raises GitFailed."""
        answer = self._run(*arguments, given=given, environment=environment)
        if answer.code:
            reason = _reason(answer.err) or f"it ended with {answer.code}"
            raise GitFailed(command=arguments[0], reason=reason, path=self.root)
        return answer

    # --- what is there ---------------------------------------------------------------------------

    def head(self) -> str | None:
        """The commit that is checked out; None before the first one."""
        answer = self._run("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        return answer.text if answer.code == 0 else None

    def branch(self) -> str | None:
        """The branch that is checked out; None when HEAD is detached."""
        answer = self._run("symbolic-ref", "--quiet", "--short", "HEAD")
        return answer.text if answer.code == 0 else None

    def tip(self, branch: str) -> str | None:
        """The commit that a branch of this clone is at; None where there is no such branch."""
        answer = self._run("rev-parse", "--verify", "--quiet", f"refs/heads/{branch}^{{commit}}")
        return answer.text if answer.code == 0 else None

    def is_branch_name(self, name: str) -> bool:
        """Whether git would take `name` for a branch."""
        return not name.startswith("-") and self._run("check-ref-format", f"refs/heads/{name}").code == 0

    def remote_of(self, branch: str) -> str | None:
        """The remote that `branch` is pushed to: its own, else ``origin``, else the only one."""
        own = self._run("config", "--get", f"branch.{branch}.remote").text
        remotes = self._ask("remote").text.split()
        if own in remotes or "origin" in remotes:
            return own if own in remotes else "origin"
        return remotes[0] if len(remotes) == 1 else None

    def merge_base(self, one: str, other: str) -> str | None:
        """The commit from which both went on; None where none is known, as in a shallow clone."""
        answer = self._run("merge-base", one, other)
        return answer.text.split("\n")[0] if answer.code == 0 else None

    def files(self, commit: str, folder: str) -> dict[str, str]:
        """Path and blob of every file below `folder` in `commit`."""
        below = [] if folder in ("", ".") else ["--", f"{folder}/"]
        listed = self._ask("ls-tree", "-r", "-z", "--full-tree", commit, *below).out
        entries = [line.split(b"\t", 1) for line in listed.split(b"\0") if line]
        found = [(path.decode(errors="surrogateescape"), what.split()) for what, path in entries]
        return {path: what[2].decode() for path, what in found if what[0] in (b"100644", b"100755")}

    def blob(self, name: str) -> bytes:
        """The content of a blob."""
        return self._ask("cat-file", "blob", name).out

    def read(self, commit: str, path: str) -> bytes | None:
        """The file `path` in `commit`; None where there is none."""
        folder, _, _ = path.rpartition("/")
        found = self.files(commit, folder).get(path)
        return None if found is None else self.blob(found)

    def history(self, commit: str, path: str, *, limit: int = 50) -> list[str]:
        """The newest commits before and including `commit` that changed `path`, the newest first."""
        answer = self._ask("rev-list", f"--max-count={limit}", "--full-history", commit, "--", path)
        return answer.text.split()

    def stages(self, path: str) -> list[tuple[str, bytes]]:
        """The versions of a file that a merge could not bring together: ours and theirs; none without a conflict."""
        listed = self._ask("ls-files", "--unmerged", "-z", "--", f":(top,literal){path}").out
        entries = [line.split(b"\t")[0].split() for line in listed.split(b"\0") if line]
        names = {b"2": "ours", b"3": "theirs"}
        return [(names[stage], self.blob(blob.decode())) for _, blob, stage in entries if stage in names]

    # --- the remote ------------------------------------------------------------------------------

    def fetch(self, remote: str, branch: str) -> str | None:
        """The tip of a remote branch, whose commits are here then; None where it has no such branch.

        Raises Unreachable or Refused.
        """
        refspec = f"+refs/heads/{branch}:{self._fetched}"
        # Without refmap it would update the remote's own branches here as well, and fail where one is locked.
        options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--refmap=")
        answer = self._run("fetch", *options, "--", remote, refspec, environment=self._access(remote))
        if answer.code and _NO_REMOTE_BRANCH in answer.err.lower():
            return None
        if answer.code:
            raise _trouble(self._without_names(answer.err, remote, branch))
        return self._ask("rev-parse", "--verify", self._fetched).text

    def forget_fetched(self) -> None:
        """Give up the name of what was fetched; the commits themselves stay until git cleans up."""
        self.delete_ref(self._fetched)

    def push(self, remote: str, commit: str, branch: str) -> None:
        """Make `commit` the tip of a remote branch that it goes on from.

        Raises Outrun when the branch has moved on, Refused, or Unreachable.
        """
        target = f"{commit}:refs/heads/{branch}"
        answer = self._run("push", "--porcelain", "--", remote, target, environment=self._access(remote))
        if answer.code == 0:
            return
        rejected = [line.split("\t")[2] for line in answer.out.decode().splitlines() if line.startswith("!\t")]
        trouble = _trouble(*(self._without_names(text, remote, branch) for text in (answer.err, *rejected)))
        # Who answers at all and has nothing against it was asked by somebody else first, in one of many words.
        raise Outrun(rejected[0]) if rejected and isinstance(trouble, Unreachable) else trouble

    def _without_names(self, said: str, remote: str, branch: str) -> str:
        """What git has said, without names in which any word can stand."""
        for name in (self._url(remote), f"refs/heads/{branch}", f"'{branch}'"):
            said = said.replace(name, "it")
        return said

    def _url(self, remote: str) -> str:
        return self._run("remote", "get-url", "--", remote).text or remote

    def _access(self, remote: str) -> dict[str, str]:
        """The environment in which git may use GITHUB_TOKEN, if that is meant for this remote.

        In the environment and not among the arguments, which other users of the machine can read.
        """
        token, server = os.environ.get("GITHUB_TOKEN", ""), os.environ.get("GITHUB_SERVER_URL", "")
        if not (token and server.startswith("https://") and _origin(self._url(remote)) == _origin(server)):
            return {}
        secret = base64.b64encode(f"x-access-token:{token}".encode()).decode()
        key = f"http.{server.rstrip('/')}/.extraheader"
        count = int(os.environ.get("GIT_CONFIG_COUNT") or 0)
        # The empty one first: it drops a header that a checkout has left in the configuration.
        pairs = [(key, ""), (key, f"AUTHORIZATION: basic {secret}")]
        settings = {f"GIT_CONFIG_KEY_{count + i}": k for i, (k, _) in enumerate(pairs)}
        settings |= {f"GIT_CONFIG_VALUE_{count + i}": v for i, (_, v) in enumerate(pairs)}
        return {**settings, "GIT_CONFIG_COUNT": str(count + len(pairs))}

    # --- changing --------------------------------------------------------------------------------

    def commit(self, parent: str | None, files: Mapping[str, bytes], message: str, *, ref: str) -> str:
        """A commit on `parent` in which `files` are as given and all others as they were; `ref` points to it.

        The work tree, the index and the branches stay as they are. Raises GitFailed.
        """
        author, committer = (self._identity(who) for who in ("AUTHOR", "COMMITTER"))
        text = message.encode()
        stream = [f"feature done\ncommit {ref}\nmark :1\nauthor {author}\ncommitter {committer}\n".encode()]
        stream.append(b"data %d\n%s\n" % (len(text), text))
        stream.append(f"from {parent}\n".encode() if parent else b"")
        for path, content in files.items():
            name = _quoted(path).encode(errors="surrogateescape")
            stream.append(b"M 100644 inline %s\ndata %d\n%s\n" % (name, len(content), content))
        stream.append(b"get-mark :1\ndone\n")
        return self._ask("fast-import", "--quiet", "--done", given=b"".join(stream)).text

    def _identity(self, who: str) -> str:
        """Name, address and time for a commit. Where nobody has said who works here, the tool says that it was it."""
        fallback = {f"GIT_{who}_NAME": "ckptcache", f"GIT_{who}_EMAIL": "ckptcache@localhost"}
        has_name = bool(os.environ.get(f"GIT_{who}_EMAIL") or self._run("config", "--get", "user.email").text)
        return self._ask("var", f"GIT_{who}_IDENT", environment={} if has_name else fallback).text

    def bundle(self, path: Path, ref: str, *, remote: str, tip: str | None) -> bool:
        """Write what `ref` has beyond what `remote` had, when it was asked last, into a file that `git fetch` reads.

        Returns whether there was anything to write. Raises GitFailed.

        Args:
            tip: a commit that it is known to have by now.
        """
        is_named = remote in self._ask("remote").text.split()
        known = ["--not", f"--remotes={remote}" if is_named else "--remotes", *([tip] if tip else [])]
        if not self._ask("rev-list", "--max-count=1", ref, *known).text:
            return False
        fs.ensure_folder(path.parent)
        self._ask("bundle", "create", "--quiet", str(path.absolute()), ref, *known)
        return True

    def point(self, ref: str, commit: str) -> None:
        """Let a name of this tool's point to `commit`. Raises GitFailed."""
        self._ask("update-ref", ref, commit)

    def delete_ref(self, ref: str) -> None:
        """Forget a name that this tool gave; the commit itself stays until git cleans up."""
        self._run("update-ref", "-d", ref)

    def configure(self, key: str, value: str) -> None:
        """Set something in this clone's own configuration. Raises GitFailed."""
        self._ask("config", "--local", key, value)

    def follow(self, commit: str, files: Sequence[str]) -> str | None:
        """Bring the branch that is checked out up to `commit`, the `files` being in the work tree already.

        Returns None, or why it was left where it is: it has commits of its own, or a file that differs
        was changed here.
        """
        before = self.head()
        if before == commit:
            return None
        if before and self._run("merge-base", "--is-ancestor", before, commit).code:
            return "it has commits of its own"
        folders = {path.rpartition("/")[0] for path in files}
        blobs = {path: blob for folder in folders for path, blob in self.files(commit, folder).items()}
        listed = "".join(f"100644 {blobs[path]}\t{path}\0" for path in files if path in blobs)
        self._ask("update-index", "-z", "--add", "--index-info", given=listed.encode(errors="surrogateescape"))
        # Of one tree alone, it would take away all that is staged and not in it.
        answer = self._run("read-tree", "-m", "-u", before or self._empty_tree(), commit)
        if answer.code:
            self._run("reset", "--quiet", "--", *files)
            return _reason(answer.err)
        self._ask("update-ref", "-m", "ckptcache progress commit", "HEAD", commit, *([before] if before else []))
        return None

    def _empty_tree(self) -> str:
        return self._ask("hash-object", "-t", "tree", "-w", "--stdin").text


# --- reading what git says -----------------------------------------------------------------------


def _trouble(said: str, *rejected: str) -> Unreachable | Refused:
    """What kind of failure it is. Of a rejection, what the remote's own hooks printed tells more than git does."""
    theirs = [line.removeprefix("remote:").strip() for line in said.splitlines() if line.startswith("remote:")]
    told = list(filter(None, theirs[:2])) or [_reason(said)]
    reason = ": ".join([*rejected[:1], *told]) if rejected else _reason(said)
    refused = any(word in "\n".join([said, *rejected]).lower() for word in _REFUSED)
    return (Refused if refused else Unreachable)(reason or "git gave no reason")


def _reason(said: str) -> str:
    """The line that tells most: the first error, without what git puts before it."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith(("hint:", "To "))]
    telling = [line for line in lines if line.lower().startswith(("fatal:", "error:", "remote:", "!"))]
    line = (telling or lines or [""])[0]
    for prefix in ("fatal: ", "error: ", "remote: "):
        line = line.removeprefix(prefix)
    return line.rstrip(".")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _quoted(path: str) -> str:
    escaped = path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'

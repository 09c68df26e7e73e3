"""Where a record is committed: which repository, which remote, which branch."""

from dataclasses import dataclass
from pathlib import Path

from ckptcache.errors import InvalidValue, NoBranch
from ckptcache.progress.git import Repository


@dataclass(frozen=True, slots=True)
class Target:
    """A branch of a repository.

    Attributes:
        remote: a remote's name, a URL or a path; None where the clone has none.
    """

    repository: Repository
    remote: str | None
    branch: str


def find_target(root: Path, *, remote: str | None = None, branch: str | None = None) -> Target:
    """The branch to commit the record below `root` to: the given one, else the one that is checked out.

    Raises:
        NotARepository: `root` is in no git work tree.
        NoBranch: HEAD is detached and no branch is given.
        InvalidValue: git can't have a branch of that name.
    """
    repository = Repository.around(root)
    if branch is not None and not repository.is_branch_name(branch):
        raise InvalidValue(name="branch", value=branch, reason="git can't have a branch of that name")
    branch = branch or repository.branch()
    if branch is None:
        raise NoBranch(reason="HEAD is detached")
    return Target(repository, remote or repository.remote_of(branch), branch)

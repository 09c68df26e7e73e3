"""A process that is killed at each of the system calls that an operation of the cache makes."""

import signal
from contextlib import nullcontext

import pytest

from ckptcache.errors import CkptCacheError
from tests.campaigns import variants
from tests.campaigns.stages import SCENARIOS, Stage, opened
from tests.faults import KillingSystem, run_child

CAMPAIGN = "kills"
SHORT = ("a save that evicts", "the first save", "a backup", "a backup merged")
EVERY = [pytest.param(n, marks=[] if n in SHORT else [pytest.mark.campaign]) for n in SCENARIOS]


def killed_everywhere(stage: Stage, *, torn: bool, variant: variants.Variant = nullcontext) -> int:
    """Kill and check at every operation, or halfway through every write; returns how many there were."""
    with variant():
        points = [at for at, name in enumerate(stage.operations()) if not torn or name == "write"]
    for at in points:
        stage.lay_out()

        def child(at: int = at) -> None:
            from ckptcache.storage import fs

            fs.system = KillingSystem(at, torn=torn)
            with opened(stage.folder) as cache:
                stage.act(cache)

        with variant():
            status = run_child(child)
            if status != -signal.SIGKILL:  # no AssertionError, which of a broken variant would count as found out
                raise ChildProcessError(f"it ended with {status} and was not killed at operation {at}")
            stage.check()
    return len(points)


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("scenario", EVERY)
@pytest.mark.timeout(600)
def test_nothing_acknowledged_is_lost_by_a_kill_at_any_operation(quick_path, counted, scenario, torn):
    killed = killed_everywhere(Stage(quick_path, scenario), torn=torn)
    assert killed > 5 or torn
    counted(CAMPAIGN, "halves of writes" if torn else "operations", killed)


@pytest.mark.parametrize("variant", [variants.evicting_before_the_commit, variants.keeping_leftovers])
@pytest.mark.timeout(600)
def test_a_kill_shows_an_order_that_is_wrong(quick_path, counted, variant):
    stage = Stage(quick_path, "a save that evicts")
    with pytest.raises((AssertionError, CkptCacheError)):
        killed_everywhere(stage, torn=False, variant=variant)
    counted.caught(CAMPAIGN, variants.name_of(variant))


@pytest.mark.parametrize(
    ("scenario", "variant"),
    [("a backup", variants.keeping_half_backups), ("a backup merged", variants.restoring_file_by_file)],
)
@pytest.mark.timeout(600)
def test_a_kill_shows_a_backup_that_is_careless(quick_path, counted, scenario, variant):
    stage = Stage(quick_path, scenario)
    with pytest.raises((AssertionError, CkptCacheError)):
        killed_everywhere(stage, torn=False, variant=variant)
    counted.caught(CAMPAIGN, variants.name_of(variant))

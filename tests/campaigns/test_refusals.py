"""A disk that refuses any of the system calls that an operation of the cache makes."""

import errno

import pytest

from ckptcache import TrainingCache
from ckptcache.errors import CkptCacheError, SaveFailed
from tests.caches import ids, temporary_files
from tests.campaigns import variants
from tests.campaigns.stages import SCENARIOS, Stage, new_best, opened
from tests.faults import FailingSystem, swapped

CAMPAIGN = "refusals"
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE, errno.EROFS)


def tries(operations: int, everything: bool) -> list[tuple[int, int]]:
    """Which operation fails how: every one in every way, or each in one way, in turn."""
    if everything:
        return [(at, error) for at in range(operations) for error in ERRORS]
    return [(at, ERRORS[at % len(ERRORS)]) for at in range(operations)]


def refused(stage: Stage, at: int, error: int, *, lasting: bool) -> CkptCacheError | None:
    """The error that the act ends with when an operation fails; anything but an error of ours is raised."""
    stage.lay_out()
    cache, caught = opened(stage.folder), None
    with swapped(FailingSystem(at, error, lasting=lasting)) as failing:
        try:
            stage.act(cache)
        except CkptCacheError as raised:
            caught = raised
        cache.close()
    if not failing.hit:  # no AssertionError, which of a broken variant would count as found out
        raise LookupError(f"operation {at} was never made")
    if not lasting and stage.act is new_best and caught is not None:
        check_left_alone(stage, cache)
    return caught


def check_left_alone(stage: Stage, cache: TrainingCache) -> None:
    assert ids(cache.checkpoints()) == ids(opened(stage.template).checkpoints())
    assert temporary_files(stage.folder) == []
    assert cache.names() == opened(stage.template).names()


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.timeout(600)
def test_a_save_that_is_refused_at_any_operation_says_so_and_leaves_the_old_set_as_it_was(
    quick_path, counted, everything, lasting
):
    stage = Stage(quick_path, "a save that evicts")
    count, failed = len(stage.operations()), 0
    for at, error in tries(count, everything):
        caught = refused(stage, at, error, lasting=lasting)
        if caught is not None:
            failed += 1
            assert len(str(caught)) > 40
            assert isinstance(caught, SaveFailed) or "written" in str(caught)
        stage.check()
    assert failed > count // 2, "what fails after the commit is survived; everything before it is not"
    counted(CAMPAIGN, "failing operations", len(tries(count, everything)))


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("scenario", ["a backup", "a backup restored", "a backup merged", "an export"])
@pytest.mark.timeout(600)
def test_a_backup_or_export_that_is_refused_at_any_operation_either_way_says_so_and_is_made_again(
    quick_path, counted, scenario, lasting
):
    stage, failed = Stage(quick_path, scenario), 0
    points = tries(len(stage.operations()), everything=False)
    for at, error in points:
        caught = refused(stage, at, error, lasting=lasting)
        if caught is not None:
            failed += 1
            assert len(str(caught)) > 40
        if not lasting:
            assert temporary_files(quick_path) == []
        stage.check()
    assert failed > len(points) // 3, "what fails after the commit is survived; everything before it is not"
    counted(CAMPAIGN, "failing operations", len(points))


@pytest.mark.campaign
@pytest.mark.parametrize("scenario", list(SCENARIOS))
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.timeout(900)
def test_an_operation_of_any_kind_that_is_refused_ends_in_an_error_of_ours_and_leaves_a_sound_cache(
    quick_path, counted, scenario, lasting
):
    stage = Stage(quick_path, scenario)
    points = tries(len(stage.operations()), everything=True)
    for at, error in points:
        refused(stage, at, error, lasting=lasting)
        stage.check()
    counted(CAMPAIGN, "failing operations", len(points))


@pytest.mark.parametrize("variant", [variants.keeping_temporary_files, variants.evicting_before_the_commit])
def test_a_refusal_shows_what_is_left_behind(quick_path, counted, variant):
    stage = Stage(quick_path, "a save that evicts")
    with pytest.raises(AssertionError), variant():
        for at, error in tries(len(stage.operations()), everything=False):
            refused(stage, at, error, lasting=False)
            stage.check()
    counted.caught(CAMPAIGN, variants.name_of(variant))

"""What all tests share: a clean environment, Hypothesis's profiles, `requires` for the tools that a test needs,
and `counted` for what campaigns count, with the table of it at the end of a run."""

import importlib.util
import os
import shutil
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background deaf to it, and the programs under test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


_OURS = ("CKPTCACHE_REQUIRE", "CKPTCACHE_HYPOTHESIS", "CKPTCACHE_PYTHON")

# A developer's own settings must not decide what the tests see, here or in processes that they start.
for _name in [name for name in os.environ if name.startswith("CKPTCACHE_") and name not in _OURS]:
    del os.environ[_name]

# One worker per core is there already; more threads in each only get in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)

# No deadline: the machines are shared, and a slow moment is no failure.
settings.register_profile("default", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=300, deadline=None, derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("CKPTCACHE_HYPOTHESIS", "default"))


def requires(tool: str, found: bool | None = None) -> None:
    """Skip the test unless `tool` is here; fail instead where CKPTCACHE_REQUIRE is "all".

    Args:
        tool: a program, "root", or a Python module; anything else with `found`.
        found: whether it is here, for what the caller has looked for itself.
    """
    if _is_here(tool) if found is None else found:
        return
    reason = f"needs {tool}, which is not here"
    if os.environ.get("CKPTCACHE_REQUIRE") == "all":
        pytest.fail(f"{reason}, and CKPTCACHE_REQUIRE=all", pytrace=False)
    pytest.skip(reason)


def _is_here(tool: str) -> bool:
    if tool == "root":
        return hasattr(os, "geteuid") and os.geteuid() == 0
    return shutil.which(tool) is not None or importlib.util.find_spec(tool) is not None


@pytest.fixture(name="requires")
def _requires() -> Callable[..., None]:
    return requires


# --- what the campaigns count --------------------------------------------------------------------


class Tally:
    """Keeps what a campaign counted with the test's report, which crosses from pytest-xdist's workers."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def __call__(self, campaign: str, what: str, number: int) -> None:
        """`number` of `what` (points killed, cuts made) were tried, and all was well."""
        self._record("campaign", [campaign, what, number])

    def caught(self, campaign: str, variant: str) -> None:
        """The same check failed for code broken in this way."""
        self._record("caught", [campaign, variant])


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Tally:
    return Tally(record_property)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One table of all campaigns that passed: what was counted, and the broken variants that each caught."""
    counts, caught = defaultdict(Counter), defaultdict(set)
    for kind, values in _properties(terminalreporter.stats):
        if kind == "campaign":
            counts[values[0]][values[1]] += values[2]
        elif kind == "caught":
            caught[values[0]].add(values[1])
    if counts or caught:
        terminalreporter.section("campaigns")
    for name in sorted({*counts, *caught}):
        terminalreporter.line(f"{name}: {', '.join(f'{number:,} {what}' for what, number in counts[name].items())}")
        if caught[name]:
            terminalreporter.line(f"    caught: {', '.join(sorted(caught[name]))}")


def _properties(stats: dict[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    """What tests that passed recorded, up to their end: what a fixture says when it is left is in the last report."""
    passed = {report.nodeid for report in stats.get("passed", [])}
    ends = (r for r in stats.get("", []) if getattr(r, "when", "") == "teardown" and r.nodeid in passed)
    return (pair for report in ends for pair in report.user_properties)

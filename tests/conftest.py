"""What all tests share: a clean environment, Hypothesis's profiles, and `requires` for the tools that a test needs."""

import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Callable

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

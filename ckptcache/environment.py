"""Where a checkpoint was made (versions, device, git commit), and how many processors there are."""

import functools
import os
import platform
import subprocess
import sys
from contextlib import suppress
from typing import Any


def environment() -> dict[str, Any]:
    """Python's and torch's version, the device, and the commit of the git checkout that the program runs in."""
    return dict(_fixed())


def processors() -> int:
    """How many processors this process may use at once."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


@functools.cache
def _fixed() -> tuple[tuple[str, Any], ...]:
    found: dict[str, Any] = {"python": platform.python_version(), "platform": sys.platform}
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch"] = str(torch.__version__)
        found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if commit := _git_commit():
        found["git_commit"] = commit
    return tuple(found.items())


def _git_commit() -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "rev-parse", "HEAD"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        if answer.returncode == 0:
            return answer.stdout.strip()
    return None

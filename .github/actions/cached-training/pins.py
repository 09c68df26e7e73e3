"""Prints the pins of a constraints file, without those of what is installed already.

pip takes a pin as a reason to replace what would do as it is: another PyTorch, perhaps, than the machine's CUDA needs.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path


def canonical(name: str) -> str:
    """A package's name as packages are compared by it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def missing(lines: Iterable[str], installed: Iterable[str]) -> Iterator[str]:
    """Those of the `lines`, each ``name==version``, that pin nothing of what is `installed`."""
    known = {canonical(name) for name in installed}
    return (line for line in lines if "==" in line and canonical(line.partition("==")[0].strip()) not in known)


if __name__ == "__main__":
    names = [d.metadata["Name"] for d in distributions() if d.metadata["Name"]]
    print("\n".join(missing(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines(), names)))

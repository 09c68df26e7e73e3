"""Stands in for actions/upload-artifact: files below their lowest common folder, under a name that a run gives once.

Stricter than the original in what is hidden: there, only the name of a file or of a folder on the way to it counts.
Not modelled: folders that are empty are left out here as there, but executable bits and links are not tried.
"""

import glob
import os
import re
import shutil
import sys
from pathlib import Path

NAME, HIDDEN = os.environ["NAME"], os.environ["HIDDEN"] == "true"
PATTERNS = [os.path.abspath(line.strip()) for line in os.environ["PATHS"].splitlines() if line.strip()]


def searched(pattern):
    """The folder or file that a pattern is looked for in: all before its first wildcard."""
    parts = pattern.split("/")
    wild = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
    return pattern if wild is None else "/".join(parts[:wild])


def files(pattern):
    for found in map(Path, glob.glob(pattern, recursive=True, include_hidden=True)):
        yield from (p for p in ([found] if found.is_file() else found.rglob("*")) if p.is_file())


def inner(file):
    """The parts of its path within the workspace, or just its name."""
    return file.relative_to(Path.cwd()).parts if file.is_relative_to(Path.cwd()) else [file.name]


found = sorted({file for pattern in PATTERNS for file in files(pattern)})
roots = [searched(pattern) for pattern in PATTERNS]
common = Path(os.path.commonpath(roots) if len(roots) > 1 else roots[0])
common = common if common.is_dir() else common.parent
found = [f for f in found if HIDDEN or not any(part.startswith(".") for part in inner(f))]
if not found:
    print(f"No files were found for {NAME}")
    sys.exit(1 if os.environ["IF_NONE"] == "error" else 0)
if set(NAME) & set('":<>|*?\r\n\\/'):
    sys.exit(f"::error::The artifact name is not valid: {NAME}")
target = Path(os.environ["STAND_INS"], "artifacts", os.environ["GITHUB_RUN_ID"], NAME)
if target.exists():
    sys.exit(f"::error::an artifact with this name already exists: {NAME}")
for file in found:
    copy = target / file.relative_to(common)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, copy)
print(f"{len(found)} files were uploaded as {NAME}")

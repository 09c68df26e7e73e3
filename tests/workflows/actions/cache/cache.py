"""Stands in for GitHub's cache: immutable entries, found by key or prefix, the newest first, for the same paths only.

Not modelled: which branch may read which entry, compression, expiry and the limit of 10 GB. STAND_IN_CACHE_LOSES names
jobs for which nothing is found.
"""

import hashlib
import os
import sys
import tarfile
from pathlib import Path

STORE = Path(os.environ["STAND_INS"], "cache")
PATHS = [line.strip() for line in os.environ["PATHS"].splitlines() if line.strip()]
KEY = os.environ["KEY"]
# Like the original, which looks only among entries that were saved with the very same list of paths.
VERSION = hashlib.sha256("\n".join(PATHS).encode()).hexdigest()[:16]


def entries():
    """Key and archive of each entry of the same paths, the newest first."""
    folders = sorted(STORE.glob(f"*-{VERSION}"), reverse=True)
    return [((folder / "key").read_text(), folder / "files.tar") for folder in folders]


def choose(found, key, prefixes):
    for known, archive in found:
        if known == key:
            return known, archive
    for prefix in prefixes:
        for known, archive in found:
            if known.startswith(prefix):
                return known, archive
    return None, None


def restore():
    prefixes = [line.strip() for line in os.environ["RESTORE_KEYS"].splitlines() if line.strip()]
    is_lost = os.environ["GITHUB_JOB"] in os.environ.get("STAND_IN_CACHE_LOSES", "").split()
    known, archive = (None, None) if is_lost else choose(entries(), KEY, prefixes)
    if known is None:
        print(f"Cache not found for input keys: {', '.join([KEY, *prefixes])}")
        return
    with tarfile.open(archive) as tar:
        tar.extractall(filter="data")
    print(f"Cache restored from key: {known}")
    with open(os.environ["GITHUB_OUTPUT"], "a") as output:
        output.write(f"cache-hit={'true' if known == KEY else 'false'}\ncache-matched-key={known}\n")


def save():
    there = [path for path in PATHS if Path(path).exists()]
    if not there:
        print("::warning::Path Validation Error: nothing of it is there, hence no cache is being saved.")
        return
    if any(known == KEY for known, _ in entries()):
        print(f"::warning::Unable to reserve cache with key {KEY}: it is taken")
        return
    number = len(list(STORE.glob("*"))) if STORE.exists() else 0
    folder = STORE / f"{number:06}-{VERSION}"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "files.tar", "w") as tar:
        for path in there:
            tar.add(path)
    (folder / "key").write_text(KEY)
    print(f"Cache saved with key: {KEY}")


{"restore": restore, "save": save}[sys.argv[1]]()

import os
import subprocess
import sys
from pathlib import Path

import architecture
import pytest

ROOT = Path(__file__).resolve().parent.parent
TREE = architecture.read_tree(ROOT)
RULES = (
    architecture.wrong_arrows,
    architecture.cycles,
    architecture.torch_in_policy,
    architecture.pickle_imports,
    architecture.unsafe_loads,
    architecture.file_system_writes,
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert rule(TREE) == []


def test_the_tree_is_read_whole():
    assert {"ckptcache/__init__.py", "ckptcache/errors.py", "ckptcache/policy/__init__.py"} <= set(TREE)


def test_the_clone_holds_nothing_unexpected():
    listed = (
        subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False) if _git() else None
    )
    if listed is None or listed.returncode:
        pytest.skip("this is no git clone")
    assert architecture.strangers(listed.stdout.splitlines()) == []


def _git() -> bool:
    return (ROOT / ".git").exists() and any(
        (Path(folder) / "git").exists() for folder in os.environ.get("PATH", "").split(os.pathsep)
    )


# --- planted violations --------------------------------------------------------------------------


ARROWS = [
    ("errors.py", "from ckptcache.config import CacheConfig"),
    ("config.py", "from ckptcache import metadata"),
    ("metadata.py", "import ckptcache.storage"),
    ("policy/quality.py", "from ckptcache.storage.fs import read"),
    ("policy/quality.py", "from ckptcache import state"),
    ("policy/quality.py", "from ..history import log"),
    ("state/capture.py", "def f():\n    from ckptcache.policy import retention"),
    (
        "storage/index.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ckptcache.policy import quality",
    ),
    ("storage/index.py", "from importlib import import_module\nimport_module('ckptcache.cache')"),
    ("history/sql.py", "from ckptcache.cache import TrainingCache"),
    ("cache.py", "from ckptcache.session import TrainingSession"),
    ("session.py", "from ckptcache.trainer import CachedTrainer"),
    ("trainer.py", "from ckptcache.workflow import TrainingWorkflow"),
    ("report.py", "from ckptcache.cli import main"),
    ("cli/ls.py", "from ckptcache.nanecho import model"),
    ("cli/ls.py", "from ckptcache import TrainingCache"),
    ("dashboard/app.py", "import ckptcache"),
    ("helpers.py", "x = 1"),
]


@pytest.mark.parametrize(("path", "source"), ARROWS)
def test_an_arrow_up_or_across_is_found(path, source):
    tree = dict.fromkeys(("ckptcache/storage/fs.py", "ckptcache/policy/retention.py", "ckptcache/metadata.py"), "")
    assert len(architecture.wrong_arrows({**tree, f"ckptcache/{path}": source})) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("metadata.py", "from ckptcache.config import CRITICAL_PARAMS\nfrom ckptcache.errors import InvalidId"),
        (
            "config.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ckptcache.metadata import NamePointer",
        ),
        ("storage/index.py", "from ckptcache.storage import fs\nfrom . import ptfile\nfrom .fs import read"),
        ("cache.py", "from ckptcache.storage.index import Index\nfrom ckptcache.policy import quality"),
        ("trainer.py", "from ckptcache.session import TrainingSession\nfrom ckptcache.report import draw"),
        ("cli/ls.py", "from ckptcache import __version__\nfrom ckptcache.cache import TrainingCache\nimport click"),
        ("__main__.py", "from ckptcache.cli import main"),
        ("__init__.py", "from ckptcache.cache import TrainingCache"),
    ],
)
def test_an_arrow_down_is_not(path, source):
    assert architecture.wrong_arrows({f"ckptcache/{path}": source}) == []


def test_a_cycle_is_found_with_its_way():
    tree = {
        "ckptcache/report.py": "from ckptcache.mirror import a",
        "ckptcache/mirror.py": "def f():\n    from ckptcache import progress",
        "ckptcache/progress.py": "from . import report",
    }
    assert architecture.cycles(tree) == [
        "ckptcache.mirror -> ckptcache.progress -> ckptcache.report -> ckptcache.mirror"
    ]


def test_a_cycle_for_type_checkers_alone_is_none():
    tree = {
        "ckptcache/report.py": "from ckptcache.mirror import a",
        "ckptcache/mirror.py": "import typing\nif typing.TYPE_CHECKING:\n    from ckptcache import report",
    }
    assert architecture.cycles(tree) == []


@pytest.mark.parametrize("source", ["import torch", "from torch import nn", "def f():\n    import torch.nn as nn"])
def test_torch_in_a_policy_is_found(source):
    assert architecture.torch_in_policy({"ckptcache/policy/quality.py": source})
    assert not architecture.torch_in_policy({"ckptcache/state/capture.py": source})


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "import cloudpickle as c", "__import__('shelve')", "import dill"],
)
def test_a_pickle_is_found(source):
    assert architecture.pickle_imports({"ckptcache/cli/ls.py": source})


def test_knowing_of_pickles_is_free():
    source = "import pickletools\nfrom pickle import UnpicklingError"
    assert not architecture.pickle_imports({"ckptcache/storage/ptfile.py": source})


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=safe)",
        "torch.load(f, **options)",
        "t.load(f)",
        "read(f)",
        "functools.partial(torch.load, weights_only=True)",
        "torch.serialization.load(f)",
        "torch.jit.load(f)",
        "numpy.load(f, allow_pickle=True)",
    ],
)
def test_an_unsafe_load_is_found(call):
    source = f"import torch\nimport torch as t\nfrom torch import load as read\n{call}"
    assert len(architecture.unsafe_loads({"ckptcache/state/restore.py": source})) == 1


def test_a_safe_load_is_not():
    source = (
        "import torch\ntorch.load(f, weights_only=True, mmap=True)\njson.load(f)\nnumpy.load(f, allow_pickle=False)"
    )
    assert architecture.unsafe_loads({"ckptcache/state/restore.py": source}) == []


WRITES = [
    *(
        "os.replace(a, b)",
        "os.rename(a, b)",
        "os.unlink(a)",
        "os.remove(a)",
        "os.fsync(f)",
        "os.mkdir(a)",
        "o.unlink(a)",
    ),
    *(
        "os.makedirs(a)",
        "os.truncate(a, 0)",
        "map(os.unlink, files)",
        "os.open(a, os.O_CREAT | os.O_WRONLY)",
        "gone(a)",
    ),
    *(
        "shutil.rmtree(a)",
        "shutil.move(a, b)",
        "shutil.copy2(a, b)",
        "open(a, 'w')",
        "open(a, mode='ab')",
        "open(a, m)",
    ),
    *(
        "open(a, 'r+b')",
        "a.open('wb')",
        "a.open(mode='x')",
        "io.open(a, 'w')",
        "os.fdopen(f, 'wb')",
        "gzip.open(a, 'wb')",
    ),
    *("a.write_text(t)", "a.write_bytes(t)", "a.unlink(missing_ok=True)", "a.rename(b)", "a.replace(b)", "a.touch()"),
    *("a.mkdir(parents=True)", "a.rmdir()", "a.symlink_to(b)", "a.chmod(0o600)", "f.truncate(0)", "array.tofile(a)"),
    *("zipfile.ZipFile(a, 'w')", "archive.extractall(a)", "torch.save(state, a)", "figure.savefig(a)", "np.save(a, x)"),
    *("save_file(tensors, a)", "import fcntl", "import tempfile"),
]
LOCKS = ["import filelock", "from filelock import FileLock"]


@pytest.mark.parametrize("line", WRITES)
def test_a_write_outside_fs_is_found(line):
    source = f"import os, os as o\nfrom os import unlink as gone\nimport numpy as np\n{line}"
    assert len(architecture.file_system_writes({"ckptcache/cache.py": source})) == 1
    for name in ("fs", "system"):
        assert architecture.file_system_writes({f"ckptcache/storage/{name}.py": source}) == []


def test_the_system_is_called_through_fs_only():
    tree = dict.fromkeys(("ckptcache/storage/index.py", "ckptcache/cache.py"), "from ckptcache.storage import system")
    assert len(architecture.file_system_writes({**tree, "ckptcache/storage/system.py": ""})) == 2


@pytest.mark.parametrize("line", LOCKS)
def test_a_lock_outside_locks_is_found(line):
    for path in ("cache", "storage/fs"):
        assert len(architecture.file_system_writes({f"ckptcache/{path}.py": line})) == 1
    assert architecture.file_system_writes({"ckptcache/storage/locks.py": line}) == []


@pytest.mark.parametrize("line", ["os.unlink(a)", "import fcntl"])
def test_a_write_in_locks_is_found(line):
    source = f"import os\n{line}"
    assert len(architecture.file_system_writes({"ckptcache/storage/locks.py": source})) == 1


@pytest.mark.parametrize(
    "line",
    [
        *(
            "open(a)",
            "open(a, 'rb')",
            "a.open()",
            "a.open('rb')",
            "a.read_bytes()",
            "os.open(a, os.O_RDONLY | os.O_NOFOLLOW)",
        ),
        *("text.replace('a', 'b')", "dataclasses.replace(r, x=1)", "moment.replace(tzinfo=UTC)", "items.remove(x)"),
        *(
            "torch.save(state, buffer)",
            "torch.save(state, cast(IO[bytes], target))",
            "figure.savefig(stream)",
            "zipfile.ZipFile(buffer, 'w')",
            "zipfile.ZipFile(a)",
        ),
        *("archive.open(name)", "webbrowser.open(address)", "os.stat(a)", "shutil.disk_usage(a)", "fs.replace(b)"),
    ],
)
def test_reading_is_free(line):
    assert (
        architecture.file_system_writes(
            {"ckptcache/cache.py": f"import os, shutil\nfrom ckptcache.storage import fs\n{line}"}
        )
        == []
    )


def test_a_stranger_in_the_clone_is_found():
    files = ["README.md", "ckptcache/cache.py", "docs/cli.md", "notes.txt", "src/x.py", "docs/plan.md", "docs/a/cli.md"]
    assert architecture.strangers(files) == ["notes.txt", "src/x.py", "docs/plan.md", "docs/a/cli.md"]


# --- what runs without torch ---------------------------------------------------------------------


def test_importing_the_package_does_not_import_torch():
    done = python("-c", "import ckptcache, sys; print(sorted(m for m in sys.modules if m.split('.')[0] == 'torch'))")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_records_settings_and_policies_do_not_import_torch():
    inner = [p for p in TREE if p.split("/")[1] in ("errors.py", "config.py", "metadata.py", "policy")]
    code = "".join(f"import {architecture.module_of(path)}\n" for path in inner)
    done = python("-c", f"{code}import sys; print('torch' in sys.modules)")
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_listing_checkpoints_does_not_import_torch(tmp_path):
    if "ckptcache/cli/__main__.py" not in TREE:
        pytest.skip("there is no command line yet")
    done = python("-X", "importtime", "-m", "ckptcache.cli", "--cache-dir", str(tmp_path), "ls")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "ckptcache.errors" in imported
    assert "torch" not in imported

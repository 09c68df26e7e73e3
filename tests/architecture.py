"""The house rules, each a function over a tree of sources that returns what breaks it.

A tree maps the path of each file, like ``ckptcache/policy/quality.py``, to its text. Nothing is
imported, so code that doesn't run yet is checked as well.
"""
# ruff: noqa: SIM905 - a list of words reads better as words

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

Tree = Mapping[str, str]

_THIRD = tuple(
    "catalog resume ledger adoption background drafting rollback saving restoring checkup transfer backup unpacking "
    "looking marking caring cache contrast difference diffing".split()
)
_FOURTH = tuple(
    "curves tally events deadline overrides registry checkpointing signals warming startup stretch recovery proof "
    "facts ending session trainer display testing workflow".split()
)
FLOORS = {
    1: ("errors", "values", "elsewhere", "config", "fields", "metadata", "environment", "words"),
    2: ("storage", "policy", "state", "history"),
    3: _THIRD,
    4: (*_FOURTH, "distributed", "mirror", "report", "progress"),
    5: ("nanecho", "integrations", "dashboard", "cli"),
    6: ("__main__",),
}
FLOOR_OF = {unit: floor for floor, units in FLOORS.items() for unit in units}
STAIRS = (("errors", "values", "elsewhere", "config", "fields", "metadata"), _THIRD, _FOURTH)
"""Within a floor, these stand one above the other."""

TOP_LEVEL = frozenset(
    "pyproject.toml README.md ckptcache scripts tests .training-progress .github docs .ci LICENSE CHANGELOG.md "
    "constraints.txt .gitignore".split()
)
DOCS = frozenset(
    "design.md cli.md errors.md resuming.md slurm.md examples.md exactness.md warm-start.md formats.md names.md "
    "benchmarks.md github-actions.md "
    "benchmarks.png comprehensive_demo.png".split()
)

FILE_SYSTEM = "ckptcache/storage/fs.py"
SYSTEM = "ckptcache/storage/system.py"
LOCKING = "ckptcache/storage/locks.py"
FS_NAMES = ("ckptcache.storage.fs", "fs")
STREAMS = ("buffer", "stream", "target")
"""What a variable is called that holds an open stream: memory, or a file that storage/fs.py has opened."""

PICKLE_ERRORS = frozenset("pickle.PickleError pickle.PicklingError pickle.UnpicklingError".split())
PICKLES = frozenset("pickle _pickle cPickle cloudpickle dill joblib shelve marshal".split())
HOMES = {
    **dict.fromkeys("fcntl msvcrt portalocker tempfile".split(), (FILE_SYSTEM, SYSTEM)),
    "filelock": (LOCKING,),
}
"""Modules that write or lock, and the only files that may import each."""
OS_WRITES = frozenset(
    "replace rename renames unlink remove removedirs rmdir fsync fdatasync sync mkdir makedirs truncate ftruncate link "
    "symlink chmod chown lchown fchmod fchown utime mkfifo mknod write pwrite writev pwritev copy_file_range sendfile "
    "posix_fallocate lockf setxattr".split()
)
SHUTIL_WRITES = frozenset(
    "rmtree move copy copy2 copyfile copymode copystat copytree make_archive unpack_archive".split()
)
OPENING_FLAGS = frozenset("O_WRONLY O_RDWR O_CREAT O_APPEND O_TRUNC O_TMPFILE".split())
OPENERS = frozenset(
    "open io.open io.FileIO os.fdopen codecs.open gzip.open bz2.open lzma.open tarfile.open zipfile.ZipFile".split()
)
"""What takes the mode second; any other `.open` is a method, as of a path, and takes it first."""
PATH_WRITES = frozenset(
    "write_text write_bytes unlink rename touch mkdir rmdir symlink_to hardlink_to chmod lchmod truncate tofile "
    "extractall".split()
)
TARGETED_WRITES = {"torch.save": 1, "numpy.save": 0, "numpy.savez": 0, "numpy.savetxt": 0, "savefig": 0, "save_file": 1}
"""What may write a file or into memory, and which argument says so."""


# --- reading sources -----------------------------------------------------------------------------


def read_tree(root: Path, folder: str = "ckptcache") -> dict[str, str]:
    """The Python files below `folder` of the project at `root`."""
    files = sorted((root / folder).rglob("*.py"))
    return {f.relative_to(root).as_posix(): f.read_text(encoding="utf-8") for f in files}


@dataclass(frozen=True)
class Arrow:
    """One import: `path` needs `target`, a dotted name, at `line`."""

    path: str
    line: int
    target: str
    type_only: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.target}"


def module_of(path: str) -> str:
    """``ckptcache/storage/__init__.py`` is ``ckptcache.storage``."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def unit_of(module: str) -> str:
    """The part of the house that `module` belongs to: its file or folder right below ``ckptcache``; "" is the face."""
    return module.partition(".")[2].partition(".")[0]


@lru_cache(maxsize=512)
def _parsed(text: str, path: str) -> ast.Module:
    return ast.parse(text, path)


def arrows(tree: Tree) -> list[Arrow]:
    """Every import in `tree`, those inside functions and of ``import_module("...")`` too."""
    return [
        arrow
        for path, text in tree.items()
        for arrow in _arrows_of(path, _parsed(text, path), frozenset(_modules(tree)))
    ]


def _modules(tree: Tree) -> Iterator[str]:
    return map(module_of, tree)


def _arrows_of(path: str, module: ast.Module, known: frozenset[str]) -> Iterator[Arrow]:
    typing_only = {
        id(n) for block in ast.walk(module) if _is_type_checking(block) for s in block.body for n in ast.walk(s)
    }
    for node in ast.walk(module):
        for target in _targets(node, path, known):
            yield Arrow(path, node.lineno, target, id(node) in typing_only)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _targets(node: ast.AST, path: str, known: frozenset[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _base(node, path)
        for alias in node.names:
            full = f"{base}.{alias.name}"
            # From a package, a name may be a module below it; from anything else it is just a name.
            yield full if full in known or base == "ckptcache" or full in PICKLE_ERRORS else base
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def _base(node: ast.ImportFrom, path: str) -> str:
    if not node.level:
        return node.module or ""
    package = path.split("/")[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


# --- who may import whom -------------------------------------------------------------------------


def wrong_arrows(tree: Tree) -> list[str]:
    """Imports that run up or across, or through the face, and modules that stand on no floor."""
    inner = [a for a in arrows(tree) if a.path != "ckptcache/__init__.py" and a.target.split(".")[0] == "ckptcache"]
    homeless = sorted({unit for unit in map(unit_of, _modules(tree)) if unit and unit not in FLOOR_OF})
    return [
        *(f"ckptcache/{unit} stands on no floor: give it one in tests/architecture.py" for unit in homeless),
        *(f"{arrow}, {reason}" for arrow in inner if (reason := _objection(arrow))),
    ]


def _objection(arrow: Arrow) -> str | None:
    source, target = unit_of(module_of(arrow.path)), unit_of(arrow.target)
    if arrow.target == "ckptcache.__version__":
        return None
    if target not in FLOOR_OF:
        return "the package's face: import it from its home"
    if source not in FLOOR_OF or is_allowed(source, target, type_only=arrow.type_only):
        return None
    return f"from floor {FLOOR_OF[source]} to floor {FLOOR_OF[target]}"


def is_allowed(source: str, target: str, *, type_only: bool = False) -> bool:
    """Whether a module of unit `source` may import one of `target`."""
    if source == target or FLOOR_OF[source] != FLOOR_OF[target]:
        return source == target or FLOOR_OF[target] < FLOOR_OF[source]
    if type_only and (source, target) == ("config", "metadata"):
        return True
    for stair in STAIRS:
        if source in stair and target in stair:
            return stair.index(target) < stair.index(source)
    return FLOOR_OF[source] == 4


def cycles(tree: Tree) -> list[str]:
    """Modules that need each other when they run; imports for type checkers alone don't count."""
    known = frozenset(_modules(tree))
    needs: dict[str, set[str]] = {module: set() for module in known}
    for arrow in arrows(tree):
        source = module_of(arrow.path)
        if not arrow.type_only and source != "ckptcache" and arrow.target in known - {source, "ckptcache"}:
            needs[source].add(arrow.target)
    return [" -> ".join(cycle) for cycle in _cycles(needs)]


def _cycles(needs: Mapping[str, Iterable[str]]) -> Iterator[list[str]]:
    done: set[str] = set()

    def visit(module: str, way: Sequence[str]) -> Iterator[list[str]]:
        if module in way:
            yield [*way[way.index(module) :], module]
        elif module not in done:
            for target in sorted(needs[module]):
                yield from visit(target, [*way, module])
            done.add(module)

    for module in sorted(needs):
        yield from visit(module, [])


def torch_in_policy(tree: Tree) -> list[str]:
    """Imports of torch among the policies, which answer without it."""
    return [
        str(a) for a in arrows(tree) if a.path.startswith("ckptcache/policy/") and a.target.split(".")[0] == "torch"
    ]


def pickle_imports(tree: Tree) -> list[str]:
    """Imports of modules that run code when they read; to catch the errors that torch raises is free."""
    return [str(a) for a in arrows(tree) if a.target.split(".")[0] in PICKLES and a.target not in PICKLE_ERRORS]


# --- what may be called --------------------------------------------------------------------------


def unsafe_loads(tree: Tree) -> list[str]:
    """Uses of ``torch.load`` other than a call with a literal ``weights_only=True``, and its unsafe relatives."""
    return _flagged(tree, _unsafe_load)


def file_system_writes(tree: Tree) -> list[str]:
    """What writes, syncs, renames or removes a file, and isn't in storage/fs.py or its system calls; reading is free.

    Likewise what locks one outside storage/locks.py.
    """
    outside = {path: text for path, text in tree.items() if path not in (FILE_SYSTEM, SYSTEM)}
    imports = [str(a) for a in arrows(tree) if a.path not in HOMES.get(a.target.split(".")[0], (a.path,))]
    imports += [str(a) for a in arrows(tree) if a.target == module_of(SYSTEM) and a.path != FILE_SYSTEM]
    return [*imports, *_flagged(outside, _writes)]


def _flagged(tree: Tree, is_wrong: Callable[[ast.AST, "Names"], bool]) -> list[str]:
    found = []
    for path, text in tree.items():
        module = _parsed(text, path)
        names = Names(module)
        wrong = [node for node in ast.walk(module) if is_wrong(node, names)]
        found += [f"{path}:{node.lineno} {ast.unparse(node).splitlines()[0][:80]}" for node in wrong]
    return found


class Names:
    """What the names in a module stand for, by its imports: `np.save` is ``numpy.save``."""

    def __init__(self, module: ast.Module) -> None:
        self.called = {id(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)}
        self._aliases: dict[str, str] = {}
        for node in ast.walk(module):
            if isinstance(node, ast.Import):
                self._aliases |= {a.asname: a.name for a in node.names if a.asname}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                self._aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def full(self, node: ast.AST) -> str:
        """The dotted name that `node` is, or "" when it is no such thing."""
        if isinstance(node, ast.Name):
            return self._aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{self.full(node.value) or '?'}.{node.attr}"
        return ""


def _unsafe_load(node: ast.AST, names: Names) -> bool:
    if isinstance(node, ast.Call):
        if names.full(node.func) in ("torch.load", "torch.serialization.load"):
            return not _has_literal(node, "weights_only", True)
        return any(k.arg == "allow_pickle" and not _is_literal(k.value, False) for k in node.keywords)
    full = names.full(node)
    if full in ("torch.load", "torch.serialization.load"):
        return id(node) not in names.called
    return full in ("torch.jit.load", "torch.package.PackageImporter")


def _has_literal(call: ast.Call, name: str, value: object) -> bool:
    return any(k.arg == name and _is_literal(k.value, value) for k in call.keywords)


def _is_literal(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _writes(node: ast.AST, names: Names) -> bool:
    # A function passed on, as in map(os.unlink, ...), writes as well as one that is called here.
    full = names.full(node)
    module, _, name = full.rpartition(".")
    if (module == "os" and name in OS_WRITES) or (module == "shutil" and name in SHUTIL_WRITES):
        return True
    return isinstance(node, ast.Call) and _call_writes(node, names.full(node.func))


def _call_writes(call: ast.Call, full: str) -> bool:
    module, _, name = full.rpartition(".")
    if module in FS_NAMES:
        return False
    if full == "os.open":
        return any(isinstance(n, ast.Attribute) and n.attr in OPENING_FLAGS for n in ast.walk(call))
    if name == "open" or full in OPENERS:
        return _opens_for_writing(call, full)
    if full in TARGETED_WRITES or name in TARGETED_WRITES:
        return not _into_stream(call, TARGETED_WRITES.get(full, TARGETED_WRITES.get(name, 0)))
    if name == "replace" and module:
        # Path.replace takes one argument; str.replace takes two, dataclasses.replace keywords.
        return len(call.args) == 1 and not call.keywords
    return module not in ("", "os", "shutil") and name in PATH_WRITES


def _opens_for_writing(call: ast.Call, full: str) -> bool:
    given = [k.value for k in call.keywords if k.arg == "mode"]
    if full in OPENERS:
        unclear = [mode for mode in given or call.args[1:2] if not isinstance(mode, ast.Constant)]
        return bool(unclear or any(map(_is_writing_mode, given or call.args[1:2]))) and not _into_stream(call, 0)
    return any(map(_is_writing_mode, given or call.args[:2]))


def _is_writing_mode(node: ast.AST) -> bool:
    mode = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
    return set(mode) <= set("rwaxbt+:|gz2") and not {"w", "a", "x", "+"}.isdisjoint(mode)


def _into_stream(call: ast.Call, place: int) -> bool:
    target = call.args[place] if len(call.args) > place else None
    if isinstance(target, ast.Call) and ast.unparse(target.func) in ("cast", "typing.cast"):
        target = target.args[-1]
    return isinstance(target, ast.Name) and target.id in STREAMS


# --- the clone -----------------------------------------------------------------------------------


def strangers(files: Iterable[str]) -> list[str]:
    """Files of the repository that stand where nothing but the agreed ones may."""
    wrong = []
    for file in files:
        top, _, rest = file.partition("/")
        if top not in TOP_LEVEL or (top == "docs" and rest not in DOCS):
            wrong.append(file)
    return wrong

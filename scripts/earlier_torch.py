"""Install the latest release of torch before the pinned one beside the project, for the tests that read with it.

`python scripts/earlier_torch.py` puts it into a folder below `build/`, alone: what it imports besides comes from the
interpreter that this is started with. Where its only wheel is one for CUDA, it is installed without CUDA's libraries,
which are gigabytes, and `STAND_INS` of a few kilobytes answer for them; on the CPU nothing asks them anything.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

RELEASE = "2.12.1"
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / f"torch-{RELEASE}-{sys.implementation.cache_tag}"
"""Where it lies; on PYTHONPATH it comes before the pinned one."""
STAND_INS = "libstandins.so"
_CUDAS_LIBRARY = re.compile(r"\[(lib(?:cu|nv|nccl)[\w.]*)\]")
_CUDAS_SYMBOL = re.compile(r" U (_*(?:cu|nv|nccl)\w*)(?:@+(\S+))?$", re.MULTILINE)
_RETURN_NOTHING = "xorl %eax, %eax\n\tret"


def environment(folder: Path = FOLDER) -> dict[str, str]:
    """In which Python imports the earlier release."""
    return {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}


def is_ready() -> bool:
    return FOLDER.is_dir()


def install() -> None:
    """Install it, all or nothing.

    Raises:
        OSError: pip, or a tool, isn't here or fails; what it said is on stderr.
    """
    FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER.name}-", dir=FOLDER.parent) as scratch:
        made = Path(scratch) / "torch"
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps"]
        _said([*pip, "--no-compile", "--target", str(made), f"torch=={RELEASE}"])
        stand_in_for_cuda(made)
        _said([sys.executable, "-c", "import torch; torch.zeros(1)"], env=environment(made))
        try:
            made.rename(FOLDER)
        except OSError:
            if not is_ready():  # or somebody else was as fast
                raise


def stand_in_for_cuda(site: Path) -> None:
    """Give torch in `site` one library, under many names, of what it asks of CUDA's own: functions that do nothing."""
    libraries = [*site.glob("torch/_C*.so"), *site.glob("torch/lib/*.so*")]
    needed = {name for path in libraries for name in _CUDAS_LIBRARY.findall(_said(["readelf", "-d", str(path)]))}
    lacking = {name for name in needed if not (site / "torch" / "lib" / name).exists()}
    if not lacking:
        return
    if platform.machine() != "x86_64":
        raise OSError(f"torch {RELEASE} has wheels for CUDA alone, and is stood in for on x86_64 alone")
    symbols = {pair for path in libraries for pair in _CUDAS_SYMBOL.findall(_said(["nm", "-D", str(path)]))}
    _assemble(site / "torch" / "lib" / STAND_INS, symbols)
    for name in lacking:
        (site / "torch" / "lib" / name).symlink_to(STAND_INS)


def _assemble(target: Path, symbols: Iterable[tuple[str, str]]) -> None:
    """A shared library with those functions, each in the version that is asked for, which the loader insists on."""
    source, versions = target.with_suffix(".s"), target.with_suffix(".map")
    names = sorted({name for name, _ in symbols})
    labels = "".join(f".globl {name}\n.type {name}, @function\n{name}:\n" for name in names)
    source.write_text(f'.text\n{labels}\t{_RETURN_NOTHING}\n.section .note.GNU-stack,"",@progbits\n')
    versions.write_text("".join(_version_nodes(symbols)))
    _said(["as", "-o", str(target.with_suffix(".o")), str(source)])
    _said(["ld", "-shared", f"--version-script={versions}", "-o", str(target), str(target.with_suffix(".o"))])


def _version_nodes(symbols: Iterable[tuple[str, str]]) -> Iterator[str]:
    held: dict[str, list[str]] = {}
    for name, version in sorted(symbols):
        held.setdefault(version, []).append(name)
    held.pop("", None)  # those without a version need no node
    for version, names in held.items():
        yield f"{version} {{ {' '.join(f'{name};' for name in names)} }};\n"


def _said(command: list[str], env: dict[str, str] | None = None) -> str:
    if shutil.which(command[0]) is None:
        raise OSError(f"{command[0]} is not here: install binutils")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=env)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def main() -> int:
    """Install it unless it is there; with --check, say by the exit code whether it is."""
    if is_ready():
        return 0
    if "--check" in sys.argv:
        return 1
    try:
        install()
    except OSError as error:
        sys.stderr.write(f"torch {RELEASE} could not be installed: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

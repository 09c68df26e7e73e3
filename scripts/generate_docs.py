"""Write the reference pages that come from the code: docs/errors.md, and docs/cli.md once there is a command line.

With --check nothing is written; the exit code is 1 when a page is out of date.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100
MADE_BY = "<!-- Written by scripts/generate_docs.py; change the code instead. -->\n"

ERRORS_HEAD = """
# Errors

What ckptcache raises on purpose is a `CkptCacheError`, from `ckptcache.errors`. The message names the thing, the cause
and the way out; what stands in braces is filled in, and is in the `fields` of the error. The command line ends with the
exit code.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | failed, for the reason that is printed |
| 2 | the command, a setting or an argument is wrong |
| 3 | nothing suitable was found |
| 4 | damage was found |
| 130, 143 | interrupted by SIGINT, by SIGTERM |
"""

CLI_HEAD = """
# The command line

What `--help` prints, for every command. The exit codes are in [errors.md](errors.md).
"""


# --- errors --------------------------------------------------------------------------------------


def errors_page(module: ModuleType) -> str:
    """The page for the error classes of `module`, in their order and under the comments that divide them."""
    lines = [MADE_BY, ERRORS_HEAD]
    current = None
    for section, kind in _sectioned(module):
        if section != current:
            lines.append(f"\n## {section}\n\n| error | exit code | message |\n| --- | --- | --- |\n")
            current = section
        lines.append(f"| `{kind.__name__}` | {kind.exit_code} | {_cell(_message(kind))} |\n")
    return "".join(lines)


def _sectioned(module: ModuleType) -> Iterator[tuple[str, Any]]:
    source = inspect.getsource(module)
    titles = {
        n: m[1] for n, line in enumerate(source.splitlines(), 1) if (m := re.match(r"# --- (.+?)(?::.*)? -{3,}$", line))
    }
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            section = [title for line, title in titles.items() if line < node.lineno]
            yield (section[-1].capitalize() if section else "The base class"), getattr(module, node.name)


def _message(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


# --- the command line ----------------------------------------------------------------------------


def cli_page(command: Any) -> str:
    """The page for the click command `command` and everything below it."""
    import click

    def texts(part: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
        context = click.Context(part, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH)
        path = context.command_path
        yield f"\n## {path}\n\n```text\n{click.unstyle(part.get_help(context)).rstrip()}\n```\n"
        if isinstance(part, click.Group):
            for sub in part.list_commands(context):
                if (found := part.get_command(context, sub)) is not None and not found.hidden:
                    yield from texts(found, sub, context)

    return "".join([MADE_BY, CLI_HEAD, *texts(command, "ckptcache", None)])


def _command_line() -> Any | None:
    if importlib.util.find_spec("ckptcache.cli") is None:
        return None
    return getattr(importlib.import_module("ckptcache.cli"), "main", None)


# --- writing -------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """Path of each generated page, relative to the project, to its text."""
    made = {"docs/errors.md": errors_page(importlib.import_module("ckptcache.errors"))}
    if (command := _command_line()) is not None:
        made["docs/cli.md"] = cli_page(command)
    return made


def out_of_date(made: dict[str, str], root: Path) -> list[str]:
    """Those of `made` that aren't there, or read otherwise, below `root`."""
    return [
        name for name, text in made.items() if not (p := root / name).is_file() or p.read_text(encoding="utf-8") != text
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is out of date")
    check = parser.parse_args().check
    made = pages()
    for name in (stale := out_of_date(made, ROOT)):
        if check:
            print(f"{name} is out of date: run `python scripts/generate_docs.py`.", file=sys.stderr)
        else:
            (ROOT / name).parent.mkdir(exist_ok=True)
            (ROOT / name).write_text(made[name], encoding="utf-8", newline="\n")
            print(f"wrote {name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())

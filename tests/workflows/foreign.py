"""A small project of somebody else's, with no source of ckptcache in it: that of docs/github-actions.md."""

import re

from tests.workflows.acting import ROOT, Github

WORKFLOW = "train.yml"
RUN = "my-model"
DOCS = (ROOT / "docs" / "github-actions.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The first block of code of that language on the page."""
    found = re.search(rf"^```{language}\n(.*?)^```$", DOCS, re.M | re.S)
    assert found is not None
    return found[1]


def publish(github: Github, *, script: str | None = None, inputs: str = "") -> None:
    """Publish the project of the page, with another `script` or more `inputs` for the action if given."""
    project = github.folder / "project"
    (project / ".github/workflows").mkdir(parents=True)
    (project / "train.py").write_text(block("python") if script is None else script)
    workflow = block("yaml") + "".join(f"          {line}\n" for line in inputs.splitlines())
    (project / ".github/workflows" / WORKFLOW).write_text(workflow)
    github.publish(project)


def changed(text: str, old: str, new: str) -> str:
    """`text` with `old` replaced, which must be there."""
    assert old in text
    return text.replace(old, new)

import json

import pytest

from ckptcache.cache import TrainingCache
from ckptcache.values import content_hash
from cli.conftest import DATA, WIDE, ckptcache_cli, save

MODEL = content_hash(WIDE)
INDEXES = {
    "a configuration that is a list": lambda index, record: index["configs"].update({MODEL: [1, 2]}),
    "a configuration that is text": lambda index, record: index["configs"].update({MODEL: "x"}),
    "a configuration that is gone": lambda index, record: index["configs"].clear(),
    "data that is a number": lambda index, record: index["configs"].update({content_hash(DATA): 3}),
    "deep": lambda index, record: index["configs"].update({MODEL: json.loads("[" * 500 + "]" * 500)}),
    "a huge number": lambda index, record: record.update(iteration=2**63, sequence=10**15),
    "a name to nowhere": lambda index, record: index["names"].update(x={"checkpoint": "gone", "revision": 0}),
    "a name with control characters": lambda index, record: index["names"].update(
        {"\x1b[31m": {"checkpoint": "gone", "revision": 0}}
    ),
    "a session from nowhere": lambda index, record: index["sessions"].update(s={"parent": "gone", "config": "none"}),
    "numbers that aren't": lambda index, record: record.update(metrics={"a": "nan"}, learning_rate=["inf"]),
    "a time with control characters": lambda index, record: record.update(created_at="\x1b[2J"),
    "a reason with control characters": lambda index, record: record.update(save_reason="\x9b31m\r\nforged"),
    "another decision": lambda index, record: record.update(decision="bogus", decision_reason="\x1b]0;title\x07"),
    "fields of later versions": lambda index, record: record.update(future={"x": 1}, status="a lie"),
    "a rollback to nowhere": lambda index, record: index["names"].update(
        rollback={"checkpoint": "gone", "before": {"gone": "gone"}}
    ),
    "a mark of one that is gone": lambda index, record: record.update(rolled_back="gone"),
    "a session that came of itself": lambda index, record: (
        index["sessions"].update(s={"parent": next(iter(index["checkpoints"])), "stop_reason": "\x1b[31m"}),
        record.update(session="s"),
    ),
    "sessions in a circle": lambda index, record: (
        index["sessions"].update(s={"parent": "b", "warm_start": True}, t={"parent": next(iter(index["checkpoints"]))}),
        index["checkpoints"].update(b={"session": "t", "decision": "evicted"}),
        record.update(session="s"),
    ),
    "its own parent": lambda index, record: record.update(parents=[next(iter(index["checkpoints"]))]),
    "the greatest numbers": lambda index, record: record.update(epoch=1e308, val_loss=1e308, size=2**62),
    "a link in its notes": lambda index, record: record.update(notes="[link=file:///etc/passwd]x[/link]", tags=["[/]"]),
}
COMMANDS = [
    *("ls", "ls --all", "show ckpt_", "best", "explain", "sessions", "stats", "doctor", "prune --dry-run"),
    *("lineage --all", "lineage ckpt_", "rollback ckpt_ --dry-run", "rollback --undo --dry-run"),
    *("diff ckpt_ ckpt_", "rerank --quality-weight-loss 0.5"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with TrainingCache(folder) as cache:
        save(cache, 1, 1.0)
    for path in (*folder.glob("checkpoints/*.json"), folder / "metadata.json.prev"):
        path.unlink(missing_ok=True)
    return folder, (folder / "metadata.json").read_text()


@pytest.mark.parametrize("change", INDEXES.values(), ids=INDEXES)
def test_whatever_an_index_holds_there_is_an_answer_and_no_harm(made, change):
    folder, text = made
    index = json.loads(text)
    change(index, next(iter(index["checkpoints"].values())))
    (folder / "metadata.json").write_text(json.dumps(index))
    for command in COMMANDS:
        for form in ((), ("--json",)):
            result = ckptcache_cli("--cache-dir", folder, *command.split(), *form, rc=None)
            assert result.exit_code in (0, 3, 4), (command, result.output)
            assert not {"\x1b", "\x9b", "\x07", "\r"} & set(result.output), command
            if form and result.stdout:
                assert isinstance(json.loads(result.stdout), dict)

import json
import os
from pathlib import Path

import pytest

from ckptcache.cli.find import MAX_DEPTH, find_cache, is_cache
from ckptcache.errors import AmbiguousCache, CacheDirIsFile, CacheNotFound, ConfigError
from cli.conftest import ckptcache_cli

INDEX = '{"schema_version": 2, "checkpoints": {}, "sessions": {}, "names": {}, "configs": {}, "fingerprints": {}}'


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def index_at(*folders, content=INDEX):
    for folder in folders:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "metadata.json").write_text(content)


def test_the_current_folder_comes_first():
    index_at(".", "runs/cache")
    assert find_cache(None) == Path()


def test_the_nearest_below_wins():
    index_at("runs/cache", "a/b/c/cache")
    assert find_cache(None) == Path("runs/cache")


def test_several_at_one_depth_are_named():
    index_at("b/cache", "a/cache", "a/b/c/cache")
    with pytest.raises(AmbiguousCache, match=r"2 caches lie equally near \(a/cache, b/cache\)") as caught:
        find_cache(None)
    assert caught.value.exit_code == 2


def test_of_several_at_one_depth_the_one_with_checkpoints_is_meant():
    index_at(".training-progress/ci/cache", ".training-progress/full/cache", "out/mine/cache")
    Path("out/mine/cache/checkpoints").mkdir()
    Path("out/mine/cache/checkpoints/a.pt").write_bytes(b"x")
    assert find_cache(None) == Path("out/mine/cache")
    Path(".training-progress/ci/cache/checkpoints").mkdir()
    Path(".training-progress/ci/cache/checkpoints/b.pt").write_bytes(b"x")
    with pytest.raises(AmbiguousCache, match="2 caches"):
        find_cache(None)


@pytest.mark.parametrize("folder", [".git/x", ".venv/x", "node_modules/x", "a/__pycache__/x"])
def test_some_folders_are_passed_over(folder):
    index_at(folder)
    with pytest.raises(CacheNotFound, match="or below it"):
        find_cache(None)


def test_training_progress_is_looked_into_though_hidden():
    index_at(".training-progress/run/cache")
    assert find_cache(None) == Path(".training-progress/run/cache")


def test_links_are_not_followed_and_too_deep_is_not_looked(here):
    index_at("/".join(["d"] * (MAX_DEPTH + 1)), here.parent / f"{here.name}-elsewhere")
    os.symlink(here.parent / f"{here.name}-elsewhere", here / "link")
    os.symlink(here, here / "circle")
    with pytest.raises(CacheNotFound):
        find_cache(None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (INDEX, True),
        ('{"old_1": {"iteration": 3, "val_loss": 2.0}}', True),
        ('<<<<<<< a\n{"schema_version": 2, "checkpoints": {}}', True),
        ('{"schema_version": 99, "checkpoints": {}}', True),
        ('{"name": "a package", "version": "1.0"}', False),
        ('{"schema_version": 1, "tables": {}}', False),
        ("{}", False),
        ("[1]", False),
        ("junk", False),
        ('{"a": {"b": 1}}', False),
    ],
)
def test_a_metadata_json_of_something_else_is_no_cache(content, expected):
    index_at("x", content=content)
    assert is_cache(Path("x")) is expected


def test_a_broken_index_beside_its_lock_or_its_checkpoints_is_a_cache():
    index_at("locked", "full", content="junk")
    Path("locked/metadata.json.lock").touch()
    Path("full/checkpoints").mkdir()
    Path("full/checkpoints/a.pt").touch()
    assert is_cache(Path("locked"))
    assert is_cache(Path("full"))


def test_what_is_named_wins_over_what_is_near(monkeypatch):
    index_at(".", "given", "env", "settings")
    Path("ckptcache.toml").write_text('cache_dir = "settings"\n')
    assert find_cache(None).name == "settings"
    monkeypatch.setenv("CKPTCACHE_DIR", "env")
    assert find_cache(None) == Path("env")
    assert find_cache("given") == Path("given")


def test_what_is_named_must_be_a_cache_folder():
    Path("file").touch()
    Path("empty").mkdir()
    for name, error in {"file": CacheDirIsFile, "empty": CacheNotFound, "none": CacheNotFound, "": ConfigError}.items():
        with pytest.raises(error):
            find_cache(name)
    assert find_cache("empty", create=True) == Path("empty")


def test_the_command_finds_the_cache_and_ends_with_3_or_2_otherwise():
    result = ckptcache_cli("ls", "--json", rc=3)
    assert json.loads(result.stdout)["error"]["type"] == "CacheNotFound"
    assert "name one with --cache-dir or CKPTCACHE_DIR" in result.stderr
    index_at("runs/cache")
    assert json.loads(ckptcache_cli("ls", "--json").stdout) == {"checkpoints": []}
    index_at("other/cache")
    assert "other/cache, runs/cache" in ckptcache_cli("ls", rc=2).stderr


def test_looking_for_a_cache_creates_nothing(here):
    for command in ("ls", "doctor", "pin x", "prune"):
        ckptcache_cli(*command.split(), rc=3)
        ckptcache_cli("--cache-dir", "none", *command.split(), rc=3)
    assert list(here.iterdir()) == []

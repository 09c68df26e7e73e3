import dataclasses
import math
from pathlib import Path

import pytest

from ckptcache.config import CRITICAL_PARAMS, CacheConfig, check_setting, environment_variable, in_scratch
from ckptcache.errors import ConfigError, InvalidConfigFile, UnknownSetting


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(**settings) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        CacheConfig(**settings)
    return caught.value.fields["problems"].split("; ")


# --- layers --------------------------------------------------------------------------------------


def test_defaults_stand_when_nothing_is_set():
    config = CacheConfig()
    assert (config.cache_dir, config.max_checkpoints, config.max_cache_size_gb) == ("cache/training", 10, 20.0)
    assert config.critical_params == CRITICAL_PARAMS
    assert config.max_cache_bytes == 20_000_000_000


def test_each_layer_beats_the_one_below(folder, monkeypatch):
    (folder / "ckptcache.toml").write_text("max_checkpoints = 3\n")
    assert CacheConfig().max_checkpoints == 3
    monkeypatch.setenv("CKPTCACHE_MAX_CHECKPOINTS", "4")
    assert CacheConfig().max_checkpoints == 4
    assert CacheConfig(max_checkpoints=5).max_checkpoints == 5


def test_layers_are_taken_setting_by_setting(folder, monkeypatch):
    (folder / "ckptcache.toml").write_text("max_checkpoints = 3\nkeep_latest = 2\n")
    monkeypatch.setenv("CKPTCACHE_KEEP_LATEST", "7")
    config = CacheConfig(max_records=50)
    assert (config.max_checkpoints, config.keep_latest, config.max_records) == (3, 7, 50)


def test_an_argument_equal_to_the_default_still_beats_the_environment(monkeypatch):
    monkeypatch.setenv("CKPTCACHE_MAX_CHECKPOINTS", "4")
    assert CacheConfig(max_checkpoints=10).max_checkpoints == 10


def test_pyproject_gives_settings_too(folder):
    (folder / "pyproject.toml").write_text("[tool.ckptcache]\nmax_checkpoints = 6\n")
    assert CacheConfig().max_checkpoints == 6


def test_own_file_beats_pyproject_beside_it(folder):
    (folder / "pyproject.toml").write_text("[tool.ckptcache]\nmax_checkpoints = 6\n")
    (folder / "ckptcache.toml").write_text("max_checkpoints = 3\n")
    assert CacheConfig().max_checkpoints == 3


def test_the_nearest_file_above_counts(folder, monkeypatch):
    (folder / "ckptcache.toml").write_text("max_checkpoints = 3\n")
    (folder / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(folder / "a" / "b")
    assert CacheConfig().max_checkpoints == 3
    (folder / "a" / "ckptcache.toml").write_text("max_checkpoints = 4\n")
    assert CacheConfig().max_checkpoints == 4


def test_a_pyproject_that_says_nothing_of_the_cache_is_passed_over(folder, monkeypatch):
    (folder / "ckptcache.toml").write_text("max_checkpoints = 3\n")
    (folder / "part").mkdir()
    (folder / "part" / "pyproject.toml").write_text("[project]\nname = 'part'\n")
    monkeypatch.chdir(folder / "part")
    assert CacheConfig().max_checkpoints == 3


def test_a_cache_dir_in_a_file_is_relative_to_that_file(folder, monkeypatch):
    (folder / "ckptcache.toml").write_text("cache_dir = 'runs/cache'\n")
    (folder / "deep").mkdir()
    monkeypatch.chdir(folder / "deep")
    assert Path(CacheConfig().cache_dir) == folder / "runs" / "cache"
    assert CacheConfig(cache_dir=Path("here")).cache_dir == "here"


def test_the_short_variable_names_the_folder(monkeypatch):
    monkeypatch.setenv("CKPTCACHE_DIR", "short")
    assert CacheConfig().cache_dir == "short"
    monkeypatch.setenv("CKPTCACHE_CACHE_DIR", "long")
    assert CacheConfig().cache_dir == "long"
    assert environment_variable("cache_dir") == "CKPTCACHE_CACHE_DIR"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_cache_size_gb", "0.5", 0.5),
        ("quality_weight_loss", "1", 1.0),
        ("min_improvement_threshold", "0", 0.0),
        ("data_cache_ttl_hours", "24", 24.0),
        ("max_records", "12", 12),
        ("auto_cleanup", "off", False),
        ("data_cache_enabled", " Yes ", True),
        ("critical_params", "n_layer, n_head", ("n_layer", "n_head")),
        ("critical_params", "all", "all"),
        ("quality_metrics", "accuracy=max, mae = min", {"accuracy": "max", "mae": "min"}),
    ],
)
def test_variables_are_read_as_their_settings_type(monkeypatch, name, text, value):
    monkeypatch.setenv(f"CKPTCACHE_{name.upper()}", text)
    read = getattr(CacheConfig(), name)
    assert read == value
    assert type(read) is type(value)


def test_a_changed_copy_looks_nothing_up(monkeypatch):
    config = CacheConfig(max_checkpoints=5)
    monkeypatch.setenv("CKPTCACHE_KEEP_LATEST", "9")
    assert dataclasses.replace(config, max_records=7).keep_latest == 1


# --- what doesn't work ---------------------------------------------------------------------------


def test_all_problems_are_told_at_once_whatever_their_layer(folder, monkeypatch):
    (folder / "ckptcache.toml").write_text("cache_dir = 5\nmax_records = 'many'\n")
    monkeypatch.setenv("CKPTCACHE_KEEP_LATEST", "few")
    found = problems(max_checkpoints=0, auto_cleanup="perhaps")
    assert {p.split(" ")[0] for p in found} == {
        "cache_dir",
        "max_records",
        "keep_latest",
        "max_checkpoints",
        "auto_cleanup",
    }


def test_a_problem_names_where_the_value_stands(folder, monkeypatch):
    (folder / "ckptcache.toml").write_text("max_records = 'many'\n")
    monkeypatch.setenv("CKPTCACHE_KEEP_LATEST", "few")
    told = "; ".join(problems())
    assert "keep_latest (from CKPTCACHE_KEEP_LATEST) must be a whole number of at least 0, not 'few'" in told
    assert f"max_records (from {folder / 'ckptcache.toml'}) must be" in told


@pytest.mark.parametrize("name", ["max_checkpoints", "max_records"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3", None])
def test_counts_must_be_at_least_one(name, value):
    assert problems(**{name: value}) == [f"{name} must be a whole number of at least 1, not {value!r}"]


@pytest.mark.parametrize("name", ["max_cache_size_gb", "data_cache_ttl_hours"])
@pytest.mark.parametrize("value", [0, -0.5, math.nan, math.inf, True, "big"])
def test_sizes_and_times_must_be_above_nothing(name, value):
    assert problems(**{name: value}) == [f"{name} must be a number above 0, not {value!r}"]


def test_nothing_kept_as_latest_is_a_choice():
    assert CacheConfig(keep_latest=0).keep_latest == 0
    assert problems(keep_latest=-1)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, None])
def test_weights_must_be_numbers_of_at_least_nothing(value):
    assert problems(quality_weight_loss=value)[0].startswith("quality_weight_loss must be a number of at least 0")


def test_weights_must_add_up_to_something():
    weights = {"quality_weight_loss": 0, "quality_weight_metrics": 0}
    assert "add up to nothing" in problems(**weights)[0]
    assert CacheConfig(**weights, quality_weight_progress=0.1).quality_weight_progress == 0.1


@pytest.mark.parametrize("value", [{"accuracy": "up"}, ["accuracy"], "accuracy"])
def test_scored_metrics_must_say_max_or_min(value):
    assert problems(quality_metrics=value)[0].startswith("quality_metrics must map each metric to 'max' or 'min'")


@pytest.mark.parametrize("text", ["accuracy", "accuracy=max,mae", "accuracy=up"])
def test_scored_metrics_in_the_environment_are_refused_whole(monkeypatch, text):
    monkeypatch.setenv("CKPTCACHE_QUALITY_METRICS", text)
    assert "quality_metrics (from CKPTCACHE_QUALITY_METRICS)" in problems()[0]


@pytest.mark.parametrize("value", ["n_layer", 5, None, [1], {"n_layer": 1}])
def test_critical_params_must_be_names(value):
    assert problems(critical_params=value)[0].startswith("critical_params must be a list of names, or 'all'")


@pytest.mark.parametrize("value", ["", 5, None, b"bytes", "nul\0"])
def test_the_folder_must_be_a_path(value):
    assert problems(cache_dir=value)[0].startswith("cache_dir must be the path of a folder")


def test_an_empty_folder_in_a_file_is_no_folder(folder):
    (folder / "ckptcache.toml").write_text("cache_dir = ''\n")
    assert "must be the path of a folder" in problems()[0]


def test_a_scorer_must_be_a_function():
    assert problems(best_fn="val_loss")[0].startswith("best_fn must be a function")


def test_an_unknown_setting_suggests_the_nearest(folder):
    (folder / "ckptcache.toml").write_text("max_chekpoints = 3\n")
    with pytest.raises(UnknownSetting, match=r"'max_chekpoints'.*ckptcache\.toml.*did you mean 'max_checkpoints'") as e:
        CacheConfig()
    assert e.value.exit_code == 2


def test_an_unknown_setting_like_no_other_lists_them_all():
    with pytest.raises(UnknownSetting, match=r"there are .*keep_latest.*max_records"):
        check_setting("zzz", source="the command line")


def test_a_scorer_cannot_stand_in_a_file(folder):
    (folder / "ckptcache.toml").write_text("best_fn = 'val_loss'\n")
    with pytest.raises(UnknownSetting, match="best_fn"):
        CacheConfig()


@pytest.mark.parametrize("content", [b"max_checkpoints = \n", b"\xff\xfe", b"[a\n"])
@pytest.mark.parametrize("name", ["ckptcache.toml", "pyproject.toml"])
def test_a_broken_file_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(InvalidConfigFile) as caught:
        CacheConfig()
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("content", ["tool = 1\n", "[project]\nname = 'x'\n"])
def test_a_pyproject_without_our_table_is_no_settings_file(folder, content):
    (folder / "pyproject.toml").write_text(content)
    assert CacheConfig().max_checkpoints == 10


def test_our_table_must_be_a_table(folder):
    (folder / "pyproject.toml").write_text("[tool]\nckptcache = 3\n")
    with pytest.raises(InvalidConfigFile, match="not a table"):
        CacheConfig()


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheConfig().max_checkpoints = 3


# --- a scratch folder ----------------------------------------------------------------------------


def test_every_folder_has_a_stand_in_of_its_own_in_the_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CKPTCACHE_SCRATCH", str(tmp_path / "scratch"))
    stand_in = CacheConfig(cache_dir="runs/cache").cache_dir
    assert Path(stand_in).parent == tmp_path / "scratch"
    assert Path(stand_in).name.endswith("-cache")
    assert CacheConfig(cache_dir=tmp_path / "runs" / "x" / ".." / "cache").cache_dir == stand_in
    assert CacheConfig(cache_dir="other/cache").cache_dir != stand_in
    assert CacheConfig(cache_dir=stand_in).cache_dir == stand_in
    assert Path(CacheConfig().cache_dir).parent == tmp_path / "scratch"


def test_without_a_scratch_folder_a_path_stays_and_what_is_no_path_is_refused_as_ever(monkeypatch):
    assert in_scratch("runs/cache") == "runs/cache"
    monkeypatch.setenv("CKPTCACHE_SCRATCH", "/nowhere")
    for wrong in ("", 3, "a\0b"):
        with pytest.raises(ConfigError, match="cache_dir"):
            CacheConfig(cache_dir=wrong)

import math
import subprocess
import sys

import pytest

from ckptcache.errors import ConfigError, InvalidConfigFile, UnknownSetting
from ckptcache.nanecho.settings import NanEchoConfig, TrainingSettings, known_options, load_settings
from ckptcache.values import jsonable

BAD_MODELS = [
    ({"n_layer": 0}, "n_layer"),
    ({"n_head": -1}, "n_head"),
    ({"n_embd": 1.5}, "n_embd"),
    ({"n_embd": 130}, "multiple of n_head"),
    ({"vocab_size": "256"}, "vocab_size"),
    ({"block_size": True}, "block_size"),
    ({"dropout": 1.0}, "dropout"),
    ({"dropout": math.nan}, "dropout"),
    ({"bias": 1}, "bias"),
    ({"connection_ratio": 0.0}, "connection_ratio"),
    ({"max_connections": 1.1}, "max_connections"),
    ({"connection_ratio": 0.6, "max_connections": 0.5}, "must not be above max_connections"),
    ({"connection_seed": -1}, "connection_seed"),
]
BAD_TRAININGS = [
    ({"batch_size": 0}, "batch_size"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
    ({"learning_rate": 0.0}, "learning_rate"),
    ({"learning_rate": math.inf}, "learning_rate"),
    ({"learning_rate": 1e-5, "min_learning_rate": 1e-4}, "min_learning_rate"),
    ({"min_learning_rate": -1.0}, "min_learning_rate"),
    ({"warmup_iters": -1}, "warmup_iters"),
    ({"warmup_iters": 20, "decay_iters": 20}, "decay_iters"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"betas": (0.9, 1.0)}, "betas"),
    ({"betas": 0.9}, "betas"),
    ({"betas": [0.9]}, "betas"),
    ({"grad_clip": -1}, "grad_clip"),
    ({"eval_interval": 0}, "eval_interval"),
    ({"eval_batches": 0}, "eval_batches"),
    ({"checkpoint_interval": 0}, "checkpoint_interval"),
    ({"connection_growth_interval": -1}, "connection_growth_interval"),
    ({"connection_growth_step": 0}, "connection_growth_step"),
    ({"max_iters": 0}, "max_iters"),
    ({"session_iters": -5}, "session_iters"),
    ({"max_seconds": 0}, "max_seconds"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"device": "the fast one"}, "device"),
    ({"device": 0}, "device"),
]


@pytest.mark.parametrize(("options", "named"), BAD_MODELS)
def test_a_model_that_cannot_be_is_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        NanEchoConfig(**options)


@pytest.mark.parametrize(("options", "named"), BAD_TRAININGS)
def test_a_training_that_cannot_be_is_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        TrainingSettings(**options)


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        TrainingSettings(batch_size=0, weight_decay=-1, seed=None)
    assert all(name in str(caught.value) for name in ("batch_size", "weight_decay", "seed"))


@pytest.mark.parametrize("settings", [NanEchoConfig(), TrainingSettings()])
def test_settings_can_be_kept_as_a_record(settings):
    assert type(settings)(**jsonable(settings)) == settings


def test_each_takes_its_own_options():
    options = {"n_layer": 2, "batch_size": 3, "betas": [0.8, 0.9], "out_dir": "out"}
    assert NanEchoConfig.of(options) == NanEchoConfig(n_layer=2)
    assert TrainingSettings.of(options) == TrainingSettings(batch_size=3, betas=(0.8, 0.9))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"n_layer": 2, "learning-rate": 0.01, "betas": [0.9, 0.95], "out_dir": "x"}'),
        ("a.toml", 'n_layer = 2\nlearning-rate = 0.01\nbetas = [0.9, 0.95]\nout_dir = "x"\n'),
    ],
)
def test_a_file_gives_options_in_either_format(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    expected = {"n_layer": 2, "learning_rate": 0.01, "betas": [0.9, 0.95], "out_dir": "x"}
    assert load_settings(tmp_path / name) == expected


def test_an_unknown_option_brings_the_nearest_one(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("learning_rat = 1\n", encoding="utf-8")
    with pytest.raises(UnknownSetting, match=r"'learning_rat' \(in .*a\.toml\): did you mean 'learning_rate'"):
        load_settings(path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"{", "cannot be read"),
        ("a.json", b"[1]", "must map names"),
        ("a.json", b'{"learning_rate": NaN}', "cannot be read"),
        ("a.toml", b"a = = 1", "cannot be read"),
        ("a.toml", b"\xff\xfe", "cannot be read"),
        ("a.yaml", b"n_layer: 2", "must end in .json or .toml"),
        ("a.json", b'{"n_layer": 2, "n-layer": 3}', "n_layer is given twice"),
        ("a.toml", None, "No such file"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidConfigFile, match=reason) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)


def test_known_options_cover_model_training_and_run():
    assert {"n_layer", "batch_size", "max_iters", "data_dir", "resume", "max_checkpoints"} <= set(known_options())


def test_settings_and_schedule_do_not_import_torch():
    code = "import sys, ckptcache.nanecho.settings, ckptcache.nanecho.schedule; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The main job: connections that grow, a schedule that follows the settings in force, resuming beside other models."""

import os
import signal
import time

import numpy as np
import pytest
import torch

from ckptcache.errors import InvalidValue
from ckptcache.nanecho.data import Corpus
from ckptcache.nanecho.schedule import learning_rate_at
from ckptcache.nanecho.settings import NanEchoConfig, TrainingSettings
from ckptcache.nanecho.trainer import CachedNanEchoTrainer, pick_device
from ckptcache.state import pieces, staging
from ckptcache.trainer import Callback
from tests.faults import run_child
from tests.jobs import cache_at, differences

TEXT = np.frombuffer(("the quick brown fox jumps over the lazy dog. " * 60).encode(), dtype=np.uint8)
CORPUS = Corpus(
    train=TEXT,
    val=TEXT[:500],
    vocab_size=128,
    largest_token=127,
    name="a fox",
    data_config={"kind": "text", "tokenisation": "bytes", "val_digest": "fox"},
)


def made(cache, *, n_embd=16, dropout=0.1, callbacks=(), resume="best", keeps=False, **settings):
    config = NanEchoConfig(
        n_layer=1, n_head=2, n_embd=n_embd, block_size=16, vocab_size=128, dropout=dropout, connection_ratio=0.4
    )
    given = {
        "batch_size": 4,
        "eval_batches": 2,
        "eval_interval": 5,
        "checkpoint_interval": 100,
        "connection_growth_interval": 4,
        "connection_growth_step": 0.2,
        "max_iters": 10,
        "device": "cpu",
        **settings,
    }
    return CachedNanEchoTrainer(
        config,
        TrainingSettings(**given),
        CORPUS,
        cache,
        callbacks=callbacks,
        resume=resume,
        keep_saved_learning_rate=keeps,
    )


def masks_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith("mask")}


def state_of(trainer):
    parts = {"model": trainer.model, "optimizer": trainer.optimizer, "sampler": trainer.batches}
    return {name: part.state_dict() for name, part in parts.items()}


def in_order(cache):
    return sorted(cache.checkpoints(everything=True), key=lambda r: r.order)


def test_growth_saves_with_its_reason_at_its_iteration_until_all_may_be_active(tmp_path):
    cache = cache_at(tmp_path, max_checkpoints=50)
    trainer = made(cache, max_iters=20)
    trainer.train()
    grown = [(r.iteration, r.save_reason) for r in in_order(cache) if r.save_reason == "growth"]
    assert grown == [(4, "growth"), (8, "growth"), (12, "growth")]
    ratios = [float(cache.load(r.id)["model"]["ratio"]) for r in in_order(cache) if r.save_reason == "growth"]
    assert ratios == pytest.approx([0.6, 0.8, 1.0])
    assert trainer.model.connection_ratio == 1.0


def test_the_settings_in_force_win_over_those_of_the_checkpoint(tmp_path):
    made(cache_at(tmp_path), max_iters=2, weight_decay=0.1, betas=(0.9, 0.95)).train()
    second = made(cache_at(tmp_path), max_iters=4, weight_decay=0.3, betas=(0.8, 0.9))
    second.train()
    groups = second.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [tuple(group["betas"]) for group in groups] == [(0.8, 0.9)] * 2


def test_masks_and_ratio_come_back_exactly(tmp_path):
    first = made(cache_at(tmp_path), max_iters=6)
    first.train()
    second = made(cache_at(tmp_path), max_iters=12)
    assert second.starting_iteration == 6
    assert second.model.connection_ratio == first.model.connection_ratio == pytest.approx(0.6)
    assert not list(differences(masks_of(second.model), masks_of(first.model)))
    assert 0 < second.model.active_connections() < sum(mask.numel() for mask in masks_of(second.model).values())
    second.close()


def test_growth_waits_for_a_save_that_still_copies_what_it_changes(tmp_path, monkeypatch, caplog):
    copy = pieces._copy_bytes
    monkeypatch.setattr(staging, "AT_ONCE", 20_000)  # the masks and the sampler's state, and not the weights
    monkeypatch.setattr(pieces, "_copy_bytes", lambda *what: (time.sleep(0.002), copy(*what)))
    cache = cache_at(tmp_path, max_checkpoints=50)
    made(cache, checkpoint_interval=4, max_iters=14).train()
    assert [r.save_reason for r in in_order(cache)].count("growth") == 3
    assert "session.staged()" not in caplog.text


class KillAt(Callback):
    """Ends the process at a step, before or after the schedule has grown what is due."""

    def __init__(self, iteration, where):
        self.iteration, self.where = iteration, where

    def before_step(self, trainer, iteration):
        if self.where == "after the growth" and iteration == self.iteration:
            trainer.session.cache.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)

    def after_step(self, trainer, iteration, loss):
        if self.where == "before the growth" and iteration == self.iteration:
            trainer.session.cache.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("where", ["before the growth", "after the growth"])
@pytest.mark.parametrize("resume", ["latest", "auto"])
def test_killed_around_a_growth_and_resumed_is_as_never_stopped(tmp_path, where, resume):
    settings = {"max_iters": 12, "checkpoint_interval": 3, "gradient_accumulation_steps": 2}
    whole = made(cache_at(tmp_path / "whole"), **settings)
    whole.train()

    def body():
        made(cache_at(tmp_path / "cut"), callbacks=[KillAt(8, where)], **settings).train()

    assert run_child(body) == -signal.SIGKILL
    cache = cache_at(tmp_path / "cut")
    assert [s.stop_reason for s in cache.sessions()] == [None]
    trainer = made(cache, resume=resume, seed=77, **settings)
    assert trainer.starting_iteration == (8 if where == "after the growth" else 6)
    trainer.train()
    assert not list(differences(state_of(trainer), state_of(whole)))
    assert not list(differences(masks_of(trainer.model), masks_of(whole.model)))


def test_the_learning_rate_follows_the_iteration_and_the_settings_in_force(tmp_path):
    rates = []

    class Note(Callback):
        def after_step(self, trainer, iteration, loss):
            rates.append({group["lr"] for group in trainer.optimizer.param_groups})

    first = {"warmup_iters": 2, "decay_iters": 20, "learning_rate": 1e-3}
    second = {"warmup_iters": 2, "decay_iters": 200, "learning_rate": 5e-3}
    made(cache_at(tmp_path), max_iters=6, callbacks=[Note()], **first).train()
    made(cache_at(tmp_path), max_iters=12, callbacks=[Note()], resume="latest", **second).train()
    expected = [learning_rate_at(i, TrainingSettings(**first)) for i in range(6)]
    expected += [learning_rate_at(i, TrainingSettings(**second)) for i in range(6, 12)]
    assert rates == [{rate} for rate in expected]
    assert cache_at(tmp_path).get("latest").learning_rate == (expected[-1], expected[-1])


def test_another_width_starts_fresh_beside_and_the_first_goes_on_from_its_own_best(tmp_path):
    def run(n_embd, max_iters, **options):
        trainer = made(cache_at(tmp_path, max_checkpoints=3), n_embd=n_embd, max_iters=max_iters, **options)
        trainer.train()
        return trainer

    run(16, 12, checkpoint_interval=2)
    cache = cache_at(tmp_path, max_checkpoints=3)
    own = cache.checkpoints()[0]
    assert len(cache.checkpoints()) == 3

    wider = run(32, 12, checkpoint_interval=2)
    assert wider.starting_iteration == 0
    first_reason, *others = [line for line in wider.session.messages if line.startswith("  ckpt_")]
    assert "n_embd: saved 16, needed 32" in first_reason
    assert [line.rpartition(": ")[2] for line in others] == ["likewise", "likewise"]
    assert len(cache.checkpoints()) == 3

    again = made(cache, n_embd=16, max_iters=20)
    assert again.resumed_from.id == own.id
    again.close()


def test_another_number_of_heads_does_not_mix_though_every_shape_is_the_same(tmp_path):
    made(cache_at(tmp_path), max_iters=3).train()
    config = NanEchoConfig(n_layer=1, n_head=4, n_embd=16, block_size=16, vocab_size=128, connection_ratio=0.4)
    other = CachedNanEchoTrainer(config, TrainingSettings(max_iters=3, device="cpu"), CORPUS, cache_at(tmp_path))
    assert other.starting_iteration == 0
    assert any("n_head: saved 2, needed 4" in line for line in other.session.messages)
    other.close()


def test_the_second_session_begins_with_the_loss_that_the_first_ended_with(tmp_path):
    first = made(cache_at(tmp_path), max_iters=20).train()
    second = made(cache_at(tmp_path), max_iters=40).train()
    assert second["first_val_loss"] == first["last_val_loss"]
    assert second["best_val_loss"] < first["best_val_loss"]
    assert 0 <= cache_at(tmp_path).best().metrics["accuracy"] <= 1


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(device):
    with pytest.raises(InvalidValue, match=r"what it has is auto, cpu"):
        pick_device(device)


def test_the_device_that_is_there_is_taken():
    assert pick_device("cpu") == "cpu"
    assert torch.device(pick_device("auto"))


# --- the learning rate at a resume ---------------------------------------------------------------

NO_WARMUP = {"warmup_iters": 0, "decay_iters": 1000}


@pytest.mark.parametrize(
    ("keeps", "rate", "said"),
    [
        (True, 2e-3, "learning_rate is 0.002, as saved; the default is 0.005 (--learning_rate changes it)"),
        (False, 5e-3, "learning_rate is 0.005, as asked; saved was 0.002"),
    ],
    ids=["kept", "asked for"],
)
def test_a_saved_learning_rate_is_kept_or_overridden_and_both_are_said(tmp_path, caplog, keeps, rate, said):
    made(cache_at(tmp_path), max_iters=5, learning_rate=2e-3, **NO_WARMUP).train()
    with caplog.at_level("INFO"):
        trainer = made(cache_at(tmp_path), max_iters=6, learning_rate=5e-3, keeps=keeps, **NO_WARMUP)
        trainer.train()
    assert said in caplog.messages
    assert not any("overrides=" in message for message in caplog.messages)
    expected = learning_rate_at(5, TrainingSettings(learning_rate=rate, **NO_WARMUP))
    assert cache_at(tmp_path).get("latest").learning_rate[0] == pytest.approx(expected)


def test_a_learning_rate_below_the_lowest_that_was_asked_for_takes_that_along(tmp_path):
    made(cache_at(tmp_path), max_iters=5, learning_rate=1e-4, **NO_WARMUP).train()
    settings = {"learning_rate": 5e-3, "min_learning_rate": 1e-3, **NO_WARMUP}
    made(cache_at(tmp_path), max_iters=6, keeps=True, **settings).train()
    assert cache_at(tmp_path).get("latest").learning_rate[0] == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("keeps", [True, False])
def test_the_schedule_is_lowered_when_training_has_diverged_twice_and_stays_so(tmp_path, keeps):
    class Explode(Callback):
        calls = 0

        def before_step(self, trainer, iteration):
            if iteration == 7 and Explode.calls < 2:
                Explode.calls += 1
                trainer.model.wte.weight.data.fill_(float("nan"))

    made(cache_at(tmp_path), max_iters=5, learning_rate=2e-3, **NO_WARMUP).train()
    options = {"learning_rate": 2e-3, "keeps": keeps, "callbacks": [Explode()], **NO_WARMUP}
    summary = made(cache_at(tmp_path), max_iters=12, **options).train()
    assert (summary["stop_reason"], summary["end_iteration"]) == ("finished", 12)
    cache = cache_at(tmp_path)
    assert [(s.start_iteration, s.stop_reason) for s in cache.sessions()] == [
        (0, "finished"),
        *[(5, "diverged")] * 2,
        (5, "finished"),
    ]
    assert cache.get("latest").learning_rate[0] == pytest.approx(2e-4, rel=1e-3)
    made(cache_at(tmp_path), max_iters=13, learning_rate=2e-3, keeps=True, resume="latest", **NO_WARMUP).train()
    assert cache_at(tmp_path).get("latest").learning_rate[0] == pytest.approx(2e-4, rel=1e-3)

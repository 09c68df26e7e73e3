"""A session that can resume from nothing and begins with the weights of another: from which, and what it says."""

import copy
import logging

import pytest
import torch
from torch import nn

from ckptcache.cache import TrainingCache
from ckptcache.errors import (
    CacheNotFound,
    CannotWarmStart,
    CheckpointDamaged,
    CheckpointMissing,
    CheckpointNotFound,
    InvalidValue,
)
from ckptcache.nanecho.model import NanEcho
from ckptcache.nanecho.settings import NanEchoConfig
from ckptcache.session import TrainingSession
from tests.caches import same
from tests.jobs import cache_at

DATA = {"kind": "text", "val_digest": "a"}


class Net(nn.Module):
    """Layers of two names each, so that what is fresh can be named by their beginning."""

    def __init__(self, depth=2, seed=0, body="body"):
        super().__init__()
        torch.manual_seed(seed)
        setattr(self, body, nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth))))
        self.head = nn.Linear(4, 2)


def objects_of(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def session_of(cache, model, *, depth=None, data=DATA, **options):
    depth = len(model.body) if depth is None and hasattr(model, "body") else depth
    options = {"model_config": {"n_layer": depth}, "data_config": data, "resume": "best", **options}
    return TrainingSession(cache, **objects_of(model), **options)


def train(cache, model=None, *, steps=2, loss=1.0, **options):
    """A session that ends with a checkpoint of that loss; the session."""
    model = Net() if model is None else model
    with session_of(cache, model, **options) as session:
        objects = session._registry.objects
        for _ in session.steps(session_iters=steps):
            objects["optimizer"].zero_grad()
            sum(p.square().sum() for p in model.parameters()).backward()
            objects["optimizer"].step()
            objects["scheduler"].step()
        session.checkpoint(val_loss=loss)
    return session


def saved_by(cache, session):
    cache.wait_until_finished()
    return next(r for r in cache.checkpoints(everything=True) if r.session == session.id)


@pytest.fixture
def cache(tmp_path):
    return cache_at(tmp_path / "cache", max_checkpoints=50)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def line(session):
    (found,) = [m for m in session.messages if m.startswith("warm start from")]
    return found


def damage(cache, record):
    path = cache.ledger.layout.checkpoint(record.id)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- what a warm start is ------------------------------------------------------------------------


def test_weights_are_taken_and_everything_else_is_fresh(cache):
    donor_model = Net()
    donor = saved_by(cache, train(cache, donor_model))
    model = Net(depth=3, seed=1)
    fresh = weights(model)
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    with session_of(cache, model, warm_start=True) as session:
        assert torch.equal(torch.get_rng_state(), drawn)
        assert (session.start_iteration, session.iteration, session.resumed_from) == (0, 0, None)
        assert session._registry.objects["optimizer"].state_dict()["state"] == {}
        assert session._registry.objects["scheduler"].last_epoch == 0
        assert torch.equal(model.body[1].weight, donor_model.body[1].weight)
        assert torch.equal(model.body[2].weight, fresh["body.2.weight"])
        assert set(session.warm_start_report.fresh) == {"model.body.2.weight", "model.body.2.bias"}
        assert line(session) == (
            f"warm start from {donor.id} (fits only in part: n_layer: saved 2, needed 3): "
            "6 of 8 tensors taken, 0 resized, 2 fresh (body.2.*)"
        )


def test_its_record_says_so_and_its_checkpoints_come_of_the_donor(cache):
    donor = saved_by(cache, train(cache, loss=0.5))
    session = train(cache, Net(depth=3), warm_start=True, loss=2.0)
    record = cache.sessions()[-1]
    assert (record.parent, record.warm_start, record.start_iteration, record.end_iteration) == (donor.id, True, 0, 2)
    saved = saved_by(cache, session)
    assert (saved.parents, saved.iteration) == ((donor.id,), 2)
    # The donor's loss was another model's: the first evaluation sets the baseline.
    assert (record.first_val_loss, record.best_val_loss, record.best_checkpoint) == (2.0, 2.0, saved.id)
    assert (session.summary()["parent"], session.summary()["resumed_from"]) == (donor.id, None)


def test_the_first_evaluation_is_not_the_donors_loss(cache):
    donor = saved_by(cache, train(cache, loss=0.5))
    with session_of(cache, Net(depth=3), warm_start=True) as session:
        session.evaluated(0.9)
        assert session.record.best_checkpoint is None
    with session_of(cache, Net(depth=4), warm_start=donor.id) as session:
        for _ in session.steps(2):
            pass
        record = session.checkpoint()
        assert (record.last_val_loss, record.parents) == (None, (donor.id,))
        session.evaluated(0.1)
    assert session.record.best_checkpoint is None


def test_what_can_be_resumed_from_is_resumed_from(cache):
    train(cache, Net(depth=3))
    train(cache, Net(depth=2))
    session = train(cache, Net(depth=3), warm_start=True)
    assert session.resumed_from is not None
    assert session.warm_start_report is None
    assert not session.record.warm_start


def test_that_a_checkpoint_named_for_its_weights_was_not_needed_is_said(cache):
    donor = saved_by(cache, train(cache, Net(depth=2)))
    train(cache, Net(depth=3))
    with session_of(cache, Net(depth=3), warm_start=donor.id) as session:
        assert any(
            m.startswith(f"no weights are taken from {donor.id}: there is a checkpoint") for m in session.messages
        )
    with session_of(cache, Net(depth=3), warm_start=True) as session:
        assert not any("weights" in m for m in session.messages)


def test_a_session_that_took_weights_did_not_go_on_from_the_donor(cache):
    train(cache, Net(depth=2))
    train(cache, Net(depth=3), warm_start=True)
    session = train(cache, Net(depth=2))
    assert session.resumed_from is not None
    assert not session.record.reseeded


def test_a_fresh_start_that_is_asked_for_can_have_weights(cache):
    model = Net()
    donor = saved_by(cache, train(cache, model))
    after = weights(model)
    model = Net(seed=1)
    with session_of(cache, model, resume="never", warm_start=donor.id) as session:
        assert session.start_iteration == 0
        assert same(weights(model), after)
    with session_of(cache, Net(seed=1), resume="never", warm_start=True) as session:
        assert line(session).startswith(f"warm start from {donor.id} (fits): 6 of 6 tensors taken")


# --- which one -----------------------------------------------------------------------------------


def test_other_data_come_first_then_what_gives_most_then_what_is_best(cache):
    other_data = saved_by(cache, train(cache, Net(depth=4), data={"kind": "code"}, loss=9.0))
    most = saved_by(cache, train(cache, Net(depth=3), loss=5.0))
    least = [saved_by(cache, train(cache, Net(depth=1), loss=loss, resume="never")) for loss in (3.0, 2.0)]
    saved_by(cache, train(cache, Net(depth=4, body="trunk"), depth=9, loss=float("nan")))
    for expected in (other_data, most, least[1], least[0]):
        model = Net(depth=4, seed=1)
        with session_of(cache, model, warm_start=True) as session:
            assert line(session).startswith(f"warm start from {expected.id} ")
            assert not any("is passed over" in m for m in session.messages)  # a file that is gone isn't tried
        session_kept = [s for s in cache.sessions() if s.id == session.id]
        assert session_kept[0].parent == expected.id
        cache.ledger.layout.checkpoint(expected.id).unlink()


def test_a_damaged_donor_is_passed_over_loudly_and_goes_to_quarantine(cache, caplog):
    first = saved_by(cache, train(cache, Net(depth=3)))
    second = saved_by(cache, train(cache, Net(depth=1)))
    damage(cache, first)
    with caplog.at_level(logging.WARNING, "ckptcache"), session_of(cache, Net(depth=4), warm_start=True) as session:
        assert line(session).startswith(f"warm start from {second.id} ")
        assert any(m.startswith(f"{first.id} is passed over") for m in session.messages)
    assert [r.message for r in caplog.records if first.id in r.message and r.levelno == logging.WARNING] != []
    assert cache.get(first.id).decision == "quarantined"


def test_without_any_that_can_be_used_it_starts_fresh_and_says_so(cache):
    model = Net(depth=3, seed=1)
    fresh = weights(model)
    with session_of(cache, model, warm_start=True) as session:
        assert "no checkpoint can give this run its weights" in session.messages
    assert same(weights(model), fresh)
    assert (session.record.warm_start, session.record.parent, session.warm_start_report) == (False, None, None)


def test_a_diverged_one_gives_nothing_unless_it_is_named(cache):
    diverged = saved_by(cache, train(cache, Net(), loss=float("nan")))
    with session_of(cache, Net(depth=3), warm_start=True) as session:
        assert session.warm_start_report is None
    with session_of(cache, Net(depth=3), warm_start=diverged.id) as session:
        assert any("has diverged" in m for m in session.messages)
        assert session.record.parent == diverged.id


def test_names_ids_and_their_beginnings_are_understood(cache):
    donor = saved_by(cache, train(cache))
    cache.name(donor.id, "good")
    for wanted in (donor.id, donor.id[:-1], "good", "latest", f"{cache.cache_dir}:good"):
        with session_of(cache, Net(depth=3), warm_start=wanted) as session:
            assert session.record.parent == donor.id
        session.cache.forget_session(session.id)


def test_a_checkpoint_of_another_cache_gives_weights_and_that_cache_is_left_as_it_is(cache, tmp_path):
    there = cache_at(tmp_path / "there")
    donor_model = Net()
    donor = saved_by(there, train(there, donor_model))
    there.close()
    before = {p: p.read_bytes() for p in there.cache_dir.rglob("*") if p.is_file()}
    model = Net(depth=3, seed=1)
    with session_of(cache, model, warm_start=f"{there.cache_dir}:{donor.id}") as session:
        assert line(session).startswith(f"warm start from {there.cache_dir}:{donor.id} (fits only in part")
    assert torch.equal(model.body[1].weight, donor_model.body[1].weight)
    assert (session.record.parent, session.record.warm_start) == (None, True)
    assert {p: p.read_bytes() for p in there.cache_dir.rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_of_another_cache_is_an_error_and_stays_where_it_is(cache, tmp_path):
    there = cache_at(tmp_path / "there")
    donor = saved_by(there, train(there))
    damage(there, donor)
    with pytest.raises(CheckpointDamaged), session_of(cache, Net(3), warm_start=f"{there.cache_dir}:{donor.id}"):
        pass
    assert there.ledger.layout.checkpoint(donor.id).exists()
    assert there.get(donor.id).decision is None


def test_where_only_the_optimizer_differs_all_weights_are_taken(cache):
    donor = saved_by(cache, train(cache))
    model = Net(seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"model_config": {"n_layer": 2}, "data_config": DATA, "warm_start": True}
    with TrainingSession(cache, model=model, optimizer=optimizer, **options) as session:
        said = f"warm start from {donor.id} (fits, but for the optimizer): 6 of 6 tensors taken, 0 resized, 0 fresh"
        assert line(session) == said


# --- what is wrong is named ----------------------------------------------------------------------


def test_an_evicted_donor_a_damaged_one_and_one_that_never_was(cache, tmp_path):
    donor = saved_by(cache, train(cache))
    with pytest.raises(CheckpointNotFound, match="ckpt_none"), session_of(cache, Net(3), warm_start="ckpt_none"):
        pass
    with (
        pytest.raises(CacheNotFound, match="nowhere"),
        session_of(cache, Net(3), warm_start=f"{tmp_path}/nowhere:best"),
    ):
        pass
    damage(cache, donor)
    with pytest.raises(CheckpointDamaged), session_of(cache, Net(3), warm_start=donor.id):
        pass
    with pytest.raises(CheckpointMissing, match="differs"), session_of(cache, Net(3), warm_start=donor.id):
        pass
    gone = saved_by(cache, train(cache, Net(1)))
    saved_by(cache, train(cache, Net(1), loss=0.1))
    TrainingCache(cache.cache_dir, max_checkpoints=1).prune()
    with pytest.raises(CheckpointMissing, match="its file isn't"), session_of(cache, Net(3), warm_start=gone.id):
        pass
    assert not any(s.warm_start for s in cache.sessions())
    assert not cache.ledger.live_sessions(cache.view().index)


def test_nothing_in_common_is_an_error_with_the_closest_names(cache):
    donor = saved_by(cache, train(cache, Net(body="trunk"), depth=2))
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4))})
    with pytest.raises(CannotWarmStart, match=r"'trunk.0.weight' for 'body.0.weight'.*\(key_map"):
        session_of(cache, model, depth=1, warm_start=donor.id).__enter__()


@pytest.mark.parametrize("wanted", ["", 3, ["x"]])
def test_what_is_no_wish_is_refused(cache, wanted):
    with pytest.raises(InvalidValue, match="warm_start cannot be"):
        session_of(cache, Net(), warm_start=wanted)


def test_a_key_map_needs_a_warm_start_and_must_be_one(cache):
    with pytest.raises(InvalidValue, match="set warm_start too"):
        session_of(cache, Net(), key_map={"a": "b"})
    with pytest.raises(InvalidValue, match="key_map cannot be"):
        session_of(cache, Net(), key_map=["a"], warm_start=True)


def test_a_key_map_finds_donors_that_fit_by_no_name(cache, caplog):
    donor_model = Net(body="trunk")
    donor = saved_by(cache, train(cache, donor_model, depth=2))
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    with session_of(cache, model, depth=2, warm_start=True) as session:
        assert session.warm_start_report is None
    key_map = {"trunk.": "body.", "hed.": None}
    with session_of(cache, model, depth=2, warm_start=True, key_map=key_map) as session:
        assert line(session).startswith(f"warm start from {donor.id} (fits only in part")
    assert torch.equal(model["body"][1].weight, donor_model.trunk[1].weight)
    assert "key_map: no saved name is 'hed.', or begins with it" in caplog.messages


def test_a_key_map_that_reads_two_names_as_one_is_refused_or_passed_over(cache):
    donor = saved_by(cache, train(cache))
    key_map = {"body.0": "body.1"}
    with pytest.raises(InvalidValue, match=r"'body.0.weight' and 'body.1.weight'"):
        session_of(cache, Net(3), warm_start=donor.id, key_map=key_map).__enter__()
    with session_of(cache, Net(3), warm_start=True, key_map=key_map) as session:
        assert any("'body.0.weight' and 'body.1.weight'" in m for m in session.messages)


def test_a_folder_without_an_id_is_no_checkpoint(cache, tmp_path):
    for wanted in (str(cache.cache_dir), "runs/cache"):
        with pytest.raises(InvalidValue, match="it names a folder and no checkpoint: write DIR:ID"):
            session_of(cache, Net(), warm_start=wanted).__enter__()


# --- what is said without it ---------------------------------------------------------------------


def test_a_fresh_start_says_how_many_could_have_given_weights(cache):
    train(cache, Net(1))
    train(cache, Net(2))
    with session_of(cache, Net(3)) as session:
        assert any("2 checkpoints could give a warm start" in m and "warm_start=True" in m for m in session.messages)
    with session_of(cache, Net(3), resume="never") as session:
        assert not any("warm start" in m for m in session.messages)
    other = nn.ModuleDict({"x": nn.Linear(7, 7)})
    with session_of(cache, other, depth=3) as session:
        assert not any("warm start" in m for m in session.messages)


# --- models that grow, and other precisions ------------------------------------------------------

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 11, "block_size": 4}


def echo(dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    return NanEcho(NanEchoConfig(**{**SMALL, **changes})).to(dtype)


@pytest.mark.parametrize("changes", [{"n_layer": 4}, {"n_embd": 16, "n_head": 4}, {"vocab_size": 20, "block_size": 9}])
def test_a_larger_nanecho_begins_as_the_smaller_one(cache, changes):
    donor = echo()
    cache.save({"model": donor}, iteration=3, val_loss=1.0, model_config=donor.config, data_config=DATA)
    model = echo(seed=1, **changes)
    with TrainingSession(cache, model=model, model_config=model.config, data_config=DATA, warm_start=True) as session:
        assert session.warm_start_report is not None
    idx = torch.randint(11, (3, 4))
    logits = model.eval()(idx)[0][..., :11]
    assert torch.allclose(logits, donor.eval()(idx)[0], atol=1e-5)


def test_of_two_that_grow_the_one_that_gives_more_is_taken(cache):
    for n_embd, loss in ((4, 0.1), (12, 3.0), (8, 2.0)):
        donor = echo(n_embd=n_embd)
        cache.save({"model": donor}, iteration=n_embd, val_loss=loss, model_config=donor.config)
    model = echo(n_embd=16)
    with TrainingSession(cache, model=model, model_config=model.config, warm_start=True) as session:
        assert cache.get(session.record.parent).iteration == 12


def test_a_donor_in_another_precision_is_cast_and_said(cache):
    donor = echo(torch.bfloat16)
    cache.save({"model": donor}, iteration=3, val_loss=1.0, model_config=donor.config)
    model = echo(seed=1, n_layer=3)
    with TrainingSession(cache, model=model, model_config=model.config, warm_start=True) as session:
        assert any("saved as bfloat16, and are float32 now" in m for m in session.messages)
    assert torch.equal(model.wte.weight, donor.wte.weight.float())


def test_a_compiled_model_gets_the_weights_of_a_plain_one_and_grows(cache):
    donor = echo()
    cache.save({"model": donor}, iteration=3, val_loss=1.0, model_config=donor.config)
    inner = echo(seed=1, n_layer=3)
    model = torch.compile(inner, backend="eager")
    with TrainingSession(cache, model=model, model_config=inner.config, warm_start=True):
        assert torch.equal(inner.wte.weight, donor.wte.weight)
        assert not inner.blocks[2].mlp.proj.weight.any()


def test_a_model_in_ddp_gets_the_weights_of_a_plain_one_and_grows(cache):
    donor = echo()
    cache.save({"model": donor}, iteration=3, val_loss=1.0, model_config=donor.config)
    inner = echo(seed=1, n_layer=3)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(inner)
        with TrainingSession(cache, model=model, model_config=inner.config, warm_start=True) as session:
            assert line(session).endswith("fresh (blocks.2.*)")
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(inner.wte.weight, donor.wte.weight)
    assert not inner.blocks[2].mlp.proj.weight.any()


def test_a_save_that_is_under_way_holds_what_was_before(cache):
    model = Net(depth=3, seed=1)
    train(cache, Net())
    before = copy.deepcopy(weights(model))
    optimizer = torch.optim.AdamW(model.parameters())
    record = cache.save({"model": model, "optimizer": optimizer}, iteration=7, blocking=False)
    with session_of(cache, model, resume="never", warm_start=True):
        pass
    assert same(cache.load(record.id)["model"], before)

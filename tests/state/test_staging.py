"""Staging by itself: what is copied when, who waits for whom, and how a change that was not announced is found."""

import threading
import time
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ckptcache.state import pieces, staging
from ckptcache.state.capture import capture
from ckptcache.state.staging import Staging, TakenAgain, changed_by_steps_only
from ckptcache.storage import ptplan
from tests.faults import run_child


@pytest.fixture(autouse=True)
def _small_counts(monkeypatch):
    """So that small tensors are staged as large ones are."""
    monkeypatch.setattr(staging, "AT_ONCE", 2000)
    yield
    left, _ = list(staging._unsettled), staging._unsettled.clear()  # one test's fault must not make others wait
    assert not left


def trained(**options):
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()


def staged(objects):
    return Staging(capture(objects).state, objects)


def copied(found):
    """What a staging makes of the file, by the copy in an image."""
    plan = ptplan.plan(found.state)
    image = bytearray(plan.size)
    found.copy_into(memoryview(image), plan.between, plan.storages)
    return bytes(image)


def live_bytes(objects):
    return b"".join(ptplan.blocks(ptplan.plan(capture(objects).state)))


def in_thread(body):
    thread = threading.Thread(target=body)
    thread.start()
    return thread


# --- what is copied when -------------------------------------------------------------------------


def keys(tensors):
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def test_parameters_and_the_optimizers_tensors_may_wait_and_buffers_may_not():
    model, optimizer = trained()
    may_wait = changed_by_steps_only({"nested": [{"model": model}], "optimizer": optimizer})
    moments = [t for state in optimizer.state.values() for t in state.values()]
    assert may_wait == keys([*model.parameters(), *moments])
    assert not may_wait & keys(model.buffers())


def test_without_an_optimizer_nothing_may_wait():
    model, _ = trained()
    assert changed_by_steps_only({"model": model}) == set()


def test_frozen_parameters_wait_beside_trained_ones_and_an_average_of_the_model_does_not():
    model, _ = trained()
    model[0].bias.requires_grad_(False)
    average = torch.optim.swa_utils.AveragedModel(model)
    trains_weight_only = torch.optim.SGD([model[0].weight])
    may_wait = changed_by_steps_only({"model": model, "ema": average, "optimizer": trains_weight_only})
    assert may_wait == keys(model.parameters())


def test_a_parameter_that_shares_its_memory_with_a_buffer_may_not_wait():
    model, optimizer = trained()
    model.register_buffer("view", model[0].weight.detach()[0])
    may_wait = changed_by_steps_only({"model": model, "optimizer": optimizer})
    assert not may_wait & keys([model[0].weight])
    assert may_wait >= keys([model[0].bias])


def test_a_small_state_is_copied_at_once_whole_and_nobody_waits():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = staged({"model": model, "optimizer": optimizer})
    assert found.is_settled
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(found.state["model"]["weight"], before)


def test_what_is_anybodys_to_change_and_large_has_to_be_copied_before_the_call_returns():
    assert staged_and_ended({"w": torch.ones(10_000)}).must_settle_at_once
    model, optimizer = trained()
    assert not staged_and_ended({"model": model, "optimizer": optimizer}).must_settle_at_once


def staged_and_ended(objects):
    found = staged(objects)
    found.end()
    return found


def test_a_tensor_in_a_set_is_copied_as_one_in_a_list_is():
    average = torch.rand(50)
    before = average.clone()
    found = staged({"seen": {average}})
    average.zero_()
    assert torch.equal(next(iter(found.state["seen"])), before)


def test_views_ties_and_odd_tensors_stay_what_they_are_in_the_copy():
    base = torch.arange(12.0)
    odd = torch.complex(torch.ones(3), torch.ones(3))
    state = {
        "base": base,
        "view": base[2:8].view(2, 3).t(),
        "tied": base,
        "empty": torch.empty(0, 3),
        "conj": odd.conj(),
        "neg": torch.complex(torch.zeros(3), torch.ones(3)).conj().imag,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "bits": torch.tensor([True, False]),
        "byte": torch.ones(2).to(torch.float8_e4m3fn),
        "sparse": torch.eye(3).to_sparse(),
        "list": [torch.zeros(2), (1, "x")],
    }
    state = capture(state).state
    copy = staged(state).state
    assert b"".join(ptplan.blocks(ptplan.plan(copy))) == b"".join(ptplan.blocks(ptplan.plan(state)))
    assert copy["view"].untyped_storage()._cdata == copy["tied"].untyped_storage()._cdata
    base.zero_()
    odd.zero_()
    state["sparse"].values().zero_()
    assert copy["view"].flatten().sum() == sum(range(2, 8))
    assert (copy["conj"].imag.tolist(), copy["neg"].tolist()) == ([-1.0] * 3, [-1.0] * 3)
    assert copy["sparse"].to_dense().trace() == 3


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors_are_copied_at_once():
    tensor = torch.quantize_per_tensor(torch.arange(4.0), 0.5, 0, torch.qint8)
    copy = staged({"q": tensor, "large": torch.ones(3000)})
    copy.end()
    assert torch.equal(copy.state["q"].int_repr(), tensor.int_repr())
    assert copy.state["q"].data_ptr() != tensor.data_ptr()


def test_tensors_of_inference_have_no_versions_and_are_copied_all_the_same():
    with torch.inference_mode():
        weight = torch.ones(3000)
    found = staged({"w": weight})
    assert copied(found) == live_bytes({"w": weight})
    found.confirm()


# --- who waits for whom --------------------------------------------------------------------------


def optimizers(parameters):
    class Own(torch.optim.Optimizer):
        def step(self, closure=None):
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.sub_(parameter.grad)

    yield Own(parameters, {})
    yield torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for how in ({"foreach": True}, {"foreach": False}, {"fused": True}):
        yield torch.optim.AdamW(parameters, lr=0.1, **how)


def test_the_step_of_any_optimizer_waits_until_all_is_copied():
    for number in range(5):
        model = nn.Linear(64, 64)
        optimizer = list(optimizers(list(model.parameters())))[number]
        model(torch.randn(2, 64)).sum().backward()
        optimizer.step()
        objects = {"model": model, "optimizer": optimizer}
        expected, found = live_bytes(objects), staged(objects)
        stepping = in_thread(optimizer.step)
        time.sleep(0.02)
        assert stepping.is_alive()
        assert copied(found) == expected
        stepping.join()
        found.confirm()
        assert live_bytes(objects) != expected


def test_a_step_that_waits_helps_and_an_optimizer_of_others_waits_too(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 4096)
    helpers, do = set(), pieces.Work._do
    monkeypatch.setattr(
        pieces.Work, "_do", lambda *a: (helpers.add(threading.current_thread()), time.sleep(0.005), do(*a))
    )
    model, optimizer = trained()
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    found = staged({"model": model, "optimizer": optimizer})
    stepping = in_thread(other.step)
    copied(found)
    stepping.join()
    assert helpers == {threading.current_thread(), stepping}
    found.confirm()


def test_nobody_waits_for_a_copy_that_came_to_nothing():
    model, optimizer = trained()
    found = staged({"model": model, "optimizer": optimizer})
    stepping = in_thread(optimizer.step)
    found.end()
    stepping.join(20)
    assert not stepping.is_alive()


def test_a_copy_that_fails_ends_in_its_thread_and_lets_the_step_go():
    model, optimizer = trained()
    found = staged({"model": model, "optimizer": optimizer})
    plan = ptplan.plan(found.state)
    model[0].weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="resized"):
        found.copy_into(memoryview(bytearray(plan.size)), plan.between, plan.storages)
    found.end()
    found.settle()


def test_a_tensor_whose_memory_went_before_its_turn_came_fails_the_copy_and_not_the_process():
    def body():
        state = {"w": torch.ones(5000)}
        plan = ptplan.plan(state)
        (piece,) = pieces.pieces(memoryview(bytearray(plan.size)), plan.storages)
        state["w"].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="resized"):
            piece()

    assert run_child(body) == 0


def test_the_tensors_can_still_be_resized_afterwards():
    objects = {"w": torch.ones(5000)}
    found = staged(objects)
    copied(found)
    found.confirm()
    objects["w"].untyped_storage().resize_(10)


def test_a_forked_child_waits_for_nobody():
    model, optimizer = trained()
    found = staged({"model": model, "optimizer": optimizer})
    # Not the model's own: the threads of its kernels are the parent's.
    tiny = torch.optim.SGD(nn.Linear(1, 1).parameters())
    assert run_child(tiny.step) == 0
    assert not found.is_settled
    found.end()


@pytest.mark.parametrize("fails", [False, True])
def test_the_streams_beside_the_training_are_waited_for_even_after_an_error(monkeypatch, fails):
    """The memory that is being copied may be anybody's afterwards."""
    waited = []

    class Stream:
        def synchronize(self):
            waited.append(self)

    monkeypatch.setattr(pieces.torch.cuda, "stream", lambda stream: nullcontext())
    streams = [Stream(), Stream()]
    with pytest.raises(RuntimeError) if fails else nullcontext(), pieces.beside(streams):
        if fails:
            raise RuntimeError
    assert waited == streams


# --- changes that nobody announced ---------------------------------------------------------------


def test_a_change_after_settling_is_no_change_of_what_was_saved():
    model, optimizer = trained()
    objects = {"model": model, "optimizer": optimizer}
    expected, found, images = live_bytes(objects), staged(objects), []
    copying = in_thread(lambda: images.append(copied(found)))
    found.settle()
    with torch.no_grad():
        model[0].weight.clamp_(-0.01, 0.01)
    copying.join()
    found.confirm()
    assert images == [expected]


@pytest.mark.parametrize("of_optimizer", [False, True])
def test_a_change_that_nobody_announced_is_found_and_the_state_is_read_again_while_all_stands_still(
    caplog, of_optimizer
):
    model, optimizer = trained()
    objects = {"model": model, "optimizer": optimizer}
    found, again = staged(objects), []
    copied(found)
    tensor = optimizer.state[model[0].weight]["exp_avg"] if of_optimizer else model[0].weight
    with torch.no_grad():
        tensor.mul_(2)
    with pytest.raises(TakenAgain):
        found.confirm()

    def read_again():
        with found.held_still():
            time.sleep(0.02)
            again.append(live_bytes(objects))

    reading, expected = in_thread(read_again), live_bytes(objects)
    optimizer.step()
    assert again == [expected] != [live_bytes(objects)]
    reading.join()
    assert "session.staged()" in caplog.text
    with pytest.raises(TakenAgain):
        found.raise_if_changed()


def test_the_state_is_read_again_at_once_where_the_thread_that_changes_it_is_no_more():
    model, optimizer = trained()
    made = []
    in_thread(lambda: made.append(staged({"model": model, "optimizer": optimizer}))).join()
    (found,) = made
    copied(found)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(TakenAgain):
        found.confirm()
    with found.held_still():
        pass
    assert found.is_settled


def test_two_that_wait_at_once_both_wait_until_a_changed_state_was_read_again():
    model, optimizer = trained()
    found = staged({"model": model, "optimizer": optimizer})
    waiting = [in_thread(found.settle) for _ in range(2)]
    time.sleep(0.05)
    with torch.no_grad():
        model[0].weight.mul_(2)
    copied(found)
    time.sleep(0.1)
    assert [thread.is_alive() for thread in waiting] == [True, True]
    with pytest.raises(TakenAgain):
        found.confirm()
    found.end()
    for thread in waiting:
        thread.join()


def test_other_threads_steps_wait_too_while_a_changed_state_is_read_again():
    model, optimizer = trained()
    found = staged({"model": model, "optimizer": optimizer})
    copied(found)
    with torch.no_grad():
        model[0].weight.mul_(2)
    first = in_thread(found.settle)
    while not found.is_settled:
        time.sleep(0.01)
    stepping = in_thread(torch.optim.SGD(nn.Linear(1, 1).parameters()).step)
    time.sleep(0.05)
    assert stepping.is_alive()
    found.end()
    first.join()
    stepping.join()


def test_a_state_that_another_thread_changes_while_it_is_read_again_is_read_once_more():
    model, optimizer = trained()
    found, reads = staged({"model": model, "optimizer": optimizer}), []

    def read(changes):
        reads.append(model[0].weight.detach().clone())
        if len(reads) <= changes:
            with torch.no_grad():
                model[0].weight.mul_(2)
        return len(reads)

    assert found.read_unchanged(lambda: read(1)) == 2
    with pytest.raises(RuntimeError, match="the one that trains"):
        found.read_unchanged(lambda: read(10))
    found.end()


# --- interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, TimeoutError])
def test_who_is_interrupted_while_it_helps_hears_of_it_and_the_copy_is_whole(monkeypatch, interruption):
    """As by a signal's handler, which may raise in the middle of a piece, and as a rule does."""
    model, optimizer = trained()
    objects = {"model": model, "optimizer": optimizer}
    monkeypatch.setattr(pieces, "PIECE", 4096)
    expected, found, images, copy_bytes = live_bytes(objects), staged(objects), [], pieces._copy_bytes
    saving, raised = threading.Event(), threading.Event()

    def interrupted(*what):
        if threading.current_thread() is not threading.main_thread():
            saving.wait(20)
        elif not raised.is_set():
            raised.set()
            saving.set()
            raise interruption
        copy_bytes(*what)

    monkeypatch.setattr(pieces, "_copy_bytes", interrupted)
    copying = in_thread(lambda: images.append(copied(found)))
    with pytest.raises(interruption):
        optimizer.step()
    copying.join(20)
    assert images == [expected]
    found.confirm()


# --- compiled ------------------------------------------------------------------------------------


def test_a_compiled_step_of_an_optimizer_waits_and_none_of_the_copying_is_compiled(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 4096)
    do = pieces.Work._do
    monkeypatch.setattr(pieces.Work, "_do", lambda *a: (time.sleep(0.005), do(*a)))
    model, optimizer = trained()
    objects, step_compiled = {"model": model, "optimizer": optimizer}, torch.compile(optimizer.step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        for _ in range(2):
            expected, found, images = live_bytes(objects), staged(objects), []
            copying = in_thread(lambda found=found, images=images: images.append(copied(found)))
            step_compiled()
            copying.join()
            found.confirm()
            assert images == [expected] != [live_bytes(objects)]

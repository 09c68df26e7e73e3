import copy

import pytest
import torch
from torch import nn

from ckptcache.errors import CannotWarmStart, InvalidValue, NotRestorable
from ckptcache.state.capture import capture
from ckptcache.state.warmstart import growth_of, modules_in, warm_start
from tests.caches import Tied, same

ID = "ckpt_donor"


class Net(nn.Module):
    """Two parts that are told apart by their names."""

    def __init__(self, width=4, depth=2, seed=0, body="encoder"):
        super().__init__()
        torch.manual_seed(seed)
        setattr(self, body, nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 2)


class Growing(nn.Module):
    """Says how a smaller one grows into it: what was there, and zeros."""

    def __init__(self, width, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.w = nn.Parameter(torch.randn(width))
        self.asked = []

    def grown_state_dict(self, donor_state, donor_config):
        self.asked.append((dict(donor_state), donor_config))
        grown = torch.zeros_like(self.w)
        grown[: len(donor_state["w"])] = donor_state["w"]
        return {"w": grown}


def saved(**objects):
    return copy.deepcopy(capture(objects).state)


def names(module):
    return {name for name, _ in module.state_dict().items()}


def give(state, key_map=None, config=None, **objects):
    return warm_start(objects, state, id=ID, donor_config=config, key_map=key_map)


# --- what fits -----------------------------------------------------------------------------------


def test_what_agrees_in_name_and_shape_is_taken_and_the_rest_is_as_the_program_made_it():
    donor, net = Net(depth=2), Net(depth=3, seed=1)
    fresh = copy.deepcopy(net.state_dict())
    report = give(saved(model=donor), model=net)
    assert report.counts == "11 of 13 tensors taken, 0 resized, 2 fresh (encoder.2.*)"
    assert set(report.fresh) == {"model.encoder.2.weight", "model.encoder.2.bias"}
    for name, tensor in net.state_dict().items():
        source = donor.state_dict() if not name.startswith("encoder.2") else fresh
        assert torch.equal(tensor, source[name]), name


def test_another_shape_stays_fresh_and_what_is_not_needed_is_unused():
    donor, net = Net(depth=3), Net(depth=1, seed=1)
    net.head = nn.Linear(4, 5)
    report = give(saved(model=donor), model=net)
    assert set(report.fresh) == {"model.head.weight", "model.head.bias"}
    assert {n for n in report.unused if "encoder" in n} == {
        f"model.encoder.{i}.{p}" for i in (1, 2) for p in ("weight", "bias")
    }
    assert set(report.unused) > {"model.head.weight"}


def test_nothing_but_modules_changes():
    def made(seed):
        net = Net(seed=seed)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1 + seed)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        net.head(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        scheduler.step()
        return {"model": net, "optimizer": optimizer, "scheduler": scheduler, "plain": {"n": seed}, "t": torch.ones(2)}

    donor, objects = made(1), made(2)
    before = copy.deepcopy({n: v.state_dict() for n, v in objects.items() if n in ("optimizer", "scheduler")})
    generator = torch.get_rng_state()
    report = warm_start(objects, saved(**donor), id=ID)
    assert same({n: objects[n].state_dict() for n in before}, before)
    assert objects["plain"] == {"n": 2}
    assert torch.equal(torch.get_rng_state(), generator)
    assert report.fresh == ()
    assert same(dict(objects["model"].state_dict()), dict(donor["model"].state_dict()))


def test_several_modules_each_get_what_was_saved_under_their_name():
    donors = {"one": Net(seed=1), "nets": {"two": Net(seed=2), "all": [Net(seed=3)]}}
    objects = {"one": Net(seed=4), "nets": {"two": Net(seed=5), "all": [Net(seed=6)], "new": Net(seed=7)}}
    report = warm_start(objects, saved(**donors), id=ID)
    assert list(modules_in(objects)) == ["one", "nets.two", "nets.all.0", "nets.new"]
    assert torch.equal(objects["nets"]["all"][0].head.weight, donors["nets"]["all"][0].head.weight)
    assert torch.equal(objects["nets"]["two"].head.weight, donors["nets"]["two"].head.weight)
    assert report.counts.endswith("11 fresh (nets.new.*)")


def test_a_tensor_with_two_names_of_which_one_was_saved_keeps_what_was_saved():
    donor, net = Tied(), Tied()
    nn.init.normal_(net.embed.weight)
    state = {"model": {"embed.weight": donor.embed.weight.detach().clone()}}
    report = give(state, model=net)
    assert torch.equal(net.embed.weight, donor.embed.weight)
    assert set(report.taken) == {"model.embed.weight", "model.head.weight"}


# --- other names, wrappers and dtypes ------------------------------------------------------------


def test_names_are_read_as_the_key_map_says():
    donor, net = Net(), Net(seed=1, body="backbone")
    report = give(saved(model=donor), {"encoder.": "backbone.", "head": None}, model=net)
    assert torch.equal(net.backbone[0].weight, donor.encoder[0].weight)
    assert set(report.fresh) == {"model.head.weight", "model.head.bias"}
    assert set(report.unused) == {"model.head.weight", "model.head.bias"}


def test_an_entry_of_the_key_map_that_means_nothing_is_told():
    report = give(saved(model=Net()), {"encodr.": "backbone."}, model=Net(seed=1))
    assert report.idle == ("encodr.",)


def test_a_key_map_that_leads_nowhere_is_told():
    report = give(saved(model=Net()), {"encoder.": "backbone"}, model=Net(seed=1, body="backbone"))
    assert report.astray["encoder.0.weight"] == "backbone0.weight"
    [line] = [line for line in report.lines if line.startswith("key_map")]
    assert "saved names are read as such that the model hasn't: 'encoder.0." in line
    assert "as 'backbone0." in line
    assert give(saved(model=Net()), {"encoder.": "backbone."}, model=Net(seed=1, body="backbone")).astray == {}


def test_a_key_map_that_reads_two_names_as_one_is_refused_and_nothing_changes():
    net = Net(seed=1)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InvalidValue, match=r"would both become 'encoder.0.weight'"):
        give(saved(model=Net()), {"encoder.1.weight": "encoder.0.weight"}, model=net)
    assert same(dict(net.state_dict()), dict(before))


def compiled(module):
    return torch.compile(module, backend="eager")


class Wrapped(nn.Module):
    """Names as DDP gives them."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [compiled, Wrapped, lambda m: Wrapped(compiled(m)), lambda m: m])
@pytest.mark.parametrize("wrap_donor", [compiled, Wrapped, lambda m: m])
def test_compiled_and_wrapped_models_have_the_same_names(wrap, wrap_donor):
    donor, net = Net(), Net(depth=3, seed=1)
    report = give(saved(model=wrap_donor(donor)), model=wrap(net))
    assert report.counts == "11 of 13 tensors taken, 0 resized, 2 fresh (encoder.2.*)"
    assert torch.equal(net.encoder[1].weight, donor.encoder[1].weight)


@pytest.mark.parametrize(("was", "now"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float16)])
def test_another_precision_is_cast_and_said(was, now):
    donor, net = Net().to(was), Net(seed=1).to(now)
    report = give(saved(model=donor), model=net)
    assert net.head.weight.dtype == now
    assert torch.equal(net.head.weight, donor.head.weight.to(now))
    assert report.cast["model.head.weight"] == (str(was).removeprefix("torch."), str(now).removeprefix("torch."))
    assert "model.norm.num_batches_tracked" not in report.cast
    assert f"saved as {report.cast['model.head.weight'][0]}" in report.lines[0]


def test_whole_numbers_are_not_taken_for_weights():
    net = nn.Linear(2, 2)
    state = {"model": {"weight": torch.ones(2, 2, dtype=torch.int64), "bias": torch.ones(2)}}
    assert give(state, model=net).fresh == ("model.weight",)


# --- models that say how they grow ---------------------------------------------------------------


@pytest.mark.parametrize("wrap", [Wrapped, compiled, lambda m: m])
def test_a_model_says_itself_how_it_grows(wrap):
    donor, net = Growing(2), Growing(5, seed=1)
    report = give(saved(model=Wrapped(donor)), config={"width": 2}, model=wrap(net))
    ((state, config),) = net.asked
    assert (list(state), config) == (["w"], {"width": 2})
    assert torch.equal(net.w, torch.cat((donor.w, torch.zeros(3))))
    assert report.resized == {"model.w": ((2,), (5,))}
    assert report.counts == "0 of 1 tensors taken, 1 resized (w [2] -> [5]), 0 fresh"
    assert growth_of(Net()) is None


def test_an_average_of_a_model_that_grows_keeps_its_count_and_is_not_begun_anew():
    small = torch.optim.swa_utils.AveragedModel(Growing(2, seed=1))
    small.n_averaged.fill_(7)
    model = Growing(3)
    average = torch.optim.swa_utils.AveragedModel(model)
    report = warm_start({"ema": average}, saved(ema=small), id="c")
    assert (report.taken, tuple(report.resized), report.unused) == (("ema.n_averaged",), ("ema.w",), ())
    average.update_parameters(model)  # which would copy the model, if it were the first
    assert average.n_averaged == 8
    assert not torch.equal(average.module.w, model.w)


def test_it_is_asked_under_the_names_that_the_key_map_gives():
    net = Growing(3)
    give({"model": {"old.w": torch.ones(2)}}, {"old.": ""}, model=net)
    assert net.w.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"w": torch.zeros(2)}, r"gives float32\[2\] for 'w', which is float32\[3\]"),
        ({"v": torch.zeros(3)}, "gives 'v', which the model doesn't have"),
        ({"w": [0, 0, 0]}, "gives a list for 'w'"),
        (None, "failed"),
    ],
)
def test_a_model_that_grows_wrongly_is_told_of_and_nothing_changes(given, said, monkeypatch):
    net, other = Growing(3), Net(seed=1)
    before = copy.deepcopy((dict(net.state_dict()), dict(other.state_dict())))
    monkeypatch.setattr(Growing, "grown_state_dict", lambda *_: given)
    with pytest.raises(CannotWarmStart, match=f"grown_state_dict of 'model' {said}"):
        give(saved(model=Growing(2), other=Net()), model=net, other=other)
    assert same((dict(net.state_dict()), dict(other.state_dict())), before)


# --- nothing, or not all -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "key_map", "said"),
    [
        ({"other": {"w": torch.zeros(2)}}, None, "it holds no tensors of model"),
        ({"model": {"x": torch.zeros(99)}}, None, "it has no parameter that this model has"),
        (
            {"model": {"head.weight": torch.zeros(9, 4)}},
            None,
            r"head.weight was saved as float32\[9, 4\], and float32\[2, 4\]",
        ),
        (
            None,
            {"head": None, "encoder.": "body.", "norm.weight": "n", "norm.bias": "b"},
            "the closest saved names are",
        ),
    ],
)
def test_without_a_parameter_in_common_it_says_so_with_the_closest_names(state, key_map, said):
    net = Net(seed=1)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CannotWarmStart, match=said):
        give(saved(model=Net()) if state is None else state, key_map, model=net)
    assert same(dict(net.state_dict()), dict(before))


def test_renamed_parts_are_named_with_what_they_may_have_been():
    with pytest.raises(CannotWarmStart, match=r"'backbone.0.weight' for 'encoder.0.weight'"):
        donor = {n: t for n, t in Net(body="backbone").state_dict().items() if n.startswith("backbone")}
        give({"model": donor}, model=Net())


def test_without_a_module_there_is_nothing_to_give_to():
    with pytest.raises(CannotWarmStart, match="no module is registered"):
        warm_start({"state": {"w": torch.zeros(2)}}, {"state": {"w": torch.ones(2)}}, id=ID)


class Refusing(Net):
    """A module that takes no state."""

    def load_state_dict(self, state, strict=True, assign=False):
        if state["head.bias"][0] > 50:
            raise RuntimeError("not mine")
        return super().load_state_dict(state, strict, assign)


def test_where_one_module_refuses_all_are_as_they_were():
    one, two = Net(seed=1), Refusing(seed=2)
    donor = Net()
    nn.init.constant_(donor.head.bias, 99.0)
    before = copy.deepcopy((dict(one.state_dict()), dict(two.state_dict())))
    with pytest.raises(NotRestorable, match="not mine"):
        give(saved(one=Net(), two=donor), one=one, two=two)
    assert same((dict(one.state_dict()), dict(two.state_dict())), before)

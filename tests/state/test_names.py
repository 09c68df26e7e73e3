"""Canonical names: the same for a plain, a compiled and a wrapped model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcache.state.names import canonical_name, canonical_names, canonical_prefix

# --- canonical names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("wte.weight", "wte.weight"),
        ("module.wte.weight", "wte.weight"),
        ("_orig_mod.module.wte.weight", "wte.weight"),
        ("module._orig_mod.module.wte.weight", "wte.weight"),
        ("h._fsdp_wrapped_module.0._checkpoint_wrapped_module._orig_mod.w", "h.0.w"),
        ("layer.module.weight", "layer.module.weight"),
        ("my_module.weight", "my_module.weight"),
        ("module", "module"),
        ("h._orig_mod", "h._orig_mod"),
        ("", ""),
    ],
)
def test_wrappers_leave_no_trace_in_a_name(name, canonical):
    assert canonical_name(name) == canonical


def test_names_that_would_become_one_keep_their_own():
    names = ["weight", "module.weight", "module.bias"]
    assert canonical_names(names) == {"weight": "weight", "module.weight": "module.weight", "module.bias": "bias"}


components = st.sampled_from(["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "a", "w"])
names = st.lists(components, min_size=1, max_size=5).map(".".join)


@given(st.lists(names, max_size=12))
def test_two_names_never_become_one(given_names):
    mapped = canonical_names(given_names)
    assert set(mapped) == set(given_names)
    assert len(set(mapped.values())) == len(mapped)


@given(names)
def test_a_canonical_name_stays_as_it_is(name):
    assert canonical_name(canonical_name(name)) == canonical_name(name)


@given(st.lists(st.sampled_from(["module", "modules", "_orig_mod", "a_b", "h", "0"]), max_size=5).map(".".join))
def test_the_prefix_of_a_module_is_what_its_parameters_begin_with(name: str) -> None:
    prefix = canonical_prefix(name)
    assert canonical_name(f"{name}.w" if name else "w") == (f"{prefix}.w" if prefix else "w")

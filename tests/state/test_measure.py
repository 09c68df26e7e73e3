import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckptcache.state import measure as module
from ckptcache.state.measure import Measure, blocks, measure, same_bits
from tests.caches import python

FLOATS = ("float64", "float32", "float16", "complex64", "complex128")
WHOLE = ("int8", "uint8", "int16", "int32", "int64", "bool")
SMALL_FLOATS = (
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


def plainly(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    """What `measure` should say, in a few lines of NumPy with 80 bits to a number."""
    is_complex = np.iscomplexobj(a) or np.iscomplexobj(b)
    x, y = (
        np.stack([v.real, v.imag]).astype(np.longdouble) if is_complex else v.astype(np.longdouble)
        for v in (np.asarray(a), np.asarray(b))
    )
    norm = lambda v: np.sqrt((v * v).sum())  # noqa: E731
    norm_a, norm_b, change = norm(x), norm(y), norm(y - x)
    found: dict[str, float | None] = {"norm_a": float(norm_a), "norm_b": float(norm_b), "change": float(change)}
    found["relative"] = 0.0 if change == 0 else math.inf if norm_a == 0 else float(change / norm_a)
    found["cosine"] = float((x * y).sum() / norm_a / norm_b) if norm_a and norm_b else None
    return found


def check(found: Measure, expected: dict[str, float | None]) -> None:
    for name, value in expected.items():
        got = getattr(found, name)
        assert (got is None) == (value is None), name
        if value is not None:
            tolerance = {"abs": 1e-9} if name == "cosine" else {"abs": 0.0}
            assert got == pytest.approx(value, rel=1e-9, **tolerance), name


def elements(dtype: str) -> st.SearchStrategy:
    """Finite values; those of 64 bits as far as NumPy's long doubles can square them on every machine."""
    if dtype == "int64":
        return st.integers(-(2**52), 2**52)
    if dtype in ("float64", "complex128"):
        parts = st.just(0.0) | st.floats(1e-150, 1e150) | st.floats(-1e150, -1e-150)
        return parts if dtype == "float64" else st.builds(complex, parts, parts)
    finite = {"allow_nan": False, "allow_infinity": False} if dtype in FLOATS else {}
    return hnp.from_dtype(np.dtype(dtype), **finite)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of one shape, often of one dtype."""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    first = draw(st.sampled_from([*FLOATS, *WHOLE]))
    second = draw(st.just(first) | st.sampled_from([*FLOATS, *WHOLE]))
    a, b = (draw(hnp.arrays(dtype, shape, elements=elements(dtype))) for dtype in (first, second))
    return a, b


@given(pairs())
@example((np.array([1e200, 1e-200]), np.array([1e200, 2e-200])))
@example((np.array([1e299]), np.array([-1e299])))
def test_it_says_what_plain_numpy_says(pair):
    a, b = pair
    found = measure(torch.from_numpy(a.copy()), torch.from_numpy(b.copy()))
    check(found, plainly(a, b))
    assert found.changed == int((a != b).sum())
    assert found.identical == (a.dtype == b.dtype and a.tobytes() == b.tobytes())


@pytest.mark.parametrize("dtype", SMALL_FLOATS, ids=str)
def test_small_floats_are_measured_as_the_numbers_they_stand_for(dtype):
    a, b = (torch.randn(40, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    check(measure(a, b), plainly(a.double().numpy(), b.double().numpy()))
    assert measure(a, a.clone()).identical


def test_dtypes_may_differ_and_then_it_is_not_identical():
    a = torch.tensor([1.0, 2.0])
    found = measure(a, a.to(torch.bfloat16))
    assert (found.change, found.changed, found.identical) == (0.0, 0, False)


def test_complex_beside_real_counts_as_without_imaginary_part():
    found = measure(torch.tensor([3.0]), torch.tensor([3 + 4j]))
    assert (found.norm_b, found.change, found.cosine) == (5.0, 4.0, pytest.approx(0.6))


def test_half_precision_complex_numbers_are_measured():
    parts = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float16)
    a = torch.view_as_complex(parts)
    assert measure(a, a).norm_a == pytest.approx(math.sqrt(26))


def test_a_conjugate_that_was_never_written_out_is_measured_as_one():
    a = torch.tensor([1 + 2j])
    assert measure(a, a.conj()).change == 4.0


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_an_empty_tensor_has_not_changed(shape):
    assert measure(torch.zeros(shape), torch.zeros(shape)) == Measure(0.0, 0.0, 0.0, 0.0, None, 0, True)


def test_from_zero_is_infinitely_far():
    found = measure(torch.zeros(2), torch.ones(2))
    assert (found.relative, found.cosine) == (math.inf, None)
    assert measure(torch.zeros(2), torch.zeros(2)).relative == 0.0


def test_the_same_infinities_and_nans_have_not_changed():
    mask = torch.tensor([0.0, -math.inf, math.nan])
    found = measure(mask, mask.clone())
    assert (found.change, found.relative, found.changed, found.identical) == (0.0, 0.0, 0, True)
    assert math.isnan(found.cosine)
    moved = measure(mask, mask + torch.tensor([1.0, 0.0, 0.0]))
    assert (moved.change, moved.changed) == (1.0, 1)
    assert math.isnan(moved.relative)


def test_beside_an_infinite_norm_a_change_says_nothing():
    assert math.isnan(measure(torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 2.0])).relative)


def test_a_nan_or_an_infinity_that_came_is_seen():
    assert math.isnan(measure(torch.ones(2), torch.tensor([1.0, math.nan])).change)
    assert measure(torch.ones(2), torch.tensor([1.0, math.inf])).change == math.inf
    assert math.isnan(measure(torch.zeros(1), torch.tensor([math.nan])).relative)


def test_zero_and_minus_zero_are_equal_and_not_identical():
    found = measure(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert (found.change, found.changed, found.identical) == (0.0, 0, False)


def test_whole_numbers_of_64_bits_are_subtracted_exactly():
    a = torch.tensor([2**62, -(2**63)], dtype=torch.int64)
    b = torch.tensor([2**62 + 1, 2**63 - 1], dtype=torch.int64)
    assert measure(a[:1], b[:1]).change == 1.0
    assert measure(a[1:], b[1:]).change == 2.0**64
    wide = torch.tensor([2**64 - 1], dtype=torch.uint64)
    assert measure(wide, torch.tensor([2**64 - 2], dtype=torch.uint64)).change == 1.0


def test_bits_without_numbers_are_compared_and_not_measured():
    a = torch.tensor([1, 2], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    b = torch.tensor([1, 3], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert measure(a, b) is None
    assert (same_bits(a, a.clone()), same_bits(a, b)) == (True, False)


# torch warns of its own sparse tensors, the first time.
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
def test_sparse_tensors_are_measured_and_never_written_out_where_they_claim_too_much(layout):
    a, b = (torch.eye(3).mul(factor).to_sparse(layout=layout) for factor in (1.0, 2.0))
    assert measure(a, b).relative == 1.0
    assert (same_bits(a, a.clone()), same_bits(a, b)) == (True, False)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_tensor_that_claims_more_than_there_is_room_for_is_only_compared():
    make = lambda value: torch.sparse_coo_tensor([[5], [7]], [value], (2**40, 2**20))  # noqa: E731
    assert measure(make(1.0), make(2.0)) is None
    assert (same_bits(make(1.0), make(1.0)), same_bits(make(1.0), make(2.0))) == (True, False)


def test_tensors_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shapes \[2\] and \[3\]"):
        measure(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(60.0).reshape(3, 4, 5),
        lambda: torch.arange(60.0).reshape(4, 15).t(),
        lambda: torch.arange(60.0).reshape(1, 1, 60),
        lambda: torch.arange(6.0)[:, None].expand(6, 10),
        lambda: torch.tensor(3.0),
    ],
    ids=["plain", "transposed", "long rows", "expanded", "scalar"],
)
def test_blocks_are_small_and_hold_every_element_in_order(make, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    tensor = make()
    found = list(blocks(tensor))
    assert torch.equal(torch.cat(found), tensor.reshape(-1))
    assert max(len(block) for block in found) <= 7


def test_by_the_block_the_answer_is_the_same(monkeypatch):
    a, b = torch.randn(5, 30, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64).t()
    whole = measure(a, b)
    monkeypatch.setattr(module, "BLOCK", 8)
    check(measure(a, b), {name: getattr(whole, name) for name in ("norm_a", "change", "relative", "cosine")})


LARGE = """
import resource, torch
from ckptcache.state.measure import measure

a = torch.ones(20_000_000)
b = torch.ones(2, 10_000_000).t()
measure(a[:1000], a[:1000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
measure(a, a)
measure(b, b)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_large_tensor_is_not_copied():
    done = python(LARGE)
    assert done.returncode == 0, done.stderr
    # Each of the tensors has 80 million bytes, and would have 160 million in float64.
    assert int(done.stdout) < 70_000_000

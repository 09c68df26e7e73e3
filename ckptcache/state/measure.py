"""How far apart two tensors are, in numbers: in float64 on the CPU, a block at a time.

No second copy of a large tensor is made. What a number means where values are missing, zero or infinite is decided
here, so that there is an answer for every tensor that has numbers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

BLOCK = 1 << 18
"""Elements that are looked at together; each block takes a few float64 copies of itself."""
MOST_DENSE = 1 << 24
"""Elements that a sparse tensor is written out to, for a few bytes of a file may claim any number of them."""
_WIDE = (torch.float64, torch.complex128)
"""Dtypes whose squares may leave float64's range."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""What bits are compared as, by the bytes of an element."""
_EXACT = 2.0**62
"""A difference of whole numbers below this is right in 64 bits, whatever was carried on the way."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Two tensors of the same shape, a and b, beside each other."""

    norm_a: float
    """Euclidean norm over all elements."""
    norm_b: float
    change: float
    """``||b - a||``, over the elements whose values differ: the same infinity in both, or NaN in both, is no change.
    NaN where a NaN came or went, infinite where an infinity did."""
    relative: float
    """``||b - a|| / ||a||``: 0 without a change, infinite where a is zero, NaN where a isn't finite."""
    cosine: float | None
    """Of a and b as vectors, complex ones by the real part of their inner product: in [-1, 1], None where one of them
    is zero or empty, NaN where one isn't finite."""
    changed: int
    """Elements whose values differ; 0.0 and -0.0 don't."""
    identical: bool
    """Whether dtype and every bit are the same."""


def measure(a: torch.Tensor, b: torch.Tensor) -> Measure | None:
    """Measure two tensors of the same shape; None for dtypes without numbers, such as bits and packed float4, and for
    sparse tensors of more than `MOST_DENSE` elements.

    Booleans count as 0 and 1, dtypes may differ. Whole numbers of 64 bits are subtracted exactly; their norms are
    rounded as float64 rounds them.

    Raises ValueError where the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"tensors of shapes {list(a.shape)} and {list(b.shape)} can't be measured")
    if not (has_numbers(a) and has_numbers(b)):
        return None
    a, b = _plain(a), _plain(b)
    scales = _scales(a, b)
    sums = _Sums()
    for x, y in zip(blocks(a), blocks(b), strict=True):
        sums.add(x, y, scales)
    return sums.measure(scales, identical=not sums.changed and same_bits(a, b))


def has_numbers(tensor: torch.Tensor) -> bool:
    """Whether torch can turn the tensor's elements into float64, and there is room for them."""
    if tensor.layout != torch.strided:
        return tensor.numel() <= MOST_DENSE
    if tensor.is_complex():
        return True
    try:
        tensor.new_empty(1).to(torch.float64)
    except (RuntimeError, NotImplementedError):
        return False
    return not tensor.is_quantized


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits: NaN equals itself, 0.0 isn't -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
        return False
    if a.layout != torch.strided:
        return all(same_bits(x, y) for x, y in zip(_components(a), _components(b), strict=True))
    a, b = _plain(a), _plain(b)
    if a.is_quantized:
        return bool(torch.equal(a, b))
    return all(torch.equal(_words(x), _words(y)) for x, y in zip(blocks(a), blocks(b), strict=True) if x.numel())


def _words(block: torch.Tensor) -> torch.Tensor:
    return block.contiguous().view(_WORDS.get(block.element_size(), torch.int64))


def blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements in order, flat, at most `BLOCK` at a time; only what isn't contiguous is copied, by the block."""
    if tensor.numel() <= BLOCK:
        yield tensor.reshape(-1)
    elif len(tensor) == 1:
        yield from blocks(tensor[0])
    else:
        step = max(1, BLOCK * len(tensor) // tensor.numel())
        for start in range(0, len(tensor), step):
            yield from blocks(tensor[start : start + step])


def _components(sparse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The dense tensors that a sparse one is made of."""
    if sparse.layout == torch.sparse_coo:
        return sparse._indices(), sparse._values()
    if sparse.layout in (torch.sparse_csr, torch.sparse_bsr):
        return sparse.crow_indices(), sparse.col_indices(), sparse.values()
    return sparse.ccol_indices(), sparse.row_indices(), sparse.values()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return dense.resolve_conj().resolve_neg() if dense.is_conj() or dense.is_neg() else dense


# --- blocks --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Scales:
    """What a, b and the change are divided by before they are squared (as LAPACK's dlassq does it)."""

    a: float = 1.0
    b: float = 1.0
    change: float = 1.0


def _scales(a: torch.Tensor, b: torch.Tensor) -> _Scales:
    if a.dtype not in _WIDE and b.dtype not in _WIDE:
        return _Scales()
    most = [0.0, 0.0, 0.0]
    for x, y in zip(blocks(a), blocks(b), strict=True):
        u, v = _values(x, y)
        found = map(_largest, (u, v, _difference(u, v)))
        most = [max(pair) for pair in zip(most, found, strict=True)]
    return _Scales(*(value or 1.0 for value in most))


def _scaled(values: torch.Tensor, scale: float) -> torch.Tensor:
    return (values if scale == 1.0 else values / scale).flatten()


def _largest(values: torch.Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


class _Sums:
    """Sums over blocks."""

    def __init__(self) -> None:
        self.a = self.b = self.change = self.dot = 0.0
        self.changed = 0

    def add(self, x: torch.Tensor, y: torch.Tensor, scales: _Scales) -> None:
        """Add one block of each tensor."""
        u, v = _values(x, y)
        difference = _whole_difference(x, y, u, v) if _are_whole(x, y) else v - u
        if not math.isfinite(float(difference.sum())):
            difference = _difference(u, v)
        self.changed += int(torch.count_nonzero(difference if difference.shape[1] == 1 else difference.any(dim=1)))
        u, v = _scaled(u, scales.a), _scaled(v, scales.b)
        difference = _scaled(difference, scales.change)
        self.a += float(u.dot(u))
        self.b += float(v.dot(v))
        self.dot += float(u.dot(v))
        self.change += float(difference.dot(difference))

    def measure(self, scales: _Scales, *, identical: bool) -> Measure:
        """What the sums come to."""
        a, b, change = math.sqrt(self.a), math.sqrt(self.b), math.sqrt(self.change)
        return Measure(
            norm_a=a * scales.a,
            norm_b=b * scales.b,
            change=change * scales.change,
            relative=relative(change, a) * (scales.change / scales.a if change else 1.0),
            cosine=1.0 if identical and 0 < a < math.inf else cosine(self.dot, a, b),
            changed=self.changed,
            identical=identical,
        )


def relative(change: float, norm: float) -> float:
    """A change beside what was changed: 0 without one, infinite beside zero, NaN beside what isn't finite."""
    if change == 0:
        return 0.0
    if not math.isfinite(norm):
        return math.nan
    return change / norm if norm else change if math.isnan(change) else math.inf


def cosine(dot: float, norm_a: float, norm_b: float) -> float | None:
    """The cosine of two vectors of these norms; None where one is zero, NaN where one isn't finite."""
    if not (math.isfinite(norm_a) and math.isfinite(norm_b)):
        return math.nan
    return max(-1.0, min(1.0, dot / norm_a / norm_b)) if norm_a and norm_b else None


def _values(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as float64, a row for each element; of complex ones, real and imaginary part."""
    is_complex = x.is_complex() or y.is_complex()
    return _rows(x, is_complex), _rows(y, is_complex)


def _rows(block: torch.Tensor, is_complex: bool) -> torch.Tensor:
    if block.is_complex():
        return torch.view_as_real(block).to(torch.float64)
    values = block.to(torch.float64)
    return torch.stack([values, torch.zeros_like(values)], dim=1) if is_complex else values.unsqueeze(1)


def _difference(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``v - u``, and 0 where both are the same infinity, or NaN; what is too large counts as the largest number."""
    is_same = (u == v) | (u.isnan() & v.isnan())
    difference = (v - u).masked_fill(is_same, 0.0)
    overflown = difference.isinf() & u.isfinite() & v.isfinite()
    largest = torch.finfo(torch.float64).max
    return torch.where(overflown, difference.clamp(-largest, largest), difference)


def _are_whole(x: torch.Tensor, y: torch.Tensor) -> bool:
    return not any(t.is_floating_point() or t.is_complex() or t.dtype == torch.bool for t in (x, y))


def _whole_difference(x: torch.Tensor, y: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    rounded = v - u
    exact = (y.to(torch.int64) - x.to(torch.int64)).to(torch.float64).unsqueeze(1)
    return torch.where(rounded.abs() < _EXACT, exact, rounded)

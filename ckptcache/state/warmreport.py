"""What a warm start took, made, and left: the report, and the lines that a person reads."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Shape = tuple[int, ...]
_SHOWN = 4
"""How many names, or beginnings of names, a line tells."""


@dataclass(frozen=True, slots=True)
class WarmStartReport:
    """What a warm start did, tensor by tensor. A name begins with the one that its module is registered under.

    Attributes:
        taken: as they were saved.
        resized: made by the model's own method of saved ones of another shape; the saved shape, and the shape.
        fresh: the rest of the model: as the program made it, or as the model's own method begins it.
        unused: saved tensors that were neither taken nor resized, by the names that they were saved under.
        cast: those whose dtype changed; the saved dtype, and the dtype.
        idle: entries of `key_map` that no saved name is, or begins with.
        astray: saved names that `key_map` reads as names that their module hasn't, with those.
    """

    taken: tuple[str, ...] = ()
    resized: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    cast: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    astray: Mapping[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> str:
        """``52 of 76 tensors taken, 0 resized, 24 fresh (blocks.4.*, blocks.5.*)``."""
        needed = (*self.taken, *self.resized, *self.fresh)
        part = _common_part(needed)
        sizes = [f"{name[len(part) :]} {list(was)} -> {list(now)}" for name, (was, now) in self.resized.items()]
        fresh = [name[len(part) :] for name in grouped(self.fresh, needed)]
        return (
            f"{len(self.taken)} of {len(needed)} tensors taken, "
            f"{len(self.resized)} resized{_listed(sizes)}, {len(self.fresh)} fresh{_listed(fresh)}"
        )

    @property
    def lines(self) -> tuple[str, ...]:
        """What else is to be said of it, a sentence each."""
        casts = Counter(self.cast.values())
        part = _common_part(self.unused)
        unused = [name[len(part) :] for name in grouped(self.unused, (*self.unused, *self.taken, *self.resized))]
        return (
            *(f"{count} of these were saved as {was}, and are {now} now" for (was, now), count in casts.items()),
            *([f"of what was saved, {len(self.unused)} went unused{_listed(unused)}"] if unused else []),
            *(f"key_map: no saved name is {name!r}, or begins with it" for name in self.idle),
            *self._astray(),
        )

    def _astray(self) -> Iterator[str]:
        for old, new in list(self.astray.items())[:1]:
            count = len(self.astray)
            what = "a saved name is read as one" if count == 1 else f"{count} saved names are read as such"
            yield f"key_map: {what} that the model hasn't: {old!r} as {new!r}"


def grouped(names: Collection[str], universe: Collection[str]) -> list[str]:
    """`names` in short: ``blocks.4.*`` where all of the `universe` that begins with ``blocks.4.`` is among them."""
    chosen = frozenset(names)
    return list(_grouped("", sorted(frozenset(universe), key=_natural), chosen))


def _grouped(prefix: str, members: Sequence[str], chosen: frozenset[str]) -> Iterator[str]:
    inside = [name for name in members if name in chosen]
    if len(inside) == len(members) > 1 and prefix.count("."):
        yield f"{prefix}*"
        return
    below: defaultdict[str, list[str]] = defaultdict(list)
    for name in inside and members:
        head, dot, _ = name[len(prefix) :].partition(".")
        below[f"{prefix}{head}{dot}"].append(name)
    for deeper, names in below.items():
        yield from _grouped(deeper, names, chosen) if len(names) > 1 else (n for n in names if n in chosen)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """So that ``blocks.10`` stands after ``blocks.9``."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _common_part(names: Collection[str]) -> str:
    """``model.`` where every name begins with it; "" where there are several modules, or none."""
    heads = {name.partition(".")[0] for name in names}
    return f"{heads.pop()}." if len(heads) == 1 else ""


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f" ({', '.join(names[:_SHOWN])}{more})" if names else ""

"""A warm start: from which checkpoint a session takes weights where it can resume from none, and what it says."""

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptcache.cache import TrainingCache
from ckptcache.catalog import Catalog, Explanation
from ckptcache.config import in_scratch, where_it_is
from ckptcache.elsewhere import place
from ckptcache.errors import CacheNotFound, CheckpointNotFound, CkptCacheError, InvalidValue
from ckptcache.metadata import CheckpointMetadata
from ckptcache.policy.compatibility import Description, Verdict
from ckptcache.policy.donors import donor_order, may_give, share_given
from ckptcache.resume import find, find_available
from ckptcache.state.renaming import KeyMap, check_key_map, renamed
from ckptcache.state.warmreport import WarmStartReport
from ckptcache.state.warmstart import growth_of, modules_in, warm_start
from ckptcache.storage.index import INDEX_NAME
from ckptcache.storage.layout import Layout

log = logging.getLogger("ckptcache")


@dataclass(frozen=True, slots=True)
class Wish:
    """What a session was told of a warm start: True, or which checkpoint; and how saved names are read."""

    wanted: bool | str
    key_map: KeyMap | None = None


@dataclass(frozen=True, slots=True)
class Warmed:
    """What came of it.

    Attributes:
        donor: the checkpoint that gave weights, if it is of the session's own cache.
        report: tensor by tensor; None where no checkpoint could give any.
        messages: a line each.
        warned: those that were logged as warnings.
    """

    donor: CheckpointMetadata | None = None
    report: WarmStartReport | None = None
    messages: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()


def wish_of(wanted: Any, key_map: Any) -> Wish | None:
    """The arguments `warm_start` and `key_map` of a session, checked; None for no warm start. Raises InvalidValue."""
    if key_map is not None:
        check_key_map(key_map)
    if wanted is False or wanted is None:
        if key_map is not None:
            raise InvalidValue(name="key_map", value=key_map, reason="only a warm start uses it: set warm_start too")
        return None
    if wanted is not True and not (isinstance(wanted, str) and wanted):
        reason = "it must be True, False, or the id or name of a checkpoint, with its folder and a colon before it"
        raise InvalidValue(name="warm_start", value=wanted, reason=reason)
    return Wish(wanted, key_map)


def give_weights(cache: TrainingCache, objects: Mapping[str, Any], needed: Description, wish: Wish) -> Warmed:
    """Fill the modules among `objects` from the checkpoint that is wished for, or the first that can be used.

    Raises:
        CacheNotFound, CheckpointNotFound, AmbiguousId, CheckpointMissing, CheckpointDamaged, ...: the one that is
            wished for can't be read.
        CannotWarmStart, InvalidValue, NotRestorable: or can't be used; every object is as it was before.
    """
    cache.staged()
    if isinstance(wish.wanted, str):
        return _named(cache, objects, needed, wish, wish.wanted)
    catalog = cache.ledger.view()
    warned: list[str] = []
    for found in donors(catalog, objects, needed, wish.key_map):
        try:
            report = _fill(cache, catalog, found.record, objects, wish.key_map)
        except CkptCacheError as error:
            warned.append(f"{found.record.id} is passed over: {error}")
            log.warning("%s", warned[-1])
        else:
            said = _said(found.record.id, found.verdict, report)
            return Warmed(found.record, report, (*warned, *said), (*warned, *_warn_of(report)))
    return Warmed(messages=(*warned, "no checkpoint can give this run its weights"), warned=tuple(warned))


def donors(
    catalog: Catalog, objects: Mapping[str, Any], needed: Description, key_map: KeyMap | None = None
) -> list[Explanation]:
    """The available checkpoints that may give weights, in the order in which they are tried.

    Those that fit but for the data come first, then by the share of the model that they give, then by rank.
    """
    modules = modules_in(objects)
    grows = any(growth_of(module) is not None for module in modules.values())
    wanted = {} if needed.fingerprint is None else needed.fingerprint.parameters
    found: list[tuple[tuple[int, float], Explanation]] = []
    shares: dict[str | None, float] = {}
    for each in catalog.explain(needed):
        share = shares.get(each.record.fingerprint)
        if share is None:
            saved = catalog.description(each.record).fingerprint
            names = {} if saved is None else _read_as(saved.parameters, modules, key_map)
            share = shares[each.record.fingerprint] = share_given(names, wanted, grows=grows)
        is_sound = each.status == "available" and each.score.status != "diverged"
        if is_sound and may_give(each.verdict.kind, share, renames=key_map is not None, grows=grows):
            found.append((donor_order(each.verdict.kind, share), each))
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]


def _read_as(saved: Mapping[str, str], modules: Mapping[str, Any], key_map: KeyMap | None) -> dict[str, str]:
    """The tensors of a fingerprint by the names that they are read as, module by module."""
    read: dict[str, str] = {}
    for path in modules:
        inner = {name.removeprefix(f"{path}."): spec for name, spec in saved.items() if name.startswith(f"{path}.")}
        try:
            read |= {f"{path}.{new}": inner[old] for old, new in renamed(inner, key_map).items()}
        except InvalidValue:  # it is said of each checkpoint that is tried
            read |= {f"{path}.{name}": spec for name, spec in inner.items()}
    return read


# --- the one that was asked for ------------------------------------------------------------------


def _named(cache: TrainingCache, objects: Mapping[str, Any], needed: Description, wish: Wish, wanted: str) -> Warmed:
    where = place(wanted)
    if where.folder is None and ("/" in wanted or Path(wanted).is_dir()):
        raise InvalidValue(name="warm_start", value=wanted, reason="it names a folder and no checkpoint: write DIR:ID")
    homes = [cache] if where.folder is None else _homes(cache, Path(where.folder))
    home = _first_that_has(homes, where.wanted)
    catalog = home.ledger.view()
    record = find_available(catalog, where.wanted)
    report = _fill(home, catalog, record, objects, wish.key_map, untouched=home is not cache)
    label = record.id if home is cache else f"{where.folder}:{record.id}"
    messages = _said(label, catalog.judge(record, needed), report)
    if catalog.scores[record.id].status == "diverged":
        messages = (*messages, f"the loss of {label} has diverged: its weights may be of no use")
    return Warmed(record if home is cache else None, report, messages, _warn_of(report))


def _homes(cache: TrainingCache, folder: Path) -> list[TrainingCache]:
    """The cache in `folder`, to be looked at only, or the session's own, if it is that.

    In a proof they are two: what the run itself has put there, and then what is there.
    """
    found = []
    for each in dict.fromkeys((Path(in_scratch(str(folder))), folder)):
        if each.resolve() == cache.ledger.layout.root.resolve():
            found.append(cache)
        elif (each / INDEX_NAME).exists() or Layout(each).checkpoints.is_dir():
            found.append(TrainingCache(where_it_is(each)))
    if not found:
        raise CacheNotFound(path=folder)
    return found


def _first_that_has(homes: list[TrainingCache], wanted: str) -> TrainingCache:
    """The first that knows what is wanted; the last, where none does."""
    for home in homes[:-1]:
        with suppress(CheckpointNotFound):
            find(home.ledger.view(), wanted)
            return home
    return homes[-1]


def _fill(
    home: TrainingCache,
    catalog: Catalog,
    record: CheckpointMetadata,
    objects: Mapping[str, Any],
    key_map: KeyMap | None,
    *,
    untouched: bool = False,
) -> WarmStartReport:
    from ckptcache.restoring import read

    state = read(home.ledger, record, untouched=untouched).state
    config = catalog.description(record).model_config
    return warm_start(objects, state, id=record.id, donor_config=config, key_map=key_map)


# --- what is said --------------------------------------------------------------------------------


def _said(label: str, verdict: Verdict, report: WarmStartReport) -> tuple[str, ...]:
    return (
        f"warm start from {label} ({_fit(verdict)}): {report.counts}",
        *(f"  {line}" for line in report.lines),
        "  weights only: the optimizer is fresh, and iterations are counted from 0",
    )


def _warn_of(report: WarmStartReport) -> tuple[str, ...]:
    """What may be a typing error is logged as a warning; the lines that were."""
    lines = tuple(f"  {line}" for line in report.lines if line.startswith("key_map"))
    for line in lines:
        log.warning("%s", line.strip())
    return lines


def _fit(verdict: Verdict) -> str:
    """How the donor fits, but for what the counts tell, and for the optimizer, which is fresh anyhow."""
    others = tuple(d for d in verdict.differences if d.what not in ("parameter", "optimizer"))
    if {d.what for d in verdict.differences if d.rejects} == {"optimizer"}:
        return "fits, but for the optimizer"
    # Weights that were given fit in part, whatever a verdict says that knows of no other names.
    kind = "partial" if verdict.kind == "incompatible" else verdict.kind
    return dataclasses.replace(verdict, kind=kind, differences=others).reason


def hint(count: int) -> tuple[str, ...]:
    """What a fresh start says of the checkpoints that could have given weights."""
    if not count:
        return ()
    whose = "1 checkpoint" if count == 1 else f"{count} checkpoints"
    return (f"  {whose} could give a warm start, weights only: warm_start=True, or train_cached.py --warm_start",)

"""Hypothesis strategies for what an index holds, and ways to damage bytes, shared by the tests of several modules."""

import random
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from ckptcache.metadata import (
    RESERVED_NAMES,
    ROLLBACK,
    CheckpointMetadata,
    Fingerprint,
    NamePointer,
    SessionRecord,
)
from ckptcache.storage.index import Index

_COMMON_IDS = ("ckpt_a", "ckpt_b", "ckpt_c", "ckpt_d")

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
"""Text that UTF-8 can hold, control characters, quotes and far planes included."""
losses = st.none() | st.floats()
"""None is unknown; NaN and infinity are diverged."""
counts = st.integers(0, 2**53 - 2)
ids = st.sampled_from(_COMMON_IDS) | st.from_regex(r"[a-z0-9][a-z0-9_-]{0,12}(\.[a-z0-9_-]{1,4})?", fullmatch=True)
"""Valid ids, often the same few, so that two indexes meet in some."""
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True).filter(
    lambda name: name not in RESERVED_NAMES and not name.startswith("ckpt_")
)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
json_mappings = st.dictionaries(texts, json_values, max_size=3)
unknown_fields = st.dictionaries(st.from_regex(r"future_[a-z]{1,5}", fullmatch=True), json_values, max_size=2)
tuples_of_text = st.lists(texts, max_size=3).map(tuple)
tuples_of_ids = st.lists(ids, max_size=2).map(tuple)
curves = st.dictionaries(texts, st.lists(st.tuples(counts, st.floats()), max_size=4).map(tuple), max_size=2)


@st.composite
def records(draw: st.DrawFn, id: str | None = None) -> CheckpointMetadata:
    """Records of checkpoints, any field of which may be empty, odd, or unknown to this version."""
    fields: dict[str, Any] = {
        **dict.fromkeys(("sequence", "revision", "iteration"), counts),
        **dict.fromkeys(("epoch", "train_loss", "val_loss", "last_val_loss", "quality_score"), losses),
        **dict.fromkeys(("created_at", "save_reason", "notes"), texts),
        **dict.fromkeys(("contents", "tags"), tuples_of_text),
        **dict.fromkeys(("last_val_loss_iteration", "size"), st.none() | counts),
        **dict.fromkeys(("digest", "decision_reason"), st.none() | texts),
        **dict.fromkeys(("extra", "environment"), json_mappings),
        **dict.fromkeys(("session", "rolled_back"), st.none() | ids),
        "parents": tuples_of_ids,
        "learning_rate": st.lists(st.floats(), max_size=3).map(tuple),
        "metrics": st.dictionaries(texts, st.floats(), max_size=3),
        "pinned": st.booleans(),
        "decision": st.sampled_from((None, "evicted", "quarantined")),
        "unknown": unknown_fields,
    }
    return CheckpointMetadata(id=id or draw(ids), **draw(_some_of(fields)))


@st.composite
def sessions(draw: st.DrawFn, id: str | None = None) -> SessionRecord:
    """Records of sessions, likewise."""
    fields: dict[str, Any] = {
        **dict.fromkeys(("sequence", "revision", "start_iteration", "end_iteration"), counts),
        **dict.fromkeys(("saved", "evicted", "failed_saves"), counts),
        **dict.fromkeys(("first_val_loss", "last_val_loss", "best_val_loss"), losses),
        **dict.fromkeys(("resume", "started_at"), texts),
        **dict.fromkeys(("ended_at", "stop_reason"), st.none() | texts),
        **dict.fromkeys(("parent", "best_checkpoint", "rolled_back"), st.none() | ids),
        "seconds": st.floats(),
        "reseeded": st.booleans(),
        "warm_start": st.booleans(),
        "curves": curves,
        "environment": json_mappings,
        "unknown": unknown_fields,
    }
    return SessionRecord(id=id or draw(ids), **draw(_some_of(fields)))


pointers = st.builds(NamePointer, checkpoint=ids, revision=counts)
rollbacks = st.builds(
    NamePointer, checkpoint=ids, revision=counts, before=st.dictionaries(ids, st.none() | ids, max_size=2)
)
fingerprints = st.builds(
    Fingerprint,
    parameters=st.dictionaries(texts, texts, max_size=2),
    optimizers=st.dictionaries(texts, json_mappings, max_size=2),
)


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    """Whole indexes in which every configuration and fingerprint that is held is named by a record."""
    index = Index(unknown=draw(unknown_fields))
    for id in draw(st.lists(ids, max_size=4, unique=True)):
        index.checkpoints[id] = _with_configs(draw, index, draw(records(id=id)))
    for id in draw(st.lists(ids, max_size=2, unique=True)):
        index.sessions[id] = draw(sessions(id=id))
    index.names = draw(st.dictionaries(names, pointers, max_size=2))
    if draw(st.booleans()):
        index.names[ROLLBACK] = draw(rollbacks)
    return index


def _with_configs(draw: st.DrawFn, index: Index, record: CheckpointMetadata) -> CheckpointMetadata:
    held = {
        **{
            f"{part}_config": index.store_config(draw(st.none() | json_values))
            for part in ("model", "training", "data")
        },
        "fingerprint": index.store_fingerprint(draw(st.none() | fingerprints)),
    }
    return CheckpointMetadata.from_json({**record.to_json(), **held})


def _some_of(fields: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.lists(st.sampled_from(sorted(fields)), max_size=6, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: fields[name] for name in chosen})
    )


@st.composite
def edits(draw: st.DrawFn, base: Index) -> Index:
    """What another process may make of `base`: entries of each part changed, removed and added."""
    index = base.copy()
    fresh = draw(indexes())
    for part in ("checkpoints", "sessions", "names", "configs", "fingerprints", "unknown"):
        entries = getattr(index, part)
        for key in draw(st.lists(st.sampled_from(sorted(entries)), max_size=2)) if entries else ():
            entries.pop(key, None)
        entries.update(getattr(fresh, part))
    for records in (index.checkpoints, index.sessions):
        for key in draw(st.lists(st.sampled_from(sorted(records)), max_size=2)) if records else ():
            records[key] = records[key].changed(environment=draw(json_mappings))
    return index


# --- damage --------------------------------------------------------------------------------------

_SCRAPS = (
    *(b"[", b"{", b"}", b'"', b",", b"null", b"true", b"NaN", b"-", b"1e999", b"9" * 400, b"\\ud800", b"\xff", b"\x00"),
    *(b"<<<<<<< HEAD\n", b"=======\n", b">>>>>>> theirs\n", b"\xef\xbb\xbf", b"[" * 2000, b'{"a":' * 2000, b'"id": 3,'),
)


def mutations(data: bytes, count: int, *, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged versions of `data`: bits flipped, pieces cut or doubled, scraps put in; always the same."""
    chance = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 1, 2, 5))):
            _mutate(changed, chance)
        if bytes(changed) != data:
            yield bytes(changed)


def _mutate(data: bytearray, chance: random.Random) -> None:
    at, kind = chance.randrange(len(data)), chance.randrange(6)
    piece = slice(at, at + chance.choice((1, 2, 8, 64, 512)))
    if kind == 0:
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[piece]
    elif kind == 2:
        data[at:at] = data[piece]
    elif kind == 3:
        data[at:at] = chance.choice(_SCRAPS)
    elif kind == 4:
        data[at] = chance.choice(b'0123456789"{}[],:truefalsn.-')
    else:
        data[piece] = chance.choice(_SCRAPS)
    if not data:
        data += b"x"

"""Files, records, links and ids made to do harm: refused or let be, and nothing happens outside of the cache."""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from ckptcache import TrainingCache
from ckptcache.errors import CkptCacheError
from ckptcache.metadata import CheckpointMetadata
from ckptcache.storage import integrity
from ckptcache.storage.index import Index, serialise
from tests.caches import listing, save, tiny
from tests.campaigns import variants
from tests.storage import hostile
from tests.storage.test_index import HOSTILE, places, put
from tests.storage.test_reconcile import HOSTILE_SIDECARS
from tests.test_metadata import HOSTILE_IDS

CAMPAIGN = "hostile input"
STRAY = "ckpt_20260101_000000_00000009_00000000_0000"
IDS = [
    *(id for id in HOSTILE_IDS if isinstance(id, str)),
    *("../../sentinel", "../precious", "..\\..\\x", "/dev/zero", "checkpoints/x", "./x", "x/.", "x/..", "~root/x"),
    *(
        "a%00b",
        "a\x1b[31mb",
        "\ufeffa",
        "a\u2028b",
        "a\u200bb",
        "{}",
        "{0}",
        "%s",
        "`id`",
        "$(id)",
        "a;b",
        "a|b",
        "a&b",
    ),
    *("<script>", "'", '"', "a=b", "a,b", "CON ", "a\tb", "\x7f", "é", "a" * 5000, "..", "...", "a..", "[/]"),
]


class World:
    """A cache with one good checkpoint, beside things that nobody may touch."""

    def __init__(self, folder: Path) -> None:
        self.root, self.cache, self.outside = folder, folder / "cache", folder / "outside"
        self.sentinel = self.outside / "sentinel"
        (self.outside / "folder").mkdir(parents=True)
        (self.outside / "precious.txt").write_text("mine")
        (self.outside / "inner.pt").write_bytes(b"")
        torch.save({"model": {"w": torch.ones(2)}}, self.outside / "precious.pt")
        (self.outside / "folder" / f"{STRAY}.pt").write_bytes((self.outside / "precious.pt").read_bytes())
        with TrainingCache(self.cache) as cache:
            self.good = save(cache, 1.0)
        self.before = self.listed()

    def listed(self) -> dict[str, bytes | None]:
        return {name: data for name, data in listing(self.root).items() if not name.startswith("cache")}

    def path(self, name: str) -> Path:
        return self.cache / name

    def attack(self, *, keeps_the_good_one: bool = True) -> None:
        """Everything that a user does with a cache; each says what it says, and nothing happens elsewhere."""
        cache = TrainingCache(self.cache)
        acts: list[Callable[[], object]] = [
            *(cache.checkpoints, cache.best, cache.stats, cache.sessions, cache.names, cache.doctor, cache.prune),
            *(lambda: cache.explain(tiny()), lambda: cache.load(STRAY), lambda: cache.pin(STRAY)),
            *(lambda: cache.restore(tiny()), lambda: cache.restore({"model": {"w": torch.ones(2)}}, resume="latest")),
            *(lambda: cache.export(STRAY, self.cache / "out.pt"), lambda: cache.tag("latest", "x")),
            *(lambda: cache.doctor(repair=True), lambda: save(cache, 2.0), cache.close),
        ]
        for act in acts:
            with suppress(CkptCacheError):
                act()
        assert self.listed() == self.before, "something happened outside of the cache"
        if keeps_the_good_one:
            with TrainingCache(self.cache) as again:
                assert again.load(self.good.id)["w"].tolist() == [1.0] * 4
                assert again.restore(tiny()) is not None


def attacked(folder: Path, name: str, prepare: Callable[[World], object], **how: Any) -> None:
    world = World(folder)
    prepare(world)
    try:
        world.attack(**how)
    except BaseException as error:
        error.add_note(f"in the case {name!r}")
        raise


# --- the corpora ---------------------------------------------------------------------------------

Case = tuple[str, Callable[[World], object]]


@functools.cache
def sample(folder: Path) -> tuple[tuple[str, bytes], ...]:
    return tuple(hostile.corpus(folder / "outside" / "sentinel"))


def files(folder: Path) -> Iterator[Case]:
    """A hostile checkpoint with a sidecar that vouches for it, and one that is imported."""
    for name, data in sample(folder):
        yield f"vouched for: {name}", functools.partial(put_vouched, data=data)
        yield f"imported: {name}", functools.partial(put_and_import, data=data)


def put_vouched(world: World, data: bytes) -> None:
    path = world.path(f"checkpoints/{STRAY}.pt")
    path.write_bytes(data)
    measured = integrity.digest_of(path)
    record = CheckpointMetadata(id=STRAY, sequence=99, val_loss=0.0, size=measured.size, digest=measured.digest)
    path.with_suffix(".json").write_bytes(serialise(Index(checkpoints={STRAY: record})))


def put_and_import(world: World, data: bytes) -> None:
    path = world.path("foreign.pt")
    path.write_bytes(data)
    with TrainingCache(world.cache) as cache, pytest.raises(CkptCacheError):
        cache.import_(path)


def sidecars(_: Path) -> Iterator[Case]:
    for name, data in HOSTILE_SIDECARS.items():
        yield f"a sidecar: {name}", functools.partial(put_sidecar, data=data.replace(b'"stray"', f'"{STRAY}"'.encode()))
    whole = orjson.loads(serialise(Index(checkpoints={STRAY: CheckpointMetadata(id=STRAY, sequence=9, size=1)})))
    whole["checkpoints"][STRAY] = CheckpointMetadata(id=STRAY).to_json(full=True)
    yield from wrong_values("a sidecar", whole, put_sidecar)


def wrong_values(what: str, document: Any, write: Callable[..., object]) -> Iterator[Case]:
    for number, (place, value) in enumerate((p, v) for p in list(places(document))[1:] for v in HOSTILE):
        if number % 7 == 0:
            data = orjson.dumps(put(document, place, value))
            yield f"{what} with {str(value)[:40]!r} at {place}", functools.partial(write, data=data)


def put_sidecar(world: World, data: bytes) -> None:
    world.path(f"checkpoints/{STRAY}.pt").write_bytes((world.outside / "precious.pt").read_bytes())
    world.path(f"checkpoints/{STRAY}.json").write_bytes(data)


def indexes(_: Path) -> Iterator[Case]:
    record = CheckpointMetadata(id=STRAY, sequence=9, val_loss=0.5, parents=(STRAY,), size=9).to_json(full=True)
    index = {"schema_version": 2, "checkpoints": {STRAY: record}, "names": {"slot": {"checkpoint": STRAY}}}
    index |= {"sessions": {"sess_1": {"parent": STRAY}}, "configs": {"x": {"n": 1}}, "fingerprints": {}}
    yield from wrong_values("an index", index, put_index)


def put_index(world: World, data: bytes) -> None:
    world.path("metadata.json").write_bytes(data)


LINKS = [
    *(
        "metadata.json",
        "metadata.json.prev",
        "metadata.json.lock",
        f"checkpoints/{STRAY}.pt",
        f"checkpoints/{STRAY}.json",
    ),
    *(
        f"checkpoints/{STRAY}.pt.gone.tmp",
        "sessions/gone.lock",
        "quarantine/x.pt",
        f"{STRAY}.pt",
        "metadata.json.w9.tmp",
    ),
    *("training_summary.json", "checkpoints", "sessions", "quarantine", "data", "history.db"),
]
TARGETS = ["precious.txt", "precious.pt", "folder", "nowhere", f"folder/{STRAY}.pt"]


def links(_: Path) -> Iterator[Case]:
    for place in LINKS:
        for target in (*TARGETS, "/dev/zero", "."):
            yield f"{place} -> {target}", functools.partial(put_link, place=place, target=target)


def put_link(world: World, place: str, target: str) -> None:
    path = world.path(place)
    path.parent.mkdir(exist_ok=True)
    if os.path.lexists(path):
        path.rename(world.path(f"was-{path.name}"))
    path.symlink_to(target if target in ("/dev/zero", ".") else world.outside / target)


def hostile_ids(_: Path) -> Iterator[Case]:
    for id in dict.fromkeys(IDS):
        yield f"the id {id[:40]!r}", functools.partial(use_id, id=id)
        yield f"an index with the id {id[:40]!r}", functools.partial(put_id, id=id)


def use_id(world: World, id: str) -> None:
    """As an argument of everything that takes an id or a name."""
    with TrainingCache(world.cache) as cache:
        acts = (cache.load, cache.get, cache.pin, cache.unpin, cache.tag, cache.unname, cache.forget_session)
        for act in acts:
            with suppress(CkptCacheError):
                act(id)
        with pytest.raises(CkptCacheError):
            cache.restore(tiny(), resume=id)
        with pytest.raises(CkptCacheError):
            cache.export(id, world.cache / "out.pt")
        with pytest.raises(CkptCacheError):
            save(cache, 0.1, parents=[id])
        for name in (id, f"{id}/x"):
            with suppress(CkptCacheError):
                cache.name("best", name)


def put_id(world: World, id: str) -> None:
    """In the index, as the key and as everything that points to a checkpoint."""
    index = json.loads(world.path("metadata.json").read_bytes())
    index["checkpoints"][id] = {"sequence": 9, "parents": [id], "decision": "evicted", "session": id}
    index["names"]["x"] = {"checkpoint": id, "revision": 0}
    world.path("metadata.json").write_bytes(orjson.dumps(index))


CORPORA = {"files": files, "sidecars": sidecars, "indexes": indexes, "links": links, "ids": hostile_ids}


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("kind", CORPORA)
@pytest.mark.timeout(900)
def test_whatever_lies_in_a_cache_nothing_happens_outside_of_it(quick_path, counted, kind, every):
    cases = list(CORPORA[kind](quick_path / "0"))
    assert len(cases) >= 50
    for name, prepare in cases[::every]:
        attacked(quick_path / "0", name, prepare, keeps_the_good_one=kind in ("files", "sidecars"))
        shutil.rmtree(quick_path / "0")
    counted(CAMPAIGN, kind, len(cases[::every]))


def test_hostile_files_show_who_decodes_them_freely(quick_path, counted):
    cases = [case for case in files(quick_path) if "saved: os.mkdir" in case[0]]
    with pytest.raises((AssertionError, pytest.fail.Exception)), variants.decoding_freely():
        for name, prepare in cases:
            attacked(quick_path, name, prepare)
    counted.caught(CAMPAIGN, variants.name_of(variants.decoding_freely))


def test_hostile_links_show_who_removes_what_they_lead_to(quick_path, counted):
    world = World(quick_path)
    put_link(world, "checkpoints", "folder")
    with pytest.raises(AssertionError), variants.following_links():
        world.attack(keeps_the_good_one=False)
    counted.caught(CAMPAIGN, variants.name_of(variants.following_links))

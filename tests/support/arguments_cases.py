"""Which values are right for which argument, and a call for every argument of the public surface.

`KINDS` say for each kind of argument which values are legitimate, and which errors refuse all
others. `CASES` are the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from arguments_matrix import KV, OF_SCENE, OPTIONS, POSITIONS, STEP, TENSORS, VALUES, Scene

from paged_kv import CacheIndex, KVCacheManager, PagedKVCache, errors


class Kind(NamedTuple):
    """Of an argument: the names of its legitimate values, and the errors that refuse all others."""

    right: frozenset[str]
    refused: tuple[type[Exception], ...]
    tensors: dict[str, Callable[[torch.Tensor], Any]] = {}  # noqa: RUF012
    right_tensors: frozenset[str] = frozenset()


def kind(*groups: set[str], refused: tuple[type[Exception], ...]) -> Kind:
    names = frozenset().union(*groups)
    unknown = names - VALUES.keys()
    assert not unknown, unknown
    return Kind(names, refused)


NOTHING = {"None"}
ZERO = {"0"}
ONES = {
    "1",
    "np.int64(1)",
    "np.uint8(1)",
    "np.array(1)",
    "torch.tensor(1)",
    "Whole.ONE",
    "Index(1)",
}
HUGE = {"2**63", "10**30", "10**5000"}
TWO_ONES = {"[1, 1]", "(1, 1)", "array.array(1, 1)", "np.array([1, 1])", "torch.tensor([1, 1])"}
EMPTY = {"[]", "()", "np.array([])", "torch.tensor([])"}
CALLABLES = {"a class", "a lambda", "a lambda of two", "torch.Tensor", "LRU", "np.float32"}
CALLABLES |= {"the class of the cache", "the class of the index"}
ONE = {"one", "np.int64(one)", "np.array(one)", "torch.tensor(one)", "Index(one)"}
PAIRS = {
    "[one, two]",
    "(one, two)",
    "{one: 1, two: 2}.keys()",
    "iter([one, two])",
    "a generator",
    "np.array([one, two])",
    "np.array([one, two], object)",
    "torch.tensor([one, two])",
    "[np.int64(one), torch.tensor(two)]",
    "[Index(one), Index(two)]",
}
SINGLE = {"[one]", "torch.tensor([one])"}
SETS = {"{one, two}", "frozenset({one, two})"}
BATCHES = PAIRS | SINGLE | EMPTY | {"an empty generator"}
OWNED = {"[one, owned]", "[one, pinned]"}
TWICE = {"[one, one]"}

COUNT = (errors.BadCount,)
SEQS = (
    errors.BadArgument,
    errors.ForeignHandle,
    errors.StaleHandle,
    errors.DuplicateSequence,
    errors.OwnedSequence,
)
FEW_SEQS = (*SEQS, errors.BadShape)  # fewer rows than tensors have
SEQ = (errors.ForeignHandle, errors.StaleHandle)
WORD = (errors.BadArgument,)
TENSOR = (errors.BadArgument, errors.BadShape, errors.BadDtype, errors.BadDevice)

# Keys that are found again: all that can be hashed and equals itself.
UNHASHABLE = {
    *(
        "bytearray",
        "{}",
        "{1: 2}",
        "set()",
        "{1}",
        "[]",
        "[None]",
        "[None, None]",
        '["a"]',
        '["a", "b"]',
        "[1]",
        "[1.5]",
    ),
    *(
        "[1.0, 1.0]",
        "[[1]]",
        "[True]",
        "[True, True]",
        "[-1, -1]",
        "[{}, {}]",
        "[1, 1]",
        "([1],)",
        "array.array(1, 1)",
    ),
    "memoryview",
    *(
        "[meta numbers]",
        "[__index__ raises]",
        "[__index__ raises TypeError]",
        "[__repr__ raises]",
        "[right tensor]",
    ),
    *(name for name in OF_SCENE if name[0] in "[{"),
    *("a list as mark", "__hash__ raises"),
}
ARRAYS = {
    name
    for name in VALUES
    if name.startswith(("np.array", "torch.tensor", "a meta", "a sparse", "a nested"))
}
UNEQUAL = {
    *("nan", "np.float32(nan)", "Decimal(nan)", "Decimal(sNaN)", "np.datetime64(NaT)"),
    *("(nan,)", "(tensor,)", "frozenset({nan})"),
}
KEYS = VALUES.keys() - UNHASHABLE - ARRAYS - UNEQUAL
REALS = {
    *(
        "0.0",
        "1.0",
        "96.0",
        "inf",
        "np.float64(2.0)",
        "torch.tensor(2.0)",
        "Fraction(1)",
        "Decimal(1)",
        "-1",
    ),
    *(
        "2**63",
        "10**30",
        "-10**30",
        "np.int8(-1)",
        "float(one)",
        "stale",
        "alien",
        "owned",
        "pinned",
    ),
}

NUMBERS = ONE | {"stale", "alien", "owned", "pinned"}
MARKS = {"the mark", "a mark of another cache", "a mark to come", "a list as mark"}
TWO_KEYS = {
    *(PAIRS | TWICE | OWNED | MARKS | TWO_ONES),
    *(
        "[one, stale]",
        "[one, alien]",
        "[one, None]",
        '[one, "a"]',
        '["a", "b"]',
        "[None, None]",
        "[True, True]",
    ),
    *(
        "[1.0, 1.0]",
        "[-1, -1]",
        "range(1, 3)",
        "np.array([1.0, 1.0])",
        "np.array([True, True])",
        "np.array([1, None])",
    ),
    *(
        "torch.tensor([1.0, 1.0])",
        "the index",
        "np.array(floats of handles)",
        "[float(one), float(two)]",
        "[str(one), str(two)]",
    ),
    *("[__index__ raises]", "[__index__ raises TypeError]", "[__repr__ raises]"),
} - {"[np.int64(one), torch.tensor(two)]"}

TWO_NUMBERS = {
    *(
        OWNED
        | TWICE
        | MARKS
        | (PAIRS - {"{one: 1, two: 2}.keys()", "iter([one, two])", "a generator"})
    ),
    *("[one, stale]", "[one, alien]"),
}

SOUND = frozenset(
    {
        *("right", "not contiguous", "expanded", "NaN"),
        *("Parameter", "requires_grad", "made with grad", "inference"),
    }
)
KINDS: dict[str, Kind] = {
    "number": kind(ZERO, ONES, refused=COUNT),
    "size": kind(ONES, refused=COUNT),
    "size or None": kind(ONES, NOTHING, refused=COUNT),
    "bound": kind(ONES, NOTHING, HUGE, NUMBERS, refused=COUNT),
    "need": kind(ZERO, ONES, HUGE, NUMBERS, refused=COUNT),
    "layer": kind(ZERO, ONES, refused=COUNT),
    "env": kind(ZERO, ONES, refused=(errors.UnknownEnv,)),
    "counts": kind(ZERO, ONES, TWO_ONES, {"range(1, 3)"}, refused=COUNT),
    "counts or None": kind(NOTHING, ZERO, ONES, TWO_ONES, {"range(1, 3)"}, refused=COUNT),
    "flag": kind({"True", "False", "np.True_", "torch.tensor(True)"}, refused=WORD),
    "pad": kind({'"left"'}, refused=WORD),
    "seqs": kind(BATCHES, OWNED, TWICE, refused=SEQS),
    "distinct": kind(BATCHES, OWNED, refused=SEQS),
    "a set": kind(BATCHES, SETS, {"set()"}, OWNED, refused=SEQS),
    "kept": kind(BATCHES, SETS, {"set()"}, OWNED, TWICE, refused=SEQS),
    "loose": kind(BATCHES, refused=SEQS),
    "ended or gone": kind(BATCHES, SETS, TWICE, {"set()", "[one, stale]"}, refused=SEQS),
    "two to put": kind(PAIRS, refused=(*SEQS, errors.HandleInUse)),
    "to put again": kind(ONE, {"owned"}, refused=(*SEQ, errors.HandleInUse)),
    "any seq": kind(ONE, {"owned", "pinned"}, refused=SEQ),
    "bundle": kind(set(), refused=WORD),
    "listener": kind(set(), refused=WORD),
    "ended": kind(BATCHES, SETS, {"set()"}, refused=SEQS),
    "as many": kind(PAIRS, refused=FEW_SEQS),
    "seq": kind(ONE, {"owned"}, refused=(*SEQ, errors.PinnedEntry)),
    "to put": kind(ONE, refused=(*SEQ, errors.HandleInUse)),
    "key": kind(KEYS, refused=(errors.BadKey,)),
    "known key": kind({'"kept"'}, refused=(errors.BadKey, errors.UnknownKey)),
    "pinned key": kind(set(), refused=(errors.BadKey, errors.UnknownKey, errors.NotPinned)),
    "priority": kind(NOTHING, ZERO, ONES, ONE, REALS, refused=(errors.BadPriority,)),
    "callable": kind(CALLABLES, refused=WORD),
    "callable or None": kind(CALLABLES, NOTHING, refused=WORD),
    "reclaimer": kind(NOTHING, {"the index"}, refused=WORD),
    "cache": kind({"the cache", "another cache"}, refused=WORD),
    "mark": kind({"the mark"}, refused=WORD),
    "policy": kind({'"lru"', "LRU"}, refused=(errors.UnknownPolicy,)),
    "dtype": kind({"torch.float16"}, refused=(errors.BadDtype,)),
    "device": kind({'"cpu"', "torch.device(cpu)"}, refused=(errors.BadDevice,)),
    "tensor": Kind(frozenset(), TENSOR, TENSORS, SOUND),
    "positions": Kind(
        frozenset(NOTHING),
        TENSOR,
        POSITIONS,
        frozenset({"right", "numpy", "negative", "not contiguous", "expanded"}),
    ),
    "bytes": kind(NOTHING, HUGE, NUMBERS, refused=COUNT),
    "dry count": kind(
        ZERO, ONES, HUGE, NUMBERS, TWO_ONES, TWO_NUMBERS, {"range(1, 3)"}, refused=COUNT
    ),
    "counts or none": kind(NOTHING, ZERO, ONES, HUGE, NUMBERS, EMPTY, refused=COUNT),
    "counts of none": kind(ZERO, ONES, HUGE, NUMBERS, EMPTY, refused=COUNT),
    "counts of one": kind(ZERO, ONES, {"[1]", "(tensor,)", "torch.tensor([1])"}, refused=COUNT),
    "busy": kind(
        *(BATCHES, SETS, OWNED, TWICE, MARKS, TWO_ONES),
        {
            "set()",
            "{1}",
            "[1]",
            "(tensor,)",
            "[-1, -1]",
            "range(1, 3)",
            "torch.tensor([1])",
            "[one, stale]",
            "[one, alien]",
        },
        refused=(errors.BadArgument, errors.ForeignHandle),
    ),
    "env ids": kind(
        *(
            NOTHING,
            EMPTY,
            TWO_ONES,
            {
                "an empty generator",
                "set()",
                "{1}",
                "[1]",
                "range(1, 3)",
                "(tensor,)",
                "torch.tensor([1])",
            },
        ),
        refused=(errors.BadArgument, errors.UnknownEnv),
    ),
    "two envs": kind(
        TWO_ONES,
        {"range(1, 3)"},
        refused=(errors.BadArgument, errors.BadCount, errors.UnknownEnv),
    ),
    "two known keys": kind(
        {"the index"},
        refused=(errors.BadArgument, errors.BadCount, errors.BadKey, errors.UnknownKey),
    ),
    "two priorities": kind(
        *(PAIRS, TWICE, OWNED, MARKS, TWO_ONES),
        {
            "range(1, 3)",
            "[None, None]",
            "[1.0, 1.0]",
            "[-1, -1]",
            "np.array([1.0, 1.0])",
            "np.array([1, None])",
            "torch.tensor([1.0, 1.0])",
            "[one, stale]",
            "[one, alien]",
            "[one, None]",
            "[float(one), float(two)]",
            "np.array(floats of handles)",
        },
        refused=(errors.BadArgument, errors.BadCount, errors.BadPriority),
    ),
    "two keys": kind(TWO_KEYS, refused=(errors.BadArgument, errors.BadKey)),
}


Run = Callable[[Scene, Any], Any]


class Case(NamedTuple):
    """One argument of a callable. `right` is the tensor that fits; `calls`: it calls the value."""

    call: str
    argument: str
    kind: str
    run: Run
    right: torch.Tensor | None = None
    calls: bool = False
    managed: bool = False


def constructed(name: str, kind: str) -> Case:
    return Case(
        "PagedKVCache",
        name,
        kind,
        lambda s, v: PagedKVCache(**{**OPTIONS, "num_pages": 1, name: v}),
    )


def managed(
    call: str, argument: str, kind: str, run: Callable[[KVCacheManager, Scene, Any], Any]
) -> Case:
    return Case(
        f"KVCacheManager.{call}",
        argument,
        kind,
        lambda s, v: run(manager_of(s), s, v),
        managed=True,
    )


def manager_of(scene: Scene) -> KVCacheManager:
    assert scene.manager is not None
    return scene.manager


def new_manager(name: str, kind: str) -> Case:
    options = {"env_count": 2}
    return Case(
        "KVCacheManager",
        name,
        kind,
        lambda s, v: KVCacheManager(**{"cache": s.cache, **options, name: v}),
    )


def new_index(name: str, kind: str) -> Case:
    return Case("CacheIndex", name, kind, lambda s, v: CacheIndex(**{"cache": s.cache, name: v}))


def scoped(scene: Scene, seqs: Any) -> list[int]:
    with scene.cache.scope() as scope:
        return scope.keep(seqs)


POSITIONS_OF_THREE = torch.tensor([[4, 5, 6], [7, 8, 9]])
POSITIONS_OF_ONE = torch.tensor([[4], [7]])
CACHE = [
    *(
        constructed(name, "size")
        for name in ("layers", "heads", "head_size", "page_size", "num_pages")
    ),
    constructed("value_head_size", "size or None"),
    constructed("max_pages", "bound"),
    constructed("max_bytes", "bytes"),
    constructed("grow", "flag"),
    constructed("dtype", "dtype"),
    constructed("device", "device"),
    Case("PagedKVCache.new", "count", "number", lambda s, v: s.cache.new(v)),
    Case("PagedKVCache.new", "start", "number", lambda s, v: s.cache.new(1, start=v)),
    Case("PagedKVCache.fork", "parents", "seqs", lambda s, v: s.cache.fork(v)),
    Case("PagedKVCache.fork", "parents with at", "seqs", lambda s, v: s.cache.fork(v, at=1)),
    Case(
        "PagedKVCache.fork", "at", "counts or None", lambda s, v: s.cache.fork([s.one, s.two], at=v)
    ),
    Case("PagedKVCache.fork", "root", "flag", lambda s, v: s.cache.fork([s.one, s.two], root=v)),
    Case("PagedKVCache.fork", "at of none", "counts or none", lambda s, v: s.cache.fork([], at=v)),
    Case("PagedKVCache.append", "seqs", "as many", lambda s, v: s.cache.append(v, KV, KV)),
    Case(
        "PagedKVCache.append",
        "keys",
        "tensor",
        lambda s, v: s.cache.append([s.one, s.two], v, KV),
        KV,
    ),
    Case(
        "PagedKVCache.append",
        "values",
        "tensor",
        lambda s, v: s.cache.append([s.one, s.two], KV, v),
        KV,
    ),
    Case(
        *("PagedKVCache.append", "positions", "positions"),
        lambda s, v: s.cache.append([s.one, s.two], KV, KV, v),
        POSITIONS_OF_THREE,
    ),
    Case("PagedKVCache.slide", "seqs", "loose", lambda s, v: s.cache.slide(v, 1)),
    Case("PagedKVCache.slide", "count", "counts", lambda s, v: s.cache.slide([s.one, s.two], v)),
    Case(
        "PagedKVCache.slide",
        "count of one",
        "counts of one",
        lambda s, v: s.cache.slide([s.one], v),
    ),
    Case(
        "PagedKVCache.slide", "count of none", "counts of none", lambda s, v: s.cache.slide([], v)
    ),
    Case("PagedKVCache.truncate", "seqs", "loose", lambda s, v: s.cache.truncate(v, 1)),
    Case(
        "PagedKVCache.truncate", "count", "counts", lambda s, v: s.cache.truncate([s.one, s.two], v)
    ),
    Case(
        "PagedKVCache.truncate",
        "count of none",
        "counts of none",
        lambda s, v: s.cache.truncate([], v),
    ),
    Case("PagedKVCache.release", "seqs", "ended", lambda s, v: s.cache.release(v)),
    Case(
        "PagedKVCache.release",
        "seqs, missing_ok",
        "ended or gone",
        lambda s, v: s.cache.release(v, missing_ok=True),
    ),
    Case(
        "PagedKVCache.release",
        "missing_ok",
        "flag",
        lambda s, v: s.cache.release([s.one], missing_ok=v),
    ),
    Case("PagedKVCache.release_subtree", "seq", "seq", lambda s, v: s.cache.release_subtree(v)),
    Case("PagedKVCache.promote", "child", "any seq", lambda s, v: s.cache.promote(v)),
    Case("PagedKVCache.parent", "seq", "any seq", lambda s, v: s.cache.parent(v)),
    Case("PagedKVCache.children", "seq", "any seq", lambda s, v: s.cache.children(v)),
    Case("PagedKVCache.descendants", "seq", "any seq", lambda s, v: s.cache.descendants(v)),
    Case("PagedKVCache.lengths", "seqs", "seqs", lambda s, v: s.cache.lengths(v)),
    Case("PagedKVCache.made_since", "mark", "mark", lambda s, v: s.cache.made_since(v)),
    Case("PagedKVCache.scope", "keep", "kept", scoped),
    Case("PagedKVCache.gather", "seqs", "seqs", lambda s, v: s.cache.gather(v)),
    Case("PagedKVCache.gather", "pad", "pad", lambda s, v: s.cache.gather([s.one], pad=v)),
    Case("PagedKVCache.gather", "reuse", "flag", lambda s, v: s.cache.gather([s.one], reuse=v)),
    Case("PagedKVCache.block_tables", "seqs", "seqs", lambda s, v: s.cache.block_tables(v)),
    Case("PagedKVCache.page_tables", "seqs", "seqs", lambda s, v: s.cache.page_tables(v)),
    Case("PagedKVCache.pages_needed", "seqs", "distinct", lambda s, v: s.cache.pages_needed(v, 1)),
    Case(
        "PagedKVCache.pages_needed",
        "forked seqs",
        "seqs",
        lambda s, v: s.cache.pages_needed(v, 1, fork=True),
    ),
    Case(
        "PagedKVCache.pages_needed",
        "count",
        "dry count",
        lambda s, v: s.cache.pages_needed([s.one, s.two], v),
    ),
    Case(
        "PagedKVCache.pages_needed",
        "count of none",
        "counts of none",
        lambda s, v: s.cache.pages_needed([], v),
    ),
    Case(
        "PagedKVCache.pages_needed",
        "fork",
        "flag",
        lambda s, v: s.cache.pages_needed([s.one], 1, fork=v),
    ),
    Case("PagedKVCache.pages_freed_by", "seqs", "a set", lambda s, v: s.cache.pages_freed_by(v)),
    Case(
        "PagedKVCache.set_reclaimer",
        "reclaimer",
        "reclaimer",
        lambda s, v: s.cache.set_reclaimer(v),
    ),
    Case("PagedKVCache.export", "seqs", "distinct", lambda s, v: len(s.cache.export(v))),
    Case(
        "PagedKVCache.export_to",
        "use",
        "callable",
        lambda s, v: s.cache.export_to(v, [s.one]),
        calls=True,
    ),
    Case("PagedKVCache.export_to", "seqs", "distinct", lambda s, v: s.cache.export_to(bool, v)),
    Case("PagedKVCache.adopt", "bundle", "bundle", lambda s, v: s.cache.adopt(v)),
    Case("PagedKVCache.look", "read", "callable", lambda s, v: s.cache.look(v), calls=True),
    Case("PagedKVCache.listen", "listener", "callable", lambda s, v: s.cache.listen(v)),
    Case("PagedKVCache.unlisten", "listener", "listener", lambda s, v: s.cache.unlisten(v)),
]
BATCH = [
    Case("PagedKVCache.open", "seqs", "seqs", lambda s, v: s.cache.open(v, 1)),
    Case("PagedKVCache.open", "room", "number", lambda s, v: s.cache.open([s.one], v)),
    Case("PagedKVCache.open", "pad", "pad", lambda s, v: s.cache.open([s.one], 1, pad=v)),
    Case(
        *("PagedKVCache.open", "rebase", "callable or None"),
        lambda s, v: s.cache.open([s.one], 1, rebase=v),
        calls=True,
    ),
    Case("Step.update", "layer", "layer", lambda s, v: s.batch.update(v, STEP, STEP)),
    Case("Step.update", "keys", "tensor", lambda s, v: s.batch.update(0, v, STEP), STEP),
    Case("Step.update", "values", "tensor", lambda s, v: s.batch.update(1, STEP, v), STEP),
    Case("Step.get", "layer", "layer", lambda s, v: s.batch.get(v)),
    Case("Step.keys", "layer", "layer", lambda s, v: s.batch.keys(v)),
    Case("Step.values", "layer", "layer", lambda s, v: s.batch.values(v)),
    Case("Step.columns", "first", "number", lambda s, v: s.batch.columns(v, 4)),
    Case("Step.columns", "end", "number", lambda s, v: s.batch.columns(0, v)),
    Case("Step.fill", "count", "number", lambda s, v: s.batch.fill(v)),
    Case("Step.commit", "slide", "counts", lambda s, v: s.batch.commit(slide=v)),
    Case(
        "Step.commit",
        "positions",
        "positions",
        lambda s, v: s.batch.commit(positions=v),
        POSITIONS_OF_ONE,
    ),
]
INDEX = [
    new_index("cache", "cache"),
    new_index("policy", "policy"),
    new_index("max_entries", "bound"),
    new_index("max_bytes", "bytes"),
    Case("CacheIndex.get", "key", "key", lambda s, v: s.index.get(v)),
    Case("CacheIndex.in", "key", "key", lambda s, v: v in s.index),
    Case("CacheIndex.pinned", "key", "key", lambda s, v: s.index.pinned(v)),
    Case("CacheIndex.put", "key", "key", lambda s, v: s.index.put(v, s.one)),
    Case("CacheIndex.put", "seq", "to put", lambda s, v: s.index.put("new", v)),
    Case("CacheIndex.put", "seq of its key", "to put again", lambda s, v: s.index.put("kept", v)),
    Case("CacheIndex.put", "priority", "priority", lambda s, v: s.index.put("new", s.one, v)),
    Case(
        "CacheIndex.put_batch",
        "keys",
        "two keys",
        lambda s, v: s.index.put_batch(v, [s.one, s.two]),
    ),
    Case(
        "CacheIndex.put_batch",
        "seqs",
        "two to put",
        lambda s, v: s.index.put_batch(["new", "newer"], v),
    ),
    Case(
        "CacheIndex.set_priorities",
        "keys",
        "two known keys",
        lambda s, v: s.index.set_priorities(v, [1, 2]),
    ),
    Case(
        "CacheIndex.set_priorities",
        "priorities",
        "two priorities",
        lambda s, v: s.index.set_priorities(["kept", "kept"], v),
    ),
    Case("CacheIndex.remove", "key", "known key", lambda s, v: s.index.remove(v)),
    Case("CacheIndex.pin", "key", "known key", lambda s, v: s.index.pin(v)),
    Case("CacheIndex.unpin", "key", "pinned key", lambda s, v: s.index.unpin(v)),
    Case("CacheIndex.victims", "keep", "busy", lambda s, v: s.index.victims(v)),
    Case("CacheIndex.reclaim", "need", "need", lambda s, v: s.index.reclaim(v)),
    Case("CacheIndex.reclaim", "busy", "busy", lambda s, v: s.index.reclaim(1, v)),
    Case("CacheIndex.reclaim", "busy, none needed", "busy", lambda s, v: s.index.reclaim(0, v)),
]
MANAGER = [
    new_manager("cache", "cache"),
    new_manager("env_count", "size"),
    *(new_manager(name, "bound") for name in ("init_entries", "recur_entries", "wm_entries")),
    *(new_manager(name, "policy") for name in ("init_policy", "recur_policy", "wm_policy")),
    managed(
        "retrieve_cache_hierarchical",
        "env_id",
        "env",
        lambda m, s, v: m.retrieve_cache_hierarchical(v, "old"),
    ),
    managed(
        "retrieve_cache_hierarchical",
        "cache_key",
        "key",
        lambda m, s, v: m.retrieve_cache_hierarchical(1, v),
    ),
    managed(
        *("retrieve_cache_hierarchical", "check_recur", "flag"),
        lambda m, s, v: m.retrieve_cache_hierarchical(1, "old", v),
    ),
    managed("get_init_cache", "env_id", "env", lambda m, s, v: m.get_init_cache(v, "x")),
    managed("get_init_cache", "key", "key", lambda m, s, v: m.get_init_cache(0, v)),
    managed("set_init_cache", "env_id", "env", lambda m, s, v: m.set_init_cache(v, "x", s.one)),
    managed("set_init_cache", "key", "key", lambda m, s, v: m.set_init_cache(0, v, s.one)),
    managed("set_init_cache", "seq", "to put", lambda m, s, v: m.set_init_cache(0, "x", v)),
    managed(
        "set_init_cache", "priority", "priority", lambda m, s, v: m.set_init_cache(0, "x", s.one, v)
    ),
    managed(
        "set_init_caches",
        "env_ids",
        "two envs",
        lambda m, s, v: m.set_init_caches(v, ["x", "y"], [s.one, s.two]),
    ),
    managed(
        "set_init_caches",
        "keys",
        "two keys",
        lambda m, s, v: m.set_init_caches([0, 1], v, [s.one, s.two]),
    ),
    managed(
        *("set_init_caches", "seqs", "two to put"),
        lambda m, s, v: m.set_init_caches([0, 1], ["x", "y"], v),
    ),
    managed(
        *("set_init_caches", "pin", "flag"),
        lambda m, s, v: m.set_init_caches([0], ["x"], [s.one], pin=v),
    ),
    managed("get_recur_cache", "key", "key", lambda m, s, v: m.get_recur_cache(v)),
    managed("set_recur_cache", "key", "key", lambda m, s, v: m.set_recur_cache(v, s.one)),
    managed("set_recur_cache", "seq", "to put", lambda m, s, v: m.set_recur_cache("x", v)),
    managed(
        "set_recur_cache", "priority", "priority", lambda m, s, v: m.set_recur_cache("x", s.one, v)
    ),
    managed(
        "set_recur_caches",
        "keys",
        "two keys",
        lambda m, s, v: m.set_recur_caches(v, [s.one, s.two]),
    ),
    managed(
        "set_recur_caches", "seqs", "two to put", lambda m, s, v: m.set_recur_caches(["x", "y"], v)
    ),
    managed("get_wm_cache", "key", "key", lambda m, s, v: m.get_wm_cache(v)),
    managed("set_wm_cache", "key", "key", lambda m, s, v: m.set_wm_cache(v, s.one)),
    managed("set_wm_cache", "seq", "to put", lambda m, s, v: m.set_wm_cache("x", v)),
    managed("set_wm_cache", "priority", "priority", lambda m, s, v: m.set_wm_cache("x", s.one, v)),
    managed("block_tables", "handles", "seqs", lambda m, s, v: m.block_tables(v)),
    managed("clear_init_caches", "env_ids", "env ids", lambda m, s, v: m.clear_init_caches(v)),
    managed("reclaim", "need", "need", lambda m, s, v: m.reclaim(v)),
    managed("reclaim", "busy", "busy", lambda m, s, v: m.reclaim(1, v)),
]
CASES: list[Case] = [*CACHE, *BATCH, *INDEX, *MANAGER]

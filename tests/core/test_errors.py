"""One test for each message: it quotes what was given and what was allowed, and nothing changed."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from mistakes import ARGUMENT, COUNT, DEVICE, DTYPE, MISTAKES, Scene, made
from tensor_mistakes import TENSOR_MISTAKES

from paged_kv import KVCacheManager, PagedKVCache, PagedKVError, errors

CASES = {**MISTAKES, **TENSOR_MISTAKES}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_and_changes_nothing(device: str, name: str) -> None:
    kind, message, call = CASES[name]
    scene = Scene(device)
    before = scene.state()
    with pytest.raises(kind, match=re.escape(message)) as caught:
        call(scene)
    assert type(caught.value) is kind
    assert isinstance(caught.value, ValueError | RuntimeError | TypeError)
    assert scene.state() == before
    scene.cache.check()
    scene.index.check()
    assert scene.cache.open_steps == 1
    scene.batch.close()
    scene.cache.release([scene.two])
    assert scene.cache.pages_free == 4


DTYPES = (
    "torch.float32, float64, float16 or bfloat16, in which tokens come and go; "
    'storage="int8" keeps them in a byte a number'
)
DEVICES = "a device of this machine that holds data, as 'cpu' or 'cuda:0'"
OPTIONS: dict[str, tuple[type[PagedKVError], str, dict[str, Any]]] = {
    "layers": (COUNT, "layers is 0, allowed is an int >= 1", {"layers": 0}),
    "heads": (COUNT, "heads is -1, allowed is an int >= 1", {"heads": -1}),
    "storage": (ARGUMENT, 'storage is 8, allowed is "exact" or "int8"', {"storage": 8}),
    "head size": (COUNT, "head_size is 1.5, allowed is an int >= 1", {"head_size": 1.5}),
    "value head size": (
        COUNT,
        "value_head_size is 0, allowed is an int >= 1",
        {"value_head_size": 0},
    ),
    "page size": (COUNT, "page_size is 0, allowed is an int >= 1", {"page_size": 0}),
    "pages": (COUNT, "num_pages is 0, allowed is an int >= 1", {"num_pages": 0}),
    "page limit": (
        COUNT,
        "max_pages is 3, allowed is None or an int >= num_pages = 4",
        {"max_pages": 3},
    ),
    "growing page limit": (
        COUNT,
        "max_pages is 3, allowed is None or an int >= num_pages = 4",
        {"max_pages": 3, "grow": True},
    ),
    "byte limit": (
        COUNT,
        "max_bytes is 9, allowed is None or an int >= num_pages * page_bytes = 1536",
        {"max_bytes": 9},
    ),
    "no bytes": (COUNT, "max_bytes is -1, allowed is None or an int >= 0", {"max_bytes": -1}),
    "grow": (ARGUMENT, "grow is 1, allowed is True or False", {"grow": 1}),
    "dtype": (DTYPE, f"the cache has dtype torch.int64, expected {DTYPES}", {"dtype": torch.int64}),
    "int8": (DTYPE, "the cache has dtype torch.int8, expected", {"dtype": torch.int8}),
    "fp8": (
        DTYPE,
        f"the cache has dtype torch.float8_e4m3fn, expected {DTYPES}",
        {"dtype": torch.float8_e4m3fn},
    ),
    "other fp8": (
        DTYPE,
        "the cache has dtype torch.float8_e5m2, expected",
        {"dtype": torch.float8_e5m2},
    ),
    "complex": (DTYPE, "the cache has dtype torch.complex64, expected", {"dtype": torch.complex64}),
    "bool": (DTYPE, "the cache has dtype torch.bool, expected", {"dtype": torch.bool}),
    "no dtype": (DTYPE, f"the cache has dtype float32, expected {DTYPES}", {"dtype": "float32"}),
    "meta": (DEVICE, f"the cache is on device meta, expected {DEVICES}", {"device": "meta"}),
    "nonsense": (
        DEVICE,
        f"the cache is on device nonsense, expected {DEVICES}",
        {"device": "nonsense"},
    ),
    "no device": (DEVICE, "the cache is on device None, expected", {"device": None}),
    "device far away": (DEVICE, "the cache is on device cuda:99, expected", {"device": "cuda:99"}),
}
if not torch.cuda.is_available():
    OPTIONS["cuda"] = (
        DEVICE,
        f"the cache is on device cuda, expected {DEVICES}",
        {"device": "cuda"},
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_that_cannot_be_is_refused(name: str) -> None:
    kind, message, options = OPTIONS[name]
    with pytest.raises(kind, match=re.escape(message)):
        made(**options)


def test_nobody_guesses_the_size_of_a_page() -> None:
    with pytest.raises(TypeError, match="page_size"):
        PagedKVCache(layers=1, heads=1, head_size=3)  # type: ignore[call-arg]


def test_what_holds_pages_cannot_be_copied(device: str) -> None:
    scene = Scene(device)
    manager = KVCacheManager(scene.cache, 1)
    before = scene.state()
    holders = [scene.cache, scene.index, manager, manager.init_pools[0], scene.batch]
    for holder, calls in ((holder, (copy.copy, copy.deepcopy, pickle.dumps)) for holder in holders):
        for call in calls:
            words = f"a {type(holder).__name__} cannot be copied or pickled"
            with pytest.raises(errors.NotCopyable, match=words) as caught:
                call(holder)
            assert isinstance(caught.value, TypeError)
            assert caught.value.kind == type(holder).__name__
            assert "snapshots keep them in a folder" in str(caught.value)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(errors.NotCopyable):
                pickle.dumps({"holder": holder}, protocol)
    assert scene.state() == before
    scene.index.check()
    manager.check()


def test_figures_and_contexts_can_be_copied(device: str) -> None:
    scene = Scene(device)
    for value in (scene.cache.stats, scene.index.stats, scene.cache.lengths([scene.one])):
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value
    context = scene.cache.gather([scene.one])
    for part, same in zip(context, copy.deepcopy(context)):
        assert torch.equal(part, same)

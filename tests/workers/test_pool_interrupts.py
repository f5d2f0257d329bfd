"""Whatever breaks off a call of a pool, at any of its lines, leaves a pool that works: nodes that
say what they should, workers that hold these and no others, nobody that runs after `close`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import pytest
import torch
from in_process import InProcess
from interrupts import ERRORS, traced
from line_breaks import Breaker, Line
from pool_models import a_pool, make_llama

from paged_kv.errors import BadArgument, NotPinned, ReleasedNode
from paged_kv.integrations import ray
from paged_kv.integrations.huggingface import PagedLM
from paged_kv.integrations.ray import PoolNode, SearchPool

FOLDER = str(Path(ray.__file__).parent)
ELSEWHERE = ("worker.py", "held_trees.py", "tape.py")
OTHERS = (*ELSEWHERE, "weights.py")  # which has no state
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [3, 4]]


class Scene(NamedTuple):
    """What was made before a call."""

    pool: SearchPool
    engine: InProcess
    roots: list[PoolNode]
    kids: list[PoolNode]


def dropped(scene: Scene) -> None:
    scene.kids.clear()
    scene.pool.logits(scene.roots)


def brought_back(scene: Scene) -> None:
    scene.engine.living()[0].dead = True
    scene.pool.sample(scene.roots, max_new_tokens=1)


def retired(scene: Scene) -> None:
    scene.pool.retire(scene.pool.stats().workers[0].worker)


def recorded(scene: Scene) -> None:
    with scene.pool.record(Path(mkdtemp()) / "run"):
        scene.pool.stats()


def recorded_again(scene: Scene) -> None:
    with scene.pool.record(Path(mkdtemp()) / "run"):
        brought_back(scene)


def make_small() -> Any:
    """One layer: all that is done here is done hundreds of times."""
    model = make_llama()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


ORACLE = PagedLM(make_small(), progress=False, max_bytes=10**6)
WEIGHTS = ORACLE.model.state_dict()
CALLS: dict[str, Callable[[Scene], object]] = {
    "prefill": lambda s: s.pool.prefill(PROMPTS, seed=3),
    "sample": lambda s: s.pool.sample(s.kids, max_new_tokens=2, num_return_sequences=2),
    "extend": lambda s: s.pool.extend(s.kids, [[3], [4, 5], [6]]),
    "crop": lambda s: s.pool.crop(s.kids, [2, 2, 2]),
    "score": lambda s: s.pool.score(s.kids, [[3], [4, 5], [6]]),
    "promote": lambda s: s.pool.promote(s.kids[0]),
    "release": lambda s: s.pool.release(s.roots),
    "pin": lambda s: s.pool.pin(s.kids),
    "unpin": lambda s: s.pool.unpin(s.roots),
    "move": lambda s: s.pool.move(s.kids[0].tree, 1 - s.kids[0].worker),
    "update": lambda s: s.pool.update(WEIGHTS),
    "snapshot": lambda s: s.pool.snapshot(),
    "drop": dropped,
    "bring back": brought_back,
    "retire": retired,
    "record": recorded,
    "record again": recorded_again,
}


def prepared() -> Scene:
    pool, engine = a_pool(2, make_model=make_small, rows=1, snapshot_every=4, restarts=1)
    roots = pool.prefill(PROMPTS, seed=5)
    pool.pin(roots)
    kids = pool.sample(roots, max_new_tokens=2)
    return Scene(pool, engine, roots, kids)


def lines(call: Callable[[Scene], object]) -> list[Line]:
    """All lines that a call passes."""
    scene = prepared()
    breaker = Breaker(FOLDER, OTHERS)
    with traced(breaker):
        call(scene)
    return list(breaker.met)


def broken(call: Callable[[Scene], object], line: Line, error: type[BaseException]) -> None:
    """Break a call off, and see that all goes on."""
    scene = prepared()
    breaker = Breaker(FOLDER, OTHERS, line, error)
    try:
        with traced(breaker):
            call(scene)
    except (error, BadArgument) as raised:  # which says that something could not be pickled
        assert error is not KeyboardInterrupt or isinstance(raised, error)
        traceback.clear_frames(raised.__traceback__)
        raised.__traceback__ = None
    about = f"{Path(line[0].co_filename).name}:{line[1]} ({error.__name__})"
    assert breaker.fired, about
    works(scene, about)
    with suppress(ReleasedNode, NotPinned, BadArgument):  # of what the call had done before
        call(scene)
    ends(scene, about)


def said(pool: SearchPool, nodes: list[PoolNode]) -> list[PoolNode]:
    """Those of these nodes that were not released, after a look at what they say."""
    alive = []
    rows = []
    for node in nodes:
        with suppress(ReleasedNode):
            rows += list(pool.logits([node]))
            alive.append(node)
    if alive:
        expected = ORACLE.next_token_logprobs([node.tokens for node in alive])
        found = torch.stack(rows).log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    return alive


def works(scene: Scene, about: str) -> None:
    """Nodes say what they should, and workers hold no others."""
    pool = scene.pool
    alive = said(pool, [*scene.roots, *scene.kids])
    pool.prefill(PROMPTS)  # asks both workers, and leaves nothing behind
    pool.snapshot()
    stats = pool.stats()
    assert stats.nodes == stats.merged.nodes == len(alive), about
    assert stats.trees == len({node.tree for node in alive}), about
    assert stats.trees == sum(worker.trees for worker in stats.workers), about
    assert len(scene.engine.living()) == len(stats.workers), about


def unpinned(pool: SearchPool, nodes: list[PoolNode]) -> None:
    for node in nodes:
        with suppress(ReleasedNode, NotPinned):
            for _ in range(3):
                pool.unpin([node])


def ends(scene: Scene, about: str) -> None:
    """What is pinned can be unpinned as often, and nothing is left at the end."""
    pool = scene.pool
    unpinned(pool, [*scene.roots, *scene.kids])
    scene.roots.clear()
    scene.kids.clear()
    pool.snapshot()
    stats = pool.stats()
    assert (stats.nodes, stats.trees) == (0, 0), about
    assert stats.merged.nodes == 0, about
    pool.close()
    assert not scene.engine.living(), about


@pytest.fixture(scope="module")
def seen() -> set[Line]:
    """Lines at which some call was broken off."""
    return set()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_broken_off_leaves_a_pool_that_works(name: str, seen: set[Line]) -> None:
    found = [line for line in lines(CALLS[name]) if line not in seen]
    for index, line in enumerate(found):
        broken(CALLS[name], line, ERRORS[index % len(ERRORS)])
    seen.update(found)

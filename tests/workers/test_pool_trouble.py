"""A pool in the hands of a careless caller, and with workers in trouble: in this process."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from in_process import DIES_BEFORE, FINE, Answer, InProcess
from pool_models import ROOM, a_lm, a_pool, make_llama, other_weights

from paged_kv.errors import (
    BadArgument,
    ClosedPool,
    ConcurrentCall,
    NestedCall,
    NotPinned,
    OutOfPages,
    ReleasedNode,
    WorkerLost,
)
from paged_kv.integrations.ray import PoolNode, SearchPool
from paged_kv.integrations.ray.worker import Recipe

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [3, 4], [12, 13, 14]]
PAGE = a_lm().pages.page_bytes


class Unsendable:
    """A processor that cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


class Unreadable:
    """A processor that cannot be read where it arrives."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return __import__, ("no_such_module_here",)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


def agrees(pool: SearchPool, nodes: list[PoolNode]) -> None:
    """What is said of nodes is what one lm says of their paths, and workers hold these alone."""
    expected = a_lm().next_token_logprobs([node.tokens for node in nodes])
    found = pool.logits(nodes).log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert pool.stats().nodes == pool.stats().merged.nodes


# -- who may call


def test_a_closed_pool_is_refused_by_name_and_hires_nobody() -> None:
    pool, engine = a_pool(2)
    roots = pool.prefill(PROMPTS)
    pool.close()
    pool.close()
    calls: list[Callable[[], object]] = [
        lambda: pool.prefill(PROMPTS),
        lambda: pool.sample(roots, max_new_tokens=1),
        lambda: pool.release(roots),
        lambda: pool.move(roots[0].tree, 0),
        lambda: pool.retire(0),
        lambda: pool.update(other_weights()),
        pool.snapshot,
    ]
    for call in calls:
        with pytest.raises(ClosedPool, match="it was closed"):
            call()
    assert not engine.living()
    assert pool.stats().trees == 4


def test_a_pool_that_closes_during_a_call_hires_nobody() -> None:
    def closing(done: int, of: int) -> None:
        if pools:
            pools[0].close()

    pools: list[SearchPool] = []
    pool, engine = a_pool(2, rows=1, progress=closing)
    roots = pool.prefill(PROMPTS)
    pools.append(pool)
    with pytest.raises(ClosedPool):
        pool.sample(roots, max_new_tokens=1)
    assert not engine.living()


def test_an_engine_that_is_gone_is_told() -> None:
    pool, engine = a_pool(2)
    roots = pool.prefill(PROMPTS)
    engine.gone = True
    with pytest.raises(ClosedPool, match="shut down"):
        pool.sample(roots, max_new_tokens=1)
    pool.close()


def test_calls_from_inside_and_from_other_threads_are_refused() -> None:
    seen: list[str] = []

    def meddle(done: int, of: int) -> None:
        if not roots:
            return
        assert pool.stats().trees == 4
        with pytest.raises(NestedCall, match="logits"):
            pool.logits(roots)

        def elsewhere() -> None:
            try:
                pool.logits(roots)
            except ConcurrentCall as error:
                seen.append(str(error))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    roots: list[PoolNode] = []
    pool, _ = a_pool(2, progress=meddle)
    roots += pool.prefill(PROMPTS)
    kids = pool.sample(roots, max_new_tokens=2)
    assert len(seen) == 2
    agrees(pool, [*roots, *kids])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_fork_cannot_use_or_end_the_pool() -> None:
    pool, engine = a_pool(2)
    roots = pool.prefill(PROMPTS)
    child = os.fork()
    if not child:
        fine = 1
        try:
            with pytest.raises(ClosedPool, match="forked"):
                pool.logits(roots)
            pool.close()
            fine = 0 if engine.living() and not engine.closed else 2
        finally:
            os._exit(fine)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    agrees(pool, roots)


# -- what callers hand over


def test_what_cannot_be_pickled_or_read_is_refused_and_nothing_else_happens() -> None:
    pool, engine = a_pool(2)
    roots = pool.prefill(PROMPTS)
    before = len(engine.calls)
    with pytest.raises(BadArgument, match="cannot pickle '_thread\\.lock'"):
        pool.sample(roots, max_new_tokens=1, logits_processor=[Unsendable()])
    with pytest.raises(BadArgument, match="can be pickled"):
        pool.extend(roots, [[5], [6], [7], [threading.Lock()]])
    assert {call.verb for call in engine.calls[before:]} == {"keep"}
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
        pool.sample(roots, max_new_tokens=1, logits_processor=[Unreadable()])
    agrees(pool, [*roots, *pool.sample(roots, max_new_tokens=1)])
    assert pool.stats().restarts == 0


def test_numbers_of_any_library_do_and_bools_do_not() -> None:
    one = np.int64(1)
    pool, _ = a_pool(np.int64(2), rows=one, in_flight=one, snapshot_every=one, restarts=one)  # type: ignore[arg-type]
    roots = pool.prefill(np.array([[5, 6], [7, 8]]), seed=np.int64(3))  # type: ignore[arg-type]
    agrees(pool, [*roots, *pool.sample(roots, max_new_tokens=one)])
    pool.move(np.int64(roots[0].tree), np.int64(1))  # type: ignore[arg-type]
    for value in (True, 1.0, "1", [1], None):
        with pytest.raises(BadArgument, match="worker"):
            pool.retire(value)  # type: ignore[arg-type]
        with pytest.raises(BadArgument, match="worker"):
            pool.move(roots[0].tree, value)  # type: ignore[arg-type]
        with pytest.raises(BadArgument, match="tree"):
            pool.worker(value)  # type: ignore[arg-type]
    for name in ("rows", "in_flight", "snapshot_every", "threads"):
        for value in (True, 0, -1, 1.5):
            with pytest.raises(BadArgument, match=name):
                a_pool(1, **{name: value})  # type: ignore[arg-type]


def test_options_that_no_worker_can_have_are_refused() -> None:
    engine = InProcess(Recipe(make_llama, {}, 1, 1))
    for options in (3, [("page_size", 2)], {"progress": True}):
        with pytest.raises(BadArgument, match="options"):
            SearchPool(make_llama, 1, options=options, engine=engine)  # type: ignore[arg-type]
    assert not engine.actors
    pool, _ = a_pool(1)
    roots = pool.prefill(PROMPTS)
    with pytest.raises(BadArgument, match="output_scores"):
        pool.sample(roots, max_new_tokens=1, output_scores=True)
    pool.sample(roots, max_new_tokens=1, output_scores=False)
    with pytest.raises(BadArgument, match="no_such_option"):
        pool.sample(roots, max_new_tokens=1, no_such_option=1)


@pytest.mark.parametrize("made", [None, 3, torch.nn.Linear(2, 2), torch.nn.Identity()])
def test_what_is_no_model_is_told(made: object) -> None:
    with pytest.raises(WorkerLost, match="model"):
        a_pool(1, make_model=Makes(made))
    with pytest.raises(WorkerLost, match="model"):
        a_pool(1, make_model=Makes(made), lm={"max_bytes": None})


class Makes:
    """Makes something."""

    def __init__(self, made: object) -> None:
        self.made = made

    def __call__(self) -> object:
        return self.made


def test_pins_are_counted_and_one_too_many_changes_none() -> None:
    pool, _ = a_pool(2)
    roots = pool.prefill(PROMPTS)
    pool.pin([*roots, roots[0]])
    pool.unpin(roots)
    with pytest.raises(NotPinned):
        pool.unpin(roots)
    pool.unpin(roots[:1])
    with pytest.raises(NotPinned):
        pool.unpin(roots[:1])


def test_pins_outlive_who_dies_after_a_snapshot() -> None:
    pool, engine = a_pool(1)
    roots = pool.prefill(PROMPTS)
    pool.snapshot()
    pool.pin(roots)
    pool.snapshot()
    pool.unpin(roots[:1])
    pool.snapshot()
    engine.living()[0].dead = True
    pool.pin(roots[:1])
    pool.unpin(roots)
    with pytest.raises(NotPinned):
        pool.unpin(roots[:1])
    assert pool.stats().restarts == 1


def test_who_cannot_pin_all_pins_none() -> None:
    pool, _ = a_pool(2, lm={"max_bytes": 20 * PAGE})
    small, large = pool.prefill([[5] * 4, [6] * 4], seed=1)
    pool.move(large.tree, 1 - small.worker)
    pool.pin([large])
    (grown,) = pool.fork([large], [[7] * 60])
    with pytest.raises(OutOfPages):
        pool.pin([small, grown])
    pool.logits([small, large])
    with pytest.raises(NotPinned):
        pool.unpin([small])
    pool.unpin([large])
    pool.extend([small], [[5] * 30])  # as much as there is room for, if it is not pinned


def test_a_call_that_failed_holds_no_nodes() -> None:
    pool, _ = a_pool(2)
    roots = pool.prefill(PROMPTS)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(BadArgument):
            pool.extend(roots, [[5], [6], [7], [99]])
        roots.clear()
        pool.snapshot()
        assert pool.stats().nodes == pool.stats().merged.nodes == 0
    finally:
        gc.enable()


# -- trees


@pytest.mark.parametrize("how", ["move", "die"])
def test_siblings_go_though_their_root_is_gone_and_they_came_from_elsewhere(how: str) -> None:
    pool, engine = a_pool(2, snapshot_every=1)
    (root,) = pool.prefill([[5, 6, 7]], seed=1)
    first, second = pool.sample([root] * 2, max_new_tokens=2)
    below, other = pool.sample([first, second], max_new_tokens=2)
    pool.release([root])
    pool.snapshot()
    if how == "move":
        pool.move(first.tree, 1 - first.worker)
    else:
        for actor in engine.living():
            actor.dead = True
    assert pool.promote(first) == 2
    agrees(pool, [first, below])
    for gone in (second, other):
        with pytest.raises(ReleasedNode):
            pool.logits([gone])


def test_promoting_twice_or_a_root_releases_no_more() -> None:
    pool, _ = a_pool(2)
    (root,) = pool.prefill([[5, 6, 7]], seed=1)
    kids = pool.sample([root] * 2, max_new_tokens=2)
    assert pool.promote(root) == 0
    assert pool.promote(kids[0]) == 2
    assert pool.promote(kids[0]) == 0
    agrees(pool, kids[:1])


def test_trees_do_not_move_to_and_fro_for_ever() -> None:
    """Two that cannot grow anywhere, and room for either beside a third."""
    pool, _ = a_pool(2, lm={"max_bytes": 50 * PAGE})
    roots = pool.prefill([[n] * 30 for n in range(5, 8)], seed=3)
    for root, worker in zip(roots, (0, 0, 1)):
        pool.move(root.tree, worker)
    pool.pin(roots)
    before = pool.stats().moved
    with pytest.raises(OutOfPages):
        pool.extend(roots, [[9] * 90] * 3)
    assert pool.stats().moved - before <= 3
    agrees(pool, roots)


def test_a_retirement_that_fails_leaves_all_where_it_was_or_went() -> None:
    pool, engine = a_pool(2, lm={"max_bytes": 40 * PAGE})
    roots = pool.prefill([[n] * 30 for n in range(5, 9)], seed=3)
    for root, worker in zip(roots, (0, 0, 1, 1)):
        pool.move(root.tree, worker)
    pool.pin(roots)
    with pytest.raises(OutOfPages):
        pool.retire(0)
    assert [worker.worker for worker in pool.stats().workers] == [0, 1]
    agrees(pool, roots)
    pool.release(roots[2:])
    pool.unpin(roots[:2])
    pool.retire(0)
    assert {root.worker for root in roots[:2]} == {1}
    assert len(engine.living()) == 1
    agrees(pool, roots[:2])


# -- workers


class Backwards(InProcess):
    """An engine that sees the latest answer first."""

    def wait(self, refs: Any, seconds: float) -> list[Answer]:
        return super().wait(list(reversed(refs)), seconds)


def test_answers_are_told_apart_whatever_comes_first() -> None:
    engine = Backwards(Recipe(make_llama, {"max_bytes": ROOM}, 1, 2))
    pool = SearchPool(make_llama, 2, engine=engine, rows=1, in_flight=3)
    roots = pool.prefill(PROMPTS, seed=2)
    lm = a_lm()
    others = lm.sample(lm.prefill(PROMPTS, seed=2) * 3, max_new_tokens=3)
    kids = pool.sample(roots * 3, max_new_tokens=3)
    assert [kid.tokens for kid in kids] == [other.tokens for other in others]


def test_while_one_is_brought_back_others_are_not_said_to_hang() -> None:
    clocks: list[InProcess] = []

    def fate(verb: str) -> str:
        if clocks and verb == "hello":
            clocks[0].clock += 100
        return FINE

    pool, engine = a_pool(2, fate=fate, timeout=7)
    roots = pool.prefill(PROMPTS)
    clocks.append(engine)
    engine.living()[0].dead = True
    pool.sample(roots, max_new_tokens=1)
    assert pool.stats().restarts == 1


def test_a_call_that_kills_whoever_tries_it_is_not_tried_for_ever() -> None:
    pool, engine = a_pool(2, restarts=2)
    roots = pool.prefill(PROMPTS, seed=1)
    engine.fate = lambda verb: DIES_BEFORE if verb == "sample" else FINE
    with pytest.raises(WorkerLost):
        pool.sample(roots, max_new_tokens=2)
    agrees(pool, [*roots, *pool.extend(roots, [[5]] * 4)])
    engine.fate = lambda verb: FINE
    agrees(pool, [*roots, *pool.sample(roots, max_new_tokens=2)])


def test_who_cannot_be_made_the_second_time_comes_as_soon_as_it_can() -> None:
    makes = Falters()
    pool, engine = a_pool(2, make_model=makes)
    roots = pool.prefill(PROMPTS, seed=1)
    Falters.falters = True
    try:
        engine.living()[0].dead = True
        for _ in range(2):
            with pytest.raises(WorkerLost, match="not now"):
                pool.sample(roots, max_new_tokens=2)
        assert len(engine.living()) == 1
    finally:
        Falters.falters = False
    agrees(pool, [*roots, *pool.sample(roots, max_new_tokens=2)])


class Falters:
    """Makes a model, but not always."""

    falters = False

    def __call__(self) -> Any:
        if Falters.falters:
            raise OSError("not now")
        return make_llama()


def test_who_is_lost_during_an_update_gets_the_weights_when_it_comes_back() -> None:
    pool, engine = a_pool(2)
    roots = pool.prefill(PROMPTS, seed=1)
    weights = other_weights()
    engine.fate = lambda verb: DIES_BEFORE if verb == "fits" else FINE
    with pytest.raises(WorkerLost):
        pool.update(weights)
    assert pool.stats().version == 0
    engine.fate = lambda verb: FINE
    agrees(pool, roots)
    engine.fate = lambda verb: DIES_BEFORE if verb == "weights" else FINE
    assert pool.update(weights) == 1
    engine.fate = lambda verb: FINE
    lm = a_lm()
    lm.model.load_state_dict(weights)
    expected = lm.logits(lm.prefill(PROMPTS))
    torch.testing.assert_close(pool.logits(roots), expected, atol=1e-4, rtol=1e-4)


def test_what_was_asked_for_comes_though_a_worker_is_lost_afterwards() -> None:
    pool, engine = a_pool(2, snapshot_every=1, restarts=1)
    roots = pool.prefill(PROMPTS, seed=1)
    engine.fate = lambda verb: DIES_BEFORE if verb == "save" else FINE
    kids = pool.sample(roots, max_new_tokens=2)
    with pytest.raises(WorkerLost):
        pool.snapshot()
    engine.fate = lambda verb: FINE
    agrees(pool, [*roots, *kids])


def test_a_snapshot_that_fails_is_told_and_what_was_asked_for_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from paged_kv.integrations.huggingface import PagedLM

    pool, _ = a_pool(2, snapshot_every=1)
    roots = pool.prefill(PROMPTS, seed=1)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no room for a snapshot")

    with monkeypatch.context() as patched:
        patched.setattr(PagedLM, "export", full)
        with pytest.warns(RuntimeWarning, match="no room for a snapshot"):
            kids = pool.sample(roots, max_new_tokens=2)
        with pytest.raises(MemoryError, match="no room"):
            pool.snapshot()
    agrees(pool, [*roots, *kids])

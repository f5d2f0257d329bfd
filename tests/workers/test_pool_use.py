"""A pool of workers in this process: order, bounds, memory, weights, and mistakes."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from copy import copy, deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from in_process import DIES_AFTER, DIES_BEFORE, FINE, HANGS
from pool_models import ROOM, a_lm, a_pool, make_llama, other_weights

from paged_kv.errors import (
    BadArgument,
    BadCount,
    ForeignNode,
    NotCopyable,
    NotPinned,
    OutOfPages,
    ReleasedNode,
    WeightsChanged,
    WorkerLost,
)
from paged_kv.integrations.ray import SearchPool

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [3, 4], [12, 13, 14]]
PAGE = a_lm().pages.page_bytes


def raises() -> Any:
    raise ValueError("no such weights")


def interrupted(done: int, of: int) -> None:
    raise KeyboardInterrupt


def test_results_are_those_of_one_lm_in_the_order_of_the_nodes() -> None:
    pool, _ = a_pool(3)
    lm = a_lm()
    roots = pool.prefill(PROMPTS, seed=2)
    others = lm.prefill(PROMPTS, seed=2)
    order = [3, 0, 2, 1, 0, 3]
    for _ in range(3):
        kids = pool.sample([roots[place] for place in order], max_new_tokens=3)
        twins = lm.sample([others[place] for place in order], max_new_tokens=3)
        assert [kid.tokens for kid in kids] == [twin.tokens for twin in twins]
        assert [kid.tree for kid in kids] == [roots[place].tree for place in order]
        roots = kids
        others = twins


def test_one_call_is_one_message_to_each_worker() -> None:
    pool, engine = a_pool(2)
    roots = pool.prefill(PROMPTS)
    assert {root.worker for root in roots} == {0, 1}
    before = len(engine.calls)
    pool.sample(roots * 4, max_new_tokens=2)
    assert len(engine.calls) == before + 2


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_messages_under_way_are_bounded(in_flight: int) -> None:
    told: list[tuple[int, int]] = []
    pool, engine = a_pool(
        2, rows=1, in_flight=in_flight, progress=lambda done, of: told.append((done, of))
    )
    roots = pool.prefill(PROMPTS)
    told.clear()
    kids = pool.sample(roots * 4, max_new_tokens=1)
    assert [kid.tree for kid in kids] == [root.tree for root in roots * 4]
    assert engine.most_waiting == in_flight
    assert told == [(row + 1, 16) for row in range(16)]


@pytest.mark.parametrize("fate", [DIES_BEFORE, DIES_AFTER, HANGS])
@pytest.mark.parametrize("moment", range(12))
def test_who_dies_or_hangs_is_brought_back(fate: str, moment: int) -> None:
    """Wherever it is: in the first call, a snapshot, a move, while it is brought back."""
    count = Counter[str]()

    def fates(verb: str) -> str:
        count["calls"] += 1
        return fate if count["calls"] in (moment + 3, moment + 5) else FINE

    results = []
    for chosen in (fates, lambda verb: FINE):
        pool, engine = a_pool(2, fate=chosen, snapshot_every=3, timeout=7)
        roots = pool.prefill(PROMPTS, seed=4)
        kids = pool.sample(roots, max_new_tokens=2)
        pool.move(roots[0].tree, 1 - roots[0].worker)
        kids = pool.sample(kids * 2, max_new_tokens=2)
        pool.promote(kids[0])
        left = [kids[0], *(kid for kid in kids if kid.tree != kids[0].tree)]
        results.append([kid.tokens for kid in pool.sample(left, max_new_tokens=2)])
        assert len(engine.living()) == 2
    assert results[0] == results[1]


def test_snapshots_shorten_what_is_repeated() -> None:
    pool, engine = a_pool(1, snapshot_every=4)
    (root,) = pool.prefill([PROMPTS[0]])
    for _ in range(10):
        pool.sample([root], max_new_tokens=1)
    engine.living()[0].dead = True
    before = len(engine.calls)
    pool.sample([root], max_new_tokens=1)
    assert len(engine.calls) - before <= 6  # one dies, four at most again, a snapshot


def test_who_dies_again_and_again_is_lost_and_others_go_on() -> None:
    doomed: set[int] = set()
    pool, engine = a_pool(2, restarts=2)
    roots = pool.prefill(PROMPTS, seed=1)
    first = [root for root in roots if root.worker == 0]
    second = [root for root in roots if root.worker == 1]
    doomed.add(id(engine.actors[0]))
    engine.actors[0].dead = True
    engine.fate = lambda verb: DIES_BEFORE if verb == "hello" else FINE
    with pytest.raises(WorkerLost, match="worker 0 is lost after 2 restarts") as caught:
        pool.sample(roots, max_new_tokens=2)
    assert caught.value.worker == 0
    pool.sample(second, max_new_tokens=2)
    engine.fate = lambda verb: FINE
    pool.sample(first, max_new_tokens=2)  # it comes back as soon as it can
    assert pool.stats().restarts == 3


def test_an_interrupt_leaves_a_pool_that_goes_on() -> None:
    pool, _ = a_pool(2)
    roots = pool.prefill(PROMPTS, seed=1)
    nodes = pool.stats().merged.nodes
    broken, _ = a_pool(2, progress=interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken.prefill(PROMPTS)
    assert broken.stats().trees == 0
    pool.sample(roots, max_new_tokens=2)
    pool.logits(roots)
    assert pool.stats().merged.nodes == nodes


def test_what_is_dropped_here_is_dropped_there() -> None:
    pool, _ = a_pool(2)
    roots = pool.prefill(PROMPTS)
    kids = pool.sample(roots, max_new_tokens=2)
    del kids
    pool.logits(roots)
    assert pool.stats().merged.nodes == len(roots)
    gone = roots.pop()
    pool.release([gone])
    assert (pool.stats().trees, pool.stats().nodes) == (3, 3)
    with pytest.raises(ReleasedNode):
        pool.sample([gone], max_new_tokens=1)


def test_a_tree_moves_away_where_pages_run_short() -> None:
    """Pinned trees cannot be evicted: one has to go before the other can grow."""
    room = 40 * PAGE
    pool, _ = a_pool(2, lm={"max_bytes": room})
    roots = pool.prefill([[5] * 20, [6] * 20, [7] * 20, [8] * 2], seed=3)
    home = roots[0].worker
    for root in roots[:3]:
        pool.move(root.tree, home)
    pool.move(roots[3].tree, 1 - home)
    pool.pin(roots[:3])
    kids = pool.extend(roots[:1], [[9] * 40])
    assert len(kids[0].tokens) == 60
    stats = pool.stats()
    assert stats.moved > 3 - 2
    assert {root.worker for root in roots} == {0, 1}
    lm = a_lm()
    (expected,) = lm.prefill([[5] * 20 + [9] * 40])
    torch.testing.assert_close(pool.logits(kids)[0], expected.logits, atol=1e-4, rtol=1e-4)


def test_what_fits_nowhere_is_out_of_pages_and_changes_nothing() -> None:
    pool, _ = a_pool(2, lm={"max_bytes": 20 * PAGE})
    (root,) = pool.prefill([[5] * 10])
    pool.pin([root])
    with pytest.raises(OutOfPages):
        pool.extend([root], [[6] * 60])
    pool.extend([root], [[6]])
    assert (pool.stats().moved, pool.stats().merged.nodes) == (0, 2)  # the child is dropped next


def test_evictions_move_the_coldest_tree_to_who_has_room() -> None:
    pool, _ = a_pool(2, lm={"max_bytes": 40 * PAGE})
    roots = pool.prefill([[n] * 16 for n in range(5, 9)], seed=3)
    home = roots[0].worker
    for root in roots:
        pool.move(root.tree, home)
    moved = pool.stats().moved
    kids = pool.sample(roots[1:] * 3, max_new_tokens=8)
    assert pool.stats().moved > moved
    assert {root.worker for root in roots} == {0, 1}
    assert len(kids) == 9


def test_a_mistake_in_one_worker_makes_no_node_in_any() -> None:
    pool, _ = a_pool(2)
    roots = pool.prefill(PROMPTS)
    with pytest.raises(BadArgument, match="0 to 60"):
        pool.extend(roots, [[5], [6], [7], [99]])
    pool.logits(roots)
    assert pool.stats().merged.nodes == len(roots)
    with pytest.raises(NotPinned):
        pool.unpin(roots[:1])


def test_errors_of_a_callers_own_functions_come_back() -> None:
    pool, _ = a_pool(2)
    roots = pool.prefill(PROMPTS)
    with pytest.raises(ValueError, match="no such weights"):
        pool.sample(roots, max_new_tokens=2, logits_processor=[Broken()])
    pool.sample(roots, max_new_tokens=2)


class Broken:
    """A processor that raises."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such weights")


def test_other_weights_are_used_at_once_and_old_contexts_never() -> None:
    pool, engine = a_pool(2, snapshot_every=2)
    lm = a_lm()
    roots = pool.prefill(PROMPTS, seed=1)
    others = lm.prefill(PROMPTS, seed=1)
    for turn in range(3):
        kids = pool.sample(roots, max_new_tokens=3)
        assert [k.tokens for k in kids] == [k.tokens for k in lm.sample(others, max_new_tokens=3)]
        weights = other_weights() if turn % 2 == 0 else make_llama().state_dict()
        assert pool.update(weights) == turn + 1
        lm.model.load_state_dict(weights)
        assert pool.stats().merged.pages == 0
        torch.testing.assert_close(pool.logits(roots), lm.logits(others), atol=1e-4, rtol=1e-4)
        for actor in engine.living():
            actor.dead = True  # whoever comes back has the new weights, too
        torch.testing.assert_close(pool.logits(kids), _logits(lm, kids), atol=1e-4, rtol=1e-4)


def _logits(lm: Any, nodes: Any) -> torch.Tensor:
    return lm.logits(lm.prefill([node.tokens for node in nodes]))


def test_weights_may_be_refused_while_there_are_contexts() -> None:
    pool, _ = a_pool(2, weights="refuse")
    roots = pool.prefill(PROMPTS)
    with pytest.raises(WeightsChanged, match="4 contexts"):
        pool.update(other_weights())
    pool.release(roots)
    assert pool.update(other_weights()) == 1


def test_weights_of_another_model_are_refused_by_all() -> None:
    pool, _ = a_pool(2)
    roots = pool.prefill(PROMPTS)
    before = pool.logits(roots)
    own = make_llama().state_dict()
    first = next(iter(own))
    for wrong in (
        {"x": torch.zeros(2)},
        {},
        3,
        {"x": 4},
        {**own, "x": torch.zeros(2)},
        {name: tensor for name, tensor in own.items() if name != first},
        {**own, first: own[first][:1]},
        {**own, first: own[first].int()},
        {**own, first: own[first].to("meta")},
        {**own, first: own[first].to_sparse()},
    ):
        with pytest.raises(BadArgument, match="weights"):
            pool.update(wrong)
    assert torch.equal(pool.logits(roots), before)


def test_a_retired_worker_leaves_its_own_trees_alone_to_others() -> None:
    pool, engine = a_pool(3)
    roots = pool.prefill(PROMPTS * 3, seed=1)
    before = {root.tree: root.worker for root in roots}
    homes = pool.retire(1)
    assert homes.keys() == {tree for tree, worker in before.items() if worker == 1}
    assert all(root.worker == homes.get(root.tree, before[root.tree]) for root in roots)
    assert len(engine.living()) == 2
    pool.sample(roots, max_new_tokens=2)
    with pytest.raises(BadArgument, match="one of several"):
        pool.retire(1)


def test_mistakes_are_named() -> None:
    for workers in (0, -1, 1.5, None):
        with pytest.raises(BadCount, match="workers"):
            a_pool(workers)  # type: ignore[arg-type]
    for options in (
        {"timeout": 0},
        {"timeout": "x"},
        {"bound": 0.5},
        {"weights": "keep"},
        {"rows": 0},
        {"in_flight": 0},
        {"snapshot_every": 0},
        {"restarts": -1},
        {"threads": 0},
        {"progress": 3},
    ):
        with pytest.raises(BadArgument, match=next(iter(options))):
            a_pool(1, **options)  # type: ignore[arg-type]
    with pytest.raises(BadArgument, match="make_model"):
        SearchPool(3, 1)  # type: ignore[arg-type]
    pool, _ = a_pool(1)
    other, _ = a_pool(1)
    (root,) = pool.prefill([[5, 6]])
    with pytest.raises(ForeignNode):
        other.sample([root], max_new_tokens=1)
    with pytest.raises(BadArgument, match="seed"):
        pool.sample([root], max_new_tokens=1, seed=3)
    with pytest.raises(BadCount, match="one a node"):
        pool.fork([root], [[1], [2]])
    with pytest.raises(BadArgument, match="tokenizer"):
        _ = root.text
    with pytest.raises(BadArgument, match="worker"):
        pool.move(root.tree, 5)
    with pytest.raises(BadArgument, match="tree"):
        pool.move(99, 0)
    for thing in (pool, root):
        with pytest.raises(NotCopyable):
            pickle.dumps(thing)
    assert copy(root) is root
    assert deepcopy(root) is root


def test_workers_that_cannot_be_made_say_why() -> None:
    engines = []

    def remember(verb: str) -> str:
        engines.append(verb)
        return FINE

    with pytest.raises(WorkerLost, match="ValueError: no such weights"):
        a_pool(2, make_model=raises, fate=remember)
    assert engines == ["hello"]
    with pytest.raises(WorkerLost, match="max_bytes"):
        a_pool(1, lm={"max_bytes": 1})


def test_closing_ends_all_workers() -> None:
    pool, engine = a_pool(2)
    with pool:
        pool.prefill(PROMPTS)
    assert not engine.living()
    assert engine.closed


def test_nodes_may_be_dropped_in_another_thread() -> None:
    pool, _ = a_pool(2)
    roots = pool.prefill(PROMPTS)
    kids = pool.sample(roots * 4, max_new_tokens=1)
    dropping = threading.Thread(target=partial(kids.clear))
    dropping.start()
    pool.logits(roots)
    dropping.join()
    pool.logits(roots)
    assert pool.stats().merged.nodes == len(roots)
    assert pool.stats().merged.max_bytes == 2 * ROOM

"""The eviction order that knows the search."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_caches import tiny_cache

from paged_kv import CacheIndex
from paged_kv.bundles.codec import from_json, to_json
from paged_kv.errors import BadArgument, BadBundle, BadCount, UnknownKey
from paged_kv.search_order import SPREAD, VISITS, Constants, SearchOrder

ACTIONS = 3
FLAT = [1 / ACTIONS] * ACTIONS
UNIT = st.floats(0, 1, allow_subnormal=False)


class Told(NamedTuple):
    """What a search tells of one node."""

    parent: int
    action: int
    reward: float
    value: float
    priors: list[float]


class Naive:
    """The same, from the definitions: every number from all that was told."""

    def __init__(self, told: list[Told], constants: Constants) -> None:
        self.told = {0: Told(0, 0, 0.0, 0.0, FLAT), **dict(enumerate(told, 1))}
        self.constants = constants
        self.backed = {node: self.values(node) for node in self.told if node}
        met = [value for node in self.told if node for value in self.met(node)]
        self.low = min(met)
        self.high = max(met)

    def path(self, node: int) -> list[int]:
        """A node, and all above it but the root."""
        return [] if not node else [node, *self.path(self.told[node].parent)]

    def arrivals(self, node: int, until: int | None = None) -> list[float]:
        """The values that reached a node, in the order of the nodes that they are of."""
        found = []
        for leaf in sorted(self.told):
            path = self.path(leaf)
            if node in path and (until is None or leaf <= until):
                value = self.told[leaf].value
                for below in path[: path.index(node)]:
                    value = self.told[below].reward + self.constants.discount * value
                found.append(value)
        return found

    def values(self, node: int) -> float:
        arrived = self.arrivals(node)
        return self.worth(node, arrived)

    def worth(self, node: int, arrived: list[float]) -> float:
        mean = sum(arrived) / len(arrived)
        return self.told[node].reward + self.constants.discount * mean

    def met(self, node: int) -> list[float]:
        """What an action was worth each time that it was tried."""
        times = [leaf for leaf in self.told if node in self.path(leaf)]
        return [self.worth(node, self.arrivals(node, leaf)) for leaf in times]

    def visits(self, node: int) -> int:
        return len(self.arrivals(node)) if node else len(self.told) - 1

    def children(self, node: int) -> dict[int, int]:
        return {
            self.told[child].action: child
            for child in self.told
            if child and self.told[child].parent == node
        }

    def mean(self, node: int) -> float:
        values = [self.backed[child] for child in self.children(node).values()]
        if node:
            values.append(self.mean(self.told[node].parent))
        return sum(values) / len(values)

    def score(self, node: int, action: int) -> float:
        base, init, _, scaled = self.constants
        child = self.children(node).get(action)
        visits = self.visits(node)
        weight = (math.log((visits + base + 1) / base) + init) * math.sqrt(visits)
        value = self.mean(node) if child is None else self.backed[child]
        if scaled and self.high > self.low:
            value = (value - self.low) / (self.high - self.low)
        if scaled:
            value = min(max(value, 0), 1)
        tried = 0 if child is None else self.visits(child)
        return self.told[node].priors[action] * weight / (tried + 1) + value

    def likelihood(self, node: int) -> float:
        product = 1.0
        for place in self.path(node):
            above, action = self.told[place][:2]
            odds = [math.exp(self.score(above, other) / SPREAD) for other in range(ACTIONS)]
            product *= odds[action] / sum(odds)
        return product


@st.composite
def searches(draw: st.DrawFn) -> list[Told]:
    told: list[Told] = []
    free = {0: list(range(ACTIONS))}
    for node in range(1, draw(st.integers(1, 12)) + 1):
        parent = draw(st.sampled_from([place for place, left in free.items() if left]))
        action = draw(st.sampled_from(free[parent]))
        free[parent].remove(action)
        free[node] = list(range(ACTIONS))
        priors = draw(st.lists(UNIT, min_size=ACTIONS, max_size=ACTIONS))
        told.append(Told(parent, action, draw(UNIT), draw(UNIT), priors))
    return told


def tell(order: SearchOrder, told: list[Told]) -> None:
    order.begin([0], FLAT)
    for node, (parent, action, reward, value, priors) in enumerate(told, 1):
        order.expand(node, parent, action, reward=reward, value=value, priors=priors)


@given(searches(), st.booleans())
def test_likelihoods_are_those_of_the_definition(told: list[Told], scaled: bool) -> None:
    constants = Constants(scaled=scaled)
    order = SearchOrder(constants)
    tell(order, told)
    naive = Naive(told, constants)
    standings = order.standings()
    assert standings.keys() == naive.told.keys()
    for node, standing in standings.items():
        assert standing.visits == naive.visits(int(str(node)))
        assert math.exp(standing.likelihood) == pytest.approx(naive.likelihood(int(str(node))))
        score = VISITS * math.log(standing.visits) + standing.likelihood
        assert standing.score() == pytest.approx(score)


@given(searches(), st.data())
def test_an_index_evicts_by_the_score_of_now(told: list[Told], data: st.DataObject) -> None:
    weight = data.draw(st.sampled_from([0, 0.5, 3.0]))
    order = SearchOrder(weight=weight)
    index = CacheIndex(tiny_cache(), order.policy)
    order.begin([0], FLAT)
    held: list[Any] = []
    for node, (parent, action, reward, value, priors) in enumerate(told, 1):
        order.expand(node, parent, action, reward=reward, value=value, priors=priors)
        if data.draw(st.booleans()):
            index.put(node, index.cache.new(1)[0])  # type: ignore[attr-defined]
            held.append(node)
        if held and data.draw(st.booleans()):
            index.remove(held.pop(data.draw(st.integers(0, len(held) - 1))))
        scores = {key: standing.score(weight) for key, standing in order.standings().items()}
        found = index.victims()
        assert sorted(found) == sorted(held)
        assert [scores[key] for key in found] == sorted(scores[key] for key in held)
        index.check()


def test_what_belongs_to_no_search_goes_first_and_the_oldest_of_it() -> None:
    cache = tiny_cache()
    order = SearchOrder()
    index = CacheIndex(cache, order.policy)
    index.put_batch(["b", "node", "a"], cache.new(3))
    tell(order, [])
    order.expand("node", 0, 1, reward=0.0, value=1.0)
    assert index.victims() == ["b", "a", "node"]
    order.begin(["another"])
    assert index.victims() == ["b", "node", "a"]


def test_without_priors_what_was_tried_counts_as_alike() -> None:
    order = SearchOrder()
    order.begin(["root"])
    for action, value in ((0.25, 0.0), ("up", 1.0), ((1, 2), 0.5)):
        order.expand(action, "root", action, reward=0.0, value=value)
    order.expand("further", "up", "on", reward=0.0, value=1.0)
    found = {key: standing.likelihood for key, standing in order.standings().items()}
    assert found["up"] > found[1, 2] > found[0.25]
    assert sum(math.exp(found[key]) for key in ("up", (1, 2), 0.25)) == pytest.approx(1)
    alike = SearchOrder()
    told = [Told(0, action, 0.0, value, FLAT) for action, value in enumerate((0.0, 1.0, 0.5))]
    tell(alike, [*told, Told(2, 0, 0.0, 1.0, FLAT)])
    known = alike.standings()
    for key, node in zip((0.25, "up", (1, 2)), (1, 2, 3)):
        assert found[key] == pytest.approx(known[node].likelihood)


def test_what_a_search_cannot_have_told() -> None:
    order = SearchOrder()
    tell(order, [Told(0, 1, 0.0, 0.0, FLAT)])
    before = dict(order.standings())
    with pytest.raises(UnknownKey, match="no entry with key 'nobody' among 2 "):
        order.expand(2, "nobody", 0, reward=0.0, value=0.0)
    with pytest.raises(BadCount, match="action is 3, allowed is an int from 0 to 2"):
        order.expand(2, 0, 3, reward=0.0, value=0.0)
    with pytest.raises(BadArgument, match="key is 1, allowed is one that no node has"):
        order.expand(1, 0, 0, reward=0.0, value=0.0)
    assert order.standings() == before


@pytest.mark.parametrize("weight", [-0.1, math.nan, True, "much", None])
def test_a_weight_is_a_number(weight: Any) -> None:
    with pytest.raises(BadArgument, match=f"weight is {weight!r}, allowed is a number >= 0"):
        SearchOrder(weight=weight)


def test_before_a_search_has_begun_nothing_is_known() -> None:
    order = SearchOrder()
    assert order.standings() == {}
    with pytest.raises(UnknownKey):
        order.expand(1, 0, 0, reward=0.0, value=0.0)


# -- elsewhere


@given(searches(), st.data())
def test_what_is_known_goes_on_elsewhere(told: list[Told], data: st.DataObject) -> None:
    half = data.draw(st.integers(0, len(told)))
    order, other = SearchOrder(), SearchOrder()
    tell(order, told[:half])
    tell(other, [Told(0, 1, 0.5, 0.5, FLAT)])  # which is forgotten
    other.restore(from_json(to_json(order.book())))
    assert other.standings() == order.standings()
    for node, (parent, action, reward, value, priors) in enumerate(told[half:], half + 1):
        for each in (order, other):
            each.expand(node, parent, action, reward=reward, value=value, priors=priors)
    assert other.standings() == order.standings()
    assert other.book() == order.book()


ROOT = ("root", -1, None, 0.0, [0.5, 0.5], 1, 1.0, 0.0, 1.0)
NODE = ("node", 0, 1, 0.0, None, 1, 1.0, math.inf, -math.inf)


def changed(at: int, value: object) -> list[object]:
    return [ROOT, (*NODE[:at], value, *NODE[at + 1 :])]


HOSTILE: dict[str, object] = {
    "no list": (ROOT, NODE),
    "no row": [ROOT, list(NODE)],
    "a row too short": [ROOT, NODE[:-1]],
    "a key twice": changed(0, "root"),
    "a key that is none": changed(0, [1]),
    "a parent that comes later": changed(1, 1),
    "a parent below none": changed(1, -2),
    "a parent that is no number": changed(1, "root"),
    "an action without a prior": changed(2, 2),
    "an action that is none": changed(2, {}),
    "a reward that is no number": changed(3, math.nan),
    "a reward of another kind": changed(3, "1"),
    "priors that are none": changed(4, [0.5, None]),
    "no priors": changed(4, []),
    "never visited": changed(5, 0),
    "visits below zero": changed(5, -1),
    "visits that are no count": changed(5, 1.0),
    "a total that is no number": changed(6, math.nan),
    "one place twice": [ROOT, NODE, ("other", *NODE[1:])],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_book_that_cannot_be_is_refused_and_changes_nothing(name: str) -> None:
    order = SearchOrder()
    constants = tuple(Constants())
    order.restore({"constants": constants, "nodes": [ROOT, NODE]})
    before = order.book()
    assert order.standings()["node"].visits == 1
    with pytest.raises(BadBundle):
        order.restore({"constants": constants, "nodes": HOSTILE[name]})
    for book in (None, {}, {"constants": tuple(Constants(discount=0.5)), "nodes": []}):
        with pytest.raises(BadBundle):
            order.restore(book)
    assert order.book() == before

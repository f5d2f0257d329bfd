"""An eviction order that knows the search: what it is least likely to come back to goes first.

A tree search chooses its next leaf by walking down, at each node to the child of the best score
(PUCT: the value of the child, and its prior over its visits). A node that stands far behind its
siblings, at any place of its path, is reached late or never. So is what was rarely visited; and
what was visited often has most below it, all of which would have to be computed again to come back
to it. No tensors in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sortedcontainers import SortedDict

from paged_kv.checks import whole
from paged_kv.errors import BadArgument, BadBundle, UnknownKey
from paged_kv.eviction import EntryView, Policy
from paged_kv.search_nodes import SearchNode, Span, nodes_of, rows_of

# The exponent of visits, against the likelihood to come back; and the difference of scores that
# makes a child e times less likely than its sibling. Chosen on one half of recorded searches, see
# docs/benchmarks_lightzero.md.
VISITS = 1.0
SPREAD = 0.2


class Constants(NamedTuple):
    """Of PUCT, with the values of MuZero (Schrittwieser et al. 2020, appendix B).

    `scaled`: whether values are scaled to the range that the search has met, as there, or added to
    the scores as they are.
    """

    base: float = 19652.0
    init: float = 1.25
    discount: float = 0.997
    scaled: bool = True


class Standing(NamedTuple):
    """Where a search stands with one of its nodes.

    `likelihood`: the logarithm of that to reach it, each child of a node being as likely as
    exp(score / SPREAD). 0 for the root.
    """

    visits: int
    likelihood: float

    def score(self, weight: float = VISITS) -> float:
        """The lowest goes first; `weight`: the exponent of visits."""
        return weight * math.log(self.visits) + self.likelihood


class SearchOrder:
    """What a PUCT search knows of its nodes, kept beside it, and the order that follows.

    The search tells of its roots and of each node that it expands; values are backed up here as
    there. `policy` makes the policy of an index whose keys are those of the nodes. `weight`: the
    exponent of visits, against the likelihood to come back. Raises BadArgument.

    >>> from paged_kv import CacheIndex, PagedKVCache
    >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    >>> order = SearchOrder()
    >>> index = CacheIndex(cache, order.policy)
    >>> order.begin(["root"], priors=[0.5, 0.5])
    >>> for key, action, value in (("good", 0, 1.0), ("bad", 1, 0.0)):
    ...     order.expand(key, "root", action, reward=0.0, value=value, priors=[0.5, 0.5])
    >>> index.put_batch(["good", "bad"], cache.new(2))
    >>> index.victims()
    ['bad', 'good']
    """

    def __init__(self, constants: Constants | None = None, weight: float = VISITS) -> None:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight >= 0:
            raise BadArgument("weight", weight, "a number >= 0")
        self.constants = Constants() if constants is None else constants
        self.weight = weight
        self._nodes: dict[Hashable, SearchNode] = {}
        self._roots: list[SearchNode] = []
        self._standings: dict[Hashable, Standing] | None = None  # until something changes

    def begin(self, roots: Sequence[Hashable], priors: Sequence[float] | None = None) -> None:
        """Searches begin below these roots; all that was known is forgotten.

        `priors` are those of the actions at each root, an action being its place in the list;
        without them, here or in `expand`, actions may be anything with a hash, and those that were
        tried count as equally likely.
        """
        self._nodes = {}
        self._roots = []
        self._standings = None
        for key in roots:
            root = SearchNode(key, Span(), None, 0.0, priors)
            self._nodes[key] = root
            self._roots.append(root)

    def expand(
        self,
        key: Hashable,
        parent: Hashable,
        action: Hashable,
        *,
        reward: float,
        value: float,
        priors: Sequence[float] | None = None,
    ) -> None:
        """A search expanded a node: `value` is backed up to its root. Cost: O(depth).

        Raises UnknownKey for a parent that it was not told of, BadCount for an action that has no
        prior, BadArgument for a key that is known.
        """
        above = self._nodes.get(parent)
        if above is None:
            raise UnknownKey(parent, len(self._nodes))
        if key in self._nodes:
            raise BadArgument("key", key, "one that no node has")
        if above.priors is not None:
            action = whole("action", action, 0, len(above.priors) - 1)
        node = SearchNode(key, above.tree, above, reward, priors)
        self._standings = None
        self._nodes[key] = node
        above.children[action] = node
        self._back_up(node, value)

    def _back_up(self, node: SearchNode, value: float) -> None:
        discount = self.constants.discount
        while True:
            node.visits += 1
            node.total += value
            above = node.parent
            if above is None:
                return
            node.tree.meet(self._value(node))
            value = node.reward + discount * value
            node = above

    def _value(self, node: SearchNode) -> float:
        """What the action that leads to a visited node is worth."""
        return node.reward + self.constants.discount * node.total / node.visits

    def standings(self) -> Mapping[Hashable, Standing]:
        """Where the searches stand with all nodes: another mapping once they have gone on.

        Cost: O(nodes and their actions), once for each simulation that is asked about.
        """
        if self._standings is None:
            found: dict[Hashable, Standing] = {}
            for root in self._roots:
                found.update(self._walk(root))
            self._standings = found
        return self._standings

    def _walk(self, root: SearchNode) -> Iterator[tuple[Hashable, Standing]]:
        waiting = [(root, 0.0, 0.0)]
        while waiting:
            node, likelihood, above = waiting.pop()
            if node.visits:
                yield node.key, Standing(node.visits, likelihood)
            if node.children:
                mean = self._mean(node, above)
                scores = self._scores(node, mean)
                rest = likelihood - _log_sum([score / SPREAD for score in scores.values()])
                waiting += [
                    (child, rest + scores[action] / SPREAD, mean)
                    for action, child in node.children.items()
                ]

    def _mean(self, node: SearchNode, above: float) -> float:
        """What an action that was not tried yet counts as worth; `above`: the same of its
        parent.
        """
        values = [self._value(child) for child in node.children.values()]
        if node.parent is None:
            return sum(values) / len(values)
        return (above + sum(values)) / (len(values) + 1)

    def _scores(self, node: SearchNode, mean: float) -> dict[Hashable, float]:
        """The score of each action."""
        base = self.constants.base
        weight = math.log((node.visits + base + 1) / base) + self.constants.init
        weight *= math.sqrt(node.visits)
        priors: dict[Hashable, float]
        if node.priors is None:
            priors = dict.fromkeys(node.children, 1 / len(node.children))
        else:
            priors = dict(enumerate(node.priors))
        scores = {}
        for action, prior in priors.items():
            child = node.children.get(action)
            visits = 0 if child is None else child.visits
            value = mean if child is None else self._value(child)
            if self.constants.scaled:
                value = node.tree.scaled(value)
            scores[action] = prior * weight / (visits + 1) + value
        return scores

    # -- elsewhere

    def book(self) -> dict[str, Any]:
        """What is known, as plain values: for the `data` of a bundle or a snapshot, beside the
        index whose order it is. Keys and actions are the caller's own. Cost: O(nodes).

        >>> order, other = SearchOrder(), SearchOrder()
        >>> order.begin(["root"])
        >>> order.expand("node", "root", 0, reward=0.0, value=1.0)
        >>> other.restore(order.book())
        >>> other.standings() == order.standings()
        True
        """
        return {"constants": tuple(self.constants), "nodes": rows_of(self._nodes.values())}

    def restore(self, book: object) -> None:
        """Know what another order of the same constants knew, and nothing else. Raises BadBundle
        for what is no book, or of other constants.
        """
        if not isinstance(book, dict) or book.keys() != {"constants", "nodes"}:
            raise BadBundle("the order of a search has other fields than it should have")
        if book["constants"] != tuple(self.constants):
            ours = tuple(self.constants)
            raise BadBundle(f"a search has constants {book['constants']!r}, expected {ours}")
        nodes = nodes_of(book["nodes"])
        self._nodes = nodes
        self._roots = [node for node in nodes.values() if node.parent is None]
        self._standings = None

    @property
    def policy(self) -> Callable[[], Policy]:
        """Makes the eviction policy of one index."""
        return lambda: SearchPolicy(self.standings, self.weight)


def _log_sum(numbers: Sequence[float]) -> float:
    """The logarithm of the sum of the exponentials."""
    most = max(numbers)
    return most + math.log(sum(math.exp(number - most) for number in numbers))


class SearchPolicy:
    """Entries by the score of their node, the lowest first; those of no node before all others, the
    oldest first.

    Adding, hits and removal are O(log n); the first eviction after a simulation sorts all entries.
    """

    def __init__(
        self, standings: Callable[[], Mapping[Hashable, Standing]], weight: float = VISITS
    ) -> None:
        self._standings = standings
        self._weight = weight
        self._scored: Mapping[Hashable, Standing] | None = None  # what the ranks go by
        self._ranks: dict[EntryView, tuple[float, int]] = {}
        self._order: SortedDict[tuple[float, int], EntryView] = SortedDict()

    def on_add(self, entry: EntryView) -> None:
        standing = None if self._scored is None else self._scored.get(entry.key)
        score = -math.inf if standing is None else standing.score(self._weight)
        rank = (score, entry.added)
        self._ranks[entry] = rank
        self._order[rank] = entry

    def on_hit(self, entry: EntryView) -> None:
        pass

    def on_priority(self, entry: EntryView, priority: float | None) -> None:
        pass

    def on_remove(self, entry: EntryView) -> None:
        del self._order[self._ranks.pop(entry)]

    def victims(self) -> Iterator[EntryView]:
        if not self._ranks:
            return iter(())
        standings = self._standings()
        if standings is not self._scored:
            self._scored = standings
            entries = list(self._ranks)
            self._order.clear()
            for entry in entries:
                self.on_add(entry)
        return iter(self._order.values())

"""A search on several caches: all draw the same, and what they hold is counted."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tiny_folder import TINY

from paged_kv.errors import BadCount, UnsupportedModel
from paged_kv.linears.packing import has_kernels
from paged_kv.tools.search import PRESETS, Preset, search
from paged_kv.tools.search.countdown import Game, checked, posed, question
from paged_kv.tools.search.methods import FUNCTIONS
from paged_kv.tools.search.models import Loaded, random_model
from paged_kv.tools.search.nodes import Node
from paged_kv.tools.search.presets import METHODS
from paged_kv.tools.search.result import as_dict
from paged_kv.tools.search.side import PACKED, sides_for
from paged_kv.tools.search.trial import Trial, needed_bytes

SMALL = Preset("small", prompt_tokens=40, simulations=6, width=4, tokens=5)
SIDE_KEYS = {
    "tokens_per_second",
    "kv_bytes_peak",
    "unique_token_bytes_peak",
    "working_bytes_peak",
    "model_seconds",
    "cache_seconds",
    "tokens_prefilled",
}


@cache
def tiny() -> Loaded:
    return random_model("float32", **TINY)


@cache
def found(method: str) -> dict[str, Any]:
    return search(tiny(), SMALL, method=method, seed=3)


@pytest.mark.parametrize("method", METHODS)
def test_all_caches_draw_the_same_tokens_of_the_same_nodes(method: str) -> None:
    result = found(method)
    drawn = SMALL.simulations * SMALL.width * SMALL.tokens
    assert result["tokens_compared"] == (len(result["caches"]) - 1) * drawn
    assert result["tokens_different"] == 0
    assert result["max_abs_logprob_difference"] < 1e-4
    assert len(result["tree"]) == SMALL.nodes
    assert {side["tokens_drawn"] for side in result["caches"].values()} == {drawn}


def test_the_methods_search_in_their_own_ways() -> None:
    shapes = {method: [node["parent"] for node in found(method)["tree"]] for method in METHODS}
    assert len({tuple(shape) for shape in shapes.values()}) == 3


def test_the_seed_decides() -> None:
    again = search(tiny(), SMALL, seed=3)
    other = search(tiny(), SMALL, seed=4)
    assert again["tree"] == found("mcts")["tree"]
    assert other["tree"] != again["tree"]


def test_what_each_cache_holds() -> None:
    caches = found("mcts")["caches"]
    assert list(caches) == list(sides_for(torch.device("cpu"), torch.float32))
    each = found("mcts")["workload"]["token_bytes"]
    assert each == 2 * 2 * 2 * 8 * 4
    for side in caches.values():
        assert side.keys() >= SIDE_KEYS
        needed = side["unique_token_bytes_peak"]
        assert needed <= (40 + 24 * 5) * each
        assert side["kv_bytes_peak"] >= needed - 24 * 5 * each
    copies = sum(40 + node_length(found("mcts")["tree"], node) - 1 for node in range(1, 25))
    batch = 4 * (40 + 20)
    assert (
        (copies + 40) * each <= caches["deepcopy"]["kv_bytes_peak"] <= (copies + 40 + batch) * each
    )
    for name in ("gathered", "tree"):
        assert caches[name]["kv_bytes_peak"] < 1.6 * caches[name]["unique_token_bytes_peak"]
        assert caches[name]["working_bytes_peak"] > 0


def node_length(tree: list[dict[str, Any]], number: int) -> int:
    """Drawn tokens down to a node."""
    length = 0
    while tree[number]["parent"] is not None:
        length += SMALL.tokens
        number = tree[number]["parent"]
    return length


def test_what_each_cache_feeds_again() -> None:
    result = found("best-of-n")
    fed = {name: side["tokens_prefilled"] for name, side in result["caches"].items()}
    depths = [node_length(result["tree"], number) for number in range(25)]
    opened = sorted({node["parent"] for node in result["tree"][1:]})
    below = [depths[number] for number in opened]
    # of samples side by side, each is opened once, and the root for the first and each new set
    assert fed["deepcopy"] == fed["gathered"] == fed["tree"] == 40 + len(opened) - 1
    assert fed["rootcache"] == 40 + sum(below)
    roots = sum(node["parent"] == 0 for node in result["tree"]) // SMALL.width
    assert fed["prefill"] == sum(40 + depth for depth in below) + 40 * (roots - 1)


def test_ratios_are_those_of_the_figures() -> None:
    result = found("mcts")
    caches = result["caches"]
    best = max(caches[name]["tokens_per_second"] for name in ("prefill", "rootcache", "deepcopy"))
    wanted = caches["tree"]["tokens_per_second"] / best
    assert result["ratios"]["tokens_per_second"] == pytest.approx(wanted, abs=1e-3)
    held = caches["deepcopy"]["kv_bytes_peak"] / caches["tree"]["kv_bytes_peak"]
    assert result["ratios"]["kv_bytes_peak"] == pytest.approx(held, abs=1e-3)


@pytest.mark.skipif(not has_kernels(torch.float32), reason="nothing is packed on this machine")
def test_packed_weights_are_a_side_of_their_own() -> None:
    loaded = random_model("float32", **{**TINY, "hidden_size": 512, "intermediate_size": 768})
    names = ("rootcache", "tree", PACKED)
    trial = Trial(loaded, SMALL, sides=names)
    trial.run()
    result = as_dict(trial)
    caches = result["caches"]
    assert list(caches) == list(names)
    assert result["tokens_compared"] == 2 * SMALL.simulations * SMALL.width * SMALL.tokens
    assert result["max_abs_logprob_difference"] < 1e-4
    layers = 2 * (2 * 512 * 512 + 3 * 512 * 768)  # the weights of K and V are too small
    assert 4 * layers <= result["workload"]["packed_bytes"] <= 4 * loaded.model.num_parameters()
    wanted = caches[PACKED]["tokens_per_second"] / caches["rootcache"]["tokens_per_second"]
    assert result["ratios"]["packed_tokens_per_second"] == pytest.approx(wanted, abs=1e-3)
    assert not trial.loaded.model.lm_head.__dict__.keys() & {"forward"}
    more = sum(weight.nbytes for weight in loaded.model.parameters())
    assert needed_bytes(trial) == more + needed_bytes(Trial(loaded, SMALL, sides=names[:2]))


def test_a_side_that_draws_otherwise_is_counted() -> None:
    trial = Trial(tiny(), SMALL)
    trial.run()
    batch = trial.lockstep.batches[2]
    child = batch.drawn["rootcache"][1]
    batch.drawn["rootcache"][1] = child._replace(
        tokens=(*child.tokens[:-1], (child.tokens[-1] + 1) % 97)
    )
    assert as_dict(trial)["tokens_different"] == 1


def test_an_interrupt_leaves_whole_batches() -> None:
    trial = Trial(tiny(), SMALL)
    seen = []

    def stop() -> None:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial.run(stop)
    assert len(trial.lockstep.batches) == 2
    result = as_dict(trial)
    assert result["workload"]["simulations_done"] == 2
    assert len(result["tree"]) == 1 + 2 * SMALL.width


def test_other_shapes_and_dtypes(device: str) -> None:
    loaded = random_model("bfloat16", device, **TINY)
    result = search(loaded, SMALL._replace(width=1, tokens=1, simulations=3), page_size=1)
    assert result["workload"]["dtype"] == "bfloat16"
    assert result["tokens_compared"] == (len(result["caches"]) - 1) * 3
    assert result["workload"]["token_bytes"] == 2 * 2 * 2 * 8 * 2


def test_a_path_beyond_the_positions_is_refused_at_once() -> None:
    loaded = random_model("float32", **TINY, max_position_embeddings=90)
    with pytest.raises(BadCount, match=r"40.*at most 90, the model's positions"):
        Trial(loaded, SMALL)


def test_a_model_that_cannot_be_paged_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedModel):
        Trial(Loaded(MambaForCausalLM(config).eval(), None, "mamba"), SMALL)


def test_the_presets_have_the_nodes_they_promise() -> None:
    nodes = {name: preset.nodes for name, preset in PRESETS.items()}
    assert nodes == {"demo": 33, "512": 97, "2048": 33}


def test_what_all_need_covers_what_they_held() -> None:
    caches = found("mcts")["caches"].values()
    held = sum(side["kv_bytes_peak"] + side["working_bytes_peak"] for side in caches)
    assert held <= needed_bytes(Trial(tiny(), SMALL))


def grown(
    method: str, value: Callable[[Node], float], done: Callable[[], bool]
) -> list[list[Node]]:
    """The batches of a search without a model; nodes are what `value` and `done` say."""
    root = Node(0, None, 0)
    plan = FUNCTIONS[method](root, 9, 5)
    made = 1
    batches: list[list[Node]] = []
    children: list[Node] = []
    while True:
        try:
            parents = plan.send(children) if batches else next(plan)
        except StopIteration:
            return batches
        batches.append(parents)
        children = [parent.child(made + place) for place, parent in enumerate(parents)]
        made += len(children)
        for child in children:
            child.value = value(child)
            child.done = done()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(20))
def test_every_method_asks_for_full_batches_of_open_nodes(method: str, seed: int) -> None:
    draws = random.Random(seed)
    batches = grown(method, lambda node: draws.random(), lambda: draws.random() < 0.3)
    assert [len(batch) for batch in batches] == [5] * 9
    for batch in batches:
        assert len({parent.depth for parent in batch}) == 1
    first = grown(method, lambda node: 0.0, lambda: True)
    assert {parent.number for batch in first for parent in batch} == {0}


def test_mcts_goes_where_values_are_high() -> None:
    def is_good(node: Node | None) -> bool:
        return node is not None and (node.number == 2 or is_good(node.parent))

    batches = grown("mcts", lambda node: float(is_good(node)), lambda: False)
    chosen = [batch[0] for batch in batches]
    assert [node.number for node in chosen[:2]] == [0, 2]
    assert sum(map(is_good, chosen)) >= 6  # of 9, though the root has four other children


@pytest.mark.parametrize(
    ("answer", "attempts", "distance", "ended"),
    [
        ("", 0, None, False),
        ("8 + 3 - 5", 0, None, False),  # it may go on
        ("8 + 3 - 5 =", 1, 0, False),
        ("8 + 3 - 5 = 99\n", 1, 0, False),  # what the model thinks it comes to does not count
        ("8 + 3 + 5 = 16\n8 - 3 = 5\n8 + 5 = 13\n", 3, 1, False),
        ("3 + 3 = 6\n", 0, None, False),  # there is one 3
        ("8 * 3 - 5 = 19\nwhat\n8 + 3 = 11\n", 1, 5, False),
        ("8 + 3 = 11\n\n8 + 3 - 5 = 6", 1, 5, True),
        ("8 + 3 = 11\nNumbers: 8 3", 1, 5, False),  # the line is not whole
        ("8 + 3 = 11\nNumbers: 8 3\n", 1, 5, True),
        ("\n", 0, None, True),
        ("8 + 3 - 5 = 6\n\n", 1, 0, False),  # nothing behind a right attempt is looked at
    ],
)
def test_answers_of_the_numbers_game(
    answer: str, attempts: int, distance: int | None, ended: bool
) -> None:
    seen = checked(Game((3, 8, 5), 6), answer)
    assert (seen.allowed, seen.distance, seen.ended) == (attempts, distance, ended)
    assert seen.solved == (distance == 0)


def test_games_can_be_solved_by_their_last_attempt() -> None:
    for number in range(50):
        found = posed(random.Random(number))
        assert str(found.game.target) in question(found.game)
        answer = "\n".join(found.attempts) + "\n"
        assert checked(found.game, answer).solved
        assert checked(found.game, answer).allowed == len(found.attempts)
        before = "\n".join(found.attempts[:-1])
        assert not checked(found.game, before).solved


def test_the_model_is_as_it_was() -> None:
    model = tiny().model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    search(tiny(), SMALL._replace(simulations=1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.base_model._forward_hooks
    assert not model.base_model._forward_pre_hooks

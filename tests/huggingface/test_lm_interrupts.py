"""Whatever breaks off a verb of a `PagedLM`, at any of its lines, leaves one that works: with the
right logits, without leaks.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hf_paths import paths
from interrupts import ERRORS, traced
from line_breaks import Breaker, Line
from lm_oracle import Oracle, close, whole
from tiny_models import tiny_model

from paged_kv.bundles.bundle import Bundle
from paged_kv.errors import ReleasedNode
from paged_kv.integrations import huggingface
from paged_kv.integrations.huggingface import PagedLM
from paged_kv.integrations.huggingface.nodes import Node

FOLDER = str(Path(huggingface.__file__).parent)
# What a model runs through: a fault in there is one of the model, which has lines enough.
OTHERS = ("attention.py", "feeding.py", "stepping.py", "shapes.py", "cache.py")
PROMPTS = [[7, 8, 9, *row] for row in paths((9, 6, 11))]
SAME = {"weights": "of both lms"}
PAGES = 30  # of two tokens: too few for all that is made here


class Scene(NamedTuple):
    """A call, and what was made before it."""

    lm: PagedLM
    other: PagedLM
    oracle: Oracle
    roots: list[Node]
    kids: list[Node]  # drawn, their last tokens are pending
    fresh: list[Node]  # of which nothing was fed
    bundle: Bundle  # of some of these, pinned


def scoped(scene: Scene) -> None:
    with scene.lm.scope() as scope:
        made = scene.lm.fork(scene.kids, [[3]] * 3)
        scope.keep(made[:1])
        scene.lm.logits(made)


def dropped(scene: Scene) -> None:
    scene.kids.clear()
    scene.lm.stats()


def pinned(scene: Scene) -> None:
    scene.lm.pin(scene.fresh)
    scene.lm.unpin(scene.fresh)


def changed(scene: Scene) -> None:
    scene.oracle.change()
    scene.lm.logits(scene.kids)


CALLS: dict[str, Callable[[Scene], object]] = {
    "prefill": lambda s: s.lm.prefill([[7, 8, 9, 3, 4], [7, 8, 9, 3, 5], PROMPTS[1]], seed=1),
    "trunks": lambda s: s.lm.prefill([[8] * 10 + [4], [8] * 10 + [5], [8] * 10 + [6]]),
    "fork": lambda s: s.lm.fork(s.kids, [[3], [4], []]),
    "extend": lambda s: s.lm.extend(s.kids, [[3], [4, 5, 6], [7]], consume=True),
    "crop": lambda s: s.lm.crop(s.kids, [3, 4, 5]),
    "sample": lambda s: s.lm.sample(s.kids, max_new_tokens=3, num_return_sequences=2),
    "score": lambda s: s.lm.score(s.fresh, [[3, 4, 5], [4], [5, 6]]),
    "look up": lambda s: s.lm.next_token_logprobs([[7, 8, 9], PROMPTS[0], [7, 8, 9]]),
    "logits": lambda s: s.lm.logits([*s.fresh, *s.kids]),
    "mirror": lambda s: s.other.mirror(s.kids),
    "find": lambda s: s.lm.find(PROMPTS),
    "promote": lambda s: s.lm.promote(s.fresh[0]),
    "pin": pinned,
    "release": lambda s: s.lm.release(s.roots),
    "clear": lambda s: s.lm.clear(),
    "scope": scoped,
    "export": lambda s: s.lm.export([*s.roots, *s.kids, *s.fresh], identity=SAME),
    "adopt": lambda s: s.other.adopt(s.bundle, identity=SAME),
    "drop": dropped,
    "weights": changed,
}


@pytest.fixture(scope="module")
def seen() -> set[Line]:
    """Lines at which some call was broken off."""
    return set()


def small_model() -> Any:
    """One layer of a tiny model: all that is done here is done a thousand times."""
    model = deepcopy(tiny_model("llama"))
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


class Stage:
    """Two lms, that one scene after the other is played on."""

    def __init__(self) -> None:
        self.oracle = Oracle("llama", small_model())
        page = PagedLM(self.oracle.model, page_size=2, max_bytes=10**6).pages.page_bytes
        options: dict[str, Any] = {"page_size": 2, "progress": False, "batch_bytes": 10_000}
        self.lm = PagedLM(self.oracle.model, max_bytes=PAGES * page, **options)
        self.other = PagedLM(small_model(), max_bytes=10**6, **options)

    def prepare(self) -> Scene:
        """What was made before the call."""
        roots = self.lm.prefill(PROMPTS, seed=5)
        kids = self.lm.sample(roots, max_new_tokens=2)
        fresh = self.lm.fork(roots, [[3, 4], [5], [6]])
        self.lm.pin(roots[:1])
        bundle = self.lm.export([*roots, *kids, *fresh[:1]], identity=SAME)
        self.lm.unpin(roots[:1])
        return Scene(self.lm, self.other, self.oracle, roots, kids, fresh, bundle)

    def lines(self, call: Callable[[Scene], object]) -> list[Line]:
        """All lines that a call passes."""
        scene = self.prepare()
        breaker = Breaker(FOLDER, OTHERS)
        with traced(breaker):
            call(scene)
        return list(breaker.met)

    def broken(self, call: Callable[[Scene], object], line: Line, error: Any) -> None:
        """Break a call off, and see that all goes on."""
        scene = self.prepare()
        breaker = Breaker(FOLDER, OTHERS, line, error)
        try:
            with traced(breaker):
                call(scene)
        except error as raised:
            traceback.clear_frames(raised.__traceback__)
            raised.__traceback__ = None
        about = f"{Path(line[0].co_filename).name}:{line[1]} ({error.__name__})"
        assert breaker.fired, about
        self.works(scene)
        with suppress(ReleasedNode):  # of nodes that the call had released before
            call(scene)
        del scene, call
        self.ended(about)

    def works(self, scene: Scene) -> None:
        """All is whole, and what the model says is right."""
        whole(self.lm)
        whole(self.other)
        made = (*scene.roots, *scene.kids)
        alive = [node for node in made if self.lm.paths.has(node.place.number)]
        for node, row in zip(alive, self.lm.logits(alive)):
            close(row, self.oracle.logits(node.tokens)[-1])

    def ended(self, about: str) -> None:
        """Nothing is left once nobody holds a node, but what the lm keeps for itself."""
        whole(self.lm)
        self.lm.next_token_logprobs([])  # what was evicted goes
        assert self.lm.stats().nodes <= 2, about  # of the look-up
        self.lm.clear()
        for lm in (self.lm, self.other):
            stats = lm.stats()
            assert (stats.nodes, stats.paths, stats.kv_bytes) == (0, 0, 0), about
            assert lm.pages.live() == [], about


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_broken_off_leaves_an_lm_that_works(
    name: str, stage: Stage, seen: set[Line]
) -> None:
    call = CALLS[name]
    lines = [line for line in stage.lines(call) if line not in seen]
    stage.ended("the first time")
    for index, line in enumerate(lines):
        stage.broken(call, line, ERRORS[index % len(ERRORS)])
    seen.update(lines)

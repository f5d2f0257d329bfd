"""`paged_kv.tools.estimate`: the counts against caches that were really filled, and against
measured profiles.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from paged_kv import PagedKVCache
from paged_kv.pages.kinds import KINDS
from paged_kv.snapshot import save
from paged_kv.snapshot.tensors import ROOM
from paged_kv.tools.estimate import Estimate, Workload, configs, estimate
from paged_kv.tools.estimate.call import of
from paged_kv.tools.estimate.pages import Pages
from paged_kv.tools.profile.presets import PRESETS

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "profile.json"
CARTPOLE: dict[str, Any] = {
    "layers": 2,
    "heads": 2,
    "head_size": 32,
    "context": 8,
    "envs": 8,
    "simulations": 25,
}


def of_profile(workload: dict[str, Any], **options: Any) -> Estimate:
    """The estimate of a workload that a profile names."""
    return estimate(
        layers=workload["layers"],
        heads=workload["heads"],
        head_size=workload["embed_dim"] // workload["heads"],
        context=workload["context_length"],
        envs=workload["envs"],
        simulations=workload["simulations"],
        page_size=workload["page_size"],
        **options,
    )


@pytest.mark.parametrize("storage", KINDS)
def test_bytes_are_those_of_a_real_cache_and_its_snapshot(storage: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": 2, "heads": 3, "head_size": 8, "value_head_size": 5}
    cache = PagedKVCache(**sizes, page_size=2, storage=storage, dtype=torch.bfloat16)
    found = estimate(
        **sizes, storage=storage, dtype="bfloat16", context=40, envs=1, simulations=20, page_size=2
    )
    assert found.page_bytes == cache.page_bytes
    seqs = cache.new()
    count = 2 * found.pages.likely
    tokens = [torch.ones(2, 1, 3, count, size, dtype=torch.bfloat16) for size in (8, 5)]
    cache.append(seqs, *tokens)
    save(tmp_path / "saved", cache, seqs)
    (segment,) = (tmp_path / "saved").glob("pages-*")
    assert segment.stat().st_size == found.snapshot_bytes + ROOM


# -- pages of a cache that a search really filled


class Tree(NamedTuple):
    """What a simulated search left in a cache, and the most pages in use while it ran, or ever."""

    pages: int
    peak: int
    ever: int
    tokens: set[tuple[int, ...]]


class Grower:
    """Plays root steps and searches on a real cache, and knows every token by name."""

    def __init__(self, load: Workload, size: int, kept: int) -> None:
        self.load = load
        self.size = size
        self.kept = kept
        self.cache = PagedKVCache(layers=1, heads=1, head_size=1, page_size=size, num_pages=4)
        self.windows: dict[int, list[tuple[int, ...]]] = {}
        self.roots: list[list[int]] = [[] for _ in range(load.envs)]
        self.counter = 0

    def grow(self, parents: list[int], count: int) -> list[int]:
        """Children with `count` more tokens, slid where they are full, as a model step
        makes them.
        """
        children = self.cache.fork(parents)
        kv = torch.zeros(1, len(parents), 1, count, 1)
        self.cache.append(children, kv, kv)
        for parent, child in zip(parents, children, strict=True):
            self.counter += 1
            window = [*self.windows.get(parent, []), *((self.counter, i) for i in range(count))]
            if parent in self.windows and len(window) >= self.load.context - 1:
                self.cache.slide([child], self.load.tokens_per_step)
                window = window[self.load.tokens_per_step :]
            self.windows[child] = window
        return children

    def start(self, tokens: int) -> None:
        """Roots of so many tokens, placed to end on the edge of a page."""
        empty = self.cache.new(self.load.envs, start=-tokens % self.size)
        self.store(self.grow(empty, tokens))
        self.cache.release(empty)

    def store(self, roots: list[int]) -> None:
        """Keep the latest roots of each environment."""
        for mine, root in zip(self.roots, roots, strict=True):
            mine.append(root)
            if len(mine) > self.kept:
                self.cache.release([mine.pop(0)])

    def step(self) -> None:
        """The roots of the next root step."""
        self.store(self.grow([mine[-1] for mine in self.roots], self.load.tokens_per_step))

    def search(self, choose: Callable[[int], int]) -> Tree:
        """One search: a node a simulation and environment, below the one of those before it that is
        chosen.
        """
        trees = [[mine[-1]] for mine in self.roots]
        pages = self.cache.books.pages
        before = pages.peak
        pages.peak = 0
        for _ in range(self.load.simulations):
            parents = [tree[choose(len(tree))] for tree in trees]
            for tree, child in zip(
                trees, self.grow(parents, self.load.tokens_per_step), strict=True
            ):
                tree.append(child)
        self.cache.check()
        live = [seq for tree in trees for seq in tree]
        tokens = {token for seq in live for token in self.windows[seq]}
        peak = self.cache.stats.peak_pages
        return Tree(self.cache.pages_in_use, peak, max(before, peak), tokens)


@st.composite
def loads(draw: st.DrawFn) -> tuple[Workload, int]:
    """A small workload and a page size."""
    context = draw(st.integers(3, 14))
    step = draw(st.integers(1, min(5, context - 1)))
    given_root = draw(st.booleans())
    load = Workload(
        layers=1,
        heads=1,
        head_size=1,
        context=context,
        tokens_per_step=step,
        envs=draw(st.integers(1, 3)),
        simulations=draw(st.integers(1, 7)),
        root_tokens=draw(st.integers(1, context - 1)) if given_root else None,
        root_steps=None if given_root else draw(st.none() | st.integers(1, 9)),
    )
    return load, draw(st.integers(1, context))


def played(load: Workload, size: int, choices: st.DataObject, kept: int = 1) -> Tree:
    """The tree of a search at the root step that the workload asks for."""
    grower = Grower(load, size, kept)
    grower.start(load.root_tokens or load.first_tokens)
    if load.root_tokens is None:
        # root steps after which no window grows and no older root is missing
        full = load.context + kept
        for _ in range(
            (full + choices.draw(st.integers(1, 9)) if load.root_steps is None else load.root_steps)
            - 1
        ):
            grower.step()
    return grower.search(lambda nodes: choices.draw(st.integers(0, nodes - 1)))


@given(loads(), st.data())
def test_pages_are_those_of_a_real_cache(
    drawn: tuple[Workload, int], choices: st.DataObject
) -> None:
    load, size = drawn
    found = Pages(load, size)
    tree = played(load, size, choices)
    held = found.held()
    assert held.least <= tree.pages <= held.most
    assert held.least <= held.likely <= held.most
    assert tree.peak <= held.most + found.transient()
    assert len(tree.tokens) == of(load, size).unique_tokens


@given(loads(), st.data())
def test_advised_pages_are_exact_and_the_pool_never_grows(
    drawn: tuple[Workload, int], choices: st.DataObject
) -> None:
    load, _ = drawn
    found = of(load)
    tree = played(load, found.advised_page_size, choices)
    assert load.tokens_per_step % found.advised_page_size == 0
    assert found.pages.least == found.pages.most == tree.pages
    assert tree.peak == tree.ever == found.num_pages


@given(loads(), st.integers(1, 6), st.data())
def test_older_roots_hold_pages_of_their_own(
    drawn: tuple[Workload, int], kept: int, choices: st.DataObject
) -> None:
    load, _ = drawn
    assume(load.root_tokens is None)
    pages = Pages(load, of(load).advised_page_size)
    older = kept - 1 if load.root_steps is None else min(kept, load.root_steps) - 1
    tree = played(load, pages.size, choices, kept)
    assert tree.pages == pages.held().most + pages.older_roots(older)


@pytest.mark.parametrize(
    ("size", "step", "fewest", "most"),
    [
        (3, 2, [0, 1, 2], [0, 1, 1]),
        (2, 3, [0, 1, 2], [0, 0, 0]),
        (5, 3, [0, 1, 2], [0, 1, 1]),
        (4, 2, [0, 1, 2], [0, 0, 0]),
    ],
)
def test_the_bounds_are_reached(size: int, step: int, fewest: list[int], most: list[int]) -> None:
    load = Workload(
        layers=1,
        heads=1,
        head_size=1,
        context=20,
        envs=1,
        simulations=3,
        tokens_per_step=step,
        root_tokens=5,
    )
    reached = []
    for parents in (fewest, most):
        grower = Grower(load, size, 1)
        rest = iter(parents)
        grower.start(5)
        reached.append(grower.search(lambda nodes, rest=rest: next(rest)).pages)
    held = Pages(load, size).held()
    assert reached == [held.least, held.most]


def test_a_search_of_any_size_is_counted_at_once_and_exactly() -> None:
    many = 2**31 - 1
    load = Workload(
        layers=1, heads=1, head_size=1, context=many, envs=1, simulations=many, root_tokens=1
    )
    assert Pages(load, 2).held() == (many + 1, many + 1, many + 1)
    assert Pages(load, 255).held().most > many


# -- against what was measured


def check(found: Estimate, result: dict[str, Any], *, dense: int) -> None:
    """All figures of a profile, to the byte."""
    own = result["caches"]["dense"]
    paged = result["caches"]["paged"]
    assert dense == own["kv_bytes_peak"]
    assert found.unique_bytes == own["unique_token_bytes_peak"]
    if found.workload.tokens_per_step % found.page_size:  # it depends on the tree
        pages = paged["kv_bytes_peak"] // found.page_bytes
        assert found.pages.least <= pages <= found.pages.most
        assert found.paged.working <= paged["working_bytes_peak"]
        return
    assert found.paged.kv == paged["kv_bytes_peak"]
    assert found.paged.working == paged["working_bytes_peak"]


@pytest.mark.parametrize(
    "result", json.loads(MEASURED.read_text()), ids=lambda r: r["workload"]["preset"]
)
def test_measured_presets(result: dict[str, Any]) -> None:
    found = of_profile(result["workload"])
    check(found, result, dense=found.lightzero.kv)
    assert found.lightzero.working == result["caches"]["dense"]["working_bytes_peak"]
    assert found.advised_page_size == 2


def test_the_table_of_the_docs() -> None:
    page = (MEASURED.parent.parent.parent / "docs" / "estimate.md").read_text()
    for result in json.loads(MEASURED.read_text()):
        found = of_profile(result["workload"])
        cells = (
            found.lightzero.kv,
            found.lightzero.working,
            found.unique_bytes,
            found.paged.kv,
            found.paged.working,
        )
        name = result["workload"]["preset"]
        assert f"| {name} | {' | '.join(f'{bytes_:,}' for bytes_ in cells)} | 0 |" in page


@pytest.mark.parametrize(
    ("preset", "changes", "megabytes"),
    [
        ("cartpole", {}, 20.2),
        ("atari", {}, 242),
        ("atari-8l", {}, 970),
        ("atari", {"context": 64}, 1939),
    ],
)
def test_measured_on_lightzero_main(preset: str, changes: dict[str, int], megabytes: float) -> None:
    """Rings and working buffers, measured after 300 root steps of 8 environments."""
    found = estimate(**{**configs.preset(PRESETS[preset]), **changes})
    held = found.lightzero_main.kv + found.lightzero_main.working
    assert held / 1e6 == pytest.approx(megabytes, rel=0.003)


@pytest.mark.parametrize(
    ("preset", "page_size"), [("cartpole", 1), ("cartpole", 2), ("cartpole", 4), ("long", 4)]
)
def test_reference_runs(preset: str, page_size: int) -> None:
    from paged_kv.tools.profile import profile

    result = profile(preset, envs=2, simulations=4, roots=2, page_size=page_size, reference=True)
    found = of_profile(result["workload"])
    check(found, result, dense=found.dense.kv)
    assert found.dense.working == result["caches"]["dense"]["working_bytes_peak"]


@pytest.mark.lightzero
@pytest.mark.parametrize("page_size", [2, 4])
def test_lightzero_runs(page_size: int) -> None:
    from paged_kv.tools.profile import profile

    result = profile("cartpole", simulations=26, roots=2, page_size=page_size)
    # 26 simulations a root step, so that the ring of 50 fills in two
    found = of_profile(result["workload"])
    check(found, result, dense=found.lightzero.kv)


@pytest.mark.lightzero
def test_a_page_size_that_depends_on_the_tree_gives_bounds() -> None:
    from paged_kv.tools.profile import profile

    result = profile("cartpole", envs=2, simulations=12, roots=2, page_size=3)
    found = of_profile(result["workload"])
    pages = result["caches"]["paged"]["kv_bytes_peak"] // found.page_bytes
    assert found.pages.least <= pages <= found.pages.most
    assert found.pages.least < found.pages.most


@pytest.mark.lightzero
def test_lightzero_after_every_root_step() -> None:
    from paged_kv.tools.profile import client
    from paged_kv.tools.profile.side import Setting

    setting = Setting(
        envs=3, simulations=14, seed=0, device=torch.device("cpu"), page_size=2, at="read"
    )
    for kind in ("dense", "paged"):
        side = client.LightZeroSide(kind, PRESETS["cartpole"], setting)
        held: list[Any] = []
        side.on_simulation = lambda side=side, held=held: held.append(side.held())
        for steps in range(1, 6):
            side.step(setting.simulations, steps)
            found = estimate(**{**CARTPOLE, "envs": 3, "simulations": 14}, root_steps=steps)
            assert held[-1].kv == (found.paged if kind == "paged" else found.lightzero).kv
        if kind == "paged":
            assert side.wm.paged.cache.stats.peak_pages == found.num_pages

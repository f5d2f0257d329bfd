"""What `estimate --workers` advises, against pools that get it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pool_models import a_pool
from tiny_models import VOCABULARY, tiny_model

from paged_kv.integrations.huggingface.lm import BATCH_BYTES
from paged_kv.integrations.ray.placement import BOUND, Placement
from paged_kv.tools.estimate import Estimate, estimate
from paged_kv.tools.estimate import machines as advised
from paged_kv.tools.search.forest import Forest
from paged_kv.tools.search.presets import METHODS, Preset
from paged_kv.tools.search.side import Rule
from paged_kv.tools.search.task import Likely

TREES = 6
CONFIG = tiny_model("llama").config


def estimated(preset: Preset, page_size: int) -> Estimate:
    return estimate(
        layers=CONFIG.num_hidden_layers,
        heads=CONFIG.num_attention_heads,
        kv_heads=CONFIG.num_key_value_heads,
        head_size=CONFIG.hidden_size // CONFIG.num_attention_heads,
        context=CONFIG.max_position_embeddings,
        envs=TREES,
        simulations=preset.simulations * preset.width,
        tokens_per_step=preset.tokens,
        root_tokens=preset.prompt_tokens,
        page_size=page_size,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("prompt", "tokens", "page_size"), [(12, 4, 4), (13, 3, 2), (13, 4, 1)])
def test_workers_with_what_is_advised_evict_nothing(
    method: str, prompt: int, tokens: int, page_size: int
) -> None:
    preset = Preset("small", prompt_tokens=prompt, simulations=3, width=4, tokens=tokens)
    found = estimated(preset, page_size)
    need = advised.machines(found, 2, hidden_size=CONFIG.hidden_size)
    lm = {"page_size": page_size, "max_bytes": need.max_bytes}
    pool, engine = a_pool(2, lm=lm)
    most = [0, 0]

    def look() -> None:
        for worker in pool.stats().workers:
            assert worker.figures is not None
            most[worker.worker] = max(most[worker.worker], worker.figures.pages)

    tasks = [Likely(VOCABULARY, seed) for seed in range(TREES)]
    growth = Forest(pool, tasks, preset, Rule(tokens, 0.8)).grow(method, 7, look)
    assert growth.nodes == TREES * preset.simulations * preset.width
    assert max(worker.trees for worker in pool.stats().workers) <= need.trees_of_a_worker
    assert pool.stats().merged.evicted == 0
    assert max(most) <= need.num_pages
    if method != "best-of-n" and tokens == page_size:
        assert max(most) == need.num_pages  # what is given is needed
    bundles = [
        state.bundle
        for actor in engine.living()
        for state in actor.worker._held.states(actor.worker._held.trees(), {}).values()
    ]
    saved = sum(bundle.nbytes for bundle in bundles)
    assert 0.85 < saved / need.snapshot_bytes < 1.12


@given(st.integers(1, 400), st.integers(1, 40))
def test_a_worker_gets_no_more_trees_than_that(trees: int, workers: int) -> None:
    placement = Placement(range(workers))
    for tree in range(trees):
        placement.open(tree)
    most = advised.trees_of_a_worker(trees, workers)
    assert max(placement.loads().values()) <= most == placement.room(trees)


def test_constants_are_those_of_the_parts() -> None:
    assert advised.BOUND == BOUND
    assert advised.FORWARD_BYTES == BATCH_BYTES

"""KGen, which others wrote: its searches on pages find what they find without any cache."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

pytestmark = pytest.mark.kgen

PROMPT = "3456789" * 8
Found = list[tuple[str, float]]


def mcts() -> Found:
    """Texts, and tokens drawn for each."""
    from kgen.sampling.cg_mcts import cg_mcts_sample

    def six_tokens(ids: torch.Tensor, before: int) -> bool:
        return ids.shape[1] - before >= 6

    return cg_mcts_sample(PROMPT, ids_splitters=[six_tokens], variations=4)[0]


def beams() -> Found:
    """Texts, and the score of each."""
    from kgen.sampling.beam import beam_search_sample

    return beam_search_sample(PROMPT, variations=4)


class Case(NamedTuple):
    """A search, the size of its model's vocabulary, and how many times as much copies hold."""

    search: Callable[[], Found]
    vocabulary: int
    saves: float


CASES = {
    "cg_mcts_sample": Case(mcts, 24, 6),
    "beam_search_sample": Case(beams, 160, 50),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each search of KGen in turn."""
    return CASES[request.param]


def searched(kind: type, case: Case) -> tuple[Found, Any]:
    """What a search finds, and what it searched with."""
    from kgen_models import tiny_llama

    searcher = kind(tiny_llama(case.vocabulary))
    with pytest.MonkeyPatch.context() as patch:
        searcher.install(patch)
        torch.manual_seed(5)
        found = case.search()
    return found, searcher


def same(found: Found, expected: Found) -> None:
    """Equal texts; numbers up to rounding."""
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [number for _, number in found] == pytest.approx([number for _, number in expected])


def whole_again(paged: Any) -> None:
    """Nothing is held once KGen has dropped its nodes, which know parents and children."""
    gc.collect()
    paged.settle()
    paged.pages.check()
    assert paged.pages.open_steps == 0
    assert paged.pages.pages_in_use == 0


def test_generate_on_pages_finds_the_same_in_a_fraction_of_the_memory(case: Case) -> None:
    import kgen_models

    expected, _ = searched(kgen_models.Alone, case)
    assert len({text for text, _ in expected}) > 3
    copied, copies = searched(kgen_models.OnCopies, case)
    same(copied, expected)
    found, paged = searched(kgen_models.OnPages, case)
    same(found, expected)
    assert copies.peak > case.saves * paged.peak
    whole_again(paged)


def test_nodes_find_what_their_draws_find_without_a_cache(case: Case) -> None:
    import kgen_models

    expected, _ = searched(kgen_models.NodesAlone, case)
    assert len({text for text, _ in expected}) > 3
    found, paged = searched(kgen_models.OnNodes, case)
    same(found, expected)
    whole_again(paged)

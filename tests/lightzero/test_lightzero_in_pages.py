"""`attention="pages"`: searches attend to contexts where they lie, and answer the same."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from lightzero_trees import Searcher, build_model, difference, play

from paged_kv.attention import in_pages
from paged_kv.attention.in_pages import InPages
from paged_kv.errors import BadCount

pytestmark = pytest.mark.lightzero
ROUNDING = 3e-6
both_positions = pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns at which something attended to windows where they lie."""
    columns: list[int] = []
    see = InPages.see

    def counted(self: InPages, column: int, layer: int, tokens: torch.Tensor) -> torch.Tensor:
        columns.append(column)
        return see(self, column, layer, tokens)

    monkeypatch.setattr(InPages, "see", counted)
    return columns


def attached(model: Any, **options: Any) -> Any:
    from paged_kv.integrations.lightzero import attach

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return attach(copy.deepcopy(model), **options)


def pair(model: Any, **options: Any) -> tuple[Searcher, Searcher]:
    """The same games on gathered contexts and on such as stay in their pages."""
    pages = {**options, "attention": "pages"}
    return Searcher(attached(model, **options)), Searcher(attached(model, **pages))


@both_positions
@pytest.mark.parametrize("padding", ["masked", "attended"])
@pytest.mark.parametrize("at", ["read", "write"])
@pytest.mark.parametrize("keys", ["node", "latent"])
def test_answers_are_the_same(
    seen: list[int], rotary: bool, padding: str, at: str, keys: str
) -> None:
    gathered, paged = pair(build_model(rotary=rotary), padding=padding, at=at, keys=keys)
    seen.clear()  # a batch on which steps were compared
    play(gathered)
    assert not seen
    play(paged)
    assert len(seen) >= 9 * 4 * 2  # tokens of steps, of each layer
    assert difference(gathered, paged) <= ROUNDING
    assert gathered.wm.hit_count == paged.wm.hit_count
    paged.wm.paged.cache.check()


@both_positions
def test_contexts_are_copied_only_where_they_differ(
    rotary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paged_kv.pages.storage import PagePlanes

    gathers: list[int] = []
    gather = PagePlanes.gather

    def counted(self: PagePlanes, index: Any, layout: Any) -> None:
        gathers.append(len(index))
        gather(self, index, layout)

    _, paged = pair(build_model(rotary=rotary))
    monkeypatch.setattr(PagePlanes, "gather", counted)
    for _ in range(6):
        paged.search(4)
    assert not gathers


@both_positions
def test_bounded_pools(seen: list[int], rotary: bool) -> None:
    gathered, paged = pair(build_model(rotary=rotary), num_pages=8, max_pages=40)
    assert difference(play(gathered), play(paged)) <= ROUNDING
    assert seen


@both_positions
def test_packed_weights_too(seen: list[int], rotary: bool) -> None:
    gathered, paged = pair(build_model(rotary=rotary), linears="packed")
    assert difference(play(gathered), play(paged)) <= ROUNDING
    assert seen


@both_positions
def test_steps_under_autocast(seen: list[int], rotary: bool) -> None:
    """Contexts are float32, and tokens bfloat16."""
    gathered, paged = pair(build_model(rotary=rotary))
    for searcher in (gathered, paged):
        searcher.search(2)
        recurrent = searcher.model.recurrent_inference

        def cast(*args: Any, recurrent: Any = recurrent, **options: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                answer = recurrent(*args, **options)
            answer.latent_state = answer.latent_state.float()
            return answer

        searcher.model.recurrent_inference = cast
        searcher.search(2)
    assert difference(gathered, paged) <= 0.05  # of bfloat16
    assert seen


def test_copies_have_contexts_of_their_own(seen: list[int]) -> None:
    gathered, paged = pair(build_model(rotary=False))
    paged.search(3)
    gathered.search(3)
    paged.model = copy.deepcopy(paged.model)
    assert paged.wm.paged.gather == "later"
    paged.reset()
    gathered.reset()
    assert difference(play(gathered), play(paged)) <= ROUNDING


def test_steps_of_lightzeros_own_copy_their_contexts(seen: list[int]) -> None:
    """Where the model is made of other parts than short steps know."""
    from paged_kv.integrations.lightzero import attach

    model = build_model(rotary=True)
    block = next(part for part in model.modules() if hasattr(part, "blocks")).blocks[0]
    block.register_forward_hook(lambda *_: None)
    own = Searcher(attach(copy.deepcopy(model), step="lightzero"))
    with pytest.warns(UserWarning, match='step="lean" is not used'):
        paged = Searcher(attach(copy.deepcopy(model), attention="pages"))
    seen.clear()
    assert difference(play(own), play(paged)) == 0
    assert not seen


def test_without_numba_contexts_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_pages, "loop", lambda: None)
    model = build_model(rotary=True)
    gathered = Searcher(attached(model))
    from paged_kv.integrations.lightzero import attach

    paged = Searcher(attach(copy.deepcopy(model), attention="pages"))
    play(gathered)
    with pytest.warns(UserWarning, match='attention="pages" is not used, since numba is not'):
        play(paged)
    assert difference(gathered, paged) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": "page"}, r"attention is 'page', allowed is 'gathered' or 'pages'"),
        ({"step": "lightzero"}, r"step is 'lightzero', allowed is 'lean' where attention is"),
        ({"compile": True}, r"compile is True, allowed is False where attention is 'pages'"),
        ({"storage": "int8"}, r"storage is 'int8', allowed is 'exact' where attention is 'pages'"),
        ({"window": "exact"}, r"attention is 'pages', allowed is 'gathered' where window is"),
    ],
)
def test_choices_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadCount, match=said):
        attached(build_model(rotary=True), **{"attention": "pages", **options})

"""Which cache a model has: `attach` and `installed`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any, TypeVar

from lzero.model.unizero_world_models.world_model import WorldModel

from paged_kv.errors import BadCount
from paged_kv.integrations.lightzero.shared.choices import Choices
from paged_kv.integrations.lightzero.shared.versions import FOUND, MAIN
from paged_kv.integrations.lightzero.shared.wrappers import unwrapped, world_model_of

if FOUND == MAIN:
    from paged_kv.integrations.lightzero.main.world_model import (
        BUILDERS,
        put_hooks,
        swap_in,
        swap_out,
    )
else:
    from paged_kv.integrations.lightzero.release.world_model import (
        BUILDERS,
        put_hooks,
        swap_in,
        swap_out,
    )

Target = TypeVar("Target")
CACHES = ("paged", "lightzero")
_MODELS = ("_model", "_learn_model", "_target_model", "_collect_model", "_eval_model")

# Already here: so that they lie inside whatever is put around the same methods later, and are there
# for models that were attached in another process and arrive pickled.
put_hooks()


def attach(
    target: Target,
    cache: str = "paged",
    *,
    at: str = "read",
    page_size: int = 2,
    keys: str = "node",
    padding: str = "masked",
    window: str = "cached",
    weights: str = "keep",
    eviction: str = "search",
    step: str = "lean",
    linears: str = "torch",
    attention: str = "gathered",
    storage: str = "exact",
    compile: bool = False,
    **pool: Any,
) -> Target:
    """Make a world model, a UniZero model or a policy use paged contexts, or LightZero's own cache
    again.

    - `cache`: "paged" or "lightzero".
    - `at`: when learned positions are re-based after a slide: "read" (what is stored stays
      untouched and shared) or "write" (LightZero's arithmetic bit for bit; every slide rewrites its
      window).
    - `keys`: how contexts are found again: "node" by environment and by the search tree's own names
      of its nodes (nothing is hashed, lost or mixed up; needs LightZero's C++ tree) or "latent" by
      row and latent state, as LightZero does, but compared as a whole.
    - `padding`: what shorter windows of a batch see of the zeros in front of them: "masked"
      nothing, so that a row gives the numbers it gives alone, or "attended" LightZero 0.2.0's
      numbers, which depend on the longest window.
    - `window`: what a context is: "cached" keys and values, corrected or not when the window
      slides, as LightZero does; or "exact" the tokens alone, from which every step computes its
      windows anew (release 0.2.0; main has modes of its own for it).
    - `weights`: what becomes of contexts whose weights changed since: "keep" goes on with them, as
      LightZero does, and counts it in `world_model.paged.old.used`; "drop" forgets them before the
      next search; "refuse" raises WeightsChanged there. Of changes that leave no trace
      `world_model.paged.weights_changed()` tells.
    - `eviction`: where `pool` bounds the pages, which search nodes go first: "search" those that
      the search is least likely to come back to, "lru", "fifo". With `keys="node"` an evicted node
      is computed again when it is needed.
    - `step`: how the model takes a step of a search: "lean" by one short function over the same
      modules and weights, checked here against the model's own step on a random batch, or
      "lightzero" by its own code. Where a model is made of other parts, steps stay LightZero's own;
      a warning and `world_model.paged.lean.refused` say why.
    - `linears`: how linear layers compute in a search: "torch" as ever, or "packed" on the CPU from
      copies that are read faster (`paged_kv.linears`), equal up to rounding.
    - `attention`: "gathered" copies the windows of a batch side by side, in one kernel, and attends
      as LightZero does; "pages" attends to them where they lie, by a loop that numba compiles, for
      short steps on the CPU: equal up to rounding, and faster the longer windows are. Where that
      cannot be, a warning says why, and windows are copied.
    - `storage`: "exact", or "int8" for a quarter of the bytes, each number within half a step (not
      with `at="write"`, which would round a window at every slide).
    - `compile`: whether short steps of all `env_num` rows are compiled by torch.compile before the
      first search, which takes minutes, and timed: where that gains nothing or fails, a warning
      says so, and steps are as without it.
    - `pool`: what `PagedKVCache` takes: `num_pages`, `max_pages`, `max_bytes`, `grow`.

    All contexts held so far are dropped. Deep copies of an attached model have pools of their own.
    Returns `target`. Raises BadCount for unknown choices and where `target` holds no UniZero world
    model.
    """
    if cache not in CACHES:
        raise BadCount("cache", cache, " or ".join(map(repr, CACHES)))
    choices = Choices(
        at,
        keys,
        padding,
        window,
        weights,
        eviction,
        step,
        linears,
        attention,
        storage,
        compile,
    )
    choices.check()
    models = list(_world_models(target))
    if not models:
        raise BadCount(
            "target",
            type(target).__name__,
            "a UniZero world model, or a model or policy that holds one",
        )
    for model in models:
        if cache == "paged":
            swap_in(model, choices, {"page_size": page_size, "storage": storage, **pool})
        else:
            swap_out(model)
    return target


@contextlib.contextmanager
def installed(cache: str = "paged", **options: Any) -> Iterator[None]:
    """Within the block, every UniZero model that LightZero builds gets the chosen cache, with
    options of `attach`.

    For entry points that build the model themselves, such as `lzero.entry.train_unizero`.
    """

    def building(original: Any) -> Any:
        def build(*args: Any, **kwargs: Any) -> Any:
            return attach(original(*args, **kwargs), cache, **options)

        return staticmethod(build)  # some are attributes of classes, and no methods

    places: list[tuple[Any, str]] = []
    for module, owner, name in BUILDERS:
        found = import_module(module)
        places.append((getattr(found, owner) if owner else found, name))
    before = [vars(place)[name] for place, name in places]
    for (place, name), original in zip(places, before):
        setattr(place, name, building(original))
    try:
        yield
    finally:
        for (place, name), original in zip(places, before):
            setattr(place, name, original)


def _world_models(target: Any) -> Iterator[Any]:
    """Each distinct world model of a target, once."""
    seen: set[int] = set()
    models = [getattr(unwrapped(target), name, None) for name in _MODELS]
    for holder in map(unwrapped, (target, *models)):
        world_model = holder if isinstance(holder, WorldModel) else world_model_of(holder)
        if isinstance(world_model, WorldModel) and id(world_model) not in seen:
            seen.add(id(world_model))
            yield world_model

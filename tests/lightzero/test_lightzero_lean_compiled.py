"""The short step on its staging buffer: compiled, ready to be captured, and how many kernels it
takes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from lightzero_trees import Searcher, build_model, difference
from torch.utils._python_dispatch import TorchDispatchMode

from paged_kv.tools.profile.counters import KernelCounter, Probe, Probes, Regions

pytestmark = pytest.mark.lightzero
ROUNDING = 2e-5
both_positions = pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])
WAITS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
    "aten::_to_copy",
    "aten::lift_fresh",
}


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for a device, copies between devices, or has a shape that depends on
    contents.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in WAITS, f"{func} in a step that is to be captured"
        return func(*args, **(kwargs or {}))


def attached(model: Any, **options: Any) -> Any:
    from paged_kv.integrations.lightzero import attach

    return attach(copy.deepcopy(model), **options)


def staged(model: Any, device: str, rows: int = 4) -> tuple[Any, Any]:
    """The parts of a model, and a staging buffer of random contexts."""
    from paged_kv.integrations.lightzero.shared.lean.reading import read
    from paged_kv.integrations.lightzero.shared.lean.staging import Staging

    world_model = model.world_model.to(device)
    staging = Staging(world_model, rows)
    random = torch.Generator(device=device).manual_seed(0)
    staging.planes.normal_(generator=random)
    staging.mask[0, :, :, :2] = -torch.inf
    staging.index += 2
    return read(world_model), staging


@both_positions
def test_nothing_waits_within_a_step(rotary: bool, device: str) -> None:
    from paged_kv.integrations.lightzero.shared.lean.staging import staged_step

    parts, staging = staged(build_model(rotary=rotary), device)
    with torch.no_grad(), NoWaiting():
        staged_step(parts, staging)


def test_the_mode_notices_what_waits() -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(1).item()


@both_positions
def test_a_step_is_one_graph(rotary: bool, device: str) -> None:
    """`fullgraph` raises where a step looks at a number."""
    from paged_kv.integrations.lightzero.shared.lean.staging import staged_step

    parts, staging = staged(build_model(rotary=rotary), device)
    again = copy.deepcopy(staging)
    with torch.no_grad():
        wanted = staged_step(parts, staging)
        found = torch.compile(staged_step, fullgraph=True, backend="eager")(parts, again)
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(again.planes, staging.planes)


@both_positions
def test_a_step_writes_to_the_same_memory(rotary: bool, device: str) -> None:
    from paged_kv.integrations.lightzero.shared.lean.staging import staged_step

    parts, staging = staged(build_model(rotary=rotary), device)
    before = staging.planes.clone()
    address = staging.planes.data_ptr()
    with torch.no_grad():
        staged_step(parts, staging)
    assert staging.planes.data_ptr() == address
    old = staging.width - 2
    assert torch.equal(staging.planes[..., :old, :], before[..., :old, :])
    assert not torch.equal(staging.planes[..., old:, :], before[..., old:, :])


def launches(model: Any) -> float:
    """Kernels of one `recurrent_inference`."""
    searcher = Searcher(model)
    for _ in range(4):
        searcher.search(4)
    regions = Regions()
    with (
        Probes([Probe(model, "recurrent_inference", "step")], regions),
        KernelCounter(regions) as n,
    ):
        searcher.search(4)
    return n.counts["step"] / 4


@both_positions
def test_half_of_the_kernels(rotary: bool, device: str) -> None:
    """In a captured step, with attention as one kernel, and on the CPU where windows stay in their
    pages. Gathered ones take three kernels there, for the same bits.
    """
    from paged_kv.integrations.lightzero.shared.lean.staging import staged_step

    model = build_model(rotary=rotary)
    own = launches(attached(model, step="lightzero"))
    lean = launches(attached(model, step="lean"))
    assert lean < 0.56 * own
    if device == "cpu":
        loops = 2 * model.world_model.num_layers  # of numba, which torch knows nothing of
        assert launches(attached(model, attention="pages")) + loops <= own / 2
    parts, staging = staged(model, device)
    with torch.no_grad(), KernelCounter(Regions()) as counted:
        staged_step(parts, staging)
    assert sum(counted.counts.values()) <= own / 2


# -- torch.compile


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs that torch traces and runs as they are: inductor takes a minute for each."""
    from paged_kv.integrations.lightzero.shared.lean import compiled, running

    monkeypatch.setattr(running, "compiled", partial(compiled.compiled, backend="eager"))
    yield
    torch._dynamo.reset()


def timed(monkeypatch: pytest.MonkeyPatch, plain: float, other: float) -> None:
    from paged_kv.integrations.lightzero.shared.lean import compiled

    monkeypatch.setattr(compiled, "race", lambda *_: compiled.Timed(plain, other))


@both_positions
@pytest.mark.parametrize("padding", ["masked", "attended"])
def test_compiled_steps_answer_alike(
    rotary: bool, padding: str, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 2.0, 1.0)
    model = build_model(rotary=rotary)
    own = Searcher(attached(model, step="lightzero", padding=padding))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = Searcher(attached(model, compile=True, padding=padding))
        for searcher in (own, ours):
            for ready in (None,) * 6 + (3,):
                searcher.search(4, ready=ready)
    assert difference(own, ours) <= ROUNDING
    lean = ours.wm.paged.lean
    assert lean.steps == 7 * 4
    assert lean.compiled_steps == 6 * 4, "three rows are fewer than the model has environments"


def test_compiled_steps_follow_the_weights(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 2.0, 1.0)
    model = build_model(rotary=True)
    searchers = Searcher(attached(model, step="lightzero")), Searcher(attached(model, compile=True))
    for searcher in searchers:
        searcher.search(3)
        with torch.no_grad():
            for weight in searcher.wm.parameters():
                weight.mul_(1.05)
        searcher.search(3)
    assert difference(*searchers) <= ROUNDING
    assert searchers[1].wm.paged.lean.compiled_steps == 6


def test_under_a_mode_steps_are_plain_and_afterwards_compiled_again(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 2.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = Searcher(attached(build_model(rotary=True), compile=True))
        ours.search(3)
        with KernelCounter(Regions()) as counted:
            ours.search(3)
        ours.search(3)
    assert sum(counted.counts.values()) > 0
    assert ours.wm.paged.lean.steps == 9
    assert ours.wm.paged.lean.compiled_steps == 6


def test_what_gains_nothing_is_not_used(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 1.0, 1.1)
    ours = Searcher(attached(build_model(rotary=True), compile=True))
    with pytest.warns(UserWarning, match="compile=True is not used, since it gains nothing here"):
        ours.search(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours.search(2)  # neither said nor tried again
    assert ours.wm.paged.lean.steps == 4
    assert ours.wm.paged.lean.compiled_steps == 0


def test_both_ways_are_timed(quick: None) -> None:
    from paged_kv.integrations.lightzero.shared.lean.compiled import ROUNDS, Compiled, race
    from paged_kv.integrations.lightzero.shared.lean.reading import read

    model = attached(build_model(rotary=True), step="lean").world_model
    made = Compiled(model, read(model), backend="eager")
    called = []

    def plain(*arguments: Any) -> Any:
        called.append(arguments)
        return made.run(*arguments)

    with torch.no_grad():
        found = race(model, plain, made.run, model.paged)
    assert found.plain > 0
    assert found.compiled > 0
    assert len(called) == ROUNDS


def broken(*_: Any, **__: Any) -> Callable[..., Any]:
    def run(*_: Any) -> Any:
        raise RuntimeError("no compiler was found\nand more")

    return run


def test_without_a_compiler_steps_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", broken)
    model = build_model(rotary=True)
    own = Searcher(attached(model, step="lightzero"))
    ours = Searcher(attached(model, compile=True))
    said = "compile=True is not used, since it failed: RuntimeError: no compiler was found"
    with pytest.warns(UserWarning, match=said):
        ours.search(3)
    own.search(3)
    assert difference(own, ours) <= ROUNDING
    assert ours.wm.paged.lean.not_compiled.endswith("no compiler was found")


def test_a_failure_in_the_middle_of_a_search(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 2.0, 1.0)
    model = build_model(rotary=False)
    own = Searcher(attached(model, step="lightzero"))
    ours = Searcher(attached(model, compile=True))
    own.search(3)
    ours.search(3)
    from paged_kv.integrations.lightzero.shared.lean.staging import Staging

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "store", broken())
        with pytest.warns(UserWarning, match="compile=True is not used, since it failed"):
            ours.search(3)
    own.search(3)
    assert difference(own, ours) <= ROUNDING
    ours.wm.paged.cache.check()

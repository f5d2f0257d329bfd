"""Pages of int8 codes: within the bound in every order of verbs, never rounded twice, small, and
refused where numbers are read in place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from quantised_machine import QuantisedMachine, within

from paged_kv import PagedKVCache
from paged_kv.errors import BadArgument, OtherFingerprint, UnfitForKernel
from paged_kv.pages.codes import LEAST, Int8Records, decode, encoded

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def test_all_verbs_keep_the_bound(device: str) -> None:
    machine = type("Machine", (QuantisedMachine,), {"device": device})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=100, stateful_step_count=25, deadline=None)
    )


def read_back(numbers: torch.Tensor) -> torch.Tensor:
    found = torch.empty_like(numbers)
    decode(*encoded(numbers), found)
    return found


def rows(dtype: torch.dtype, exponents: list[int], seed: int) -> torch.Tensor:
    """Rows of any size, as far as the dtype reaches; some of a few large numbers."""
    random = torch.Generator().manual_seed(seed)
    scale = 2.0 ** torch.tensor(exponents, dtype=torch.float64)[:, None]
    found = torch.randn(len(exponents), 5, dtype=torch.float64, generator=random) * scale
    found[::3, 1:] *= 1e-3
    info = torch.finfo(dtype)
    most = min(info.max, torch.finfo(torch.float32).max)
    return found.clamp(-most, most).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=150)
@given(exponents=st.lists(st.integers(-160, 128), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_numbers_come_back_within_the_bound_and_are_rounded_once(
    dtype: torch.dtype, exponents: list[int], seed: int
) -> None:
    if dtype == torch.float16:
        exponents = [each // 10 for each in exponents]
    numbers = rows(dtype, exponents, seed)
    once = read_back(numbers)
    assert within(once, numbers)
    first = encoded(numbers)
    again = encoded(once)
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.peaks, again.peaks)
    assert first.codes.min() >= -127


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_peak_of_two_bytes_comes_back(dtype: torch.dtype) -> None:
    """All positive numbers there are, each as the largest of its row."""
    every = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    peaks = every[every.isfinite()]
    share = torch.linspace(-1, 1, 61, dtype=torch.float64)
    numbers = (peaks.double()[:, None] * share).to(dtype)
    once = read_back(numbers)
    assert within(once, numbers)
    assert torch.equal(read_back(once), once)
    assert torch.equal(encoded(once).codes, encoded(numbers).codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_comes_back_as_nan(dtype: torch.dtype, wrong: float) -> None:
    numbers = torch.ones(3, 4, dtype=dtype)
    numbers[1, 2] = wrong
    once = read_back(numbers)
    assert once[1].isnan().all()
    assert torch.equal(once[::2], numbers[::2])
    assert encoded(once).codes[1].eq(0).all(), "the same codes again"
    assert read_back(once)[1].isnan().all()


def test_rows_without_a_magnitude_are_zeros() -> None:
    numbers = torch.tensor([[LEAST, -LEAST / 2], [LEAST / 2, -1e-45], [0.0, -0.0]])
    once = read_back(numbers)
    assert torch.allclose(once[0], numbers[0], rtol=1e-2, atol=0)
    assert once[1:].eq(0).all()


def test_numbers_of_float64_beyond_float32_are_told() -> None:
    assert read_back(torch.tensor([[1e39, 1.0]], dtype=torch.float64)).isnan().all()


# -- the cache


def made(storage: str = "int8", **options: Any) -> PagedKVCache:
    shape: dict[str, Any] = {"layers": 2, "heads": 3, "head_size": 64, "page_size": 4}
    return PagedKVCache(**{**shape, "storage": storage, **options})


def kv(cache: PagedKVCache, count: int, sequences: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (cache.layers, sequences, cache.heads, count)
    keys = torch.randn(*shape, cache.head_size, device=cache.device).to(cache.dtype)
    values = torch.randn(*shape, cache.value_head_size, device=cache.device).to(cache.dtype)
    return keys, values


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, 3.87), (torch.bfloat16, 1.93), (torch.float16, 1.93)]
)
def test_pages_are_small(dtype: torch.dtype, least: float) -> None:
    exact = made("exact", dtype=dtype)
    small = made(dtype=dtype)
    assert exact.page_bytes / small.page_bytes > least
    held = sum(plane.rows.nbytes for plane in small._pool.storage.planes)  # type: ignore[attr-defined]
    assert held == (small.pages_reserved + 1) * small.page_bytes


@pytest.mark.parametrize("page_size", [1, 3, 4, 8])
@pytest.mark.parametrize("value_head_size", [None, 5])
def test_whatever_moves_a_page_moves_its_bytes(
    device: str, page_size: int, value_head_size: int | None
) -> None:
    """A copied last page, a trim, a bundle, and a context that is read in different ways."""
    torch.manual_seed(0)
    cache = made(page_size=page_size, value_head_size=value_head_size, device=device)
    (root,) = cache.new()
    cache.append([root], *kv(cache, 7))
    before = cache.gather([root])
    left, right = cache.fork([root, root])
    cache.append([left], *kv(cache, 1))
    cache.append([right], *kv(cache, 1))
    cache.release(cache.fork([root]))
    cache.trim()
    twin = made(page_size=page_size, value_head_size=value_head_size, device=device)
    adopted = twin.adopt(cache.export([left]))
    for held, seq in ((cache, root), (cache, left), (cache, right), (twin, adopted[0])):
        found = held.gather([seq], pad="right")
        assert torch.equal(found.keys[:, :, :, :7], before.keys)
        assert torch.equal(found.values[:, :, :, :7], before.values)
    with cache.open([root], 1) as step:
        assert torch.equal(step.keys(1), before.keys[1])
        assert torch.equal(step.values(1), before.values[1])


def test_a_bundle_of_other_pages_is_refused() -> None:
    exact = made("exact")
    small = made()
    for one, other in ((exact, small), (small, exact)):
        seqs = one.new()
        one.append(seqs, *kv(one, 3))
        before = other.live()
        with pytest.raises(OtherFingerprint, match="int8 codes"):
            other.adopt(one.export(seqs))
        assert other.live() == before


def test_kernels_that_read_in_place_are_refused() -> None:
    cache = made(page_size=256)
    (root,) = cache.new()
    cache.append([root], *kv(cache, 3))
    for pages in (cache.flashinfer_pages, cache.flash_attention_pages):
        with pytest.raises(UnfitForKernel, match="int8 codes"):
            pages([root], 0)


def test_another_storage_is_refused() -> None:
    with pytest.raises(BadArgument, match='"exact" or "int8"'):
        made("int4")


def test_gradients_do_not_reach_the_pages() -> None:
    cache = made()
    keys, values = (part.requires_grad_() for part in kv(cache, 3))
    (root,) = cache.new()
    cache.append([root], keys, values)
    assert not cache.gather([root]).keys.requires_grad
    with torch.inference_mode():
        cache.append([root], *kv(cache, 3))
    assert cache.lengths([root]) == [6]


# -- records


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_head_size", [4, 3])
@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), pages=st.integers(1, 4), page_size=st.integers(1, 5))
def test_records_come_back_and_go_again_as_they_were(
    dtype: torch.dtype, value_head_size: int, seed: int, pages: int, page_size: int
) -> None:
    torch.manual_seed(seed)
    options = {"head_size": 4, "value_head_size": value_head_size, "page_size": page_size}
    exact = made("exact", dtype=dtype, **options)
    small = made(dtype=dtype, **options)
    keys, values = kv(exact, pages * page_size)
    contents = []
    for cache in (exact, small):
        seqs = cache.new()
        cache.append(seqs, keys, values)
        contents.append(torch.from_numpy(cache.export(seqs).records.copy()))
    records = Int8Records(exact._pool.storage.form)
    coded = records.encode(contents[0])
    assert coded.shape == (pages, records.page_bytes)
    assert records.page_bytes == small.page_bytes
    assert torch.equal(coded, contents[1]), "those of a cache of codes"
    decoded = records.decode(coded)
    assert decoded.shape == contents[0].shape
    assert torch.equal(records.encode(decoded), coded)
    if value_head_size == 4:  # else rows of two sizes lie behind each other
        numbers = [each.view(dtype).view(pages, -1, 4) for each in (decoded, contents[0])]
        assert within(*numbers)

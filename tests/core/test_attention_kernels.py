"""Pages as kernels of others read them: what is read back through their tables is what was written.

No kernel runs here; its way through the tables is a few lines of torch.
"""

from __future__ import annotations

import pytest
import torch
from paged_rows import Scene, Step

from paged_kv.attention import Rows, flash_attention_pages, flashinfer_pages
from paged_kv.errors import UnfitForKernel


def ragged(page_size: int, device: str, value_head_size: int | None = None) -> tuple[Scene, Step]:
    """Rows that share pages, of unequal lengths, whose new tokens are written."""
    torch.manual_seed(0)
    scene = Scene(page_size=page_size, value_head_size=value_head_size, device=device)
    root = scene.new(0, 2 * page_size + 1)
    child = scene.fork(root)
    scene.append(child, page_size)
    step = scene.step([root, child, root, scene.new(0, page_size - 1)], [1, 2, 0, 1])
    for layer in range(2):
        step.write(layer)
    return scene, step


@pytest.mark.parametrize("value_head_size", [None, 3])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_flashinfer_reads_what_was_written(
    device: str, page_size: int, value_head_size: int | None
) -> None:
    scene, step = ragged(page_size, device, value_head_size)
    for layer in range(2):
        pages = flashinfer_pages(scene.storage, step.rows, layer)
        assert pages.indptr.dtype == pages.indices.dtype == pages.last_page_len.dtype == torch.int32
        assert pages.last_page_len.ge(1).all()
        assert pages.last_page_len.le(page_size).all()
        for row, child in enumerate(step.children):
            first, end = pages.indptr[row : row + 2].tolist()
            table = pages.indices[first:end].long()
            total = (end - first - 1) * page_size + int(pages.last_page_len[row])
            for found, expected in zip((pages.keys, pages.values), scene.contexts[child]):
                tokens = found[table].transpose(0, 1).flatten(1, 2)[:, :total]
                assert torch.equal(tokens, expected[layer])
        if value_head_size is None:
            assert pages.cache.shape[1:] == (2, 2, page_size, 4)
            assert torch.equal(pages.cache[1:3, 0], pages.keys[1:3])
            assert pages.cache[:, 1].data_ptr() == pages.values.data_ptr()
        else:
            assert pages.cache is None


def test_flash_attention_reads_what_was_written(device: str) -> None:
    scene, step = ragged(16, device)
    for layer in range(2):
        pages = flash_attention_pages(scene.storage, step.rows, layer, multiple=16)
        assert pages.block_table.dtype == pages.cache_seqlens.dtype == torch.int32
        assert pages.k_cache.stride(-1) == 1
        for row, child in enumerate(step.children):
            total = int(pages.cache_seqlens[row])
            table = pages.block_table[row].long()
            caches = (pages.k_cache, pages.v_cache)
            for found, expected in zip(caches, scene.contexts[child]):
                tokens = found[table].flatten(0, 1)[:total]
                assert torch.equal(tokens.transpose(0, 1), expected[layer])


def test_views_copy_nothing() -> None:
    scene, step = ragged(16, "cpu")
    pages = flashinfer_pages(scene.storage, step.rows, 0)
    flash = flash_attention_pages(scene.storage, step.rows, 0, multiple=16)
    memory = scene.storage.layer_view(0)[0].untyped_storage().data_ptr()
    for view in (pages.cache, pages.keys, pages.values, flash.k_cache, flash.v_cache):
        assert view.untyped_storage().data_ptr() == memory


def test_an_offset_in_the_first_page_is_refused() -> None:
    scene = Scene(page_size=16)
    step = scene.step([scene.new(0, 3), scene.new(5, 3)], [1, 1])
    message = "the first token of row 1 is at offset 5 of its page, allowed is offset 0"
    with pytest.raises(UnfitForKernel, match=f"FlashInfer cannot read these pages: {message}"):
        flashinfer_pages(scene.storage, step.rows, 0)
    with pytest.raises(UnfitForKernel, match=f"flash_attn_with_kvcache cannot .*: {message}"):
        flash_attention_pages(scene.storage, step.rows, 0, multiple=16)


def test_another_page_size_is_refused() -> None:
    scene = Scene(page_size=16)
    with pytest.raises(UnfitForKernel, match="page_size is 16, allowed is a multiple of 256"):
        flash_attention_pages(scene.storage, Rows([], [], [], []), 0)


def test_sizes_of_k_and_v_that_differ_are_refused_where_they_must_be() -> None:
    scene = Scene(page_size=16, value_head_size=3)
    with pytest.raises(UnfitForKernel, match="K has size 4 and V 3, allowed is one size for both"):
        flash_attention_pages(scene.storage, Rows([], [], [], []), 0, multiple=16)


def test_a_row_without_a_token_is_refused_where_it_must_be() -> None:
    scene = Scene(page_size=16)
    step = scene.step([scene.new(0, 3), scene.new(0, 0)], [1, 0])
    with pytest.raises(UnfitForKernel, match="row 1 has no token, allowed is at least one"):
        flashinfer_pages(scene.storage, step.rows, 0)
    assert flash_attention_pages(
        scene.storage, step.rows, 0, multiple=16
    ).cache_seqlens.tolist() == [4, 0]

"""A transformers cache over pages, for `forward` and `generate`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from paged_kv.cache import PagedKVCache
from paged_kv.checks import amount, flag, handles
from paged_kv.errors import BadArgument, BadCount, BadDevice, BadDtype, BadShape
from paged_kv.integrations.huggingface.feeding import FeedCache
from paged_kv.integrations.huggingface.rows import Rows
from paged_kv.integrations.huggingface.shapes import ModelShape, decoder_of, shape_of
from paged_kv.integrations.huggingface.versions import FOUND


class PagedCache(FeedCache):
    """Contexts in pages as the cache of a model: in `forward`, and in every mode of `generate`.

    - `seqs`: what it goes on from, a row each. It works on forks of its own, which are released
      with it. Without `seqs` it is empty, and the first forward says how many rows there are.
    - `expand_size`: each row that many times, side by side: `generate` repeats its inputs for
      `num_beams` and `num_return_sequences`, not its cache. An empty cache stores the first forward
      of rows that are alike once.
    - `omit_last`: leave out the last token of each row, which is fed again: for `generate`, whose
      `input_ids` are the whole path, and which has to feed something.

    Rows of unequal lengths end in one column; the attention mask has zeros in front of shorter
    ones. `fork` hands out the rows as sequences, `copy.deepcopy` makes another cache over forks.

    Raises UnsupportedModel; BadShape, BadDtype, BadDevice where the pages are not made for the
    model; BadCount, BadArgument, StaleHandle, ForeignHandle.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2)).eval()
    >>> pages = shape_of(model).pages()
    >>> cache = PagedCache(pages, model)
    >>> prompt = torch.tensor([[11, 12, 13]])
    >>> out = model.generate(prompt, max_new_tokens=4, do_sample=False, **cache.as_argument())
    >>> node, = cache.fork()
    >>> pages.lengths([node])    # the last token was drawn, and not fed yet
    [6]
    """

    def __init__(
        self,
        pages: PagedKVCache,
        model: Any,
        seqs: Iterable[int] | None = None,
        *,
        expand_size: int = 1,
        omit_last: bool = False,
    ) -> None:
        check_fit(pages, shape_of(model))
        times = amount("expand_size", expand_size, 1)
        config = decoder_of(model).config.get_text_config(decoder=True)
        rows = Rows(pages, config, times if seqs is None else 1)
        super().__init__(rows)
        self.rows = rows
        self.mixed = False  # whether rows have changed places since it was made, as beams do
        if seqs is not None:
            self._begin(handles(seqs), times, omit_last)

    def _begin(self, seqs: list[int], times: int, omit_last: bool) -> None:
        pages = self.rows.pages
        parents = [seq for seq in seqs for _ in range(times)]
        lengths = pages.lengths(parents)
        if flag("omit_last", omit_last):
            if 0 in lengths:
                raise BadCount("tokens of a row", 0, "at least one, of which the last is omitted")
            lengths = [length - 1 for length in lengths]
        columns = max(lengths, default=0)
        self.rows.become(lambda: (pages.fork(parents, at=lengths), columns))
        self.rows.began = min(lengths, default=0)

    def __repr__(self) -> str:
        state = f"{self.rows.rows} rows of {self.rows.columns} columns"
        return f"<PagedCache of {state} in {self.rows.pages!r}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """Another cache that goes on from here. No K/V is copied."""
        self.rows.settle()
        twin = PagedCache.__new__(PagedCache)
        mine = self.rows
        rows = Rows(mine.pages, mine.config, mine.alike)
        FeedCache.__init__(twin, rows)
        twin.rows = rows
        twin.mixed = self.mixed
        state = mine.state
        rows.become(lambda: (mine.pages.fork(state.seqs), state.columns))
        rows.began = mine.began
        memo[id(self)] = twin
        return twin

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row; what a model with dense attention was fed as padding counts."""
        self.rows.settle()
        return list(self.rows.state.lengths)

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward of an empty cache."""
        return self.rows.rows or -1

    def settle(self) -> None:
        """Store what was fed, and give back the buffer and the pages that were ready for more.

        Whatever looks at the rows does so by itself. Call it where a cache is put by after
        `generate`, or it keeps a dense copy of its rows until somebody goes on from it.
        """
        self.rows.settle()

    def fork(self, attention_mask: torch.Tensor | None = None) -> list[int]:
        """The rows as they are now, as sequences that are the caller's own. No K/V is copied.

        `attention_mask` [B, columns or more] says which columns each row keeps, the first of them
        to the last: so padding goes, in front, and behind the end of a row that was finished before
        others. A dense model stores what it is fed as padding, since only its mask tells; give the
        mask that it was given. Raises BadShape, BadArgument.
        """
        self.rows.settle()
        pages = self.rows.pages
        state = self.rows.state
        if attention_mask is None:
            return pages.fork(state.seqs)
        firsts, ends = _spans(attention_mask, len(state.seqs), state.columns)
        pads = [state.columns - length for length in state.lengths]
        with pages.scope() as scope:
            kept = [max(0, end - pad) for end, pad in zip(ends, pads)]
            seqs = pages.fork(state.seqs, at=kept)
            gone = [min(keep, max(0, first - pad)) for keep, first, pad in zip(kept, firsts, pads)]
            pages.slide(seqs, gone)
            return scope.keep(seqs)

    # -- what generate() does with it

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Be these rows: forks of those that go on twice."""
        order = beam_idx.tolist()
        self.mixed = self.mixed or order != list(range(self.rows.rows))
        self.rows.pick(order)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, side by side."""
        times = amount("repeats", repeats, 0)
        self.rows.pick([row for row in range(self.rows.rows) for _ in range(times)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows: numbers, or true for each that stays."""
        chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.mixed = True
        self.rows.pick(chosen.tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Drop columns from the end, -n for n of them.

        Before transformers 5.24 a number of zero or more says how many are left.
        """
        held = self.rows.columns
        wanted = int(tokens_to_remove)
        if FOUND.crop_removes and wanted > 0:
            raise BadCount("tokens_to_remove", wanted, "0, or -n for n columns")
        count = -wanted
        if not FOUND.crop_removes and wanted >= 0:
            count = max(0, held - wanted)
        if count:
            self.rows.shorten(min(count, held))

    def reset(self) -> None:
        """Be empty again, with as many rows."""
        self.rows.clear()


def check_fit(pages: PagedKVCache, shape: ModelShape) -> None:
    """Raise BadShape, BadDtype or BadDevice unless the pages are made for the model."""
    if not isinstance(pages, PagedKVCache):
        raise BadArgument("pages", pages, "a PagedKVCache")
    held = (pages.layers, pages.heads, pages.head_size, pages.value_head_size)
    if held != shape[:4]:
        raise BadShape("pages (layers, heads, head size, value head size)", held, shape[:4])
    if pages.dtype != shape.dtype:
        raise BadDtype("pages", pages.dtype, shape.dtype)
    if pages.device != shape.device:
        raise BadDevice("pages", pages.device, shape.device)


def _spans(mask: torch.Tensor, rows: int, columns: int) -> tuple[list[int], list[int]]:
    """First column that each row keeps, and the one behind the last."""
    if not isinstance(mask, torch.Tensor):
        raise BadArgument("attention_mask", mask, "a tensor [B, columns]")
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < columns:
        raise BadShape("attention_mask", tuple(mask.shape), (rows, f"{columns} or more"))
    kept = mask[:, :columns].detach().cpu().bool()
    firsts = kept.long().cumsum(1).eq(0).sum(1)
    ends = columns - kept.flip(1).long().cumsum(1).eq(0).sum(1)
    if bool((ends - firsts).clamp(min=0).ne(kept.sum(1)).any()):
        raise BadArgument("attention_mask", mask.int().tolist(), "one run of ones in each row")
    return firsts.tolist(), ends.tolist()

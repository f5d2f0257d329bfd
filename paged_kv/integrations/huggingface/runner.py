"""Tokens are run through a model's layers, on pages: batches of unequal rows, in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch

from paged_kv.cache import PagedKVCache
from paged_kv.errors import OutOfFrames, OutOfPages
from paged_kv.integrations.huggingface.attention import NAME
from paged_kv.integrations.huggingface.shapes import ModelShape
from paged_kv.integrations.huggingface.stepping import StepCache
from paged_kv.integrations.huggingface.token_tree import Tokens
from paged_kv.linears import PackedLinears

T = TypeVar("T")
R = TypeVar("R")


class Fed(NamedTuple):
    """One row that was run: its new sequence, the caller's own, and hidden states of its tokens."""

    seq: int
    hidden: torch.Tensor  # [tokens, hidden size], or of the last one alone


class Runner:
    """Runs tokens behind sequences.

    `tokens`: new tokens of a forward at most, padding included; `piece`: those of a row; `linears`:
    what computes linear layers in place of the model's own.
    """

    def __init__(
        self,
        decoder: Any,
        shape: ModelShape,
        pages: PagedKVCache,
        *,
        tokens: int,
        piece: int,
        backend: str,
        linears: PackedLinears | None,
    ) -> None:
        self.decoder = decoder
        self.shape = shape
        self.pages = pages
        self.tokens = tokens
        self.piece = piece
        self.backend = backend
        self.linears = linears
        self.fed = 0  # tokens so far
        self._told: Callable[[int], object] | None = None

    @contextmanager
    def telling(self, told: Callable[[int], object]) -> Iterator[None]:
        """A block in which `told` hears how many tokens were fed, forward by forward."""
        self._told = told
        try:
            yield
        finally:
            self._told = None

    def rows(self, counts: Iterable[int]) -> int:
        """How many of these rows, from the first one on, go into one batch. No more counts are
        taken than are needed.
        """
        widest = 0
        row = 0
        for count in counts:
            widest = max(widest, min(count, self.piece))
            if row and (row + 1) * widest > self.tokens:
                break
            row += 1
        return row

    def fitting(self, rows: Sequence[T], count: int, work: Callable[[Sequence[T]], R]) -> R:
        """What comes of work on the first `count` rows, or on fewer, where pages or frames do not
        do for so many. Raises OutOfPages or OutOfFrames where they do not do for one. Whatever
        `work` made when it ran out must be released by then.
        """
        while True:
            try:
                return work(rows[:count])
            except (OutOfPages, OutOfFrames):
                if count < 2:
                    raise
                count //= 2

    def feed(
        self, seqs: Sequence[int], rows: Sequence[Tokens], *, whole: bool = False
    ) -> list[Fed]:
        """Run at least one new token behind each of these sequences, which stay; one batch.

        `whole`: hidden states of all new tokens are wanted. What is made on the way is released.
        Raises OutOfPages.
        """
        at = list(seqs)
        states: list[list[torch.Tensor]] = [[] for _ in rows]
        for first in range(0, max(map(len, rows)), self.piece):
            going = [row for row, tokens in enumerate(rows) if len(tokens) > first]
            pieces = [rows[row][first : first + self.piece] for row in going]
            children, hidden = self._step([at[row] for row in going], pieces)
            for row, child, piece, state in zip(going, children, pieces, hidden):
                if first:
                    self.pages.release([at[row]])
                at[row] = child
                kept = state[: len(piece)]
                states[row] = [*states[row], kept] if whole else [kept[-1:]]
        return [Fed(seq, torch.cat(found)) for seq, found in zip(at, states)]

    def look(self, seqs: Sequence[int], rows: Sequence[Tokens]) -> list[torch.Tensor]:
        """Hidden states [tokens, hidden size] of tokens behind sequences; nothing of it stays."""
        if max(map(len, rows)) > self.piece:
            fed = self.feed(seqs, rows, whole=True)
            self.pages.release([row.seq for row in fed])
            return [row.hidden for row in fed]
        _, hidden = self._step(seqs, rows, publish=False)
        return [state[: len(tokens)] for tokens, state in zip(rows, hidden)]

    def computing(self, module: torch.nn.Module) -> AbstractContextManager[object]:
        """A block in which the linear layers of a module compute as the caller wants."""
        return nullcontext() if self.linears is None else self.linears.scope(module)

    def repack(self) -> None:
        """Have weights packed again at their next use, where they are packed."""
        if self.linears is not None:
            self.linears.repack()

    def no_states(self) -> torch.Tensor:
        """Hidden states of no tokens [0, hidden size]."""
        size = self.decoder.config.get_text_config(decoder=True).hidden_size
        return torch.empty(0, size, dtype=self.shape.dtype, device=self.shape.device)

    def _step(
        self, seqs: Sequence[int], rows: Sequence[Tokens], *, publish: bool = True
    ) -> tuple[list[int], torch.Tensor]:
        """One forward: children, and hidden states [B, n, hidden size]."""
        counts = [len(tokens) for tokens in rows]
        with self.pages.attend(seqs, counts, backend=self.backend) as step:
            ids, positions = self._inputs(rows, step.lengths)
            with torch.no_grad(), attending(self.decoder), self.computing(self.decoder):
                hidden = self.decoder(
                    input_ids=ids,
                    position_ids=positions,
                    use_cache=True,
                    **StepCache(step).as_argument(),
                ).last_hidden_state
            children = step.commit() if publish else []
        self.fed += sum(counts)
        if self._told is not None:
            self._told(sum(counts))
        return children, hidden

    def _inputs(
        self, rows: Sequence[Tokens], lengths: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their positions, both [B, n]; padding repeats the last token of its row."""
        width = max(map(len, rows))
        ids = [tokens + tokens[-1:] * (width - len(tokens)) for tokens in rows]
        places = [
            [length + min(index, len(tokens) - 1) for index in range(width)]
            for tokens, length in zip(rows, lengths)
        ]
        device = self.shape.device
        return torch.tensor(ids, device=device), torch.tensor(places, device=device)


@contextmanager
def attending(decoder: Any) -> Iterator[None]:
    """A block in which the layers of a model attend over pages."""
    config = decoder.config.get_text_config(decoder=True)
    before = config._attn_implementation
    try:
        config._attn_implementation = NAME
        yield
    finally:
        config._attn_implementation = before

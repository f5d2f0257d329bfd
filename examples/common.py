"""What the examples share: a model, the same verbs without any cache, and what pages saved."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from paged_kv.integrations.huggingface.lm import PagedLM

Head = Callable[[torch.Tensor], torch.Tensor]


class Path(NamedTuple):
    """A node of `Cacheless`: its tokens."""

    tokens: tuple[int, ...]


class Cacheless:
    """The verbs of a `PagedLM` that the examples use: every call runs whole paths, one by one."""

    def __init__(self, model: Any, head: Head | None = None) -> None:
        self.model = model
        self.head = model.get_output_embeddings() if head is None else head
        self.tokens_fed = 0

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[Path]:
        """A path for each prompt, without its padding."""
        pairs = zip(input_ids, attention_mask)
        return [Path(tuple(row[mask.bool()].tolist())) for row, mask in pairs]

    def fork(self, nodes: Sequence[Path], token_lists: Sequence[Sequence[int]]) -> list[Path]:
        """Longer paths."""
        return [Path(node.tokens + tuple(more)) for node, more in zip(nodes, token_lists)]

    def mirror(self, nodes: Sequence[Path]) -> list[Path]:
        """The same paths."""
        return list(nodes)

    def promote(self, node: Path) -> int:
        """Nothing is kept, so nothing goes."""
        return 0

    @torch.no_grad()
    def logits(self, nodes: Sequence[Path]) -> torch.Tensor:
        """What the head says behind each path."""
        self.tokens_fed += sum(len(node.tokens) for node in nodes)
        return torch.stack([self.head(self._hidden(node.tokens)) for node in nodes])

    def _hidden(self, tokens: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.model.device)
        return self.model.base_model(ids, use_cache=False).last_hidden_state[0, -1]


class Watch:
    """The most K/V that an lm held, and the most that a copy for every node would have held."""

    def __init__(self, lm: PagedLM) -> None:
        self.lm = lm
        self.tokens = 0
        lm.pages.listen(self._look)

    def _look(self, event: object) -> None:
        self.tokens = max(self.tokens, self.lm.pages.logical_tokens)

    @property
    def pages(self) -> int:
        """Bytes of the most pages."""
        return self.lm.pages.stats.peak_pages * self.lm.pages.page_bytes

    @property
    def copies(self) -> int:
        """Bytes of the most tokens, counted once for every node that has them."""
        return self.tokens * self.lm.pages.token_bytes


def report(watches: Sequence[Watch]) -> None:
    """Print what pages saved."""
    held = sum(watch.pages for watch in watches)
    copies = sum(watch.copies for watch in watches)
    fed = sum(watch.lm.stats().tokens_fed for watch in watches)
    print(
        f"{fed} tokens fed; K/V at most {held:,} bytes, copies for every node {copies:,}", end=" "
    )
    print(f"({copies / held:.1f} x)")


def told(equal: bool) -> None:
    """Print how a check went; exit where it went wrong."""
    print("without a cache:", "the same" if equal else "something else")
    if not equal:
        raise SystemExit(1)


def tiny_model(seed: int = 0) -> Any:
    """A small random Llama with 64 tokens, the same for each seed."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, eos_token_id=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def load(folder: str | None) -> tuple[Any, Any]:
    """A model and its tokenizer; without a folder a tiny one, and None."""
    if folder is None:
        return tiny_model(), None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def prompts(tokenizer: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts as tokens [B, n], padded on the left, and their mask; without a tokenizer random."""
    if tokenizer is None:
        made = torch.Generator().manual_seed(1)
        lengths = [24 - 5 * place for place, _ in enumerate(texts)]
        rows = [torch.randint(3, 64, (length,), generator=made) for length in lengths]
    else:
        rows = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return ids, torch.tensor(mask)


def text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Tokens as text, or as numbers without a tokenizer."""
    return str(list(tokens)) if tokenizer is None else repr(tokenizer.decode(tokens))


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every example takes."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    parser.add_argument("--model", metavar="FOLDER", help="of a language model; else a tiny one")
    parser.add_argument("--check", action="store_true", help="do it without a cache, too")
    parser.add_argument("--seed", type=int, default=0)
    return parser

"""What KGen searches with: a tiny model on pages, on nodes, on copies as KGen makes them, or alone.

KGen keeps one model and calls its `generate`, one row at a time, with the K/V of the node that it
goes on from: all but the last token of the row. It copies them by `move_kv` and `clone_kv`.
"""

from __future__ import annotations

import copy
import weakref
from types import SimpleNamespace
from typing import Any

import kgen.models
import kgen.sampling.beam
import pytest
import torch
from dense_draws import draw
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from paged_kv.integrations.huggingface import PagedCache, shape_of
from paged_kv.integrations.huggingface.lm import PagedLM
from paged_kv.integrations.huggingface.versions import FOUND

END = 2
FIRST = "0"  # the character of token 0


class Letters:
    """A tokenizer: each token is a character."""

    eos_token_id = END

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) - ord(FIRST) for letter in text]])}

    def decode(self, tokens: torch.Tensor) -> str:
        return "".join(chr(ord(FIRST) + token) for token in tokens.tolist())


def tiny_llama(vocabulary: int) -> Any:
    """A random model. Padding is its end: a mask would hide any other token that is drawn."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    special = dict(vocab_size=vocabulary, bos_token_id=1, eos_token_id=END, pad_token_id=END)
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.lm_head.weight.data.mul_(0.5)  # KGen divides by zero where a token repeats itself
    return model


class Alone:
    """No K/V are kept: every call feeds the whole row again, and every token of it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def parameters(self) -> Any:
        return self.model.parameters()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Be the model that KGen searches with."""
        patch.setattr(kgen.models, "tokenizer", Letters())
        patch.setattr(kgen.models, "text_model", self)

    def generate(self, input_ids: torch.Tensor, past_key_values: Any = None, **options: Any) -> Any:
        out = self.model.generate(input_ids, use_cache=False, **options)
        return SimpleNamespace(sequences=out.sequences, past_key_values=None)


class OnPages(Alone):
    """K/V in pages: each call goes on from a fork, so nodes and candidates may share one cache."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.pages = shape_of(model).pages()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        super().install(patch)
        patch.setattr(kgen.sampling, "move_kv", lambda kv, device=None: kv)
        patch.setattr(kgen.sampling.beam, "clone_kv", lambda kv: kv)

    def generate(self, input_ids: torch.Tensor, past_key_values: Any = None, **options: Any) -> Any:
        if past_key_values is None:
            cache = PagedCache(self.pages, self.model)
        else:
            cache = copy.deepcopy(past_key_values)  # copies no K/V
        out = self.model.generate(input_ids, **cache.as_argument(), **options)
        cache.settle()
        return SimpleNamespace(sequences=out.sequences, past_key_values=cache)

    def settle(self) -> None:
        """Give up what dropped nodes have held."""
        self.pages.settle()

    @property
    def peak(self) -> int:
        """The most bytes of K/V that were held."""
        return self.pages.stats.peak_pages * self.pages.page_bytes


class OnNodes(OnPages):
    """Each call draws a child of a node."""

    def __init__(self, model: Any) -> None:
        Alone.__init__(self, model)
        self.lm = PagedLM(model, progress=False)
        self.pages = self.lm.pages

    def settle(self) -> None:
        self.lm.stats()

    def generate(self, input_ids: torch.Tensor, past_key_values: Any = None, **options: Any) -> Any:
        path = input_ids[0].tolist()
        if past_key_values is None:
            (node,) = self.lm.prefill([path], seed=0)
        else:
            rest = path[len(past_key_values.tokens) :]
            (node,) = self.lm.fork([past_key_values], [rest])
        (child,) = self.lm.sample([node], seed=seed(), **options)
        single = options["generation_config"].max_new_tokens == 1  # candidates follow the row
        held = node if single else child
        return SimpleNamespace(sequences=torch.tensor([child.tokens]), past_key_values=held)


class NodesAlone(Alone):
    """What `OnNodes` draws, without any cache."""

    def generate(self, input_ids: torch.Tensor, past_key_values: Any = None, **options: Any) -> Any:
        path = draw(self.model, input_ids[0].tolist(), seed(), **options)
        return SimpleNamespace(sequences=torch.tensor([path]), past_key_values=None)


def seed() -> int:
    """A seed for one call, from the numbers that the search draws with."""
    return int(torch.randint(2**62, ()))


class OnCopies(Alone):
    """K/V as KGen keeps them, counted.

    It was written for caches that are read as pairs (K, V) and given back as tuples of them, which
    transformers does not take any more: they are translated here.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.bytes = 0
        self.peak = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        super().install(patch)
        clone = kgen.sampling.clone_kv
        patch.setattr(kgen.sampling.beam, "clone_kv", lambda kv: self.count(clone(kv)))

    def generate(self, input_ids: torch.Tensor, past_key_values: Any = None, **options: Any) -> Any:
        cache = DynamicCache()
        for layer, pair in enumerate(past_key_values or ()):
            cache.update(*pair, layer)
        out = self.model.generate(input_ids, **{FOUND.cache_argument: cache}, **options)
        pairs = tuple((layer.keys, layer.values) for layer in cache.layers)
        return SimpleNamespace(sequences=out.sequences, past_key_values=self.count(pairs))

    def count(self, pairs: Any) -> Any:
        """Count the bytes of these tensors as long as they are held."""
        for tensor in (tensor for pair in pairs for tensor in pair):
            self.bytes += tensor.nbytes
            weakref.finalize(tensor, self._gone, tensor.nbytes)
        self.peak = max(self.peak, self.bytes)
        return pairs

    def _gone(self, size: int) -> None:
        self.bytes -= size

"""The model that is searched: from a folder, or a random one of the same shape."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

# SmolLM2-135M
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


class Loaded(NamedTuple):
    """A model that draws without ends or other rules of its own; no tokenizer where its weights are
    random.
    """

    model: Any
    tokenizer: Any
    name: str


@contextmanager
def quiet() -> Iterator[None]:
    """A block in which transformers shows no bars, and warns of nothing."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def from_folder(folder: Path, dtype: str, device: str = "cpu") -> Loaded:
    """A model and its tokenizer, as `save_pretrained` leaves them. Raises OSError and ValueError
    as transformers does.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, clean_up_tokenization_spaces=False
        )
    return Loaded(_ready(model, device), tokenizer, Path(os.path.abspath(folder)).name)


def random_model(dtype: str, device: str = "cpu", **changes: Any) -> Loaded:
    """A Llama of SmolLM2's shape whose weights are random; `changes` are of its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))
    return Loaded(_ready(model.to(getattr(torch, dtype)), device), None, "random Llama")


def _ready(model: Any, device: str) -> Any:
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0)
    return model.to(device).eval()

"""A folder with a tiny language model of random weights, as `save_pretrained` leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paged_kv.tools.search.models import random_model

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def saved(folder: Path, **changes: Any) -> Path:
    """A folder with a tiny model, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {letter: place for place, letter in enumerate(["?", "\n", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    random_model("float32", **{**TINY, **changes}).model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder

"""What a model says of hidden states: logits of a language model, a value, a reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from paged_kv.errors import UnsupportedModel
from paged_kv.integrations.huggingface.shapes import decoder_of

Head = Callable[[torch.Tensor], torch.Tensor]

# Heads of transformers' models for sequences and tokens, which answer for every hidden state.
SCORES = ("score", "classifier", "v_head", "value_head", "reward_head")
CLOSE = 1e-3  # of logits, in relation to the largest


def head_of(model: Any) -> Head | None:
    """The head of a model, as a function of hidden states [..., hidden size]; None where it is a
    decoder alone.

    A language model is asked once for a few tokens, to see that the head gives its logits. Raises
    UnsupportedModel where it does not: name the head then.
    """
    decoder = decoder_of(model)
    whole = _without_adapter(model)
    if whole is decoder:
        return None
    output = whole.get_output_embeddings()
    if output is None:
        return _score_of(model, whole)
    head = _language_head(whole, output)
    _compare(model, whole, decoder, head)
    return head


def _without_adapter(model: Any) -> Any:
    while hasattr(model, "get_base_model"):  # of PEFT
        model = model.get_base_model()
    return model


def _score_of(model: Any, whole: Any) -> Head:
    for name in SCORES:
        found = getattr(whole, name, None)
        if isinstance(found, torch.nn.Module):
            return found
    raise UnsupportedModel(model, "its head is not known: name it with head=")


def _language_head(whole: Any, output: Any) -> Head:
    """Logits as the models of transformers make them of their last hidden states."""
    config = whole.config.get_text_config(decoder=True)
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = output(hidden)
        if factor != 1.0 or divisor != 1.0:
            found = found * (factor / divisor)
        return found if cap is None else cap * torch.tanh(found / cap)

    return logits


def _compare(model: Any, whole: Any, decoder: Any, head: Head) -> None:
    """Raise UnsupportedModel unless hidden states and head give the logits of the model."""
    tokens = torch.arange(3, device=decoder.device)[None]
    with torch.no_grad():
        wanted = whole(input_ids=tokens, use_cache=False).logits
        got = head(decoder(input_ids=tokens, use_cache=False).last_hidden_state)
    room = CLOSE * float(wanted.abs().max())
    if got.shape != wanted.shape or float((got - wanted).abs().max()) > room:
        raise UnsupportedModel(model, "its logits are not its head's: name the head with head=")

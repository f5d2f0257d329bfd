"""How tokens are drawn: the options of `generate`, resolved as transformers does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from paged_kv.checks import whole
from paged_kv.errors import BadArgument, UnsupportedModel

Allowed = Callable[[int, torch.Tensor], list[int]]
# Modes of `generate` that a sample of nodes is not: they draw no token at a time from one model.
OTHER_MODES = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "guidance_scale": 1,
}


class Hooks(NamedTuple):
    """What a caller brings along that is no number."""

    generation_config: Any = None
    logits_processor: Any = None
    stopping_criteria: Any = None
    prefix_allowed_tokens_fn: Allowed | None = None


class Recipe(NamedTuple):
    """Resolved options of one call."""

    config: Any
    processors: list[Any]  # the caller's own
    criteria: Any  # see rows padded on the left
    allowed: Allowed | None
    new_tokens: int
    copies: int  # children of each node
    greedy: bool
    pad: int


def recipe(model: Any, tokenizer: Any, hooks: Hooks, options: dict[str, Any]) -> Recipe:
    """Resolve the options of `generate`. Raises UnsupportedModel, BadArgument, BadCount; what
    transformers raises passes through.
    """
    if not hasattr(model, "_prepare_generation_config"):
        raise UnsupportedModel(model, "it is no language model that generates")
    if getattr(hooks.generation_config, "do_sample", None) is None:
        options = {"do_sample": True, **options}
    asked = options.pop("num_return_sequences", None)  # which `generate` refuses to the likeliest
    config, unknown = model._prepare_generation_config(hooks.generation_config, **options)
    if unknown:
        raise BadArgument("option", next(iter(unknown)), "an option of sample() or of generate()")
    for name, plain in OTHER_MODES.items():
        found = getattr(config, name, None)
        if found not in (plain, None):
            raise BadArgument(name, found, f"{plain}: sample() draws from one model")
    copies = config.num_return_sequences or 1 if asked is None else asked
    copies = whole("num_return_sequences", copies, 1)
    config.num_return_sequences = 1
    if config.temperature == 0:  # which `generate` spells do_sample=False
        config.do_sample = False
    new_tokens = whole("max_new_tokens", config.max_new_tokens, 1)
    config.max_length = None  # columns say nothing of rows that are padded
    model._prepare_special_tokens(config, True, device=model.device)
    criteria = model._get_stopping_criteria(
        generation_config=config,
        stopping_criteria=_listed(hooks.stopping_criteria, "stopping_criteria"),
        tokenizer=tokenizer,
    )
    processors = _listed(hooks.logits_processor, "logits_processor")
    allowed = hooks.prefix_allowed_tokens_fn
    if allowed is not None and not callable(allowed):
        raise BadArgument("prefix_allowed_tokens_fn", allowed, "a function of a row and its tokens")
    return Recipe(
        config,
        processors,
        criteria,
        allowed,
        new_tokens,
        copies,
        not config.do_sample,
        _pad(config),
    )


def _pad(config: Any) -> int:
    """What stands in front of shorter rows, and behind rows that ended."""
    for token in (config.pad_token_id, config.eos_token_id):
        if isinstance(token, (list, tuple)) and token:
            token = token[0]
        if isinstance(token, int) and token >= 0:
            return token
    return 0


def _listed(found: Any, name: str) -> Any:
    """Hooks as the list that transformers takes; one alone is a list of one."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    kind = LogitsProcessorList if name == "logits_processor" else StoppingCriteriaList
    if found is None:
        return kind()
    if callable(found) and not isinstance(found, list):
        return kind([found])
    if isinstance(found, (list, tuple)) and all(map(callable, found)):
        return kind(found)
    raise BadArgument(name, found, "None, a callable, or a list of them")

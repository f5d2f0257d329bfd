"""What a model and its machine allow: memory, activations, and that it computes without dropout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from paged_kv.errors import BadDevice, BadDtype, UnsupportedModel
from paged_kv.integrations.huggingface.shapes import ModelShape, decoder_of


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody needs now; all of it, where the system does not tell."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    if found:  # what the page cache could give back counts, too
        return found[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def token_bytes(model: Any) -> int:
    """Activations of one token in one forward, roughly: of the layer that is computed."""
    decoder = decoder_of(model)
    config = decoder.config.get_text_config(decoder=True)
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    numbers: int = 6 * hidden + 3 * inner
    return numbers * int(torch.empty(0, dtype=decoder.dtype).element_size())


def check_model(model: Any, shape: ModelShape) -> None:
    """Raise an error unless a model computes, and does so as its pages were made for.

    UnsupportedModel where it drops activations at random; BadDtype, BadDevice.
    """
    refuse_dropout(model)
    decoder = decoder_of(model)
    if decoder.dtype != shape.dtype:
        raise BadDtype("the model", decoder.dtype, shape.dtype)
    if decoder.device != shape.device:
        raise BadDevice("the model", decoder.device, shape.device)


def refuse_dropout(model: Any) -> None:
    """Raise UnsupportedModel where some part of the model drops activations at random: K/V would be
    noise.
    """
    for name, module in model.named_modules():
        if not module.training:
            continue
        if isinstance(module, torch.nn.Dropout) and module.p:
            raise UnsupportedModel(model, f"{name} drops activations at random: call model.eval()")
        if _rate(module):
            raise UnsupportedModel(model, f"{name} drops scores at random: call model.eval()")


def _rate(module: torch.nn.Module) -> float:
    """The share of its scores that an attention drops."""
    found = getattr(module, "attention_dropout", 0.0)
    if isinstance(found, (int, float)):
        return float(found)
    return 0.0

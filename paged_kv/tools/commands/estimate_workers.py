"""`paged-kv estimate --workers N`: what machines need on which workers share a search's trees."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paged_kv.tools.estimate import Estimate
    from paged_kv.tools.estimate.machines import Machines

SIZES = {
    "workers": "also say what machines need on which N workers share the trees",
    "machines": "machines that the workers run on (default: 1)",
    "model_bytes": "weights of one copy of the model (default with --transformers-config: those of "
    "the folder's *.safetensors)",
}


def add(command: Any, whole: Any) -> None:
    """The options of the command."""
    group = command.add_argument_group("workers of a pool")
    for name, about in SIZES.items():
        group.add_argument("--" + name.replace("_", "-"), type=whole, metavar="N", help=about)


def unusable(options: argparse.Namespace) -> str | None:
    """What cannot be asked for together, or None."""
    if options.workers is not None:
        return None
    for name in SIZES:
        if getattr(options, name) is not None:
            return f"--{name.replace('_', '-')} needs --workers"
    return None


def shared(options: argparse.Namespace, found: Estimate) -> Machines | None:
    """The workers of an estimate, where they are asked for. Raises BadCount, BadConfig."""
    if options.workers is None:
        return None
    from paged_kv.tools.estimate.checkpoint import checkpoint
    from paged_kv.tools.estimate.machines import machines
    from paged_kv.tools.estimate.workload import DTYPES

    model_bytes = options.model_bytes
    hidden_size = None
    if options.transformers_config is not None:
        kept = checkpoint(options.transformers_config)
        hidden_size = kept.hidden_size
        if model_bytes is None and kept.weights is not None:
            model_bytes = kept.weights * DTYPES[found.workload.dtype]
    many = 1 if options.machines is None else options.machines
    return machines(found, options.workers, many, model_bytes=model_bytes, hidden_size=hidden_size)

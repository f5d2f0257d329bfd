"""Hugging Face models on paged key/value contexts.

Importing this package imports transformers; importing `paged_kv` does not.
"""

# First: where another transformers is installed, this names it before anything else of it is used.
from paged_kv.integrations.huggingface.versions import FOUND  # isort: skip

from paged_kv.integrations.huggingface import attention as _attention  # registers "paged_kv"
from paged_kv.integrations.huggingface.cache import PagedCache
from paged_kv.integrations.huggingface.lm import PagedLM
from paged_kv.integrations.huggingface.node_scope import NodeScope
from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.integrations.huggingface.results import Extended, LMStats
from paged_kv.integrations.huggingface.shapes import ModelShape, shape_of
from paged_kv.integrations.huggingface.stepping import StepCache

del _attention

__all__ = [
    "FOUND",
    "Extended",
    "LMStats",
    "ModelShape",
    "Node",
    "NodeScope",
    "PagedCache",
    "PagedLM",
    "StepCache",
    "shape_of",
]

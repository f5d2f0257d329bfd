"""How a model attends to the contexts of a step."""

from paged_kv.attention.choice import make_attention, may_pay
from paged_kv.attention.contract import Attention, Rows
from paged_kv.attention.kernels import flash_attention_pages, flashinfer_pages
from paged_kv.attention.scratch import Scratch

__all__ = [
    "Attention",
    "Rows",
    "Scratch",
    "make_attention",
    "may_pay",
    "flash_attention_pages",
    "flashinfer_pages",
]

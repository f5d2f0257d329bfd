"""The searches that `paged-kv search` knows by name. No tensors in here."""

from __future__ import annotations

from typing import NamedTuple

METHODS = ("mcts", "beam", "best-of-n")
LINEARS = ("packed", "torch")
DTYPES = ("float32", "bfloat16", "float16")


class Preset(NamedTuple):
    """How long the root is, and how much is searched below it."""

    name: str
    prompt_tokens: int
    simulations: int  # batches of children
    width: int = 8  # children in a batch
    tokens: int = 16  # of a child

    @property
    def nodes(self) -> int:
        """Nodes of the whole tree, the root included."""
        return 1 + self.simulations * self.width


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("demo", 512, 4),
        Preset("512", 512, 12),
        Preset("2048", 2048, 4),
    )
}

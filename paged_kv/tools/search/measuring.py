"""Where the time of a search goes, and what it holds at its peak."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from paged_kv.integrations.huggingface.shapes import decoder_of


class Stopwatch:
    """Adds up seconds between starts and stops. One that does not run may be stopped."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begun: float | None = None

    def start(self) -> None:
        """Begin to count."""
        self._begun = time.perf_counter()

    def stop(self) -> None:
        """Count no more."""
        if self._begun is not None:
            self.seconds += time.perf_counter() - self._begun
        self._begun = None


class Held(NamedTuple):
    """Bytes: of keys and values, those of a running batch included; and of buffers beside them."""

    kv: int
    working: int


class Peak:
    """The most that was held at once since it was last asked."""

    def __init__(self) -> None:
        self._most = Held(0, 0)

    def note(self, held: Held) -> None:
        """Something is held now."""
        self._most = Held(max(self._most.kv, held.kv), max(self._most.working, held.working))

    def taken(self) -> Held:
        """The peak; the next one begins at nothing."""
        most = self._most
        self._most = Held(0, 0)
        return most


@contextmanager
def timed(model: Any, watch: Stopwatch) -> Iterator[None]:
    """A block in which a watch runs while the layers of a model, or its head, compute."""
    output = model.get_output_embeddings()
    hooks = []
    for module in (decoder_of(model), output):
        hooks.append(module.register_forward_pre_hook(lambda *_: watch.start()))
        hooks.append(module.register_forward_hook(lambda *_: watch.stop()))
    try:
        yield
    finally:
        watch.stop()  # an interrupt may have left it running
        for hook in hooks:
            hook.remove()

"""What LightZero's models do where their own caches copy a context."""

from __future__ import annotations

from typing import Any

from paged_kv.integrations.lightzero.shared.state import PagedState


class SharedCopies:
    """A world model with contexts in pages. To be inherited before LightZero's own class."""

    paged: PagedState

    def custom_copy_kv_cache_to_shared_wm(self, src_kv: Any) -> Any:
        """Nothing to copy: a step never writes to what is stored."""
        if isinstance(src_kv, self.paged.stored):
            return src_kv
        return super().custom_copy_kv_cache_to_shared_wm(src_kv)  # type: ignore[misc]

    def custom_copy_kv_cache_to_shared_init_envs(self, src_kv: Any, env_id: int) -> int:
        """A sequence with the same contents, to be assigned to a key of
        `past_kv_cache_init_infer_envs[env_id]`.
        """
        return self.paged.adopt(self, src_kv)

    def custom_copy_kv_cache_to_shared_recur(self, src_kv: Any) -> int:
        """A sequence with the same contents, to be assigned to a key of
        `past_kv_cache_recurrent_infer`.
        """
        return self.paged.adopt(self, src_kv)

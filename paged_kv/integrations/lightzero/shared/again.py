"""What LightZero's models do where a search comes back to a node that was evicted."""

from __future__ import annotations

from typing import Any

import torch

from paged_kv.integrations.lightzero.shared.evictable import EvictableNodes
from paged_kv.integrations.lightzero.shared.state import PagedState


class MakesAgain:
    """A world model with contexts in pages. To be inherited before LightZero's own class."""

    paged: PagedState
    total_query_count: int
    hit_count: int

    def forward_recurrent_inference(
        self,
        state_action_history: Any,
        simulation_index: int = 0,
        search_depth: Any = (),
        start_pos: Any = 0,
    ) -> Any:
        """LightZero's step of a search, once the nodes that it starts from are stored."""
        step = super().forward_recurrent_inference  # type: ignore[misc]
        nodes = self.paged.nodes
        if type(nodes) is EvictableNodes:
            latents, actions = state_action_history[-1]

            def run(rows: list[int], actions: torch.Tensor, depths: list[int], begins: Any) -> None:
                step([(latents[rows], actions)], simulation_index, depths, begins)

            counted = self.total_query_count, self.hit_count
            nodes.prepare(actions, search_depth, start_pos, run)
            self.total_query_count, self.hit_count = counted  # as if they had been there
        return step(state_action_history, simulation_index, search_depth, start_pos)

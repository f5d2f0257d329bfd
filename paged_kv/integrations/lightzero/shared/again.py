"""What LightZero's models do where a search comes back to a node: use its context, or make that
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paged_kv.integrations.lightzero.shared.evictable import EvictableNodes
from paged_kv.integrations.lightzero.shared.lean.places import TOKENS
from paged_kv.integrations.lightzero.shared.state import PagedState


class ComesBack:
    """A world model with contexts in pages. To be inherited before LightZero's own class."""

    paged: PagedState
    device: torch.device
    total_query_count: int
    hit_count: int
    retrieve_or_generate_kvcache: Any
    trim_and_pad_kv_cache: Any
    update_cache_context: Any

    def forward_recurrent_inference(
        self,
        state_action_history: Any,
        simulation_index: int = 0,
        search_depth: Any = (),
        start_pos: Any = 0,
    ) -> Any:
        """LightZero's step of a search, once the nodes that it starts from are stored."""
        step = super().forward_recurrent_inference  # type: ignore[misc]
        lean = self.paged.lean
        if lean is not None and lean.ready(self):
            step = self._lean_step
        nodes = self.paged.nodes
        if type(nodes) is EvictableNodes and self.paged.by_node(self):
            latents, actions = state_action_history[-1]

            def run(rows: list[int], actions: torch.Tensor, depths: list[int], begins: Any) -> None:
                step([(latents[rows], actions)], simulation_index, depths, begins)

            queries = self.total_query_count
            hits = self.hit_count
            nodes.prepare(actions, search_depth, start_pos, run)
            self.total_query_count = queries  # as if they had been there
            self.hit_count = hits
        return step(state_action_history, simulation_index, search_depth, start_pos)

    def _lean_step(
        self, state_action_history: Any, simulation_index: int, search_depth: Any, start_pos: Any
    ) -> Any:
        """LightZero's step, but for the model's part of it, which is the short one."""
        lean = self.paged.lean
        assert lean is not None
        latents, actions = state_action_history[-1]
        attributes = self.__dict__
        attributes["keys_values_wm_list"] = []
        attributes["keys_values_wm_size_list"] = []
        self.retrieve_or_generate_kvcache(latents, len(latents), simulation_index, start_pos)
        sizes = self.trim_and_pad_kv_cache(is_init_infer=False)
        answers = lean.run(self, attributes["keys_values_wm"], actions, search_depth, start_pos)
        attributes["keys_values_wm_size_list"] = sizes
        attributes["keys_values_wm_size_list_current"] = [size + TOKENS for size in sizes]
        latent = attributes["latent_state"] = answers.latent.unsqueeze(1)
        self.update_cache_context(latent, is_init_infer=False, simulation_index=simulation_index)
        value, reward = answers.scalars.unsqueeze(1).chunk(2)
        return answers.last.unsqueeze(1), latent, reward, answers.policy.unsqueeze(1), value

    def _use(self, nodes: Sequence[int | None], latents: Any, start_pos: Any) -> list[Any]:
        """Go on from these nodes in the next step; one that is missing begins with its own token.

        Instead of sizes, which LightZero returns here, these are the contexts:
        `trim_and_pad_kv_cache` knows the sizes.
        """
        attributes = self.__dict__  # plain attributes, without the search of Module.__setattr__
        found: list[Any] = list(nodes)
        attributes["total_query_count"] += len(found)
        attributes["hit_count"] += len(found) - found.count(None)
        if None in found:
            missing = [row for row, node in enumerate(found) if node is None]
            found = [None if node is None else self.paged.entry(node) for node in found]
            for row in missing:
                latent = torch.from_numpy(latents[row]).unsqueeze(0).to(self.device)
                found[row] = self.paged.fresh(self, latent, int(start_pos[row]))
        attributes["keys_values_wm_list"] = found
        return found

"""The result of a search as plain data, ready for JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from paged_kv.tools.profile.result import machine
from paged_kv.tools.search.lockstep import Lap, Lockstep
from paged_kv.tools.search.nodes import Node
from paged_kv.tools.search.side import DEEPCOPY, PACKED, TODAY, TREE
from paged_kv.tools.search.trial import Trial, token_bytes

SCHEMA = 1
RATES = ("tokens_per_second", "tokens_per_second_with_root", "tokens_per_cpu_second")


def as_dict(trial: Trial) -> dict[str, Any]:
    """One JSON object of what was run so far: whole batches."""
    grown = trial.lockstep
    caches = {side.name: _cache(trial, side.name) for side in grown.sides}
    return {
        "schema": SCHEMA,
        "machine": _machine(trial.shape.device),
        "workload": _workload(trial),
        "caches": caches,
        "ratios": _ratios(caches),
        **_compared(grown),
        "task": _task(trial),
        "timeline": [_moment(trial, place) for place in range(len(grown.batches))],
        "tree": [_node(node) for node in _whole(grown)],
    }


def _machine(device: torch.device) -> dict[str, Any]:
    import transformers

    return {**machine(device), "transformers": transformers.__version__}


def _workload(trial: Trial) -> dict[str, Any]:
    preset = trial.preset
    return {
        "preset": preset.name,
        "method": trial.method,
        "model": trial.loaded.name,
        "architecture": type(trial.loaded.model).__name__,
        "parameters": trial.loaded.model.num_parameters(),
        "prompt_tokens": preset.prompt_tokens,
        "simulations": preset.simulations,
        "simulations_done": len(trial.lockstep.batches),
        "width": preset.width,
        "tokens": preset.tokens,
        "nodes": len(_whole(trial.lockstep)),
        "seed": trial.seed,
        "temperature": trial.temperature,
        "dtype": str(trial.shape.dtype).removeprefix("torch."),
        "device": str(trial.shape.device),
        "threads": torch.get_num_threads(),
        "page_size": trial.page_size,
        "token_bytes": token_bytes(trial.shape),
        "packed_bytes": trial.linears.nbytes,
    }


def _whole(grown: Lockstep) -> list[Node]:
    """The root and the nodes of whole batches: an interrupt may have left more."""
    return grown.nodes[: 1 + sum(len(next(iter(batch.drawn.values()))) for batch in grown.batches)]


def _cache(trial: Trial, side: str) -> dict[str, Any]:
    grown = trial.lockstep
    laps = [batch.laps[side] for batch in grown.batches]
    root = grown.roots[side]
    drawn = sum(len(child.tokens) for batch in grown.batches for child in batch.drawn[side])
    fed_as_drawn = drawn - sum(len(batch.drawn[side]) for batch in grown.batches)
    seconds = _sum(laps, "seconds")
    everything = [root, *laps]
    unique = max((batch.unique_tokens for batch in grown.batches), default=0)
    return {
        "tokens_per_second": _rate(drawn, seconds),
        "tokens_per_second_with_root": _rate(drawn, seconds + root.seconds),
        "tokens_per_cpu_second": _rate(drawn, _sum(laps, "cpu_seconds")),
        "kv_bytes_peak": max(lap.peak.kv for lap in everything),
        "unique_token_bytes_peak": unique * token_bytes(trial.shape),
        "working_bytes_peak": max(lap.peak.working for lap in everything),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(_sum(laps, "cpu_seconds"), 3),
        "root_seconds": round(root.seconds, 3),
        "model_seconds": round(_sum(laps, "model_seconds"), 3),
        "draw_seconds": round(_sum(laps, "draw_seconds"), 3),
        "cache_seconds": round(sum(map(_cache_seconds, laps)), 3),
        "tokens_drawn": drawn,
        "tokens_prefilled": root.tokens_fed + sum(lap.tokens_fed for lap in laps) - fed_as_drawn,
    }


def _sum(laps: Iterable[Lap], field: str) -> float:
    return float(sum(getattr(lap, field) for lap in laps))


def _cache_seconds(lap: Lap) -> float:
    """All that is neither the model nor the draws."""
    return max(0.0, lap.seconds - lap.model_seconds - lap.draw_seconds)


def _rate(tokens: int, seconds: float) -> float:
    return round(tokens / seconds, 2) if seconds else 0.0


def _ratios(caches: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """What pages attended once are worth, against the best of what programs do without them; the
    same with packed weights.
    """
    today = [caches[name] for name in TODAY if name in caches]
    tree = caches.get(TREE)
    if tree is None or not today:
        return {}
    best = {field: max(side[field] for side in today) for field in RATES}
    ratios = {field: _ratio(tree[field], value) for field, value in best.items()}
    if PACKED in caches:
        packed = caches[PACKED]
        ratios |= {f"packed_{field}": _ratio(packed[field], best[field]) for field in RATES}
    if DEEPCOPY in caches:
        ratios["kv_bytes_peak"] = _ratio(caches[DEEPCOPY]["kv_bytes_peak"], tree["kv_bytes_peak"])
    needed = tree["unique_token_bytes_peak"]
    ratios["kv_bytes_over_unique"] = _ratio(tree["kv_bytes_peak"], needed)
    ratios["working_bytes_over_unique"] = _ratio(tree["working_bytes_peak"], needed)
    return ratios


def _ratio(above: float, below: float) -> float | None:
    return round(above / below, 4) if below else None


def _compared(grown: Lockstep) -> dict[str, Any]:
    """Tokens of all nodes of all sides against the first one's."""
    first, *others = [side.name for side in grown.sides]
    compared = 0
    different = 0
    apart = 0.0
    for batch in grown.batches:
        for name in others:
            for ours, theirs in zip(batch.drawn[first], batch.drawn[name]):
                compared += len(ours.tokens)
                different += sum(a != b for a, b in zip(ours.tokens, theirs.tokens))
                gaps = [abs(a - b) for a, b in zip(ours.logprobs, theirs.logprobs)]
                apart = max(apart, *gaps) if ours.tokens == theirs.tokens else apart
    return {
        "tokens_compared": compared,
        "tokens_different": different,
        "max_abs_logprob_difference": apart,
    }


def _task(trial: Trial) -> dict[str, Any]:
    """What was looked for; whether it was found only where the task can tell."""
    found: dict[str, Any] = {"name": trial.task.name, "question": trial.task.question}
    if trial.task.checks:
        solved = [node for node in _whole(trial.lockstep) if node.solved]
        found["solved_nodes"] = len(solved)
        found["solution"] = trial.task.best(solved[0].text) if solved else None
    return found


def _moment(trial: Trial, place: int) -> dict[str, Any]:
    """What was held around one batch."""
    batch = trial.lockstep.batches[place]
    return {
        "simulation": place + 1,
        "kv_bytes": {name: lap.peak.kv for name, lap in batch.laps.items()},
        "unique_token_bytes": batch.unique_tokens * token_bytes(trial.shape),
        "seconds": {name: round(lap.seconds, 4) for name, lap in batch.laps.items()},
    }


def _node(node: Node) -> dict[str, Any]:
    return {
        "id": node.number,
        "parent": None if node.parent is None else node.parent.number,
        "text": node.text,
        "value": round(node.value, 4),
        "solved": node.solved,
        "done": node.done,
        "visits": node.visits,
    }

"""Mistakes that callers make with tensors and steps: what each raises, and says."""

from __future__ import annotations

import numpy as np
import torch
from mistakes import ARGUMENT, COUNT, DEVICE, DTYPE, MIXED, SHAPE, Case, Scene

from paged_kv import Step, errors


def closed(scene: Scene) -> Step:
    """A step that has ended."""
    step = scene.cache.open([scene.one], 0)
    step.close()
    return step


def uneven(scene: Scene) -> None:
    """Commit a token of the first layer only."""
    scene.update(scene.step)
    try:
        scene.batch.commit()
    finally:
        scene.batch.layers[0].size = 4


TENSOR_MISTAKES: dict[str, Case] = {
    "commit of a closed step": (
        errors.ClosedStep,
        "commit() of a closed step: call open() again",
        lambda s: closed(s).commit(),
    ),
    "columns of a closed step": (
        errors.ClosedStep,
        "columns() of a closed step",
        lambda s: closed(s).columns(0, 1),
    ),
    "columns filled of a closed step": (
        errors.ClosedStep,
        "fill() of a closed step",
        lambda s: closed(s).fill(1),
    ),
    "more columns filled than there is room": (
        COUNT,
        "count is 3, allowed is an int from 0 to 2",
        lambda s: s.batch.fill(3),
    ),
    "past of a closed step": (errors.ClosedStep, "of a closed step", lambda s: closed(s).then),
    "layers that differ": (
        COUNT,
        "columns filled, by layer is [5, 4], allowed is the same number in every layer",
        lambda s: uneven(s),
    ),
    "room": (COUNT, "room is -1, allowed is an int >= 0", lambda s: s.cache.open([s.one], -1)),
    "pad": (
        ARGUMENT,
        """pad is 'middle', allowed is "left" or "right\"""",
        lambda s: s.cache.open([s.one], 1, pad="middle"),
    ),
    "pad of gather": (ARGUMENT, "pad is 'up'", lambda s: s.cache.gather([s.one], pad="up")),
    "pad of another kind": (
        ARGUMENT,
        """pad is 1, allowed is "left" or "right\"""",
        lambda s: s.cache.gather([s.one], pad=1),
    ),
    "no tensor": (
        ARGUMENT,
        "keys is None, allowed is a tensor",
        lambda s: s.cache.append([s.one, s.two], None, s.kv),
    ),
    "positions of another kind": (
        ARGUMENT,
        "positions is [[0]], allowed is an int64 tensor or array [B, n]",
        lambda s: s.cache.append([s.one, s.two], s.kv, s.kv, [[0]]),
    ),
    "update of no tensors": (
        ARGUMENT,
        "keys is [1.0], allowed is a tensor",
        lambda s: s.update([1.0], [1.0]),
    ),
    "a key that is a tensor": (
        errors.BadKey,
        "tensor(1) is no key: a tensor is found under itself only: use its bytes",
        lambda s: s.index.put(torch.tensor(1), s.one),
    ),
    "room used up": (
        COUNT,
        "new tokens is 3, allowed is 0 to the room of 2",
        lambda s: s.update(s.step.expand(2, 3, 3, 4)),
    ),
    "layer": (
        COUNT,
        "layer is 2, allowed is an int from 0 to 1",
        lambda s: s.update(s.step, layer=2),
    ),
    "layer to read": (
        COUNT,
        "layer is 9, allowed is an int from 0 to 1",
        lambda s: s.batch.keys(9),
    ),
    "keys shape": (
        SHAPE,
        "keys has shape (2, 2, 3, 4, 2), expected (2, 2, 3, 4, 4)",
        lambda s: s.cache.append([s.one, s.two], s.kv[..., :2], s.kv),
    ),
    "values shape": (
        SHAPE,
        "values has shape (2, 2, 3, 3, 4), expected (2, 2, 3, 4, 4)",
        lambda s: s.cache.append([s.one, s.two], s.kv, s.kv[:, :, :, :3]),
    ),
    "head count": (
        SHAPE,
        "keys has shape (2, 2, 1, 4, 4), expected (2, 2, 3, 4, 4)",
        lambda s: s.cache.append([s.one, s.two], s.kv[:, :, :1], s.kv),
    ),
    "batch size": (
        SHAPE,
        "keys has shape (2, 2, 3, 4, 4), expected (2, 1, 3, 4, 4)",
        lambda s: s.cache.append([s.one], s.kv, s.kv),
    ),
    "too few dimensions": (
        SHAPE,
        "keys has shape (2,), expected",
        lambda s: s.cache.append([s.one], torch.ones(2), s.kv),
    ),
    "positions shape": (
        SHAPE,
        "positions has shape (2,), expected (2, 4)",
        lambda s: s.cache.append([s.one, s.two], s.kv, s.kv, torch.zeros(2, dtype=torch.int64)),
    ),
    "update shape": (
        SHAPE,
        "keys has shape (2, 1, 1, 4), expected (2, 3, 1, 4)",
        lambda s: s.update(s.step[:, :1], s.step),
    ),
    "update values shape": (
        SHAPE,
        "values has shape (2, 3, 2, 4), expected (2, 3, 1, 4)",
        lambda s: s.update(s.step, s.step.repeat(1, 1, 2, 1)),
    ),
    "update dimensions": (
        SHAPE,
        "keys has shape (), expected",
        lambda s: s.update(torch.tensor(1.0)),
    ),
    "commit positions": (
        SHAPE,
        "positions has shape (2, 2), expected (2, 1)",
        lambda s: s.commit(positions=np.zeros((2, 2), dtype=np.int64)),
    ),
    "keys dtype": (
        DTYPE,
        "keys has dtype torch.float64, expected torch.float32",
        lambda s: s.cache.append([s.one, s.two], s.kv.to(MIXED), s.kv),
    ),
    "values dtype": (
        DTYPE,
        "values has dtype torch.float64, expected torch.float32",
        lambda s: s.cache.append([s.one, s.two], s.kv, s.kv.to(MIXED)),
    ),
    "positions dtype": (
        DTYPE,
        "positions has dtype torch.float32, expected int64",
        lambda s: s.cache.append([s.one, s.two], s.kv, s.kv, torch.zeros(2, 4)),
    ),
    "update dtype": (
        DTYPE,
        "keys has dtype torch.float64, expected torch.float32",
        lambda s: s.update(s.step.to(MIXED)),
    ),
    "update values dtype": (
        DTYPE,
        "values has dtype torch.float64",
        lambda s: s.update(s.step, s.step.to(MIXED)),
    ),
    "device": (
        DEVICE,
        "keys is on device meta, expected",
        lambda s: s.cache.append([s.one, s.two], s.kv.to("meta"), s.kv),
    ),
    "update device": (
        DEVICE,
        "values is on device meta, expected",
        lambda s: s.update(s.step, s.step.to("meta")),
    ),
}

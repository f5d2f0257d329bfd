"""A recording as scalars for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from paged_kv.errors import MissingPackage
from paged_kv.recording.format import Line, Recording
from paged_kv.recording.trace import rates

WRITERS = ("tensorboardX", "torch.utils.tensorboard")  # LightZero writes with the first


def export(recording: Recording, folder: str | os.PathLike[str]) -> int:
    """Write the samples below `folder`; returns how many scalars. A step is a millisecond.

    Raises MissingPackage where neither tensorboardX nor tensorboard is installed, and OSError.
    """
    writer = _writer_class()(os.fspath(folder))
    written = 0
    try:
        for tag, value, sample in scalars(recording):
            writer.add_scalar(
                tag, value, round(sample["t"] * 1000), recording.header["started"] + sample["t"]
            )
            written += 1
    finally:
        writer.close()
    return written


def scalars(recording: Recording) -> Iterator[tuple[str, float, Line]]:
    """Tag, value and sample of every number. The tag: "paged_kv/", its field, "/", its bin."""
    before: Line = {}
    for sample in recording.samples:
        for name, value in {**sample, **rates(before, sample)}.items():
            if isinstance(value, dict):
                yield from (
                    (f"paged_kv/{name}/{part}", number, sample) for part, number in value.items()
                )
            elif name not in ("kind", "t"):
                yield f"paged_kv/{name}", value, sample
        before = sample


def _writer_class() -> Any:
    for name in WRITERS:
        try:
            return import_module(name).SummaryWriter
        except ImportError:
            continue
    raise MissingPackage("writing for TensorBoard", "tensorboardX or tensorboard", "tensorboardX")

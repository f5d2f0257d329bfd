"""Workers that share a search's trees, and the machines they run on: bytes of each part."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

from paged_kv.tools.estimate.call import Estimate, of
from paged_kv.tools.estimate.pages import Pages
from paged_kv.tools.estimate.workload import DTYPES, MOST_BYTES, check

BOUND = 1.1  # as that of a placement: trees of a worker over the mean, at most
PROCESS_BYTES = 304 << 20  # of its own, with torch, transformers and ray, before it has a model
FORWARD_BYTES = 256 << 20  # activations that a PagedLM lets a forward take
COPIES = 2  # of what is replaced: the old one goes once the new one is there


@dataclass(frozen=True)
class Machines:
    """What `machines` found, for the worker that holds the most trees and the fullest machines.

    `model_bytes` is None where it is not known; then it is in no sum. `store_bytes` are of the
    machine of the driver, which keeps snapshots of all trees, `other_store_bytes` of each other
    one; so are `machine_bytes` and `other_machine_bytes`, which have stores and processes in them.
    """

    workers: int
    machines: int
    workers_of_a_machine: int
    trees: int
    trees_of_a_worker: int
    num_pages: int
    max_bytes: int
    working_bytes: int
    model_bytes: int | None
    process_bytes: int
    worker_bytes: int
    snapshot_bytes: int
    store_bytes: int
    other_store_bytes: int
    machine_bytes: int
    other_machine_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        return dataclasses.asdict(self)


def machines(
    found: Estimate,
    workers: int,
    machines: int = 1,
    *,
    model_bytes: int | None = None,
    hidden_size: int | None = None,
) -> Machines:
    """Say what machines need on which `workers` share the trees of an estimate.

    `model_bytes`: of one copy of the weights. `hidden_size`: of a language model, which keeps a
    hidden state of a node and computes over its pages, so that activations take the place of the
    buffers of a batch. Raises BadCount.

    >>> from paged_kv.tools.estimate import estimate
    >>> whole = estimate(layers=2, heads=2, head_size=32, context=8, envs=100, simulations=25)
    >>> found = machines(whole, workers=8, model_bytes=1_000_000)
    >>> found.trees_of_a_worker, found.num_pages, found.max_bytes
    (13, 364, 745472)
    """
    check("workers", workers, 1)
    check("machines", machines, 1, workers, "workers")
    for name, value in (("model_bytes", model_bytes), ("hidden_size", hidden_size)):
        if value is not None:
            check(name, value, 1, MOST_BYTES)
    trees = found.workload.envs
    most = trees_of_a_worker(trees, workers)
    load = dataclasses.replace(found.workload, envs=most)
    one = of(load, found.page_size)
    pages = Pages(load, found.page_size)
    num_pages = pages.held().most + pages.transient()
    states = 0
    if hidden_size is not None:
        states = most * (1 + load.simulations) * hidden_size * DTYPES[load.dtype]
    max_bytes = num_pages * one.page_bytes + states
    working = one.paged.working if hidden_size is None else FORWARD_BYTES
    model = model_bytes or 0
    worker = max_bytes + working + model + PROCESS_BYTES
    crowd = ceil(workers / machines)
    snapshot = found.snapshot_bytes + states * trees // most
    store = COPIES * (snapshot + model)
    other_store = min(crowd * most, trees) * snapshot // trees + model
    return Machines(
        workers=workers,
        machines=machines,
        workers_of_a_machine=crowd,
        trees=trees,
        trees_of_a_worker=most,
        num_pages=num_pages,
        max_bytes=max_bytes,
        working_bytes=working,
        model_bytes=model_bytes,
        process_bytes=PROCESS_BYTES,
        worker_bytes=worker,
        snapshot_bytes=snapshot,
        store_bytes=store,
        other_store_bytes=other_store,
        machine_bytes=crowd * worker + store + PROCESS_BYTES,
        other_machine_bytes=crowd * worker + other_store,
    )


def trees_of_a_worker(trees: int, workers: int) -> int:
    """The most trees that a pool gives one of its workers.

    >>> trees_of_a_worker(100, 8), trees_of_a_worker(1000, 8), trees_of_a_worker(3, 8)
    (13, 137, 1)
    """
    mean = trees / workers
    return max(floor(BOUND * mean), ceil(mean))

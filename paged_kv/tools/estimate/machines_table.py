"""Workers and machines as text for the terminal."""

from __future__ import annotations

from typing import NamedTuple

from paged_kv.tools.estimate.machines import Machines
from paged_kv.tools.units import size


class Row(NamedTuple):
    """One line: what it is about, bytes, and what to give."""

    label: str
    bytes: int
    advice: str = ""


def text(found: Machines) -> str:
    """A title and a line for each part.

    >>> from paged_kv.tools.estimate import estimate
    >>> from paged_kv.tools.estimate.machines import machines
    >>> whole = estimate(layers=2, heads=2, head_size=32, context=8, envs=100, simulations=25)
    >>> print(text(machines(whole, workers=8, machines=2)))
    8 workers on 2 machines: at most 13 of 100 trees in a worker, 4 workers on a machine
    K/V of a worker                  728.0 KiB  give max_bytes=745472
    its working buffers              115.3 KiB
    its process without all these    304.0 MiB
    a worker in all                  304.8 MiB
    object store, driver's machine    11.1 MiB  give object_store_memory=11648000
    object store, other machines       2.9 MiB
    memory, driver's machine           1.5 GiB
    memory, other machines             1.2 GiB
    Its model is in no sum: give --model-bytes.
    """
    rows = _rows(found)
    width = max(len(row.label) for row in rows)
    lines = [f"{row.label:<{width}}  {size(row.bytes):>10}  {row.advice}".rstrip() for row in rows]
    told = [] if found.model_bytes else ["Its model is in no sum: give --model-bytes."]
    return "\n".join([_title(found), *lines, *told])


def _title(found: Machines) -> str:
    trees = "tree" if found.trees == 1 else "trees"
    return (
        f"{_count(found.workers, 'worker')} on {_count(found.machines, 'machine')}: at most "
        f"{found.trees_of_a_worker:,} of {found.trees:,} {trees} in a worker, "
        f"{_count(found.workers_of_a_machine, 'worker')} on a machine"
    )


def _rows(found: Machines) -> list[Row]:
    rows = [
        Row("K/V of a worker", found.max_bytes, f"give max_bytes={found.max_bytes}"),
        Row("its working buffers", found.working_bytes),
        Row("its process without all these", found.process_bytes),
    ]
    if found.model_bytes:
        rows.insert(2, Row("its model", found.model_bytes))
    store = f"give object_store_memory={found.store_bytes}"
    rows += [
        Row("a worker in all", found.worker_bytes),
        Row("object store, driver's machine", found.store_bytes, store),
    ]
    if found.machines == 1:
        return [*rows, Row("memory of the machine", found.machine_bytes)]
    return [
        *rows,
        Row("object store, other machines", found.other_store_bytes),
        Row("memory, driver's machine", found.machine_bytes),
        Row("memory, other machines", found.other_machine_bytes),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")

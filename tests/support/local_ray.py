"""A Ray of the test process, which leaves nothing running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType

import psutil


@contextmanager
def local_ray(cpus: int, *by_value: ModuleType, store_bytes: int = 100_000_000) -> Iterator[None]:
    """Whatever of it is left at the end is ended by its number. No actor can import the modules
    `by_value`, whose functions are pickled whole.
    """
    from ray import cloudpickle

    from paged_kv.integrations.ray.cluster import start_local

    for module in by_value:
        cloudpickle.register_pickle_by_value(module)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    start_local(cpus, store_bytes=store_bytes)
    started: list[psutil.Process] = []
    try:
        yield
        started = psutil.Process().children(recursive=True)
    finally:
        import ray

        ray.shutdown()
        left = [process for process in started if process.pid not in before]
        _, alive = psutil.wait_procs(left, timeout=60)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert not alive, alive

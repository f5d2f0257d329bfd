"""The asynchronous UniZero entry of LightZero's main in its smoke configuration, with pages in all
processes. Prints what the actors have counted, as one line of JSON for each of their calls.

Two things differ from that configuration: `context_length` is 4, since with its 2 the world model
keeps no context, on any cache; and the environment is one of random pictures and short episodes,
so that no emulator is needed.

    python lightzero_async_run.py FOLDER, where its runs, logs and counters go
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from lightzero_trees import quiet
from local_ray import local_ray

ADDED = ["paged_kv.integrations.lightzero.everywhere", "lightzero_async_counters"]
CONTEXT = 4


def changed(entry: Any) -> Any:
    """The entry, for a configuration with pages and pictures."""

    def run(configs: Any, **arguments: Any) -> Any:
        main, create = configs
        create.policy.import_names += ADDED
        create.env.update(type="pictures", import_names=["lightzero_pictures"])
        main.policy.model.world_model_cfg.context_length = CONTEXT
        return entry(configs, **arguments)

    return run


def main() -> None:
    """Train, and say what was counted."""
    folder = Path(sys.argv[1])
    counters = folder / "counters"
    counters.mkdir()
    os.environ["PAGED_KV_COUNTERS"] = str(counters)
    os.chdir(folder)
    with quiet(), local_ray(4, store_bytes=500_000_000):
        import lzero.entry  # noqa: F401  (the module that is looked up below)
        from zoo.atari.config.atari_unizero_segment_async_config import main as smoke

        module = sys.modules["lzero.entry.train_unizero_segment_async"]
        module.train_unizero_segment_async = changed(module.train_unizero_segment_async)
        smoke(
            "ALE/Pong-v5",
            seed=0,
            exp_root="runs",
            async_pipeline=True,
            num_collector_actors=2,
            smoke_test=True,
        )
    for path in sorted(counters.glob("*.json")):
        print(path.read_text())


if __name__ == "__main__":
    main()

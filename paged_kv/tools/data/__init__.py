"""Files shipped with the package; see the `.md` beside each for where it comes from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def checkpoint_path() -> Path:
    """The trained CartPole world model, a safetensors file of 0.7 MB.

    Cost: none; the file is not opened.

    >>> checkpoint_path().name
    'cartpole.safetensors'
    """
    return Path(str(files("paged_kv.tools.data").joinpath("cartpole.safetensors")))

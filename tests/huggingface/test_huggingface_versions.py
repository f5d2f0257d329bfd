"""Which transformers is installed, by what it can do."""

from __future__ import annotations

import warnings

import pytest
import transformers
from tiny_models import tiny_model
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from paged_kv.errors import UnsupportedVersion
from paged_kv.integrations.huggingface.versions import (
    FOUND,
    Interface,
    cache_argument,
    probe,
    warn_of,
)


def test_the_installed_version_is_told_by_what_it_takes() -> None:
    old = transformers.__version__.startswith("4.57")
    expected = Interface("past_key_values", False) if old else Interface("cache", True)
    assert expected == FOUND
    assert cache_argument(tiny_model("llama")) == FOUND.cache_argument


class OldCache(Cache):
    def crop(self, max_length: int) -> None: ...


class OtherCache(Cache):
    def crop(self, fraction: float) -> None: ...


class OtherGeneration:
    def prepare_inputs_for_generation(self, input_ids: object, memory: object) -> None: ...


def test_each_fact_is_told_on_its_own() -> None:
    mixed = probe(OldCache, GenerationMixin)
    assert mixed == Interface(FOUND.cache_argument, crop_removes=False)


@pytest.mark.parametrize(
    ("cache", "generation", "why"),
    [
        (OtherCache, GenerationMixin, r"whose crop\(\) takes none of max_length, tokens_to_remove"),
        (Cache, OtherGeneration, "whose models take none of cache, past_key_values"),
        (object, GenerationMixin, "whose Cache has no update, get_seq_length"),
    ],
)
def test_another_interface_is_refused_by_name(cache: type, generation: type, why: str) -> None:
    with pytest.raises(UnsupportedVersion, match=why) as caught:
        probe(cache, generation)
    assert transformers.__version__ in str(caught.value)
    assert "tested with 4.57.6, 5.24.0 only" in str(caught.value)


@pytest.mark.parametrize("version", ["4.56.2", "5.25.0.dev0", "6.0.0"])
def test_a_version_beyond_the_tested_ones_is_warned_of(version: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"transformers {version} is installed"):
        warn_of(version)


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.24.0"])
def test_a_version_among_them_is_not(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of(version)

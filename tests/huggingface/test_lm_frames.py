"""A language model whose batches need more pages at once than there are frames for."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import pytest
import torch
from lm_oracle import Oracle, close, whole
from tiny_models import tiny_model

from paged_kv.errors import OutOfFrames
from paged_kv.integrations.huggingface import PagedLM
from paged_kv.tiers import FileTier, HostTier, Tiers

FRAMES = 16  # of two tokens: enough for two paths
COLD: dict[str, Any] = {"host": HostTier, "file": partial(FileTier, tempfile.gettempdir())}


def lm_of(frames: int | None, cold: str = "host", **options: Any) -> PagedLM:
    tiers = None if frames is None else Tiers(frames=frames, cold=COLD[cold])
    model = tiny_model("llama")
    return PagedLM(model, max_bytes=10**7, page_size=2, progress=False, tiers=tiers, **options)


def lives(lm: PagedLM) -> dict[str, Any]:
    """What comes of a few calls that are one batch each where there is room."""
    prompts = [[first, *range(5, 5 + length)] for first, length in zip(range(20, 30), [9, 4] * 5)]
    roots = lm.prefill(prompts, seed=3)
    kids = lm.sample(roots, max_new_tokens=7, num_return_sequences=2, temperature=0.9)
    grown = lm.extend(kids, [[30 + n % 3] * (1 + n % 4) for n in range(len(kids))])
    return {
        "kids": kids,
        "logprobs": [torch.tensor(kid.logprobs) for kid in kids],
        "grown": grown.logits,
        "logits": list(lm.logits(kids)),
        "scores": lm.score(kids, [[41, 42, 43]] * len(kids)),
        "next": list(lm.next_token_logprobs([[*kid.tokens, 9] for kid in kids])),
    }


@pytest.mark.parametrize("cold", COLD)
@pytest.mark.parametrize("piece", [3, 512])
def test_a_batch_that_is_cut_by_frames_gives_what_it_gives_uncut(cold: str, piece: int) -> None:
    lm = lm_of(FRAMES, cold, prefill_chunk_size=piece)
    found = lives(lm)
    expected = lives(lm_of(None, prefill_chunk_size=piece))
    assert [kid.tokens for kid in found.pop("kids")] == [kid.tokens for kid in expected.pop("kids")]
    for name, values in expected.items():
        for one, other in zip(found[name], values, strict=True):
            close(one, other)
    whole(lm)
    frames, place = lm.pages.tiers
    assert frames.pages <= FRAMES < lm.pages.pages_in_use
    assert place.read
    with pytest.raises(OutOfFrames):
        lm.pages.gather(lm.pages.live())  # which nobody cuts


def test_what_comes_of_it_is_what_the_model_says() -> None:
    oracle = Oracle("llama")
    lm = PagedLM(
        oracle.model,
        max_bytes=10**7,
        page_size=2,
        progress=False,
        tiers=Tiers(frames=FRAMES, cold=HostTier),
    )
    found = lives(lm)
    for kid, logits, scores in zip(found["kids"], found["logits"], found["scores"], strict=True):
        close(logits, oracle.logits(kid.tokens)[-1])
        close(scores, oracle.logprobs(kid.tokens, [41, 42, 43]))


def test_a_path_that_is_longer_than_all_frames_is_refused_and_changes_nothing() -> None:
    lm = lm_of(FRAMES)
    roots = lm.prefill([[n, 5, 6] for n in range(10, 14)], seed=1)
    before = lm.stats()
    rows = [[7], [8] * (2 * FRAMES), [9], [10]]
    refused = (
        partial(lm.score, roots, rows),
        partial(lm.sample, roots, max_new_tokens=2 * FRAMES),
        partial(lm.prefill, [[11] * (2 * FRAMES + 1)]),
    )
    for call in refused:
        with pytest.raises(OutOfFrames, match=f"allowed are {FRAMES}"):
            call()
        whole(lm)
        assert lm.stats().nodes == before.nodes
    assert [root.place.children for root in roots] == [0] * 4
    close(lm.logits(roots)[2], Oracle("llama").logits([12, 5, 6])[-1])


def test_the_model_does_not_work_before_frames_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_of(FRAMES)
    sizes: list[int] = []
    run = lm.paths.runner.decoder.forward

    def counted(*args: Any, **options: Any) -> Any:
        sizes.append(len(options["input_ids"]))
        return run(*args, **options)

    monkeypatch.setattr(lm.paths.runner.decoder, "forward", counted)
    lm.prefill([[n, *range(5, 13)] for n in range(10, 18)])
    assert sum(sizes) == 8, "each row is run once"
    assert max(sizes) > 1

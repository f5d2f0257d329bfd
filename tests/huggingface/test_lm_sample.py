"""`sample` beside `generate`, and what drawn tokens depend on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hf_paths import left_padded, paths
from lm_oracle import Oracle, close, drawn_as_told, whole
from tiny_models import VOCABULARY, tiny_model
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TopKLogitsWarper

from paged_kv.errors import BadArgument, BadCount, PagedKVError
from paged_kv.integrations.huggingface import PagedLM
from paged_kv.integrations.huggingface.draws import seed_below

PROMPTS = paths((7, 12, 9))
ROOM = 10**6


def lm_of(family: str = "llama", **options: Any) -> PagedLM:
    return PagedLM(tiny_model(family), **{"max_bytes": ROOM, "progress": False, **options})


def generated(prompt: list[int], **options: Any) -> torch.Tensor:
    """What `generate` takes for the likeliest behind a prompt."""
    model = tiny_model("llama")
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        **options,
    )
    return found[0, len(prompt) :]


# -- as generate does it


GREEDY: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"eos_token_id": [17, 40, 8, 55]},
    {"eos_token_id": 17, "min_new_tokens": 9, "repetition_penalty": 1.3},
    {"eos_token_id": list(range(2, 60)), "min_length": 12},
    {"suppress_tokens": list(range(0, 60, 2))},
    {"begin_suppress_tokens": list(range(0, 60, 2))},
    {"bad_words_ids": [[5], [7, 9]]},
    {"sequence_bias": {(4,): 9.0, (4, 6): 12.0}},
    {"forced_eos_token_id": 33},
    {"eos_token_id": 17, "exponential_decay_length_penalty": (3, 1.6)},
]


@pytest.mark.parametrize("options", GREEDY, ids=lambda options: "-".join(options) or "plain")
def test_the_likeliest_is_what_generate_takes_for_each_row_alone(options: dict[str, Any]) -> None:
    lm = lm_of()
    children = lm.sample(lm.prefill(PROMPTS), max_new_tokens=14, temperature=0, **options)
    for prompt, child in zip(PROMPTS, children):
        expected = generated(prompt, max_new_tokens=14, **options).tolist()
        assert list(child.new_tokens) == expected
    whole(lm)


WARPED: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"typical_p": 0.6},
    {"epsilon_cutoff": 0.01},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 20, "repetition_penalty": 1.5},
    {"min_new_tokens": 3, "eos_token_id": 9},
]


@pytest.mark.parametrize("options", WARPED, ids="-".join)
def test_scores_are_those_that_generate_draws_from(options: dict[str, Any]) -> None:
    """The scores of `generate` for the tokens that were drawn, forced on it one by one."""
    lm = lm_of()
    model = tiny_model("llama")
    options = {"top_k": 0, **options}
    (child,) = lm.sample(
        lm.prefill(PROMPTS[:1]), max_new_tokens=6, output_scores=True, seed=5, **options
    )
    assert child.scores is not None
    seen: list[torch.Tensor] = []
    path = list(PROMPTS[0])
    for token in child.new_tokens:
        left = len(PROMPTS[0]) + (options.get("min_new_tokens") or 0) - len(path)
        out = model.generate(
            torch.tensor([path]),
            attention_mask=torch.ones(1, len(path), dtype=torch.long),
            do_sample=True,
            return_dict_in_generate=True,
            output_scores=True,
            max_new_tokens=max(1, left),
            **{**options, **({"min_new_tokens": left} if left > 0 else {"min_new_tokens": None})},
        )
        seen.append(out.scores[0][0])
        path.append(token)
    close(child.scores, torch.stack(seen))
    for row, token, index in zip(child.scores, child.new_tokens, range(len(child.tokens))):
        assert drawn_as_told(row, token, child.place.seed, len(PROMPTS[0]) + index)


def test_a_generation_config_that_does_not_sample_takes_the_likeliest() -> None:
    lm = lm_of()
    roots = lm.prefill(PROMPTS)
    config = GenerationConfig(do_sample=False, max_new_tokens=4, pad_token_id=0)
    children = lm.sample(roots, generation_config=config)
    likeliest = lm.sample(roots, max_new_tokens=4, temperature=0, pad_token_id=0)
    assert [child.tokens for child in children] == [child.tokens for child in likeliest]


def test_a_generation_config_holds_where_nothing_else_is_said() -> None:
    lm = lm_of()
    roots = lm.prefill(PROMPTS[:2])
    config = GenerationConfig(
        max_new_tokens=4, do_sample=True, num_return_sequences=3, top_k=1, pad_token_id=0
    )
    children = lm.sample(roots, generation_config=config)
    assert [len(child.new_tokens) for child in children] == [4] * 6
    assert len({child.new_tokens for child in children[:3]}) == 1  # of top_k=1
    children = lm.sample(roots, generation_config=config, max_new_tokens=2, num_return_sequences=1)
    assert [len(child.new_tokens) for child in children] == [2, 2]
    assert config.max_new_tokens == 4


def test_zero_and_greedy_are_one() -> None:
    lm = lm_of()
    roots = lm.prefill(PROMPTS)
    expected = [child.tokens for child in lm.sample(roots, max_new_tokens=4, do_sample=False)]
    for options in (
        {"temperature": 0},
        {"temperature": 0.0, "do_sample": True},
        {"generation_config": GenerationConfig(temperature=0.0, pad_token_id=0)},
    ):
        found = lm.sample(roots, max_new_tokens=4, **options)
        assert [child.tokens for child in found] == expected
    twice = lm.sample(roots, max_new_tokens=4, temperature=0, num_return_sequences=2)
    assert [child.tokens for child in twice] == [each for each in expected for _ in range(2)]


class Words:
    """A tokenizer of which each token is a word."""

    def __init__(self) -> None:
        self.words = [f"w{token} " for token in range(VOCABULARY)]

    def __call__(self, text: str) -> Any:
        ids = [self.words.index(f"{word} ") for word in text.split()]
        return type("Encoding", (), {"input_ids": ids})

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.words[token] for token in tokens)


def test_texts_go_in_and_come_out() -> None:
    lm = lm_of(tokenizer=Words())
    one, two = lm.prefill(["w5 w6 w7", "w9"])
    assert (one.tokens, two.tokens) == ((5, 6, 7), (9,))
    assert lm.find("w5 w6 w7") == [one]
    (child,) = lm.fork([one], [[8, 9]])
    assert child.text == "w8 w9 "
    assert one.text == "w5 w6 w7 "


class Noting(LogitsProcessor):
    """Keeps a state per row, as grammars do: refuses what the row has had already."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.had: list[set[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.had = self.had or [set() for _ in input_ids]
        assert len(self.had) == len(input_ids)
        if self.seen:
            for had, ids in zip(self.had, input_ids.tolist()):
                had.add(ids[-1])
        self.seen.append(input_ids.clone())
        for row, had in enumerate(self.had):
            scores[row, list(had)] = -torch.inf
        return scores


class LongEnough(StoppingCriteria):
    """Stops a row once its path has an odd sum."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        return input_ids.sum(1) % 2 == 1


def test_hooks_see_every_row_with_its_whole_path_in_one_order() -> None:
    for batch in (1, 10**9):
        lm = lm_of(batch_bytes=batch)
        noting = Noting()
        children = lm.sample(
            lm.prefill(PROMPTS, seed=1),
            max_new_tokens=8,
            logits_processor=noting,
            stopping_criteria=LongEnough(),
            num_return_sequences=2,
        )
        padded, _ = left_padded([prompt for prompt in PROMPTS for _ in range(2)])
        assert torch.equal(noting.seen[0], padded)
        width = padded.shape[1]
        for child, row in zip(children, noting.seen[-1]):
            drawn = list(child.new_tokens)
            seen = row[width:].tolist()
            assert seen == (drawn + [0] * 9)[: len(seen)]
            assert len(set(drawn)) == len(drawn)
            stopped = [
                sum(child.tokens[: len(child.tokens) - cut]) % 2 for cut in range(len(drawn))
            ]
            assert stopped[1:] == [0] * (len(drawn) - 1)
            assert child.finish_reason == ("stop" if stopped[0] else "length")
        lengths = {len(child.new_tokens) for child in children}
        assert len(lengths) > 1  # or else nothing was seen here


def test_allowed_tokens_are_asked_for_by_prompt_and_path() -> None:
    lm = lm_of()
    asked: list[tuple[int, tuple[int, ...]]] = []

    def allowed(prompt: int, ids: torch.Tensor) -> list[int]:
        asked.append((prompt, tuple(ids.tolist())))
        return [prompt + 10, prompt + 20]

    children = lm.sample(
        lm.prefill(PROMPTS),
        max_new_tokens=3,
        num_return_sequences=2,
        top_k=0,
        prefix_allowed_tokens_fn=allowed,
    )
    for index, child in enumerate(children):
        prompt = index // 2
        assert set(child.new_tokens) <= {prompt + 10, prompt + 20}
        for length in range(len(PROMPTS[prompt]), len(child.tokens)):
            assert (prompt, child.tokens[:length]) in asked
    assert len(asked) == 3 * 6


class Listening:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.heard.append(tokens.tolist())

    def end(self) -> None:
        self.heard.append("end")


def test_a_streamer_hears_prompt_and_tokens() -> None:
    lm = lm_of()
    listening = Listening()
    (child,) = lm.sample(lm.prefill(PROMPTS[:1]), max_new_tokens=3, streamer=listening)
    assert listening.heard == [[PROMPTS[0]], *[[token] for token in child.new_tokens], "end"]


def test_an_own_processor_takes_the_place_of_one_of_its_kind() -> None:
    lm = lm_of()
    children = lm.sample(
        lm.prefill(PROMPTS),
        max_new_tokens=3,
        top_k=0,
        logits_processor=[TopKLogitsWarper(top_k=1)],
    )
    for prompt, child in zip(PROMPTS, children):
        assert list(child.new_tokens) == generated(prompt, max_new_tokens=3).tolist()


# -- what is drawn depends on seeds and paths alone


def drawn(lm: PagedLM, order: list[int], **options: Any) -> dict[int, tuple[int, ...]]:
    """What is drawn behind prompts whose roots were made in one order, and sampled in another."""
    roots = lm.prefill(PROMPTS, seed=11)
    children = lm.sample([roots[row] for row in order], max_new_tokens=5, **options)
    return {row: child.tokens for row, child in zip(order, children)}


OPTIONS: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "penalties"])
def test_draws_depend_neither_on_batches_nor_on_other_rows(options: dict[str, Any]) -> None:
    expected = drawn(lm_of(), [0, 1, 2], **options)
    for made in (
        {"batch_bytes": 1},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 5, "backend": "tree"},
        {"page_size": 16, "backend": "dense"},
    ):
        lm = lm_of(**made)
        assert drawn(lm, [2, 0, 1], **options) == expected
        assert drawn(lm, [1], **options) == {1: expected[1]}
    lm = lm_of()
    lm.prefill(paths((20, 3), seed=9))
    lm.extend(lm.prefill([PROMPTS[0]]), [[4, 5]])
    assert drawn(lm, [0, 1, 2], **options) == expected


def test_draws_do_not_depend_on_what_was_evicted() -> None:
    lm = lm_of()
    (root,) = lm.prefill(PROMPTS[:1], seed=4)
    children = lm.sample([root] * 3, max_new_tokens=4)
    deeper = lm.sample(children, max_new_tokens=4)
    lm = lm_of()
    (root,) = lm.prefill(PROMPTS[:1], seed=4)
    lm.clear()
    again = lm.sample([root] * 2, max_new_tokens=4)
    lm.clear()
    again += lm.sample([root], max_new_tokens=4)
    assert [child.tokens for child in again] == [child.tokens for child in children]
    lm.clear()
    again = lm.sample(again, max_new_tokens=4)
    assert [child.tokens for child in again] == [child.tokens for child in deeper]


def test_a_seed_of_the_call_stands_for_those_of_the_nodes() -> None:
    lm = lm_of()
    (root,) = lm.prefill(PROMPTS[:1])
    first = lm.sample([root] * 4, max_new_tokens=5, seed=8)
    again = lm.sample([root] * 4, max_new_tokens=5, seed=8)
    other = lm.sample([root] * 4, max_new_tokens=5, seed=9)
    tokens = [[child.tokens for child in each] for each in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert [child.place.seed for child in first] == [seed_below(8, row) for row in range(4)]
    assert len(set(tokens[0])) > 1


def test_tokens_come_as_often_as_the_model_says() -> None:
    """Chi-square of 3,000 first tokens over those that are expected at least five times."""
    lm = lm_of()
    (root,) = lm.prefill(PROMPTS[:1], seed=0)
    expected = (root.logits.softmax(-1).double() * 3000).tolist()
    children = lm.sample([root], max_new_tokens=1, num_return_sequences=3000, top_k=0)
    found = Counter(child.new_tokens[0] for child in children)
    often = [token for token in range(VOCABULARY) if expected[token] >= 5]
    pairs = [(found[token], expected[token]) for token in often]
    rest = 3000 - sum(count for _, count in pairs)
    if rest >= 5:
        pairs.append((3000 - sum(count for count, _ in pairs), rest))
    square = sum((count - chance) ** 2 / chance for count, chance in pairs)
    freedom = len(pairs) - 1
    assert freedom > 2
    assert square < freedom + 5 * (2 * freedom) ** 0.5


def test_logprobs_are_the_model_s_own_whatever_was_done_to_scores() -> None:
    lm = lm_of()
    oracle = Oracle("llama")
    children = lm.sample(
        lm.prefill(PROMPTS), max_new_tokens=4, temperature=0.4, top_k=3, repetition_penalty=1.5
    )
    for prompt, child in zip(PROMPTS, children):
        assert child.logprobs is not None
        close(torch.tensor(child.logprobs), oracle.logprobs(prompt, child.new_tokens))
        assert child.scores is None


# -- what is refused


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({}, BadCount, "max_new_tokens"),
        ({"max_new_tokens": 0}, (BadCount, ValueError), "max_new_tokens"),
        ({"max_new_tokens": 2.5}, BadCount, "max_new_tokens"),
        ({"max_new_tokens": 400}, BadCount, "model's positions"),
        ({"max_new_tokens": 2, "num_beams": 3}, BadArgument, "num_beams"),
        ({"max_new_tokens": 2, "prompt_lookup_num_tokens": 3}, BadArgument, "prompt_lookup"),
        ({"max_new_tokens": 2, "temprature": 3}, BadArgument, "temprature"),
        ({"max_new_tokens": 2, "assistant_model": 3}, BadArgument, "assistant_model"),
        ({"max_new_tokens": 2, "num_return_sequences": 0}, BadCount, "num_return_sequences"),
        ({"max_new_tokens": 2, "seed": -1}, BadCount, "seed"),
        ({"max_new_tokens": 2, "seed": 1.5}, BadCount, "seed"),
        ({"max_new_tokens": 2, "output_scores": "yes"}, BadArgument, "output_scores"),
        ({"max_new_tokens": 2, "logits_processor": 3}, BadArgument, "logits_processor"),
        ({"max_new_tokens": 2, "stopping_criteria": [3]}, BadArgument, "stopping_criteria"),
        ({"max_new_tokens": 2, "prefix_allowed_tokens_fn": 3}, BadArgument, "prefix_allowed"),
        ({"max_new_tokens": 2, "top_p": -1.0}, ValueError, "top_p"),
        ({"max_new_tokens": 2, "stop_strings": ["a"]}, ValueError, "tokenizer"),
    ],
    ids=str,
)
def test_other_options_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], told: str
) -> None:
    lm = lm_of()
    roots = lm.prefill(PROMPTS, seed=2)
    before = lm.stats()
    with pytest.raises(error, match=told):
        lm.sample(roots, **options)
    assert lm.stats() == before
    assert [root.place.children for root in roots] == [0, 0, 0]
    assert len(lm.sample(roots, max_new_tokens=1)) == 3


def test_scores_without_any_token_are_refused() -> None:
    lm = lm_of()
    roots = lm.prefill(PROMPTS)
    before = lm.stats()
    with pytest.raises(PagedKVError, match="a token to be drawn"):
        lm.sample(roots, max_new_tokens=2, logits_processor=lambda ids, scores: scores - torch.inf)
    assert lm.stats() == before


def test_no_nodes_have_no_children() -> None:
    assert lm_of().sample([], max_new_tokens=2) == []

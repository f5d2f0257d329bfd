"""PagedLM: a language model, or another head, whose paths are cheap handles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from paged_kv.bundles.bundle import Bundle, Source
from paged_kv.bundles.codec import Codec
from paged_kv.cache import PagedKVCache
from paged_kv.checks import counts, flag, listed, whole
from paged_kv.errors import (
    BadArgument,
    BadCount,
    NotCopyable,
    ReleasedNode,
)
from paged_kv.eviction import Policy
from paged_kv.integrations.huggingface.cache import PagedCache
from paged_kv.integrations.huggingface.draws import MOST_SEED, root_seeds
from paged_kv.integrations.huggingface.generating import Generating
from paged_kv.integrations.huggingface.heads import Head
from paged_kv.integrations.huggingface.lookup import Lookup
from paged_kv.integrations.huggingface.making import make_paths
from paged_kv.integrations.huggingface.moving import adopt_nodes, export_nodes
from paged_kv.integrations.huggingface.node_scope import NodeScope
from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.integrations.huggingface.pins import pin, unpin
from paged_kv.integrations.huggingface.prompts import prompts
from paged_kv.integrations.huggingface.recipe import Hooks, recipe
from paged_kv.integrations.huggingface.results import Extended, LMStats, figures
from paged_kv.integrations.huggingface.sampling import Sampler
from paged_kv.integrations.huggingface.scoring import score
from paged_kv.integrations.huggingface.ticks import ticking
from paged_kv.integrations.huggingface.token_tree import Tokens
from paged_kv.linears import PackedLinears
from paged_kv.tiers import Tiers

BATCH_BYTES = 256 * 2**20  # of activations, in one forward
PIECE = 512  # tokens of a row in one forward


class PagedLM:
    """A Hugging Face model whose paths of tokens are nodes: cheap to fork, keep and go back to.

    Pages that paths have in common are held once, and attended once. Every verb takes a batch, of
    nodes of any lengths and of different trees.

    - `model`: of any head; `head`: a function of hidden states, in place of the model's own.
    - `tokenizer`: for texts in and out, and for stop strings.
    - `max_bytes` bounds K/V and hidden states together, by default half of the free memory of the
      device; what is evicted is computed again. `eviction`: "lru", "fifo", "priority" or a factory
      of policies; leaves go first.
    - `page_size`: see docs/huggingface.md. `storage`: "exact", or "int8" for a quarter of the bytes
      of float32 (docs/quantised.md). `backend`: of attention, as in `PagedKVCache.attend`.
    - `batch_bytes`: activations of one forward, roughly; `prefill_chunk_size`: new tokens of a row
      in one forward.
    - `weights`: what becomes of K/V when the model's weights, adapters or mode change: "drop"
      computes them again, "refuse" raises WeightsChanged, "keep" goes on.
    - `linears`: "packed" computes the model's linear layers with packed copies of their weights,
      which small batches on a CPU read faster: see docs/linears.md; "torch" does not; a
      `PackedLinears` is shared with whoever else has it.
    - `tiers`: as those of `PagedKVCache`. `max_bytes` bounds cold pages, too; batches are cut to
      what there are frames for, and a single path that is too long raises OutOfFrames.
    - `progress`: whether long calls show a bar.

    Raises UnsupportedModel, BadArgument, BadCount.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    >>> lm = PagedLM(LlamaForCausalLM(config).eval())
    >>> root, = lm.prefill([[1, 2, 3]])
    >>> kids = lm.sample([root] * 4, max_new_tokens=5, seed=0)
    >>> [len(kid.new_tokens) for kid in kids], len(kids[0].logprobs)
    ([5, 5, 5, 5], 5)
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        head: Head | None = None,
        max_bytes: int | None = None,
        page_size: int = 2,
        storage: str = "exact",
        eviction: str | Callable[[], Policy] = "lru",
        backend: str = "auto",
        batch_bytes: int = BATCH_BYTES,
        prefill_chunk_size: int = PIECE,
        weights: str = "drop",
        linears: str | PackedLinears = "torch",
        tiers: Tiers | None = None,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.progress = flag("progress", progress)
        self.paths = make_paths(
            model,
            tokenizer=tokenizer,
            head=head,
            max_bytes=max_bytes,
            page_size=page_size,
            storage=storage,
            eviction=eviction,
            backend=backend,
            batch_bytes=batch_bytes,
            piece=prefill_chunk_size,
            weights=weights,
            linears=linears,
            tiers=tiers,
        )
        self.pages: PagedKVCache = self.paths.residents.pages
        self._lookup = Lookup(self.paths)
        self._generating = Generating(self.paths)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyable(type(self).__name__)

    def __repr__(self) -> str:
        return f"<PagedLM of {type(self.model).__name__}: {self.pages!r}>"

    # -- paths begin and grow

    def prefill(
        self, input_ids: Any, attention_mask: Any = None, *, seed: int | Sequence[int] | None = None
    ) -> list[Node]:
        """A root for each prompt, fed: rows of tokens, a tensor [B, n], or texts.

        `attention_mask` [B, n] is 0 at padding, wherever it stands. What is known of a prompt is
        not fed again. `seed`: of the draws below these roots, or a list of one for each root; by
        default each call has another one.
        Raises BadArgument, BadCount, OutOfPages.
        """
        self.paths.begin()
        rows = prompts(input_ids, attention_mask, self.paths.tokenizer)
        roots = self._new_roots([self._prompt(row) for row in rows], seed)
        new = sum(len(root.tokens) - self.paths.length(root.tokens) for root in roots)
        bar = ticking("tokens fed", new, self.progress)
        with bar as ticks, self.paths.runner.telling(ticks.update):
            self.paths.hidden(roots)
        return roots

    def fork(self, nodes: Iterable[Node], token_lists: Iterable[Any]) -> list[Node]:
        """A child of each node with more tokens, which are pending: no model call, and no page."""
        self.paths.settle()
        parents, rows = self._pairs(nodes, token_lists)
        return [self.paths.child(parent, row) for parent, row in zip(parents, rows)]

    def extend(
        self, nodes: Iterable[Node], token_lists: Iterable[Any], *, consume: bool = False
    ) -> Extended:
        """Children with more tokens, fed in one batch, and what the model says of every new token.

        `consume` releases the parents. Raises BadArgument, BadCount, OutOfPages.
        """
        self.paths.begin()
        parents, rows = self._pairs(nodes, token_lists)
        ended = flag("consume", consume)
        if not all(rows):
            raise BadArgument("token_lists", rows, "at least one token for each node")
        children, states = self.paths.grow(list(zip(parents, rows)))
        said = [] if self.paths.head is None else self.paths.say_each(states)
        if ended:
            self.paths.residents.release({parent.place.number: None for parent in parents})
        return Extended(children, states, said)

    def crop(self, nodes: Iterable[Node], lengths: Any) -> list[Node]:
        """Children with the first tokens of each node only: no model call, and no page."""
        self.paths.settle()
        found = self.paths.check(nodes)
        kept = counts("lengths", lengths, [len(node.tokens) for node in found])
        return [self.paths.crop(node, length) for node, length in zip(found, kept)]

    def sample(
        self,
        nodes: Iterable[Node],
        *,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        streamer: Any = None,
        output_scores: bool = False,
        seed: int | None = None,
        **options: Any,
    ) -> list[Node]:
        """Children with drawn tokens, `num_return_sequences` of each node side by side; one batch.

        `options` are those of `generate`: max_new_tokens, min_new_tokens, do_sample (true, unless
        `generation_config` says otherwise), temperature (0 takes the likeliest), top_k, top_p,
        min_p, repetition_penalty, eos_token_id, stop_strings, ...; what the model's own
        `generation_config` says holds where nothing else is said. Processors, criteria and
        `prefix_allowed_tokens_fn` see every row with its whole path, in one order, to the end of
        the call. What is drawn depends on the seeds of the nodes, or on `seed`, and on nothing
        else: see docs/nodes.md. The last token of a child is pending.

        Raises UnsupportedModel, BadArgument, BadCount, OutOfPages; then no child was made.
        """
        self.paths.begin()
        found = self.paths.check(nodes)
        hooks = Hooks(
            generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn
        )
        how = recipe(self.model, self.paths.tokenizer, hooks, options)
        base = None if seed is None else whole("seed", seed, 0, MOST_SEED)
        scored = flag("output_scores", output_scores)
        if not found:
            return []
        sampler = Sampler(self.paths, found, how, base, whole=scored, streamer=streamer)
        total = len(sampler.rows) * how.new_tokens
        with self.pages.scope(), ticking("tokens drawn", total, self.progress) as ticks:
            sampler.draw(ticks.update)
            return sampler.children()

    # -- what the model says

    def score(self, nodes: Iterable[Node], continuations: Iterable[Any]) -> list[torch.Tensor]:
        """Log-probability of every token of a continuation of each node, the first one included:
        float32 [tokens] a row. Nothing is left behind.

        Of continuations of one token nothing is fed. Raises BadArgument, BadCount, OutOfPages.
        """
        self.paths.begin()
        parents, rows = self._pairs(nodes, continuations)
        return score(self.paths, parents, rows) if parents else []

    def next_token_logprobs(self, token_lists: Iterable[Any]) -> torch.Tensor:
        """Log-probabilities of what follows each path [rows, vocabulary], float32: no handles.

        Equal paths are run once, beginnings that are known are not run again. What is kept for
        later calls is the lm's own, and evicted where room ends. Raises BadArgument, BadCount,
        OutOfPages.
        """
        self.paths.begin()
        rows = listed("token_lists", token_lists, "a list of rows of tokens")
        nodes = self._lookup.nodes([self._prompt(row) for row in rows])
        logits = self.paths.logits(nodes)
        self._lookup.keep(nodes)
        return logits.float().log_softmax(-1)

    def hidden_states(self, nodes: Iterable[Node]) -> torch.Tensor:
        """Last hidden states [N, hidden size] behind nodes; what is pending is fed in one batch."""
        self.paths.begin()
        return self.paths.hidden(self.paths.check(nodes))

    def logits(self, nodes: Iterable[Node]) -> torch.Tensor:
        """What the head says behind nodes [N, vocabulary], or [N, labels]; what is pending is fed
        in one batch.
        """
        self.paths.begin()
        return self.paths.logits(self.paths.check(nodes))

    def mirror(self, nodes: Iterable[Node]) -> list[Node]:
        """Roots here with the paths of nodes of another lm; what is missing is fed in one batch.

        Raises BadArgument where a value is no node, or a token is not of this model's vocabulary;
        ReleasedNode, BadCount, OutOfPages.
        """
        self.paths.begin()
        found = [_any_node(node) for node in listed("nodes", nodes, "a list of nodes")]
        rows = [self._prompt(node.tokens) for node in found]
        mirrored = [self.paths.root(row, node.place.seed) for row, node in zip(rows, found)]
        if mirrored:
            self.paths.hidden(mirrored)
        return mirrored

    # -- to generate() and back

    def cache(self, nodes: Iterable[Node], *, expand_size: int = 1) -> PagedCache:
        """A transformers cache that goes on from nodes: for `generate`, whose `input_ids` are their
        paths, padded on the left, and which feeds the last token of each again.

        `expand_size`: rows of each node, for `num_beams` or `num_return_sequences`. The nodes stay
        what they are. Raises BadArgument, BadCount, OutOfPages.
        """
        self.paths.begin()
        return self._generating.cache(self.paths.check(nodes), expand_size)

    def nodes(
        self, cache: PagedCache, sequences: Any, attention_mask: torch.Tensor | None = None
    ) -> list[Node]:
        """Children with the paths that `generate` returned for a cache of `cache()`.

        `sequences` [B, n], or what has them as an attribute; `attention_mask` [B, columns of the
        prompt], as it was given, where rows were padded. What was fed is kept, but for beams, which
        change places: their tokens are fed again where it is needed. Raises BadArgument, BadShape.
        """
        self.paths.begin()
        return self._generating.nodes(cache, sequences, attention_mask)

    # -- what is kept

    def find(self, input_ids: Any) -> list[Node | None]:
        """A node whose K/V are those of just this path, for each; None where there is none."""
        self.paths.begin()
        rows = [self._prompt(row) for row in prompts(input_ids, None, self.paths.tokenizer)]
        return [self._found(row) for row in rows]

    def promote(self, node: Node) -> int:
        """Keep a node and all below it, release all other nodes of its tree; returns how many.

        One that is pending keeps what it goes on from. Cost: O(nodes); no model call.
        """
        self.paths.settle()
        (kept,) = self.paths.check([node])
        top = kept.place.root()
        doomed = [
            other.place.number
            for other in self.paths.residents.alive()
            if isinstance(other, Node)
            and other.place.root() is top
            and not other.place.is_below(kept.place)
        ]
        self.paths.take_over(kept)
        self.paths.residents.release(doomed)
        return len(doomed)

    def pin(self, nodes: Iterable[Node]) -> None:
        """Keep K/V of nodes from eviction until `unpin` was called as often; feeds what is pending.

        Raises OutOfPages.
        """
        self.paths.begin()
        found = self.paths.check(nodes)
        pin(self.paths, found)

    def unpin(self, nodes: Iterable[Node]) -> None:
        """Undo one `pin` of each. Raises NotPinned."""
        self.paths.settle()
        unpin(self.paths, self.paths.check(nodes))

    def release(self, nodes: Iterable[Node]) -> None:
        """Give up nodes, and at once the pages that nobody shares. Their children stay."""
        self.paths.settle()
        self.paths.residents.release([node.place.number for node in self.paths.check(nodes)])

    def export(
        self,
        nodes: Iterable[Node],
        *,
        identity: Mapping[str, Any] | None = None,
        codec: Codec | None = None,
    ) -> Bundle:
        """These nodes, with paths, seeds, pins, data, K/V and last hidden states, in memory of its
        own: for `adopt` of another lm, or to be saved. They stay.

        A parent is the nearest node above that comes along, too. `identity` is compared there, by
        default a digest of the weights; `codec` makes `data` of nodes such that it can be written.
        `scores` stay behind. Cost: bytes of the pages, and of the weights where they changed since
        the last time. Raises BadArgument, ForeignNode, ReleasedNode, OutOfPages.
        """
        self.paths.begin()
        return export_nodes(self.paths, self.paths.check(nodes), identity, codec)

    def adopt(
        self,
        bundle: Source,
        *,
        identity: Mapping[str, Any] | None = None,
        codec: Codec | None = None,
    ) -> list[Node]:
        """Nodes like those that were exported, in the same order, which go on as those do: what is
        drawn below them is the same, and nothing is fed again.

        Raises OtherFingerprint for nodes of other weights, or of pages of another size; BadBundle,
        OutOfPages, BadArgument. Then no node was made.
        """
        self.paths.begin()
        return adopt_nodes(self.paths, bundle, identity, codec)

    def clear(self) -> None:
        """Give up all K/V, hidden states and packed weights. Nodes stay, and are fed again where it
        is needed.
        """
        self._lookup.clear()
        self.paths.settle()
        self.paths.runner.repack()
        self.paths.accept_weights()

    def scope(self) -> NodeScope:
        """A block at whose end every node is released that was made in it and not kept."""
        return NodeScope(self.paths)

    def stats(self) -> LMStats:
        """What is held now, and what was done. Cost: O(paths)."""
        return figures(self.paths)

    # -- inside

    def _new_roots(self, rows: Sequence[Tokens], seed: int | Sequence[int] | None) -> list[Node]:
        seeds = root_seeds(
            int(torch.randint(2**62, ()).item()) if seed is None else seed, len(rows)
        )
        return [self.paths.root(row, own) for row, own in zip(rows, seeds)]

    def _prompt(self, tokens: Any) -> Tokens:
        found = self.paths.check_tokens(tokens)
        if not found:
            raise BadCount("tokens of a prompt", 0, "at least 1")
        return found

    def _pairs(
        self, nodes: Iterable[Node], token_lists: Iterable[Any]
    ) -> tuple[list[Node], list[Tokens]]:
        """Nodes, and more tokens for each of them."""
        found = self.paths.check(nodes)
        rows = listed("token_lists", token_lists, "a list of rows of tokens")
        if len(rows) != len(found):
            raise BadCount("token_lists (one a node)", len(rows), f"{len(found)} rows")
        check = self.paths.check_tokens
        return found, [check(row, len(node.tokens)) for node, row in zip(found, rows)]

    def _found(self, path: Tokens) -> Node | None:
        for number in self.paths.residents.ending(path):
            node = self.paths.residents.node(number)
            if isinstance(node, Node) and not self._lookup.holds(node):
                return node
        return None


def _any_node(node: object) -> Node:
    """A node of whatever lm, that was not released."""
    if not isinstance(node, Node):
        raise BadArgument("node", node, "a node of a PagedLM")
    if not node.paths.has(node.place.number):
        raise ReleasedNode(node.place.number)
    return node

"""One search, run on all caches in step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paged_kv.checks import amount, choice
from paged_kv.errors import BadCount, UnsupportedModel
from paged_kv.integrations.huggingface.lm import PagedLM
from paged_kv.integrations.huggingface.shapes import ModelShape, shape_of
from paged_kv.linears import PackedLinears
from paged_kv.tools.search import kept
from paged_kv.tools.search.dense_side import DenseSide
from paged_kv.tools.search.drawing import Drawing
from paged_kv.tools.search.gathered_side import GatheredSide
from paged_kv.tools.search.lockstep import Lockstep, Watches
from paged_kv.tools.search.measuring import Stopwatch, timed
from paged_kv.tools.search.methods import FUNCTIONS
from paged_kv.tools.search.models import Loaded
from paged_kv.tools.search.paged_side import PagedSide
from paged_kv.tools.search.presets import METHODS, Preset
from paged_kv.tools.search.side import (
    DEEPCOPY,
    GATHERED,
    PACKED,
    PREFILL,
    ROOTCACHE,
    TREE,
    Rule,
    Side,
    sides_for,
)
from paged_kv.tools.search.task import LONGEST, Countdown, Likely, Task

TEMPERATURE = 0.8
PAGE_SIZE = 2
KEPT: dict[str, Callable[[], kept.Kept]] = {
    PREFILL: kept.Nothing,
    ROOTCACHE: kept.RootOnly,
    DEEPCOPY: kept.Copies,
}


class Trial:
    """A search that is ready to run: `run` it, then ask for `lockstep` and the rest.

    `sides`: the caches to compare, all by default, with packed weights only where they gain; the
    first one's tokens decide what is expanded. `linears`: the packed weights.
    Raises BadArgument, BadCount, UnsupportedModel.
    """

    def __init__(
        self,
        loaded: Loaded,
        preset: Preset,
        *,
        method: str = "mcts",
        seed: int = 0,
        page_size: int = PAGE_SIZE,
        temperature: float = TEMPERATURE,
        sides: Sequence[str] | None = None,
    ) -> None:
        choice("method", method, METHODS)
        for name in ("prompt_tokens", "simulations", "width", "tokens"):
            amount(name, getattr(preset, name), 1)
        self.shape = shape_of(loaded.model)
        if loaded.model.get_output_embeddings() is None:
            raise UnsupportedModel(loaded.model, "it has no language model's head")
        _check_positions(self.shape, preset)
        self.loaded = loaded
        self.preset = preset
        self.method = method
        self.seed = seed
        self.page_size = page_size
        self.temperature = temperature
        self.task = _task(loaded, self.shape, seed)
        self.linears = PackedLinears()
        if sides is None:
            sides = sides_for(self.shape.device, self.shape.dtype)
        self._watches = Watches(Stopwatch(), Stopwatch())
        self.lockstep = Lockstep(
            [self._side(name) for name in sides],
            self.task.prompt(preset.prompt_tokens),
            self.task.judge,
            self._watches,
            seed=seed,
        )

    def run(self, on_batch: Callable[[], None] = lambda: None) -> None:
        """Search; `on_batch` is called after each simulation, however many nodes it expanded. An
        interrupt leaves what was done so far.
        """
        self.lockstep.on_batch = on_batch
        preset = self.preset
        with timed(self.loaded.model, self._watches.model):
            self.lockstep.begin()
            root = self.lockstep.root
            self.lockstep.follow(FUNCTIONS[self.method](root, preset.simulations, preset.width))

    def _side(self, name: str) -> Side:
        rule = Rule(self.preset.tokens, self.temperature)
        watch = self._watches.draws
        model = self.loaded.model
        if name in (TREE, PACKED):
            lm = PagedLM(
                model,
                page_size=self.page_size,
                backend="tree",
                linears=self.linears if name == PACKED else "torch",
                max_bytes=2 * self._tree_bytes(),
                progress=False,
            )
            return PagedSide(name, lm, rule, watch)
        drawing = Drawing(rule, watch)
        if name == GATHERED:
            pages = self.shape.pages(page_size=self.page_size, max_bytes=2 * self._tree_bytes())
            return GatheredSide(name, model, pages, drawing)
        return DenseSide(name, model, KEPT[name](), drawing)

    def _tree_bytes(self) -> int:
        """Of all nodes' tokens, each in pages that it need not share."""
        preset = self.preset
        each = preset.tokens + 2 * self.page_size
        return (preset.prompt_tokens + preset.nodes * each) * token_bytes(self.shape)


def token_bytes(shape: ModelShape) -> int:
    """Bytes of the keys and values of one token."""
    return (
        shape.layers
        * shape.heads
        * (shape.head_size + shape.value_head_size)
        * shape.dtype.itemsize
    )


def longest(preset: Preset) -> int:
    """Tokens of the longest path."""
    steps = -(-LONGEST // preset.tokens)
    return preset.prompt_tokens + steps * preset.tokens


def needed_bytes(trial: Trial) -> int:
    """Bytes that all caches take together at most, when each path is as long as it can be, and
    packed weights.
    """
    preset = trial.preset
    each = token_bytes(trial.shape)
    path = longest(preset) * each
    batches = 4 * preset.width * path  # of the dense sides, and the gathered pages
    copies = (preset.nodes + 1) * path
    pages = 3 * preset.nodes * preset.tokens * each
    packed = any(side.name == PACKED for side in trial.lockstep.sides)
    weights = sum(weight.nbytes for weight in trial.loaded.model.parameters()) if packed else 0
    return batches + copies + pages + weights


def _check_positions(shape: ModelShape, preset: Preset) -> None:
    most = shape.positions
    if most is not None and longest(preset) > most:
        allowed = f"with the answer at most {most}, the model's positions"
        raise BadCount("tokens of the prompt", preset.prompt_tokens, allowed)


def _task(loaded: Loaded, shape: ModelShape, seed: int) -> Task:
    if loaded.tokenizer is None:
        return Likely(shape.vocabulary, seed)
    return Countdown(loaded.tokenizer, seed)

"""The workloads `paged-kv profile` knows by name."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Preset:
    """One workload: the shape of the model, and how much of it to run.

    `warmup` root steps, mostly of two simulations, fill the context windows first; `roots` root
    steps are timed; `metered` root steps of a second run are sampled after every simulation, and
    the last `counted` of them run under the (slow) kernel counter.
    """

    name: str
    layers: int
    embed: int
    heads: int
    context: int
    rotary: bool
    actions: int
    simulations: int
    observation: str  # "cartpole", "image" or "vector"
    warmup: int
    roots: int
    metered: int
    counted: int
    envs: int = 8
    about: str = ""

    @property
    def max_tokens(self) -> int:
        """Rows of the position table: LightZero's 20, or the context where that is longer."""
        return max(20, self.context + self.context % 2)

    def without_lightzero(self) -> Preset:
        """The same for the reference world model, whose environments are random vectors: CartPole
        needs LightZero.
        """
        return replace(self, observation="vector", warmup=min(self.warmup, self.context // 2 + 1))


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "cartpole",
            layers=2,
            embed=64,
            heads=2,
            context=8,
            rotary=True,
            actions=2,
            simulations=25,
            observation="cartpole",
            warmup=4,
            roots=100,
            metered=16,
            counted=2,
            about="the real CartPole, LightZero's own configuration, trained weights",
        ),
        Preset(
            "atari",
            layers=2,
            embed=768,
            heads=8,
            context=8,
            rotary=False,
            actions=6,
            simulations=50,
            observation="image",
            warmup=4,
            roots=8,
            metered=3,
            counted=1,
            about="Atari size, random weights and random frames",
        ),
        Preset(
            "atari-8l",
            layers=8,
            embed=768,
            heads=8,
            context=8,
            rotary=False,
            actions=6,
            simulations=50,
            observation="image",
            warmup=4,
            roots=6,
            metered=2,
            counted=1,
            about="Atari size with 8 layers, random weights and random frames",
        ),
        Preset(
            "long",
            layers=2,
            embed=768,
            heads=8,
            context=64,
            rotary=False,
            actions=6,
            simulations=50,
            observation="image",
            warmup=32,
            roots=6,
            metered=2,
            counted=1,
            about="context of 64 tokens, random weights and random frames",
        ),
        Preset(
            "memory",
            layers=4,
            embed=256,
            heads=4,
            context=162,
            rotary=False,
            actions=4,
            simulations=50,
            observation="vector",
            warmup=81,
            roots=6,
            metered=2,
            counted=1,
            about="memory-task size, context of 162 tokens, random weights and random observations",
        ),
    )
}

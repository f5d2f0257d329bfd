"""What train_both.py makes of its notes: growth of the caches, agreement of both sides, and the
table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

POINTS = ("collected", "learned", "evaluated")
# of a run's environment steps, left out of the slopes: pools and rings are still growing
WARM_UP = 0.2
LAST = 5  # collections whose mean return the table shows

Row = dict[str, Any]  # a line of the JSON


def slopes(held: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Growth of what a cache takes, by least squares, at each point of the cycle once the run is
    warm.
    """
    warm = WARM_UP * max((row["env_steps"] for row in held), default=0)
    late = [row for row in held if row["env_steps"] >= warm]
    return {
        point: {
            what: slope([row for row in late if row["at"] == point], what)
            for what in ("in_use", "reserved")
        }
        for point in POINTS
    }


def slope(rows: Sequence[Row], what: str) -> float | None:
    """Bytes per 1,000 environment steps; None where there are fewer than two rows."""
    steps = np.array([row["env_steps"] for row in rows], dtype=float)
    held = np.array([row[what] for row in rows], dtype=float)
    if len(rows) < 2 or np.ptp(steps) == 0:
        return None
    steps = steps - steps.mean()
    held = held - held.mean()
    return round(float(steps @ held / (steps @ steps)) * 1000, 6)


def same_until(one: Row, other: Row) -> Row:
    """How far two runs agree in every action and return, collected or evaluated."""
    agreed = 0
    for a, b in zip(one["returns"], other["returns"]):
        if any(a[key] != b[key] for key in ("at", "env_steps", "mean_return", "actions")):
            return {"env_steps": agreed, "to_the_end_of_the_shorter": False}
        agreed = a["env_steps"]
    return {"env_steps": agreed, "to_the_end_of_the_shorter": True}


def at_equal_steps(sides: Sequence[Row]) -> Row:
    """The clocks of both sides where the shorter one collected for the last time and the other one
    stood there too.
    """
    rows = [
        {row["env_steps"]: row for row in side["held"] if row["at"] == "learned"} for side in sides
    ]
    shared = max(set(rows[0]) & set(rows[1]), default=None)
    if shared is None:
        return {"env_steps": 0}
    clocks = {
        f"{side['cache']}_{clock}": known[shared][clock]
        for side, known in zip(sides, rows)
        for clock in ("cpu_s", "wall_s")
    }
    return {"env_steps": shared, **clocks}


def report(sides: Sequence[Row]) -> str:
    """The table, for people."""
    lines = [
        "    cache   steps  updates  wall s   cpu s  cpu ms/step  last returns  reserved at the end"
    ]
    for side in sides:
        last = [row["mean_return"] for row in side["returns"] if row["at"] == "collected"][-LAST:]
        lines.append(
            f"{side['cache']:>9}  {side['env_steps']:>6,}  {side['updates']:>7,}  "
            f"{side['wall_s']:>6.0f}  "
            f"{side['cpu_s']:>6.0f}  {side['cpu_s'] / max(1, side['env_steps']) * 1e3:>11.2f}  "
            f"{np.mean(last) if last else 0:>12.1f}  "
            f"{side['held'][-1]['reserved'] if side['held'] else 0:>19,}"
        )
    return "\n".join(lines)

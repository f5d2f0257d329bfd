"""An argparse parser that answers a mistake with one line, and with what was probably meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Like its base; descriptions keep their lines."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **given})

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line."""
        self.exit(2, f"paged-kv: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As its base, but whoever meets an unknown argument refuses it, so that a command knows
        its own options.
        """
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            self.error(f"unknown argument {name!r}{_guess(name, self._option_string_actions)}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Private to argparse: should it go, mistakes are answered in argparse's own words."""
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            hint = _guess(str(value), names) or f", choose from {', '.join(names)}"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint}")


class _Help(argparse.RawDescriptionHelpFormatter):
    """One column for all options that are not very long."""

    def __init__(self, prog: str, **given: Any) -> None:
        super().__init__(prog, **{"max_help_position": 26, **given})


def _guess(word: str, known: Iterable[str]) -> str:
    """A question that names the nearest of some names, or nothing where none is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1)
    return f", did you mean {names[near[0]]!r}?" if near else ""

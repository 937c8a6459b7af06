"""Rows of the tenant or class table as they arrive from KV. Pure; called by `tables`.

A row that does not decode is refused with a reason, and the last good one of the same name stays in force.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from coxswain.schemas.errors import UNREADABLE
from coxswain.schemas.names import NameRefusedError
from coxswain.schemas.policy import TenantPolicy

Row = TypeVar("Row", bound=msgspec.Struct)


def check(row: Row) -> Row:
    """Return the row if it means something beyond its types.

    Raises:
        ValueError: what is wrong with it.
    """
    if isinstance(row, TenantPolicy) and (problem := row.problem()):
        raise ValueError(problem)
    return row


class Rows(Generic[Row]):
    """The table so far: `good` rows by name, and why others were `refused`, by name or key."""

    def __init__(self, row: type[Row], name_of: Callable[[str], str]) -> None:
        self.good: dict[str, Row] = {}
        self.refused: dict[str, str] = {}
        self._decode = msgspec.json.Decoder(row).decode
        self._name_of = name_of
        self._seen: set[str] = set()

    def put(self, key: str, value: bytes | None) -> None:
        """Take the newest value of a key; None if it was deleted."""
        try:
            name = self._name_of(key)
        except NameRefusedError as error:
            if value is None:
                self.refused.pop(key, None)
            else:
                self.refused[key] = str(error)
            return
        self._seen.add(name)
        self.refused.pop(name, None)
        if value is None:
            self.good.pop(name, None)
            return
        try:
            self.good[name] = check(self._decode(value))
        except (ValueError, *UNREADABLE) as error:
            kept = "its last good row stays" if name in self.good else "it has no good row"
            self.refused[name] = f"{error}; {kept}"

    def begin(self) -> None:
        """Start to read the whole bucket again, after a reconnection."""
        self._seen.clear()
        self.refused.clear()

    def end(self) -> None:
        """The whole bucket was read: names that it no longer holds are gone."""
        self.good = {name: row for name, row in self.good.items() if name in self._seen}

"""Commands that were applied, by id: who repeats one is answered again, and nothing is done twice. Pure.

Called by `verbs.py` alone.
"""

from collections import OrderedDict
from typing import Final, NamedTuple

from msgspec.structs import replace

from coxswain.schemas.commands import MAX_AHEAD_S, Command, Reply
from coxswain.schemas.errors import Code, RefusedError

MAX_REMEMBERED: Final = 65_536
"""Ids remembered; the oldest give way."""
MAX_REMEMBERED_RESULTS: Final = 65_536
"""Results and ignored fields in the replies remembered for them, all together (some 10 MB; a name may have 512
characters). Beyond it the oldest replies lose theirs; the ids are remembered all the same."""


class Known(NamedTuple):
    """A command that was applied."""

    until: float
    """When it may be forgotten."""
    role: str
    verb: str
    reply: Reply

    @property
    def size(self) -> int:
        """What grows in it."""
        return len(self.reply.results) + len(self.reply.ignored)

    def trimmed(self) -> "Known":
        """Without what grows: that it was applied, and how many targets fared how."""
        omitted = self.reply.results_omitted + len(self.reply.results)
        return self._replace(reply=replace(self.reply, results=(), results_omitted=omitted, ignored=()))


class Answered:
    """What was answered, for as long as a repetition may come, within bounds."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._long: OrderedDict[str, None] = OrderedDict()
        """Those whose replies have anything that grows, in the same order."""
        self._size = 0
        """Of all of them."""

    def find(self, now: float, role: str, verb: str, command: Command) -> Reply | None:
        """What was answered to this very command, or None if it is new.

        Raises:
            RefusedError: 400 if the id was another command's.
        """
        known = self._known.get(command.id)
        if known is None or known.until < now:
            return None
        if (known.role, known.verb) != (role, verb):
            text = f"id {command.id} was used for `{known.verb}` by {known.role}: every command needs its own"
            raise RefusedError(Code.MALFORMED, text)
        return known.reply

    def keep(self, now: float, role: str, verb: str, command: Command, reply: Reply) -> None:
        """Remember until the command's deadline, or for a minute without one."""
        self._forget(command.id)
        known = Known(command.expires_at or now + MAX_AHEAD_S, role, verb, reply)
        self._known[command.id] = known
        if known.size:
            self._long[command.id] = None
            self._size += known.size
        while self._known:
            oldest = next(iter(self._known))
            if self._known[oldest].until >= now and len(self._known) <= MAX_REMEMBERED:
                break
            self._forget(oldest)
        while self._size > MAX_REMEMBERED_RESULTS:
            self._trim(next(iter(self._long)))

    def _trim(self, command_id: str) -> None:
        known = self._known[command_id]
        self._known[command_id] = known.trimmed()
        del self._long[command_id]
        self._size -= known.size

    def _forget(self, command_id: str) -> None:
        if known := self._known.pop(command_id, None):
            self._size -= known.size
            self._long.pop(command_id, None)

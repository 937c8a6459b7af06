"""What a browser is shown: raw status messages in, one JSON document out. Pure; the clock is passed in.

The same model as `cox top` (`control/view/overview.py`), cut to what a page can show. Not for two threads at once:
`page.py` gives it one of its own, for a large fleet's picture takes longer than the controller's loop may stand still.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

import msgspec

from coxswain import __version__
from coxswain.control.view.overview import Overview
from coxswain.control.view.picture import Picture, RequestRow, TenantRow
from coxswain.schemas.errors import UNREADABLE
from coxswain.schemas.status import decode_frame

MAX_TENANTS: Final = 500
"""Rows of tenants in a picture; those that want or get nothing are left out first."""
MAX_REQUESTS: Final = 300
"""Rows of requests of a tenant or a worker."""
MAX_SENT: Final = 500
"""Rows of commands: the latest of each verb to each worker."""

Of = Literal["tenant", "worker"]


class Message(NamedTuple):
    """A status message as it came."""

    at: float
    """Unix s."""
    worker: str
    """Of its subject: who may publish there was NATS's decision, what it says of itself is not."""
    payload: bytes


class SentRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one controller sent one worker, by verb."""

    worker: str
    verb: str
    sent_total: int
    refused_total: int
    """Refused or not answered."""
    at: float
    ok: bool
    """Of the latest."""
    code: int | None
    reason: str


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """The controller that serves the page."""

    name: str
    leading: bool
    reaches_nats: bool


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """All that the page shows but single requests."""

    version: str
    controller: Standing
    picture: Picture
    tenants_total: int
    """Of which `picture` has the first `MAX_TENANTS`."""
    missed_total: int
    """Frames that were not looked at because there were too many; the next full one repairs it."""
    sent: tuple[SentRow, ...]


class Requests(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of a tenant or a worker that status frames list, in the order of their turn."""

    at: float
    total: int
    rows: tuple[RequestRow, ...]
    """The first `MAX_REQUESTS`."""


_encode: Final = msgspec.json.Encoder().encode


class Board:
    """Pictures of a fleet for browsers.

    Args:
        fleet: its name.
    """

    def __init__(self, fleet: str) -> None:
        self._overview = Overview(fleet)
        self._listed: dict[Of, dict[str, list[RequestRow]]] = {}
        """Requests by whose they are, as of the last picture; made when first asked for."""

    def draw(
        self,
        messages: Iterable[Message],
        standing: Standing,
        sent: Iterable[SentRow],
        missed_total: int,
        now: float,
    ) -> bytes:
        """Take what came since, and give the picture as of `now` as JSON, in one line."""
        for message in messages:
            try:
                frame = decode_frame(message.payload)
            except UNREADABLE:
                continue  # the controller's own reading of it is logged
            if frame.worker == message.worker:
                self._overview.feed(frame, message.at)
        self._overview.tick(now)
        self._listed.clear()
        picture = self._overview.picture(now)
        scene = Scene(
            version=__version__,
            controller=standing,
            picture=msgspec.structs.replace(picture, tenants=_foremost(picture.tenants)),
            tenants_total=len(picture.tenants),
            missed_total=missed_total,
            sent=tuple(sent),
        )
        return _encode(scene)

    def requests(self, of: Of, name: str) -> bytes:
        """The requests of a tenant or a worker as of the last picture, as JSON."""
        if of not in self._listed:
            listed = self._listed[of] = defaultdict(list)
            for row in self._overview.requests():
                listed[row.status.tenant if of == "tenant" else row.worker].append(row)
        rows = self._listed[of].get(name, [])
        return _encode(Requests(at=self._overview.now, total=len(rows), rows=tuple(rows[:MAX_REQUESTS])))


def _foremost(tenants: tuple[TenantRow, ...]) -> tuple[TenantRow, ...]:
    """The tenants that a page has room for: who waits or runs comes before who does not."""
    if len(tenants) <= MAX_TENANTS:
        return tenants
    ranked = sorted(tenants, key=lambda row: (row.queued + row.running + row.held, row.share), reverse=True)
    return tuple(ranked[:MAX_TENANTS])

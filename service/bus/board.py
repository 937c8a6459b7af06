"""The rows of a worker's status as the engine last told them, and which of them a frame has said already. Pure.

The engine tells what changed (`port.Draft`). Deltas and full frames are made of it here, where time is cheap. A
tenant's output is summed and charged here too, as the engine does it when it needs the sum: see `Account.settle`.
Called by `loop.py`, and by the lab's bus.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from math import inf
from typing import Final, NamedTuple

from msgspec.structs import replace

from coxswain.schemas import status as st
from coxswain.service.port import Draft

FULL_SHARE: Final = 0.05
"""Share of the bus's time that full frames may take: where there are many rows they come less often."""
MAX_FULL_S: Final = 30.0
"""Longest pause between full frames, whatever they cost."""
PATIENCE: Final = 64
"""Drafts that a board which knows nothing passes over before it asks again: the answer must have been lost."""


class Tenant(NamedTuple):
    """A tenant as the engine told it."""

    row: st.TenantStatus
    since: float | None
    """When its oldest request began to wait (Unix s)."""
    past: int
    """Its output tokens beyond those of its requests with a slot."""
    price: float
    """Of an output token."""

    def as_of(self, now: float, live: int) -> st.TenantStatus:
        """Its row, with its age and all that it was delivered; `live`: output tokens of its requests with a slot."""
        row, output = self.row, self.past + live
        if news := output - row.output_tokens_total:
            row = _charged(row, row.base, row.charged + news * self.price / row.weight, output)
        if self.since is None:
            return row
        return replace(row, oldest_queued_s=max(0.0, now - self.since) or st.ZERO)


class Board:
    """The rows of one worker.

    Args:
        interval_s: least time between two full frames.
        begin_anew: called when a draft was lost: the engine must tell everything again.
        requests: whether anybody reads the rows of single requests; frames go without them otherwise.
    """

    def __init__(
        self, interval_s: float, begin_anew: Callable[[], None] = lambda: None, *, requests: bool = True
    ) -> None:
        self._interval_s = interval_s
        self._begin_anew = begin_anew
        self._shows = requests
        self._number = 0
        self._clear()

    def _clear(self) -> None:
        self._frame: st.Frame | None = None
        self._passed_over = 0
        self.complete = False
        """Whether everything was told: else there is no full frame."""
        self._full_at = -inf
        self._requests: dict[int, st.RequestStatus] = {}
        """Rows of what is listed, by the engine's number, as of now."""
        self._served: dict[int, str] = {}
        """Requests that may be delivered tokens, in the order of `Draft.tokens`: the tenant to charge for them, or
        empty."""
        self._head: dict[int, None] = {}
        self._tenants: dict[str, Tenant] = {}
        self._live: Counter[str] = Counter()
        self._begun = False
        """Whether anything was said."""
        # As the last frame had them.
        self._said: dict[int, st.RequestStatus] = {}
        self._classes: dict[str, st.ClassStatus] = {}
        # What the next delta may have: numbers, names and what they had been delivered, tenants.
        self._news: dict[int, None] = {}
        self._gone: dict[tuple[str, int], int] = {}
        self._tenant_news: dict[str, bool] = {}
        """Tenants that changed, and whether in more than output, its charge and the base."""
        self._rebased: dict[str, None] = {}

    # What the engine tells

    def take(self, draft: Draft) -> bool:
        """Take a draft; False if one before it is missing, without which nothing can be made of it."""
        if draft.fresh:
            self._clear()
        elif self._frame is None:
            self._passed_over += 1
            if self._passed_over % PATIENCE == 0:
                self._begin_anew()
            return False
        elif draft.number != self._number + 1:
            self._clear()
            self._begin_anew()
            return False
        self._number, self._frame, self.complete = draft.number, draft.frame, draft.complete
        for number, row, grows in draft.requests:
            self._served.pop(number, None)
            if grows:
                charged = row.state == "running" or row.kv == "kept"
                self._served[number] = row.tenant if charged else ""
            self._put(number, row)
        for number, tokens in draft.gone:
            self._served.pop(number, None)
            self._news.pop(number, None)
            row = self._requests.pop(number)
            if self._said.pop(number, None) is not None:
                self._gone[row.request, row.child] = tokens
        self._take_head(draft.head, draft.tokens[len(self._served) :])
        live: Counter[str] = Counter()
        for (number, tenant), tokens in zip(self._served.items(), draft.tokens, strict=False):
            if self._shows and (row := self._requests[number]).output_tokens != tokens:
                self._put(number, replace(row, output_tokens=tokens))
            if tenant:
                live[tenant] += tokens
        self._take_tenants(draft, live)
        return True

    def _put(self, number: int, row: st.RequestStatus) -> None:
        self._requests[number] = row
        self._news[number] = None

    def _take_head(self, head: Sequence[int], tokens: Sequence[int]) -> None:
        """Rows cross without a position: a request that left the head has crossed again, or is gone."""
        for place, (number, count) in enumerate(zip(head, tokens, strict=True)):
            row = self._requests[number]
            if row.position != place or row.output_tokens != count:
                self._put(number, replace(row, position=place, output_tokens=count))
        self._head = dict.fromkeys(head)

    def _take_tenants(self, draft: Draft, live: Counter[str]) -> None:
        for told in draft.tenants:
            tenant = Tenant(*told)
            self._tenants[tenant.row.tenant] = tenant
            self._tenant_news[tenant.row.tenant] = True
        for name, base, charged, output, past, price in draft.charges:
            tenant = self._tenants[name]
            if base != tenant.row.base:
                self._rebased[name] = None
            row = _charged(tenant.row, base, charged, output)
            self._tenants[name] = Tenant(row, tenant.since, past, price)
            self._tenant_news.setdefault(name, False)
        for name in live.keys() | self._live.keys():
            if live[name] != self._live[name]:
                self._tenant_news.setdefault(name, False)
        self._live = live

    # What is said

    def delta(self) -> st.Frame | None:
        """What changed since the last frame, except for ages; None where a full frame must come first."""
        frame = self._frame
        if frame is None or (self.complete and not self._begun):
            return None
        self._begun = True
        requests = [
            (number, row)
            for number in self._news
            if (row := self._requests[number]) is not (old := self._said.get(number)) and row != old
        ]
        self._said.update(requests)
        gone: tuple[st.Gone, ...] = ()
        if self._gone:  # unless another has that name by now
            listed = {(row.request, row.child) for row in self._requests.values()}
            gone = tuple(
                st.Gone(request=name[0], child=name[1], output_tokens=tokens)
                for name, tokens in self._gone.items()
                if name not in listed
            )
        tenants = {
            name: self._tenants[name].as_of(frame.sent_at, self._live[name])
            for name in sorted(self._tenant_news, key=lambda name: not self._tenant_news[name])
            if name in self._tenants
        }
        charged = {name: row.charged for name, row in tenants.items() if not self._tenant_news[name]}
        bases = {name: tenants[name].base for name in self._rebased if name in charged}
        self._said_all()
        old_classes, self._classes = self._classes, {each.class_: each for each in frame.classes}
        classes = tuple(each for each in frame.classes if not _same(each, old_classes.get(each.class_)))
        rows = tuple(row for _, row in requests) if self._shows else ()
        return replace(
            frame, tenants=tuple(tenants.values()), charged=charged, bases=bases, classes=classes, requests=rows,
            gone=gone if self._shows else (),
        )  # fmt: skip

    def full(self, *, peek: bool = False) -> st.Frame:
        """Everything as of now. `peek` takes no note of it: the next delta is what it would have been."""
        frame = self._frame
        assert frame is not None
        assert self.complete, "who asks has looked"
        if not peek:
            self._begun = True
            self._said = dict(self._requests)
            self._classes = {each.class_: each for each in frame.classes}
            self._said_all()
        rows, live = self._requests, self._live
        order = chain((number for number in rows if number not in self._head), self._head)
        return replace(
            frame,
            full=True,
            tenants=tuple(tenant.as_of(frame.sent_at, live[name]) for name, tenant in self._tenants.items()),
            requests=tuple(rows[number] for number in order) if self._shows else (),
        )

    def _said_all(self) -> None:
        self._news, self._gone, self._tenant_news, self._rebased = {}, {}, {}, {}

    def due(self, now: float) -> bool:
        """Whether a full frame is due, by a clock that does not jump."""
        return self.complete and now >= self._full_at

    def paid(self, now: float, cost_s: float) -> None:
        """A full frame went out, and took so much of the bus's time."""
        self._full_at = now + max(self._interval_s, min(cost_s / FULL_SHARE, MAX_FULL_S))


def _charged(row: st.TenantStatus, base: float, charged: float, output: int) -> st.TenantStatus:
    virtual_time = base + charged + row.lift
    return replace(
        row, base=base or st.ZERO, charged=charged or st.ZERO, virtual_time=virtual_time or st.ZERO,
        output_tokens_total=output,
    )  # fmt: skip


def _same(row: st.ClassStatus, old: st.ClassStatus | None) -> bool:
    """Whether nothing but its age has changed."""
    return old is not None and replace(row, oldest_queued_s=old.oldest_queued_s) == old

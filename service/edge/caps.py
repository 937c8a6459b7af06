"""Caps at the HTTP edge: what the engines behind this server have queued, and who may still send.

Pure: frames and clock readings in, a refusal or a passage out; a decision is a few dictionary look-ups. Called by
`asgi.py` once per request and by `status.py` for every status frame.

What counts as queued is what the engines' last frames say, and what this process let through that those frames cannot
know of yet. A frame's totals say how many of a tenant's requests an engine has ever been given, so it is known which
of those sent are in the frame's count. So the count is too high by at most what left the queue since the last frame.
Where this process is the only one it is never too low, except for a class, by what the front end works on for longer
than `LOST_S`. Several processes know only their own requests: together they exceed a cap by at most what the others
sent since the last frame.
"""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from math import ceil
from typing import Final, NamedTuple

from coxswain.schemas.names import DEFAULT, OTHER
from coxswain.service.edge.core import Refusal
from coxswain.service.edge.views import ClassSeen, EdgeFrame, TenantSeen, View

STALE_S: Final = 5.0
"""The numbers of a worker that has been silent for longer do not count: it publishes at least once a second."""
LOST_S: Final = 5.0
"""A request that no frame has confirmed for so long never reached an engine.

An HTTP request that vLLM's front end has not handed to an engine this long after its body came gives its place in the
class to others.
"""
SWEEP_S: Final = 0.1
RETRY_S: Final = (1, 60)
"""Least and most that Retry-After says."""
DRAINING_RETRY_S: Final = 10
DRAINS: Final = Refusal(503, "this server is draining: send new requests elsewhere", DRAINING_RETRY_S)


class Passage:
    """One HTTP request that was let through, until it has reached the engine or will not.

    It counts for its tenant all the while. A class is shared with other tenants, and two things last as long as a
    client likes: its upload, and vLLM's fetch of what the body links to (images, audio). So it has a place in its class
    only from when its body is there, and for at most `LOST_S`.

    Args:
        caps: where it counts.
        tenant: whose it is.
        asked_class: the class that it asked for, or empty.
        class_: the class that it would be in now.
    """

    __slots__ = (
        "_asked_class", "_asked_place", "_caps", "_last", "_sent", "_underway", "account", "class_", "tenant",
    )  # fmt: skip

    def __init__(self, caps: "EdgeCaps", tenant: str, asked_class: str, class_: str) -> None:
        self._caps = caps
        self._asked_class = asked_class
        self.tenant = tenant
        self.class_ = class_
        self._underway = True
        self._asked_place = False
        self._last: list[Sent] = []
        self._sent: list[Sent] = []
        self.account = caps.account(tenant)
        caps.underway[self.account] += 1

    def whole(self, now: float) -> Refusal | None:
        """Its body is there: give it a place in its class, or say why there is none any more. Once is enough."""
        if self._asked_place or not self._underway:
            return None
        self._asked_place = True
        self.class_, refusal = self._caps.place(self.tenant, self._asked_class, now)
        if refusal is None:
            self._caps.take_place(self, now)
        return refusal

    def sent(self, now: float, children: int) -> None:
        """The front end gave the engine one of its prompts, as so many requests (`n`)."""
        self.left()
        self._last = self._caps.note_sent(self.tenant, self.class_, children, now)
        self._sent += self._last

    def refused(self) -> None:
        """The front end did not give the engine what was reported last to `sent`, after all."""
        self._caps.note_refused(self.tenant, self._last)
        self._last = []

    def failed(self) -> None:
        """It was answered with an error: what the engine was given of it (the first prompts of a list) is aborted."""
        self._caps.note_over(self._sent)

    def left(self) -> None:
        """It is not on its way to the engine any more: it is there, or was answered without it."""
        if self._underway:
            self._underway = False
            _less(self._caps.underway, self.account)
            self._caps.leave_place(self)


class Sent:
    """One request that an engine was given and no frame has yet.

    Args:
        at: when (monotonic s).
        account: its tenant, or `OTHER`: for whom it counts.
        class_: the class that it was taken for.
    """

    __slots__ = ("account", "at", "class_", "over", "told")

    def __init__(self, at: float, account: str, class_: str) -> None:
        self.at = at
        self.account = account
        self.class_ = class_
        self.over = False
        """Whether it no longer counts. A frame will report its arrival all the same."""
        self.told = False
        """Whether a frame did."""


def _less(counts: Counter[str], name: str) -> None:
    """One less of these; what is zero takes no memory."""
    counts[name] -= 1
    if not counts[name]:
        del counts[name]


class Load(NamedTuple):
    """What waits of a tenant or class on all live engines together."""

    queued: int
    oldest_s: float
    cap: int | None


class EdgeCaps:
    """What one API server process knows of queues.

    Args:
        workers: names of the engines behind this server; frames of others are not looked at.
    """

    def __init__(self, workers: Iterable[str]) -> None:
        self.workers = frozenset(workers)
        self.views: dict[str, View] = {}
        self.underway: Counter[str] = Counter()
        """HTTP requests per tenant that were let through and are not with the engine yet."""
        self.underway_in: Counter[str] = Counter()
        """The same per class, of those that have a place in it."""
        self._placed: OrderedDict[Passage, float] = OrderedDict()
        """Those, and since when, oldest first."""
        self.sent: defaultdict[str, deque[Sent]] = defaultdict(deque)
        """Per tenant, requests that were given to an engine and are in no frame yet, oldest first.

        Those that may come in the row of `OTHER` are there too: which of the two tells of them is not known here.
        """
        self.sent_of: Counter[str] = Counter()
        """How many of these count per tenant."""
        self.sent_in: Counter[str] = Counter()
        """The same per class."""
        self._swept_at = 0.0

    # What is heard

    def heard(self, frame: EdgeFrame, now: float) -> None:
        """A status frame came."""
        if frame.worker not in self.workers:
            return
        view = self.views.get(frame.worker)
        if view is None or view.incarnation != frame.incarnation:
            if view is not None and frame.incarnation < view.incarnation and now - view.heard_at < STALE_S:
                return  # a late frame of the incarnation before
            view = self.views[frame.worker] = View(frame.incarnation)
        for tenant, count in view.merge(frame, now).items():
            for _ in range(count):
                if not self._tell_oldest(tenant):
                    break
        self._sweep(now)

    def note_sent(self, tenant: str, class_: str, count: int, now: float) -> list[Sent]:
        """An engine was given so many requests; while none was ever heard nobody is capped, and nobody counts."""
        if not self.views:
            return []
        account = self.account(tenant)
        given = [Sent(now, account, class_) for _ in range(count)]
        self.sent[tenant].extend(given)
        if any(view.overflows and tenant not in view.tenants for view in self.views.values()):
            self.sent[OTHER].extend(given)
        self.sent_of[account] += count
        self.sent_in[class_] += count
        self._sweep(now)
        return given

    def note_refused(self, tenant: str, last: list[Sent]) -> None:
        """No engine was given what was sent last."""
        self.note_over(last)
        for each in reversed(last):
            each.told = True
            if (sent := self.sent.get(tenant)) and sent[-1] is each:
                sent.pop()

    def note_over(self, sent: Iterable[Sent]) -> None:
        """These wait no more, whether or not a frame had them."""
        for each in sent:
            if not each.over:
                each.over = True
                _less(self.sent_of, each.account)
                _less(self.sent_in, each.class_)

    def take_place(self, passage: Passage, now: float) -> None:
        """From now on a request counts in its class."""
        self._placed[passage] = now
        self.underway_in[passage.class_] += 1

    def leave_place(self, passage: Passage) -> None:
        """It no longer does, if it did."""
        if self._placed.pop(passage, None) is not None:
            _less(self.underway_in, passage.class_)

    def _sweep(self, now: float) -> None:
        """Forget what never arrived, now and then."""
        if now - self._swept_at < SWEEP_S:
            return
        self._swept_at = now
        while self._placed:
            passage, since = next(iter(self._placed.items()))
            if now - since <= LOST_S:
                break
            self.leave_place(passage)
        for tenant in list(self.sent):
            while (sent := self.sent[tenant]) and now - sent[0].at > LOST_S:
                self.note_over((sent.popleft(),))
            if not sent:
                del self.sent[tenant]

    def _tell_oldest(self, row: str) -> bool:
        """A frame's row tells of the oldest that it may have; False if there is none."""
        sent = self.sent.get(row)
        while sent:
            each = sent.popleft()
            if not each.told:
                each.told = True
                self.note_over((each,))
                return True
        return False

    # What is asked

    @property
    def draining(self) -> bool:
        """Whether all engines drain: unlike their numbers, that does not grow old when frames stop."""
        return bool(self.views) and all(view.draining for view in self.views.values())

    def account(self, tenant: str) -> str:
        """Whose account a tenant's requests are in: `OTHER` if some engine is out of accounts and none has its own."""
        views = self.views.values()
        shared = any(view.overflows for view in views) and not any(tenant in view.tenants for view in views)
        return OTHER if shared else tenant

    def enter(self, tenant: str, asked_class: str, now: float) -> Passage | Refusal:
        """Let a request through, or say why not.

        Args:
            tenant: who asks.
            asked_class: the class that was asked for, or empty.
            now: monotonic seconds.
        """
        class_, refusal = self.place(tenant, asked_class, now)
        if refusal is None:
            load = _load([view.row(tenant) for view in self._live(now)])
            account = self.account(tenant)
            count = load.queued + self.underway[account] + self.sent_of[account]
            if load.cap is not None and count >= load.cap:
                refusal = _too_many(f"tenant {account!r}", count, load)
        return refusal or Passage(self, tenant, asked_class, class_)

    def place(self, tenant: str, asked_class: str, now: float) -> tuple[str, Refusal | None]:
        """The class in which a request would wait, and why it may not, whoever its tenant is."""
        views = self._live(now)
        class_ = self._class_of(views, tenant, asked_class)
        if self.draining:
            return class_, DRAINS
        load = _load([view.classes.get(class_) for view in views])
        count = load.queued + self.underway_in[class_] + self.sent_in[class_]
        if load.cap is not None and count >= load.cap:
            return class_, _too_many(f"class {class_!r}", count, load)
        return class_, None

    def _live(self, now: float) -> list[View]:
        """The engines whose numbers count."""
        return [view for view in self.views.values() if now - view.heard_at <= STALE_S]

    def _class_of(self, views: list[View], tenant: str, asked: str) -> str:
        """The class in which the engine will queue it (`SteeringCore._group_of`), as far as the frames tell."""
        for view in views:
            row = view.row(tenant)
            if row is not None:
                wanted = asked if asked in row.classes and asked in view.classes else row.class_
                return wanted if wanted in view.classes else DEFAULT
        # A tenant that never came has no row: which classes it may ask for is not known here.
        return asked if any(asked in view.classes for view in views) else DEFAULT


def _load(rows: list[TenantSeen | None] | list[ClassSeen | None]) -> Load:
    """The sum over engines; a cap only where all that know the group have one."""
    known = [row for row in rows if row is not None]
    caps = [row.max_queued for row in known if row.max_queued is not None]
    return Load(
        sum(row.queued for row in known),
        max((row.oldest_queued_s for row in known), default=0.0),
        sum(caps) if caps and len(caps) == len(known) else None,
    )


def _too_many(who: str, count: int, load: Load) -> Refusal:
    # By Little's law a queue of `count`, of which the oldest has waited `oldest_s`, has room every oldest_s / count.
    least, most = RETRY_S
    retry_s = min(max(ceil(load.oldest_s / max(count, 1)), least), most)
    return Refusal(
        429,
        f"{who} has {count} requests waiting here, and at most {load.cap} may (max_queued): try again in {retry_s} s",
        retry_s,
    )

"""Single requests and caps: what a worker has, what the policy wants, and the commands in between. Pure.

Levels, not edges: a hold that a lost command did not put is put by the next step, one that nobody wants any more
is continued, also if an earlier leader put it. Batches are bounded; what does not fit goes out when these are
answered. Called by `core`, per live worker and step.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

from coxswain.control.fleet import RequestKey, WorkerView
from coxswain.control.policy import Cap, Group, Kv, Tables
from coxswain.control.told import ECHO_S, Told
from coxswain.schemas.commands import Targets
from coxswain.schemas.subjects import CONTROLLER

HOLD_LEASE_S: Final = 8.0
"""A hold that nobody renews ends after this, whatever became of us; longer than another leader takes to take over."""
RENEW_S: Final = 2.0
"""How often a hold's lease is renewed."""
MAX_TARGETS: Final = 1_000
"""Requests, tenants or classes in one command."""
MAX_COMMANDS: Final = 16
"""Commands of one verb to one worker in one step."""

Order = tuple[str, dict[str, Any]]
"""A verb, and the fields of its command beside the envelope."""


def prioritize(
    now: float,
    view: WorkerView,
    told: Told,
    priorities: Mapping[RequestKey, int],
    classes: Mapping[RequestKey, str],
) -> list[Order]:
    """`prioritize` for requests whose priority or class is other than wanted, the most urgent first."""
    differ: defaultdict[tuple[int, str | None], list[RequestKey]] = defaultdict(list)
    for key in [*priorities, *(key for key in classes if key not in priorities)]:
        row = view.request(key)
        if row is None:
            continue
        priority, class_, at = told.places.get(key, (0, "", float("-inf")))
        if now - at >= ECHO_S:
            priority, class_ = row.priority, row.class_
        wanted, into = priorities.get(key, priority), classes.get(key, class_)
        if (wanted, into) != (priority, class_):
            differ[wanted, into if into != class_ else None].append(key)
    orders: list[Order] = []
    for (priority, to), found in sorted(differ.items(), key=lambda each: each[0][0])[:MAX_COMMANDS]:
        keys = found[:MAX_TARGETS]
        for key in keys:
            told.places[key] = (priority, to or _class_of(now, view, told, key), now)
        orders.append(("prioritize", {"priority": priority, "class_": to, "targets": _requests(keys)}))
    _prune(told.places, view)
    return orders


def hold(now: float, view: WorkerView, told: Told, wanted: Mapping[RequestKey, Kv]) -> list[Order]:
    """`continue` for requests that we hold and should not, `preempt` for those that we should and for leases."""
    orders: list[Order] = []
    ended = [key for key in view.requests if key not in wanted and _held(now, view, told, key)][:MAX_TARGETS]
    if ended:
        told.holds.update((key, (None, now)) for key in ended)
        orders.append(("continue", {"targets": _requests(ended)}))
    begun: dict[Kv, list[RequestKey]] = {"keep": [], "drop": []}
    for key, kv in wanted.items():
        if key not in view.requests:
            continue
        said, at = told.holds.get(key, (None, float("-inf")))
        harder = kv == "drop" and said != "drop"
        if not _held(now, view, told, key) or harder or now - at > RENEW_S:
            begun[kv].append(key)
    for kv, keys in begun.items():
        if chosen := keys[:MAX_TARGETS]:
            told.holds.update((key, (kv, now)) for key in chosen)
            fields = {"kv": kv, "lease_s": HOLD_LEASE_S, "targets": _requests(chosen)}
            orders.append(("preempt", fields))
    _prune(told.holds, view)
    return orders


def limit(
    now: float, view: WorkerView, told: Told, wanted: Mapping[Group, Cap], tables: Tables
) -> list[Order]:
    """`limit` for tenants and classes whose caps by us are other than wanted."""
    unknown: Iterable[Group] = ()
    if told.inherited and view.complete:  # before, rows that show caps may be missing
        unknown, told.inherited = _capped(view, tables), False
    differ: defaultdict[Cap, list[Group]] = defaultdict(list)
    for group in dict.fromkeys([*wanted, *told.caps, *unknown]):
        cap = wanted.get(group, Cap())
        said, at = told.caps.get(group, (None, 0.0))
        if said != cap or (now - at > ECHO_S and _looser(view, group, cap)):
            differ[cap].append(group)
    orders: list[Order] = []
    for cap, groups in list(differ.items())[:MAX_COMMANDS]:
        chosen = groups[:MAX_TARGETS]
        for group in chosen:
            if cap == Cap():
                told.caps.pop(group, None)
            else:
                told.caps[group] = (cap, now)
        targets = Targets(
            tenants=tuple(name for kind, name in chosen if kind == "tenant"),
            classes=tuple(name for kind, name in chosen if kind == "class"),
        )
        fields = {field: getattr(cap, field) for field in cap.__struct_fields__}
        orders.append(("limit", {**fields, "targets": targets}))
    return orders


def _requests(keys: Iterable[RequestKey]) -> Targets:
    """All children of a request are one target."""
    return Targets(requests=tuple(dict.fromkeys(request for request, _ in keys)))


def _held(now: float, view: WorkerView, told: Told, key: RequestKey) -> bool:
    """Whether we hold it: as just told, else as its row says."""
    said, at = told.holds.get(key, (None, float("-inf")))
    return said is not None if now - at < ECHO_S else CONTROLLER in view.requests[key].held_by


def _class_of(now: float, view: WorkerView, told: Told, key: RequestKey) -> str:
    """The class that it is in: as just told, else as its row says."""
    _, class_, at = told.places.get(key, (0, "", float("-inf")))
    row = view.request(key)
    assert row is not None, "asked about requests that we know of only"
    return class_ if now - at < ECHO_S else row.class_


def _prune(told: dict[RequestKey, Any], view: WorkerView) -> None:
    """Forget requests that the worker lists no more."""
    if len(told) > 2 * (len(view.requests) + len(view.beyond)) + 64:
        for key in [key for key in told if view.request(key) is None]:
            del told[key]


def _capped(view: WorkerView, tables: Tables) -> list[Group]:
    """Who may have a cap of an earlier leader: every class, and tenants with other caps than their rows'."""
    groups: list[Group] = [("class", name) for name in view.classes]
    for name, row in view.tenants.items():
        policy = tables.tenants.get(name)
        expected = (policy.max_running, policy.max_queued) if policy else (None, None)
        if (row.max_running, row.max_queued) not in ((None, None), expected):
            groups.append(("tenant", name))
    return groups


def _looser(view: WorkerView, group: Group, cap: Cap) -> bool:
    """Whether the worker's row shows that the cap is not in force."""
    kind, name = group
    row = view.tenants.get(name) if kind == "tenant" else view.classes.get(name)
    return row is not None and any(
        mine is not None and (theirs is None or theirs > mine)
        for mine, theirs in ((cap.max_running, row.max_running), (cap.max_queued, row.max_queued))
    )

"""Single requests and caps: what a worker has, what the policy wants, and the commands in between. Pure.

Levels, not edges: a hold that a lost command did not put is put by the next step, one that nobody wants any more
is continued, also if an earlier leader put it. Batches are bounded; what does not fit goes out when these are
answered. A command means all children of a request, so what a policy wants of each child is made one wish first.
Called by `core`, per live worker and step.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from coxswain.control.fleet import RequestKey, WorkerView
from coxswain.control.policy import Cap, Group, Kv, Tables
from coxswain.control.told import ECHO_S, Told
from coxswain.control.vetting import Vetting
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

NEVER: Final = 0, "", float("-inf")
"""The priority and class, and when they were told, of a request that was told none."""

Order = tuple[str, dict[str, Any]]
"""A verb, and the fields of its command beside the envelope."""
Value = TypeVar("Value")


def prioritize(
    now: float,
    view: WorkerView,
    told: Told,
    priorities: Mapping[RequestKey, int],
    classes: Mapping[RequestKey, str],
    vetting: Vetting,
) -> list[Order]:
    """`prioritize` for requests whose priority or class is other than wanted, the most urgent first."""
    rows = {key: row for key in {**priorities, **classes} if (row := view.request(key)) is not None}
    urgent = _of_requests(rows, priorities, vetting.priority, min)
    into = _of_requests(rows, classes, vetting.class_, lambda first, _: first)
    differ: dict[str, tuple[int, str, bool]] = {}
    for (request, _), row in rows.items():
        priority, class_, at = told.places.get(request, NEVER)
        if now - at >= ECHO_S:
            priority, class_ = row.priority, row.class_
        wanted, to = urgent.get(request, priority), into.get(request, class_)
        if (wanted, to) != (priority, class_):
            differ.setdefault(request, (wanted, to, to != class_))
    alike: defaultdict[tuple[int, str | None], list[str]] = defaultdict(list)
    for request, (priority, to, moves) in differ.items():
        alike[priority, to if moves else None].append(request)
    orders: list[Order] = []
    for (priority, moved_to), found in sorted(alike.items(), key=lambda each: each[0][0])[:MAX_COMMANDS]:
        chosen = found[:MAX_TARGETS]
        for request in chosen:
            told.places[request] = (priority, differ[request][1], now)
        targets = Targets(requests=tuple(chosen))
        orders.append(("prioritize", {"priority": priority, "class_": moved_to, "targets": targets}))
    _prune(told.places, view)
    return orders


def hold(
    now: float, view: WorkerView, told: Told, wanted: Mapping[RequestKey, Kv], vetting: Vetting
) -> list[Order]:
    """`continue` for requests that we hold and should not, `preempt` for those that we should and for leases."""
    orders: list[Order] = []
    spared = (
        {row.request for row in view.known() if (row.request, row.child) not in wanted} if wanted else set()
    )
    keys = [key for key in wanted if key in view.requests and key[0] not in spared]
    kinds = _of_requests(keys, wanted, vetting.kv, lambda one, other: one if one == other else "keep")
    held = (key[0] for key in view.requests if key[0] not in kinds and _held(now, view, told, key))
    if ended := [*dict.fromkeys(held)][:MAX_TARGETS]:
        told.holds.update((request, (None, now)) for request in ended)
        orders.append(("continue", {"targets": Targets(requests=tuple(ended))}))
    begun: dict[Kv, dict[str, None]] = {"keep": {}, "drop": {}}
    for key in keys:
        request = key[0]
        if (kv := kinds.get(request)) is None:
            continue
        said, at = told.holds.get(request, (None, float("-inf")))
        harder = kv == "drop" and said != "drop"
        if not _held(now, view, told, key) or harder or now - at > RENEW_S:
            begun[kv][request] = None
    for kv, requests in begun.items():
        if chosen := [*requests][:MAX_TARGETS]:
            told.holds.update((request, (kv, now)) for request in chosen)
            targets = Targets(requests=tuple(chosen))
            orders.append(("preempt", {"kv": kv, "lease_s": HOLD_LEASE_S, "targets": targets}))
    _prune(told.holds, view)
    return orders


def limit(
    now: float, view: WorkerView, told: Told, wanted: Mapping[Group, Cap], tables: Tables, vetting: Vetting
) -> list[Order]:
    """`limit` for tenants and classes whose caps by us are other than wanted."""
    unknown: Iterable[Group] = ()
    if told.inherited and view.complete:  # before, rows that show caps may be missing
        unknown, told.inherited = _capped(view, tables), False
    differ: defaultdict[Cap, list[Group]] = defaultdict(list)
    for group in dict.fromkeys([*wanted, *told.caps, *unknown]):
        if view.complete and group[0] == "class" and group[1] not in view.classes:
            if group in told.caps:  # should the class come back, what was told of it is in force again
                told.caps[group] = (None, 0.0)
            continue
        cap = wanted.get(group, Cap())
        said, at = told.caps.get(group, (None, 0.0))
        stands = said == cap and (now - at <= ECHO_S or not _looser(view, group, cap))
        if not stands and (taken := vetting.cap(group, cap)) is not None:
            differ[taken].append(group)
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


def _of_requests(
    keys: Iterable[RequestKey],
    wanted: Mapping[RequestKey, Value],
    take: Callable[[str, Value], Value | None],
    reduce: Callable[[Value, Value], Value],
) -> dict[str, Value]:
    """What is wanted of each request, made of what is wanted of its children: a command means all of them."""
    found: dict[str, Value] = {}
    for key in keys:
        request = key[0]
        if key in wanted and (value := take(request, wanted[key])) is not None:
            found[request] = reduce(found[request], value) if request in found else value
    return found


def _held(now: float, view: WorkerView, told: Told, key: RequestKey) -> bool:
    """Whether we hold it: as just told, else as its row says."""
    said, at = told.holds.get(key[0], (None, float("-inf")))
    return said is not None if now - at < ECHO_S else CONTROLLER in view.requests[key].held_by


def _prune(told: dict[str, Any], view: WorkerView) -> None:
    """Forget requests that the worker lists no more."""
    if len(told) > 2 * (len(view.requests) + len(view.beyond)) + 64:
        known = {row.request for row in view.known()}
        for request in [request for request in told if request not in known]:
            del told[request]


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

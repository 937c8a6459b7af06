"""Commands applied to the core: checks that need state, targets resolved, outcomes counted. Pure.

`Commands.apply` is the only way in. A refusal changes nothing but the newest epoch seen; a failing target is
unchanged; the same id within its horizon is applied once and answered again.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Final

from msgspec import UNSET

from coxswain.schemas import commands as c
from coxswain.schemas import events as ev
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.names import OTHER, RESERVED
from coxswain.schemas.status import CommandStats
from coxswain.schemas.subjects import CONTROLLER, ENGINE, OPERATOR
from coxswain.service.scheduler.answered import Answered
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.groups import NO_CAPS, Caps
from coxswain.service.scheduler.limits import Target
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import HELD_KEPT, QUEUED, RUNNING
from coxswain.service.scheduler.tenants import MAX_TENANTS

Outcome = tuple[c.Outcome, str, int]
"""(outcome, detail, tokens in flight) of one target."""

Results = list[tuple[Record | str, Outcome]]
"""What became of each target: a request that is here, or the name of what was not found."""
FAILED: Final = ("not_found", "not_possible")
NO_ACCOUNT: Final[Outcome] = (
    "not_possible", f"a worker keeps {MAX_TENANTS:,} tenants: later ones share `{OTHER}`", 0
)  # fmt: skip


class Commands:
    """Applies commands to one core and remembers what it answered.

    Args:
        core: the state they change.
        worker: this worker's name, for replies.
        incarnation: this worker's incarnation, for replies and `rank`.
    """

    def __init__(self, core: SteeringCore, worker: str, incarnation: str) -> None:
        self.core = core
        self.worker = worker
        self.incarnation = incarnation
        self._outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Per verb, how many ended so: `applied`, `partial`, or the refusal's code."""
        self._answered = Answered()
        self._verbs: dict[str, Callable[[float, str, c.Command], Results]] = {
            "prioritize": self._prioritize,
            "preempt": self._preempt,
            "continue": self._continue,
            "abort": self._abort,
            "rank": self._rank,
            "configure": self._configure,
            "limit": self._limit,
            "drain": self._drain,
        }

    def apply(
        self, now: float, role: str, verb: str, command: c.Command, ignored: tuple[str, ...] = ()
    ) -> c.Reply:
        """Apply a command now; the reply says what became of it. Never raises for what a command contains."""
        try:
            remembered = self._answered.find(now, role, verb, command)
            if remembered is not None:
                return remembered
            self._check(now, role, verb, command)
            results = self._verbs[verb](now, role, command)
        except RefusedError as refusal:
            return self._refused(now, role, verb, command, refusal, ignored)
        reply = self._reply(now, command, results, ignored)
        self._outcomes[verb][reply.outcome] += 1
        self._answered.keep(now, role, verb, command, reply)
        self.core.roster.changed = True
        # A rank comes many times a second: the log of commands is for what people and programs decide.
        if verb != "rank":
            self.core.tell(
                now, None, ev.CommandSeen, command=command.id, verb=verb, role=role, issuer=command.issuer,
                outcome=reply.outcome, counts=reply.counts, reason=getattr(command, "reason", ""),
            )  # fmt: skip
        return reply

    def failed(self, now: float, command: c.Command) -> c.Reply:
        """The answer to a command that this worker broke on."""
        text = "this worker failed while applying it, perhaps half way: see its log, and query the request"
        return self._rejection(now, command, RefusedError(Code.NOT_POSSIBLE, text), ())

    def stats(self, queue_depth: int) -> CommandStats:
        """What became of commands so far, and how many wait."""
        total = sum(self._outcomes.values(), Counter[str]())
        return CommandStats(
            applied_total=total.pop("applied", 0) + total.pop("partial", 0), rejected_total=dict(total),
            outcomes_total={verb: dict(counts) for verb, counts in self._outcomes.items()}, queue_depth=queue_depth,
        )  # fmt: skip

    # Checks

    def _check(self, now: float, role: str, verb: str, command: c.Command) -> None:
        if command.expires_at is not None and command.expires_at < now:
            late = now - command.expires_at
            raise RefusedError(
                Code.EXPIRED, f"expired {late:.3f} s ago by this worker's clock: send it again"
            )
        if role == CONTROLLER:
            self._check_epoch(now, command)
        if verb == "rank" and isinstance(command, c.Rank) and command.incarnation != self.incarnation:
            raise RefusedError(
                Code.STALE,
                f"rank is for incarnation {command.incarnation}, this is {self.incarnation}: read its status again",
            )

    def _check_epoch(self, now: float, command: c.Command) -> None:
        core = self.core
        if command.epoch is None:
            raise RefusedError(Code.MALFORMED, "a controller's command needs `epoch`")
        if core.epoch is None:
            raise RefusedError(Code.STALE, "this worker has not heard a leader yet: publish `lead` first")
        if command.epoch < core.epoch:
            raise RefusedError(
                Code.STALE,
                f"epoch {list(command.epoch)} is older than {list(core.epoch)}: another controller leads",
            )
        core.obeyed(now, command.epoch)

    # Targets

    def _resolve(self, targets: c.Targets) -> tuple[list[Record], Results]:
        """The union of what the targets mean now, in order of arrival at this list, and what was not found."""
        core = self.core
        found: dict[Record, None] = {}
        missing: Results = []
        for name in targets.requests:
            family = core.roster.families.find(name)
            for record in family:
                found[record] = None
            if not family:
                missing.append((name, ("not_found", "no such request: finished, aborted, or never here", 0)))
        unknown = (name for name in targets.classes if name not in core.classes)
        missing.extend((name, ("not_found", "no such class", 0)) for name in unknown)
        if targets.all:
            found.update(dict.fromkeys(core.roster.records.values()))
        elif targets.tenants or targets.classes:
            tenants, classes = set(targets.tenants), set(targets.classes)
            for record in core.roster.records.values():
                if record.account.name in tenants or record.class_ in classes:
                    found[record] = None
        return list(found), missing

    def _each(
        self,
        command: c.Targeted,
        act: Callable[[Record], Outcome],
    ) -> Results:
        records, results = self._resolve(command.targets)
        results.extend((record, act(record)) for record in records)
        failed = [outcome for _, outcome in results if outcome[0] in FAILED]
        if failed and len(failed) == len(results):
            code = Code.NOT_FOUND if all(kind == "not_found" for kind, _, _ in failed) else Code.NOT_POSSIBLE
            names = ", ".join(
                target if isinstance(target, str) else target.request for target, _ in results[:3]
            )
            detail = next((text for kind, text, _ in failed if kind == "not_possible"), failed[0][1])
            more = f" and {len(results) - 3} more" if len(results) > 3 else ""
            raise RefusedError(code, f"{detail} ({names}{more})")
        return results

    # Verbs

    def _prioritize(self, now: float, role: str, command: c.Command) -> Results:
        assert isinstance(command, c.Prioritize)
        if command.priority is None and command.class_ is None:
            raise RefusedError(Code.MALFORMED, "prioritize needs `priority`, `class` or both")
        if command.class_ is not None and command.class_ not in self.core.classes:
            raise RefusedError(Code.NOT_FOUND, f"no class {command.class_!r}: known are {self._classes()}")

        def act(record: Record) -> Outcome:
            done = self.core.reprioritize(now, record, command.priority, command.class_, role)
            return "applied" if done else "unchanged", "", 0

        return self._each(command, act)

    def _preempt(self, now: float, role: str, command: c.Command) -> Results:
        assert isinstance(command, c.Preempt)
        if role == CONTROLLER and command.lease_s is None:
            raise RefusedError(Code.MALFORMED, "a controller's preempt needs `lease_s`")
        if by := sorted(self.core.drain.roles):
            raise RefusedError(
                Code.CLOSING,
                f"this worker is draining ({', '.join(by)}): nothing is held here until `drain` is off",
            )
        lease_until = None if command.lease_s is None else now + command.lease_s
        core = self.core

        def act(record: Record) -> Outcome:
            if record.state in (QUEUED, RUNNING, HELD_KEPT):
                obstacle = core.engine.obstacle(record, command.kv)
                if obstacle:
                    return "not_possible", obstacle, 0
            in_flight = core.engine.in_flight(record)
            done = core.holds.hold(now, record, role, command.kv, lease_until, command.issuer)
            return "applied" if done else "unchanged", "", in_flight

        return self._each(command, act)

    def _continue(self, now: float, role: str, command: c.Command) -> Results:
        assert isinstance(command, c.Continue)

        def act(record: Record) -> Outcome:
            roles = list(record.holds) if role == OPERATOR else [role]
            done = self.core.holds.release(now, record, roles, role, "command")
            if not done:
                return "unchanged", "not held" if not record.holds else f"not held by {role}", 0
            if record.holds.keys() == {ENGINE}:
                return "applied", "goes on as soon as there is room", 0
            if record.holds:
                return "applied", f"still held by {', '.join(record.holds)}", 0
            return "applied", "", 0

        return self._each(command, act)

    def _abort(self, _now: float, _role: str, command: c.Command) -> Results:
        assert isinstance(command, c.Abort)
        doomed: list[Record] = []

        def act(record: Record) -> Outcome:
            doomed.append(record)
            return "applied", "", 0

        results = self._each(command, act)
        self.core.engine.abort(doomed)
        return results

    def _rank(self, _now: float, _role: str, command: c.Command) -> Results:
        assert isinstance(command, c.Rank)
        core = self.core
        if command.prices is not None and command.prices != core.tenants.prices:
            core.ledger.settle_all()
            core.tenants.prices = command.prices
        results: Results = []
        for name, rank in command.tenants.items():
            if core.tenants.room_for(name):
                core.rank(name, rank)
            else:  # the ranks of those that are here count all the same
                results.append((name, NO_ACCOUNT))
        return results

    def _configure(self, _now: float, _role: str, command: c.Command) -> Results:
        assert isinstance(command, c.Configure)
        if reserved := sorted(RESERVED & command.classes.keys()):
            raise RefusedError(Code.MALFORMED, f"class name {reserved[0]!r} is reserved: choose another")
        for name, row in command.tenants.items():
            if problem := row.problem():
                raise RefusedError(Code.MALFORMED, f"tenant {name!r}: {problem}")
        self.core.configure(command.classes, command.tenants)
        return []

    def _limit(self, now: float, role: str, command: c.Command) -> Results:
        assert isinstance(command, c.Limit)
        targets = command.targets
        if targets.requests or targets.all:
            raise RefusedError(
                Code.MALFORMED, "limit is about tenants and classes: name those, not `requests` or `all`"
            )
        fields = Caps._fields
        news = {field: getattr(command, field) for field in fields}
        if all(value is UNSET for value in news.values()):
            raise RefusedError(
                Code.MALFORMED, f"limit needs at least one of {', '.join(fields)}; null lifts one"
            )
        known = [Target("class", name) for name in targets.classes if name in self.core.classes]
        known += [Target("tenant", name) for name in targets.tenants]
        missing = [name for name in targets.classes if name not in self.core.classes]
        if missing and not known:
            raise RefusedError(Code.NOT_FOUND, f"no class {missing[0]!r}: known are {self._classes()}")
        caps = {
            target: Caps(
                *(
                    old if news[field] is UNSET else news[field]
                    for field, old in zip(fields, before, strict=True)
                )
            )
            for target in known
            for before in (self.core.limits.stored(role, target),)
        }
        if obstacle := self.core.limits.obstacle(
            role, [target for target in known if caps[target] != NO_CAPS]
        ):
            raise RefusedError(Code.TOO_LARGE, obstacle)
        results: Results = [(name, ("not_found", "no such class", 0)) for name in missing]
        for target, asked in caps.items():
            if asked != NO_CAPS and target.kind == "tenant" and not self.core.tenants.room_for(target.name):
                results.append((target.name, NO_ACCOUNT))
                continue
            done = self.core.limits.limit(now, role, target, asked)
            results.append((target.name, ("applied" if done else "unchanged", str(target), 0)))
        if results and all(outcome[0] in FAILED for _, outcome in results):
            raise RefusedError(Code.TOO_LARGE, NO_ACCOUNT[1])
        return results

    def _drain(self, now: float, role: str, command: c.Command) -> Results:
        assert isinstance(command, c.Drain)
        if command.on:
            return [(record, ("applied", "", 0)) for record in self.core.drain.begin(now, role)]
        self.core.drain.end(role)
        return []

    def _classes(self) -> str:
        return ", ".join(sorted(self.core.classes))

    # Replies

    def _reply(
        self,
        now: float,
        command: c.Command,
        results: Results,
        ignored: tuple[str, ...],
    ) -> c.Reply:
        counts: dict[str, int] = {}
        told = []
        for target, (outcome, detail, in_flight) in results:
            counts[outcome] = counts.get(outcome, 0) + 1
            if outcome != "applied" or detail or in_flight:
                named = (target, None) if isinstance(target, str) else (target.request, target.child)
                told.append(
                    c.TargetResult(
                        request=named[0],
                        child=named[1],
                        outcome=outcome,
                        detail=detail,
                        in_flight_tokens=in_flight,
                    ),
                )
        failing = sum(counts.get(kind, 0) for kind in FAILED)
        return c.Reply(
            id=command.id, worker=self.worker, incarnation=self.incarnation, worker_now=now,
            step=self.core.step + 1, outcome="partial" if failing else "applied", counts=counts, ignored=ignored,
            results=tuple(told[: c.MAX_RESULTS]), results_omitted=max(0, len(told) - c.MAX_RESULTS),
        )  # fmt: skip

    def _refused(
        self,
        now: float,
        role: str,
        verb: str,
        command: c.Command,
        refusal: RefusedError,
        ignored: tuple[str, ...],
    ) -> c.Reply:
        self._outcomes[verb][str(int(refusal.code))] += 1
        self.core.roster.changed = True
        if verb != "rank":
            self.core.tell(
                now, None, ev.CommandSeen, command=command.id, verb=verb, role=role, issuer=command.issuer,
                outcome="rejected", code=int(refusal.code), error=refusal.message,
                reason=getattr(command, "reason", ""),
            )  # fmt: skip
        return self._rejection(now, command, refusal, ignored)

    def _rejection(
        self, now: float, command: c.Command, refusal: RefusedError, ignored: tuple[str, ...]
    ) -> c.Reply:
        return c.Reply(
            id=command.id, worker=self.worker, incarnation=self.incarnation, worker_now=now,
            step=self.core.step + 1, outcome="rejected", ignored=ignored, code=int(refusal.code), error=refusal.message,
        )  # fmt: skip

"""What frames show to have happened: to workers, to the leader, to requests. Pure; called by `overview.py`.

A frame says how things are, not what was done; what was done is read from two of them. What came and went between
two frames is not seen: the event log has it (`cox explain`).
"""

from collections import Counter, deque
from typing import Final

from coxswain.control.fleet import Fleet, RequestKey, WorkerView
from coxswain.control.view.picture import Happening, Weight
from coxswain.schemas.errors import Code
from coxswain.schemas.policy import Epoch
from coxswain.schemas.status import Frame, RequestStatus, StoryLine

MAX_HAPPENINGS: Final = 500
MAX_TRAILS: Final = 16_384
"""Requests whose changes are remembered; the oldest are forgotten first."""
MAX_TRAIL: Final = 64
"""Changes remembered of one."""
TOGETHER_S: Final = 10.0
"""What a role does to requests of one worker, again and again, is one line for so long."""

NOT_HERE: Final = str(int(Code.NOT_FOUND))
"""No happening: of a command to all that names a request, every worker but one answers so."""

Trail = list[StoryLine]


class Chronicle:
    """Happenings of a fleet, and the trail of each request, from frame to frame."""

    def __init__(self) -> None:
        self.happenings: deque[Happening] = deque(maxlen=MAX_HAPPENINGS)
        self._trails: dict[tuple[str, RequestKey], Trail] = {}
        self._liveness: dict[str, str] = {}
        self._epoch: Epoch | None = None
        self._rivals: dict[str, str] = {}
        self._done: dict[tuple[str, str], tuple[float, int, Happening]] = {}
        """What a role does to requests of a worker: since when, how many, and the line that says so."""

    def trail(self, worker: str, key: RequestKey) -> tuple[StoryLine, ...]:
        """What frames told of a request so far."""
        return tuple(self._trails.get((worker, key), ()))

    def before(self, fleet: Fleet, frame: Frame, now: float) -> None:
        """Look at a frame before the fleet merges it."""
        view = fleet.workers.get(frame.worker)
        if view is None or view.incarnation != frame.incarnation:
            if view is not None and frame.incarnation > view.incarnation:
                self._say(now, frame.worker, "restarted: a new incarnation", "warning")
            view = None
        elif frame.seq < view.frame.seq:
            return
        else:
            self._compare(now, view.frame, frame)
        self._changes(now, view, frame)

    def after(self, fleet: Fleet, now: float) -> None:
        """Look at the fleet as time passes: who fell silent, who is back."""
        for worker, view in fleet.workers.items():
            liveness, old = fleet.liveness(view), self._liveness.get(worker)
            if liveness == old:
                continue
            self._liveness[worker] = liveness
            if liveness != "live":
                words = "silent" if liveness == "stale" else "gone: silent for half a minute"
                self._say(now, worker, words, "warning")
            else:
                slots = f"{view.frame.slots.active} of {view.frame.slots.total} slots"
                words = "back" if old else f"joined: {view.frame.model}, {slots}"
                self._say(now, worker, words)
        for worker, incarnation in fleet.rivals.items():
            if self._rivals.get(worker) != incarnation:
                self._rivals[worker] = incarnation
                self._say(
                    now, worker, "a second process uses this name: give each its own COX_WORKER", "warning"
                )

    def _say(self, at: float, worker: str, text: str, weight: Weight = "news") -> None:
        self.happenings.append(Happening(at=at, worker=worker, text=text, weight=weight))

    def _compare(self, now: float, old: Frame, new: Frame) -> None:
        worker = new.worker
        if new.state != old.state:
            self._say(
                now, worker, f"{old.state} → {new.state}", "news" if new.state == "serving" else "warning"
            )
        if new.config != old.config:
            self._say(now, worker, f"tables {old.config[:8]} → {new.config[:8]}")
        for code, count in new.commands.rejected_total.items():
            if code == NOT_HERE:
                continue
            if (more := count - old.commands.rejected_total.get(code, 0)) > 0:
                self._say(now, worker, f"refused {_commands(more)} ({code})", "warning")
        if (more := new.events_dropped_total - old.events_dropped_total) > 0:
            self._say(now, worker, f"dropped {more} events", "warning")
        epoch = new.leader.epoch
        if epoch is not None and (self._epoch is None or epoch > self._epoch):
            first, self._epoch = self._epoch is None, epoch
            if not first or old.leader.epoch is None:
                policy = f" with {new.leader.policy}" if new.leader.policy else ""
                self._say(now, worker, f"obeys a new leader{policy}, epoch {epoch[1]}")

    def _changes(self, now: float, view: WorkerView | None, frame: Frame) -> None:
        """Write the trails of the requests in a frame; what roles did to many at once is one happening."""
        done: Counter[str] = Counter()
        for row in frame.requests:
            key = (row.request, row.child)
            old = view.requests.get(key) if view is not None else None
            if old is row:
                continue
            words = _changed(old, row)
            if not words:
                continue
            trail = self._trails.get((frame.worker, key))
            if trail is None:
                if len(self._trails) >= MAX_TRAILS:
                    del self._trails[next(iter(self._trails))]
                trail = self._trails[frame.worker, key] = []
            if len(trail) < MAX_TRAIL:
                trail += [
                    StoryLine(at=frame.sent_at, step=frame.step, kind=kind, detail=detail)
                    for kind, detail in words
                ]
            if old is not None:
                done.update(_by_hand(old, row))
        for what, count in sorted(done.items()):
            self._sum_up(now, frame.worker, what, count)

    def _sum_up(self, now: float, worker: str, what: str, count: int) -> None:
        """A policy may hold many times a second: that is one line, which grows, so that others are seen beside it."""
        began = now
        if (
            (last := self._done.get((worker, what)))
            and now - last[0] < TOGETHER_S
            and last[2] in self.happenings
        ):
            began = last[0]
            count += last[1]
            self.happenings.remove(last[2])
        within = f" within {now - began:.0f} s" if now - began >= 1 else ""
        self._say(now, worker, f"{count} {'request' if count == 1 else 'requests'} {what}{within}")
        self._done[worker, what] = began, count, self.happenings[-1]


def _commands(count: int) -> str:
    return "a command" if count == 1 else f"{count} commands"


def _changed(old: RequestStatus | None, new: RequestStatus) -> list[tuple[str, str]]:
    """What is another than it was, as (kind, detail); kinds are those of events where there is one."""
    held = f"kv={new.kv} by={'+'.join(new.held_by)}"
    if old is None:
        detail = held if new.state == "held" else f"prompt_tokens={new.prompt_tokens}"
        return [(new.state, detail)]
    words = []
    if old.state != new.state:
        if old.state == "held":
            words.append(("continued", f"by={'+'.join(old.held_by)}"))
        if new.state == "held":
            words.append(("held", held))
        elif new.state == "running" and old.state == "queued":
            words.append(("admitted", f"cached_tokens={new.cached_tokens}"))
        elif new.state == "queued" and old.state == "running":
            words.append(("preempted", ""))
    elif new.state == "held" and (old.kv, old.held_by) != (new.kv, new.held_by):
        words.append(("held", held))
    if (old.priority, old.class_) != (new.priority, new.class_):
        detail = f"priority {old.priority} → {new.priority}, class {old.class_} → {new.class_}"
        words.append(("reprioritized", detail))
    if new.output_tokens and not old.output_tokens:
        words.append(("first_token", f"output_tokens={new.output_tokens}"))
    return words


def _by_hand(old: RequestStatus, new: RequestStatus) -> list[str]:
    """What somebody outside the engine did."""
    done = []
    came = [role for role in new.held_by if role not in old.held_by and role != "engine"]
    went = [role for role in old.held_by if role not in new.held_by and role != "engine"]
    done += [f"held by {role}" for role in came]
    done += [f"continued (held by {role})" for role in went]
    if (old.priority, old.class_) != (new.priority, new.class_):
        done.append("reprioritized")
    return done

"""A worker without an engine: it answers over a real NATS, from a plain list of requests.

For tests of what stands outside the engine (the command line, dashboards). Its loop runs in its own thread,
so that the program under test may have its own. The real worker is tested elsewhere.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

import msgspec
import nats
from nats.aio.msg import Msg

from coxswain import __version__
from coxswain.schemas import commands as c
from coxswain.schemas import status as st
from coxswain.schemas.errors import CODE_HEADER, ERROR_HEADER, Code, RefusedError
from coxswain.schemas.events import Event
from coxswain.schemas.policy import Prices
from coxswain.schemas.subjects import Subjects

INCARNATION = "01JD0000000000000000000000"


def request(
    name: str, *, tenant: str = "acme", state: st.RequestState = "running", **fields: Any
) -> st.RequestStatus:
    """A request as status shows it; anything not named has a plain value."""
    plain: dict[str, Any] = {
        "child": 0, "class_": "default", "priority": 0, "kv": "kept" if state == "held" else "none",
        "arrived_at": time.time() - 2, "prompt_tokens": 100, "cached_tokens": 0, "output_tokens": 7,
        "deadline_s": None,
    }  # fmt: skip
    return st.RequestStatus(**{**plain, "request": name, "tenant": tenant, "state": state, **fields})


class FakeWorker:
    """Use as a context manager; `requests` is what it has, `seen` the commands that reached it.

    Args:
        url: of the NATS server.
        name: the worker's name.
        requests: what it has.
        refuse: if set, every command is refused with this.
        ahead_s: how far its clock is ahead of the real one.
        fields: of its status frame, where they should differ from plain ones.
    """

    def __init__(
        self,
        url: str,
        name: str = "w1",
        requests: Iterable[st.RequestStatus] = (),
        *,
        refuse: RefusedError | None = None,
        ahead_s: float = 0.0,
        **fields: Any,
    ) -> None:
        self.name = name
        self.requests = list(requests)
        self.refuse = refuse
        self.ahead_s = ahead_s
        self.fields = fields
        self.scheduler: dict[str, Any] = {
            "max_num_seqs": 20,
            "max_num_active_seqs": 16,
            "coxswain": __version__,
        }
        self.seen: list[tuple[str, str, c.Command]] = []
        self._url = url
        self._subjects = Subjects("main")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        self._await(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._await(self._nc.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def tell(self, event: Event, kind: str) -> None:
        """Publish an event and wait until the server has it."""
        self._await(self._nc.publish(self._subjects.event(self.name, kind), msgspec.json.encode(event)))
        self._await(self._nc.flush())

    def frame(self) -> st.Frame:
        """A full status frame of what it has."""
        states = [each.state for each in self.requests]
        running, held = states.count("running"), states.count("held")
        plain: dict[str, Any] = {
            "worker": self.name, "incarnation": INCARNATION, "seq": 1, "full": True, "part": 0, "parts": 1,
            "sent_at": time.time() + self.ahead_s, "step": 812, "model": "org/tiny-llama", "vllm_version": "0.32.0",
            "state": "serving", "slots": st.Slots(active=16, total=20, running=running, held=held),
            "kv_blocks": st.KvBlocks(total=1000, used=710, held=90), "step_s": 0.0384,
            "queued": states.count("queued"), "running": running, "held": held,
            "preempted_total": 0, "recomputed_tokens_total": 0, "commands": st.CommandStats(),
            "leader": st.Leader(epoch=(1.0, 7), age_s=0.4, policy="vtc"), "config": "0" * 16,
            "events_dropped_total": 0, "requests": tuple(self.requests),
        }  # fmt: skip
        return st.Frame(**{**plain, **self.fields})

    async def _open(self) -> None:
        self._nc = await nats.connect(self._url)
        for subject in self._subjects.commands_of(self.name):
            await self._nc.subscribe(subject, cb=self._on_command)
        for subject in self._subjects.queries_of(self.name):
            await self._nc.subscribe(subject, cb=self._on_query)
        await self._nc.flush()

    def _await(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _on_command(self, message: Msg) -> None:
        _, verb = self._subjects.parse_command(message.subject)[1:]
        role = self._subjects.parse_command(message.subject).role
        try:
            command, ignored = c.decode(verb, message.data)
            self.seen.append((role, verb, command))
            reply = self._apply(verb, command, ignored)
            await message.respond(c.encode(reply))
        except RefusedError as error:
            reply = self._reply(command.id, outcome="rejected", code=int(error.code), error=error.message)
            await self._refuse(message, error, c.encode(reply))

    async def _refuse(self, message: Msg, error: RefusedError, payload: bytes = b"") -> None:
        headers = {CODE_HEADER: str(int(error.code)), ERROR_HEADER: error.message}
        await self._nc.publish(message.reply, payload, headers=headers)

    def _apply(self, verb: str, command: c.Command, ignored: tuple[str, ...]) -> c.Reply:
        if self.refuse is not None:
            raise self.refuse
        if not isinstance(command, c.Targeted):
            return self._reply(command.id, ignored=ignored)  # a real one counts requests only, too
        missing = [
            name for name in command.targets.requests if name not in {each.request for each in self.requests}
        ]
        met = [each for each in self.requests if _meant(command.targets, each)]
        if missing and not met:
            raise RefusedError(
                Code.NOT_FOUND, f"no such request: finished, aborted, or never here ({missing[0]})"
            )
        change = _CHANGES.get(verb, lambda each, _: each)
        self.requests = [change(each, command) if each in met else each for each in self.requests]
        results = [c.TargetResult(request=name, outcome="not_found") for name in missing]
        results += [
            c.TargetResult(request=each.request, outcome="applied", in_flight_tokens=1)
            for each in met
            if each.state == "running"
        ]
        counts = {"applied": len(met)} | ({"not_found": len(missing)} if missing else {})
        outcome = "partial" if missing else "applied"
        return self._reply(
            command.id, outcome=outcome, counts=counts, results=tuple(results), ignored=ignored
        )

    def _reply(self, command_id: str, **fields: Any) -> c.Reply:
        now = time.time() + self.ahead_s
        plain = {
            "worker": self.name,
            "incarnation": INCARNATION,
            "worker_now": now,
            "step": 812,
            "outcome": "applied",
        }
        return c.Reply(**{**plain, "id": command_id, **fields})

    async def _on_query(self, message: Msg) -> None:
        try:
            answer = self._answer(message.subject.rpartition(".")[2], message.data)
            await message.respond(c.encode(answer))
        except RefusedError as error:
            await self._refuse(message, error)

    def _answer(self, what: str, payload: bytes) -> Any:
        if what == "status":
            return self.frame()
        if what == "config":
            return st.Config(
                worker=self.name, incarnation=INCARNATION, digest="0" * 16, classes={}, tenants={}, prices=Prices(),
                leader=st.Leader(), vllm_version="0.32.0", scheduler=self.scheduler,
            )  # fmt: skip
        if what == "queue":
            return self._page(msgspec.json.decode(payload or b"{}", type=st.QueueQuery))
        query = msgspec.json.decode(payload, type=st.RequestQuery)
        found = [each for each in self.requests if each.request == query.request]
        if not found:
            raise RefusedError(Code.NOT_FOUND, f"no request {query.request} here")
        story = (
            st.StoryLine(at=found[0].arrived_at, step=790, kind="queued", detail="100 prompt tokens"),
            st.StoryLine(at=found[0].arrived_at + 0.5, step=801, kind="admitted"),
        )
        return st.RequestReport(
            request=query.request, children=tuple(st.Child(status=each, story=story) for each in found)
        )

    def _page(self, query: st.QueueQuery) -> st.QueuePage:
        queue = [each for each in self.requests if each.state == "queued"]
        names = [each.request for each in queue]
        first = names.index(query.after) + 1 if query.after else 0
        last = first + query.limit
        rows = [
            msgspec.structs.replace(each, position=first + place)
            for place, each in enumerate(queue[first:last])
        ]
        more = names[last - 1] if last < len(names) else None
        return st.QueuePage(requests=tuple(rows), next=more, total=len(queue))


def _meant(targets: c.Targets, each: st.RequestStatus) -> bool:
    return (
        targets.all
        or each.request in targets.requests
        or each.tenant in targets.tenants
        or each.class_ in targets.classes
    )


def _hold(each: st.RequestStatus, command: Any) -> st.RequestStatus:
    kv = "kept" if command.kv == "keep" else "dropped"
    return msgspec.structs.replace(each, state="held", kv=kv, held_by=("operator",))


def _continue(each: st.RequestStatus, _: Any) -> st.RequestStatus:
    return (
        msgspec.structs.replace(each, state="running", kv="none", held_by=())
        if each.state == "held"
        else each
    )


_CHANGES: dict[str, Callable[[st.RequestStatus, Any], st.RequestStatus]] = {
    "preempt": _hold,
    "continue": _continue,
}

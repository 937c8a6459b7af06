"""Act 2, hold and continue: a request is stopped in mid-sentence by a plain NATS message, and goes on later.

The same prompt runs twice in the same surroundings, once undisturbed; what is claimed is measured from the
worker's events and the client's stream. Called by `__init__`.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec
import nats.errors
from rich.table import Table
from rich.text import Text

from coxswain.control.demo.load import BUSY, FLOOD, POLITE, Ask, Sizes, asks
from coxswain.control.demo.processes import DemoError, first_error
from coxswain.control.demo.report import Hold
from coxswain.control.demo.screen import View
from coxswain.control.demo.stack import SETTLE_S, WORKER, Scene, new_id
from coxswain.control.demo.streams import Stream
from coxswain.schemas.commands import decode_reply
from coxswain.schemas.events import Continued, Finished, Held
from coxswain.schemas.subjects import OPERATOR

PROMPT: Final = " one long story of the sea and the ship"
TOKENS: Final = 120
HOLD_AFTER: Final = 40
"""Tokens that the client has when the hold is published: mid-sentence."""
HOLD_S: Final = 3.0
NEIGHBOURS: Final = (FLOOD.tenant, BUSY.tenant)
NEIGHBOUR_SIZES: Final = Sizes((16, 32), (80, 120))
SHOWN_CHARS: Final = 38
"""Of a text's end: the table fits 80 columns."""


@dataclass
class Neighbours:
    """Other requests that run all the time, one per neighbour."""

    streams: dict[str, list[Stream]] = field(default_factory=dict)
    leaving: bool = False

    def tokens(self) -> int:
        """What they received so far."""
        return sum(stream.tokens for streams in self.streams.values() for stream in streams)

    async def keep_running(self, scene: Scene, tenant: str, seed: int) -> None:
        """One request after another until `leaving`."""
        mine = self.streams.setdefault(tenant, [])
        for ask in asks(tenant, NEIGHBOUR_SIZES, seed):
            if self.leaving:
                return
            mine.append(Stream(tenant, ask))
            await scene.endpoint.run(mine[-1])


class Disturbed(NamedTuple):
    """What happened to the request that was held."""

    stream: Stream
    published_s: float
    """Command published to reply received."""
    continue_at: float
    """Monotonic s, before `continue` was published."""
    tokens_then: int
    """What its client had at that moment."""
    others: int
    """Tokens that the neighbours received during the hold."""


async def play(scene: Scene) -> tuple[Hold, int]:
    """Run the act.

    Returns:
        What the report says, and how many tokens the others received during the hold.

    Raises:
        DemoError: something failed.
    """
    with first_error():
        reference = await _undisturbed(scene)
        disturbed = await _held(scene)
    await scene.idle()
    stream = disturbed.stream
    held = await scene.watch.event(Held, stream.request)
    continued = await scene.watch.event(Continued, stream.request)
    finished = await scene.watch.event(Finished, stream.request)
    since = next((at for at, _ in stream.arrivals if at > disturbed.continue_at), None)
    if since is None:
        raise DemoError("no token came after `continue`")
    # Two witnesses, the engine's events and the client; whoever saw more tokens is believed.
    until = max(continued.output_tokens, disturbed.tokens_then)
    result = Hold(
        tokens_while_held=max(0, until - held.output_tokens - held.in_flight_tokens),
        recomputed_tokens=finished.recomputed_tokens,
        identical=stream.text == reference.text and stream.tokens == reference.tokens == TOKENS,
        publish_to_applied_s=round(disturbed.published_s, 6),
        continue_to_next_token_s=round(since - disturbed.continue_at, 6),
    )
    return result, disturbed.others


async def _undisturbed(scene: Scene) -> Stream:
    """The reference: the same prompt among the same neighbours, nobody interferes."""
    stream, neighbours = Stream(POLITE.tenant, Ask(PROMPT, TOKENS)), Neighbours()
    async with asyncio.TaskGroup() as group:
        with _company(scene, group, neighbours):
            await scene.endpoint.run(stream)
    await scene.idle()
    scene.screen.say(f"  undisturbed, {stream.tokens} tokens: …{stream.text[-SHOWN_CHARS:]}", style="dim")
    return stream


async def _held(scene: Scene) -> Disturbed:
    stream, neighbours = Stream(POLITE.tenant, Ask(PROMPT, TOKENS)), Neighbours()
    state, enough = ["running"], asyncio.Event()

    def seen(stream: Stream) -> None:
        if stream.tokens >= HOLD_AFTER:
            enough.set()

    async with scene.screen.show(_view(stream, neighbours, state)), asyncio.TaskGroup() as group:
        with _company(scene, group, neighbours):
            running = group.create_task(scene.endpoint.run(stream, seen))
            await enough.wait()
            published_s = await _publish(scene, "preempt", stream.request, {"kv": "keep"})
            state[0] = "HELD"
            before = neighbours.tokens()
            await asyncio.sleep(HOLD_S)
            others = neighbours.tokens() - before
            state[0] = "continued"
            continue_at, tokens_then = time.monotonic(), stream.tokens
            await _publish(scene, "continue", stream.request, {})
            await running
            state[0] = "finished"
    return Disturbed(stream, published_s, continue_at, tokens_then, others)


async def _publish(scene: Scene, verb: str, request: str, fields: dict[str, str]) -> float:
    """Publish a command as any NATS client would: a subject and a few lines of JSON.

    Returns:
        Seconds from publish to reply: `applied` says that no step from then on contradicts it.

    Raises:
        DemoError: it was refused or nobody answered.
    """
    client = scene.client
    subject = client.subjects.command(OPERATOR, WORKER, verb)
    payload = msgspec.json.encode({"id": new_id(), "targets": {"requests": [request]}, **fields})
    began = time.monotonic()
    try:
        message = await client.nc.request(subject, payload, timeout=SETTLE_S)
    except nats.errors.Error as error:
        raise DemoError(f"nobody answered on {subject}: {error}") from error
    took_s = time.monotonic() - began
    reply = decode_reply(message.data)
    if reply.outcome == "rejected":
        raise DemoError(f"{verb} was refused ({reply.code}): {reply.error}")
    return took_s


@contextmanager
def _company(scene: Scene, group: asyncio.TaskGroup, neighbours: Neighbours) -> Iterator[None]:
    """Neighbours run while the block does; their last requests end by themselves."""
    for seed, tenant in enumerate(NEIGHBOURS):
        group.create_task(neighbours.keep_running(scene, tenant, seed))
    try:
        yield
    finally:
        neighbours.leaving = True


def _view(stream: Stream, neighbours: Neighbours, state: list[str]) -> View:
    styles = {"HELD": "bold yellow", "continued": "green", "finished": "green"}

    def table() -> Table:
        shown = Table(box=None, padding=(0, 2))
        for heading in ("request", "state", "tokens", "text"):
            shown.add_column(heading, justify="right" if heading == "tokens" else "left", no_wrap=True)
        style = styles.get(state[0], "")
        text = Text(f"…{stream.text[-SHOWN_CHARS:]}", style=style)
        shown.add_row(stream.tenant, Text(state[0], style=style), str(stream.tokens), text)
        for tenant, streams in neighbours.streams.items():
            total = sum(each.tokens for each in streams)
            last = streams[-1].text[-SHOWN_CHARS:] if streams else ""
            shown.add_row(tenant, "running", str(total), Text(f"…{last}", style="dim"))
        return shown

    def line() -> str:
        return (
            f"{stream.tenant} is {state[0]} at {stream.tokens} tokens; the others have {neighbours.tokens()}"
        )

    return View(table, line)

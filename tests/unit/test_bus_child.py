"""What the bus's process lets wait for an engine that does not read."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from coxswain.schemas.commands import Continue, Targets
from coxswain.schemas.policy import Lead
from coxswain.service.bus.child import LARGE, LEADS, MAX_UNREAD, FarPort
from coxswain.service.port import CommandIn, LeadIn, QueryIn


@pytest.fixture
async def port() -> AsyncIterator[FarPort]:
    """The port of a bus whose engine reads nothing."""
    ours, theirs = socket.socketpair()
    with theirs:
        _, writer = await asyncio.open_connection(sock=ours)
        yield FarPort(writer, 0.0)
        writer.transport.abort()


def command(size: int) -> CommandIn:
    """A command of about so many bytes."""
    targets = Targets(requests=tuple("x" * 100 for _ in range(max(1, size // 100))))
    return CommandIn("operator", "continue", Continue(id="c", targets=targets), (), "inbox")


def taken(port: FarPort, item: CommandIn | LeadIn | QueryIn) -> int:
    """How many of these it takes until it refuses one."""
    count = 0
    while port.offer(item):
        count += 1
        assert count < 100_000, "it takes everything"
    return count


async def test_large_commands_leave_room_for_small_ones(port: FarPort) -> None:
    """Who sends megabytes is refused while there is room for an operator's command; that has a bound, too."""
    assert 0 < taken(port, command(16 * LARGE)) <= MAX_UNREAD // (16 * LARGE)
    assert not port.offer(QueryIn("config", None, "inbox"))
    assert port.offer(command(100))
    assert 0 < taken(port, command(LARGE // 2)) <= MAX_UNREAD // (LARGE // 2)
    assert not port.offer(command(100))


async def test_no_command_keeps_a_heartbeat_out(port: FarPort) -> None:
    """Where commands take all the room that they may, the leader is heard for long yet; that has a bound, too."""
    beat = LeadIn(Lead(epoch=(1.0, 1), controller="c", policy="vtc", at=0.0))
    taken(port, command(100_000))
    taken(port, command(100))
    assert taken(port, beat) > 1_000
    assert port._writer.transport.get_write_buffer_size() < MAX_UNREAD + LEADS + LARGE

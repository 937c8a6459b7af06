"""Faults of a cluster of three NATS servers that keep three copies: what a fleet of many machines should have.

They need a fleet of their own, on such a cluster; workers, controllers and clients have all three addresses.
"""

import asyncio
from collections.abc import AsyncGenerator

from tests.faults.hands import Hands, fault
from tests.support.cluster import NatsCluster, leader_of, well


@fault(cluster=True)
async def node_killed(hands: Hands) -> AsyncGenerator[float, None]:
    """One of three NATS servers killed for 5 s: the one that leads the event stream."""
    await _well(hands)
    node = _nats(hands).nodes[await leader_of(hands.fleet.cox.js, hands.fleet.cox.subjects.stream)]
    node.kill()
    yield 5.0
    node.start()


@fault(cluster=True)
async def node_paused(hands: Hands) -> AsyncGenerator[float, None]:
    """One of three NATS servers frozen for 12 s (SIGSTOP): the one that leads the bucket of the lease."""
    await _well(hands)
    bucket = f"KV_{hands.fleet.cox.subjects.lease_bucket}"
    node = _nats(hands).nodes[await leader_of(hands.fleet.cox.js, bucket)]
    node.pause()
    yield 12.0
    node.resume()


@fault(cluster=True)
async def node_cut_off(hands: Hands) -> AsyncGenerator[float, None]:
    """One of three NATS servers cut off from the others for 8 s, with those of us that are connected to it."""
    await _well(hands)
    await _nats(hands).cut_off()
    yield 8.0
    await _nats(hands).rejoin()


@fault(cluster=True)
async def majority_lost(hands: Hands) -> AsyncGenerator[float, None]:
    """Two of three NATS servers killed for 8 s: commands may pass, nothing can be stored and nobody elected."""
    await _well(hands)
    nodes = list(_nats(hands).nodes.values())
    for node in nodes[1:]:
        node.kill()
    yield 8.0
    for node in nodes[1:]:
        node.start()


@fault(cluster=True)
async def nodes_restarted(hands: Hands) -> AsyncGenerator[float, None]:
    """All three NATS servers restarted (SIGTERM), one after the other, each when its copies are up to date again."""
    await _well(hands)
    for node in _nats(hands).nodes.values():
        await asyncio.to_thread(node.stop)
        await asyncio.to_thread(node.start)
        await _well(hands)
    yield 0.0


def _nats(hands: Hands) -> NatsCluster:
    assert hands.fleet.cluster is not None, "this fault needs a fleet on a cluster"
    return hands.fleet.cluster


async def _well(hands: Hands) -> None:
    """Wait until nothing is left of the fault before."""
    subjects = hands.fleet.cox.subjects
    for stream in (subjects.stream, f"KV_{subjects.lease_bucket}", f"KV_{subjects.tenants_bucket}"):
        await well(hands.fleet.cox.js, stream)

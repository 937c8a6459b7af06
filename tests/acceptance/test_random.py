"""Random steering of the real model on a CPU, over HTTP and NATS: the same tokens whatever is done, exact counts."""

import asyncio
import os
import random

import pytest

from coxswain.schemas.events import Event, Finished
from tests.acceptance.test_hold import empty, frame
from tests.support.serving import Api, Stream
from tests.support.steered import Steer

pytestmark = [pytest.mark.vllm, pytest.mark.nats, pytest.mark.slow]

SEED = int(os.environ.get("COX_RANDOM_SEED", "1"))
REQUESTS = int(os.environ.get("COX_RANDOM_REQUESTS", "24"))
PROMPTS = [
    f"{start} the river was quiet, and {end}" for start in ("At night", "In the morning") for end in "abc"
]


@pytest.mark.timeout(60 + 10 * REQUESTS)
async def test_whatever_is_done_requests_say_the_same(api: Api, cox: Steer) -> None:
    """Held, dropped, continued, reordered and aborted at random: what is said and what is counted stays right."""
    dice = random.Random(SEED)
    wanted = [(dice.choice(PROMPTS), dice.randrange(20, 120)) for _ in range(REQUESTS)]
    longest = {prompt: max(tokens for said, tokens in wanted if said == prompt) for prompt, _ in wanted}
    expected = {
        prompt: await api.stream(prompt, tenant="acme", tokens=tokens).end()
        for prompt, tokens in longest.items()
    }
    before = (await frame(cox)).recomputed_tokens_total
    live: dict[Stream, tuple[str, int]] = {}
    ended: dict[Stream, tuple[str, int]] = {}
    aborted: set[Stream] = set()
    while wanted or live:
        while wanted and len(live) < 6:
            prompt, tokens = wanted.pop()
            stream = api.stream(prompt, tenant=dice.choice(["acme", "globex"]), tokens=tokens)
            live[stream] = prompt, tokens
            await stream.until(1, within_s=120)
        await disturb(cox, dice, list(live), aborted)
        await asyncio.sleep(dice.random() / 20)
        for stream in [stream for stream in live if stream.task.done()]:
            stream.task.result()
            ended[stream] = live.pop(stream)
    for stream, (prompt, tokens) in ended.items():
        whole = expected[prompt][:tokens]
        assert stream.tokens == (whole[: len(stream.tokens)] if stream in aborted else whole), f"seed {SEED}"
    assert (await frame(cox)).recomputed_tokens_total > before
    await empty(cox)
    await check_counts(cox, ended)


async def disturb(cox: Steer, dice: random.Random, live: list[Stream], aborted: set[Stream]) -> None:
    """Do one thing to up to three requests."""
    some = dice.sample(live, min(len(live), dice.randrange(1, 4)))
    names = [stream.request for stream in some]
    verb = dice.choices(["preempt", "continue", "prioritize", "abort"], [4, 4, 2, 0.2])[0]
    if verb == "preempt":
        reply = await cox(verb, *names, kv=dice.choice(["keep", "drop"]), lease_s=dice.choice([0.1, 0.5]))
    elif verb == "prioritize":
        reply = await cox(verb, *names, priority=dice.randrange(-3, 4))
    elif verb == "abort":
        aborted.add(some[0])
        reply = await cox(verb, names[0])
    else:
        reply = await cox(verb, *names)
    assert reply.code in (None, 404), reply


async def check_counts(cox: Steer, ended: dict[Stream, tuple[str, int]]) -> None:
    """Every request's last event: its tokens, and nothing computed that is not accounted for by them."""
    missing = {stream.request: stream for stream in ended}
    async with asyncio.timeout(30):
        async for event in cox.client.events(start="all"):
            assert isinstance(event, Event)
            if isinstance(event, Finished) and event.request in missing:
                stream = missing.pop(event.request)
                assert event.output_tokens >= len(stream.tokens)
                assert event.discarded_tokens == 0 or event.reason == "abort"
                assert event.restored_tokens == event.reloaded_tokens == 0
            if not missing:
                return

"""The load of act 1: who asks what, and when. Pure: the same seed gives the same load under every policy.

Two kinds of tenant: one keeps a number of requests outstanding (a new one follows each that ends), the other
asks at times fixed in advance, whatever becomes of its requests. Called by `fairness`.
"""

import random
from collections.abc import Iterator
from typing import Final, NamedTuple

_TEXT: Final = """
the ship and her crew row home from a small harbour past green hills while the wind and the tide turn
each oar moves water at one call so eight work like one long before the sun is high over the river
"""
WORDS: Final = tuple(_TEXT.split())
"""Words that the tiny model's tokenizer knows whole, so that a prompt has about as many tokens as words."""


class Ask(NamedTuple):
    """One request: a prompt and exactly how many tokens to generate."""

    prompt: str
    output_tokens: int


class Sizes(NamedTuple):
    """Bounds, both included, within which a tenant's requests are drawn."""

    prompt_words: tuple[int, int]
    output_tokens: tuple[int, int]


class Closed(NamedTuple):
    """A tenant that always has `outstanding` requests in the system."""

    tenant: str
    outstanding: int
    sizes: Sizes


class Spaced(NamedTuple):
    """A tenant that asks once in every `every_s`, at a random moment of it."""

    tenant: str
    every_s: float
    sizes: Sizes


FLOOD: Final = Closed("flood", 24, Sizes((16, 48), (30, 60)))
BUSY: Final = Closed("busy", 12, Sizes((16, 48), (30, 60)))
"""Half as much as flood, and so much more than runs at once (4) that some always wait, however they clump."""
POLITE: Final = Spaced("polite", 1.25, Sizes((8, 16), (12, 20)))
"""A fifth or so of an equal share, on the machines that this was made on; the summary says what it was."""
TENANTS: Final = (FLOOD.tenant, BUSY.tenant, POLITE.tenant)


def starts(load: Closed, over_s: float) -> list[float]:
    """When each of a tenant's outstanding requests begins, in s: spread evenly, so that tenants interleave."""
    return [over_s * (number + 0.5) / load.outstanding for number in range(load.outstanding)]


def asks(tenant: str, sizes: Sizes, seed: int) -> Iterator[Ask]:
    """A tenant's requests, one after another, without end."""
    draw = random.Random(f"{seed}/{tenant}")  # noqa: S311  (a load, not a secret)
    while True:
        words = draw.choices(WORDS, k=draw.randint(*sizes.prompt_words))
        yield Ask(" " + " ".join(words), draw.randint(*sizes.output_tokens))


def moments(load: Spaced, seconds: float, seed: int) -> list[float]:
    """When a spaced tenant asks, in s from the start; none in the first period, while the queue builds up."""
    draw = random.Random(f"{seed}/{load.tenant}/moments")  # noqa: S311
    periods = int(seconds / load.every_s)
    return [load.every_s * (period + draw.random()) for period in range(1, periods)]

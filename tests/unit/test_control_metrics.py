"""What a controller counts of itself, and the page of it."""

from collections.abc import Iterator
from itertools import pairwise

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from coxswain.control.cli import parse
from coxswain.control.fleet import Fleet
from coxswain.control.metrics import STEP_BUCKETS_S, Histogram, Meter, PortTakenError, serve
from coxswain.schemas import metrics as names
from tests.support.frames import frame
from tests.support.nats import free_port


def meter() -> Meter:
    """A controller's meter that nothing has happened to."""
    return Meter("main", "c1", "vtc", Fleet())


def samples(meter: Meter) -> dict[tuple[str, ...], float]:
    """Every value by name and labels."""
    return {(metric.name, *labels): value for metric, value, labels in meter.samples()}


def test_a_term_begins_with_an_epoch_and_ends_with_it() -> None:
    """Leading, for how long, and how often it began are told apart."""
    one = meter()
    one.lead(None)
    assert samples(one)[names.CONTROLLER_TERMS.name,] == 0
    for _ in range(3):
        one.lead((1.0, 4))
    seen = samples(one)
    assert (seen[names.CONTROLLER_LEADING.name,], seen[names.CONTROLLER_TERMS.name,]) == (1, 1)
    assert seen[names.CONTROLLER_LEADING_SECONDS.name,] > 0
    one.lead(None)
    assert samples(one)[names.CONTROLLER_LEADING_SECONDS.name,] == 0
    one.lead((1.0, 9))
    assert samples(one)[names.CONTROLLER_TERMS.name,] == 2


def test_silent_workers_are_known_and_their_requests_not_counted() -> None:
    """A worker that fell silent is `stale`; what it had is no queue of ours."""
    fleet = Fleet()
    one = Meter("main", "c1", "vtc", fleet)
    fleet.merge(frame("w1", queued=3), 100.0)
    fleet.merge(frame("w2", queued=5), 104.0)
    fleet.age(104.0)
    seen = samples(one)
    assert seen[names.CONTROLLER_WORKERS.name, "live"] == 1
    assert seen[names.CONTROLLER_WORKERS.name, "stale"] == 1
    assert seen[names.CONTROLLER_REQUESTS.name, "queued"] == 5


def test_a_histograms_buckets_hold_what_is_not_above_them() -> None:
    """Prometheus's buckets include their bound and everything below."""
    steps = Histogram(STEP_BUCKETS_S)
    for value in (0.001, 0.0011, 5.0):
        steps.add(value)
    buckets = dict(steps.buckets())
    assert (buckets["0.001"], buckets["0.0025"], buckets["1.0"], buckets["+Inf"]) == (1, 2, 2, 3)
    assert all(lower <= upper for lower, upper in pairwise(count for _, count in steps.buckets()))


@pytest.fixture
def served() -> Iterator[tuple[Meter, str]]:
    """A meter on a port of its own."""
    port = free_port()
    one = meter()
    stop = serve(one, "127.0.0.1", port)
    yield one, f"127.0.0.1:{port}"
    stop()


def test_the_page_has_the_meter_and_the_process(served: tuple[Meter, str]) -> None:
    """A refused command is there with verb and code, and so is the memory that the process takes."""
    one, address = served
    one.refused["rank", "409"] += 2
    text = httpx.get(f"http://{address}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (sample,) = families[names.CONTROLLER_REFUSED.name.removesuffix("_total")].samples
    assert sample.labels == {"fleet": "main", "verb": "rank", "code": "409"}
    assert sample.value == 2
    assert families["process_resident_memory_bytes"].samples[0].value > 0


def test_a_port_that_is_taken_is_said_so(served: tuple[Meter, str]) -> None:
    """The controller does not start without the page that it was asked for."""
    _, address = served
    host, _, port = address.partition(":")
    with pytest.raises(PortTakenError, match=port):
        serve(meter(), host, int(port))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9101", ("127.0.0.1", 9101)),
        (":9101", ("127.0.0.1", 9101)),
        ("0.0.0.0:9101", ("0.0.0.0", 9101)),
        ("[::1]:9101", ("::1", 9101)),
    ],
)
def test_an_address_is_this_machine_unless_it_says_otherwise(text: str, address: tuple[str, int]) -> None:
    """A port alone is served to nobody else."""
    assert parse.address(text) == address


@pytest.mark.parametrize("text", ["", "host", "1:x", "::1:9101", "host:70000", "host:-1"])
def test_no_address_is_refused_with_an_example(text: str) -> None:
    """What is wrong, and what to write."""
    with pytest.raises(ValueError, match=r"HOST:\]PORT|brackets"):
        parse.address(text)

"""The lab's runs: real schedulers and the real control core in virtual time."""

import numpy as np
import pytest

from coxswain.control import policy as policies
from coxswain.control.errors import PolicyError
from coxswain.control.policy import Tables
from coxswain.lab.admission import peak
from coxswain.lab.agenda import START, Agenda
from coxswain.lab.controller import Controller
from coxswain.lab.devices import DEVICES
from coxswain.lab.engine import Build, Engine
from coxswain.lab.experiment import run
from coxswain.lab.link import Link
from coxswain.lab.metrics import service_rates
from coxswain.lab.setup import Outage, Setup
from coxswain.lab.trace import Arrival, TraceError, ordered
from coxswain.schemas.policy import TenantPolicy
from coxswain.service.simulated.roofline import Work

pytestmark = pytest.mark.vllm

DEVICE = DEVICES["a10g-7b"]


def crowd(count=40, every_s=0.15, prompt=200, output=60):
    """More than the device can do, of three tenants; lengths vary."""
    return tuple(
        Arrival(
            at_s=number * every_s,
            tenant=f"t{number % 3}",
            prompt_tokens=prompt + 37 * (number % 5),
            output_tokens=output + 11 * (number % 7),
        )
        for number in range(count)
    )


def story(outcome):
    """Everything that a run says, but how long it took here."""
    return [
        (life.first_token_s, life.finished_s, life.tokens, life.worker, life.states) for life in outcome.lives
    ]


# What a run is


@pytest.mark.parametrize("policy", ["stock-fcfs", "stock-priority", "fcfs", "vtc"])
@pytest.mark.parametrize("admission", ["reserve", "vllm"])
def test_every_request_is_done_and_gets_the_tokens_it_asked_for(policy, admission):
    """Nothing is lost on any scheduler under either admission."""
    outcome = run(crowd(), Setup(policy=policy, admission=admission))
    assert all(life.done for life in outcome.lives)
    assert [life.tokens for life in outcome.lives] == [life.arrival.output_tokens for life in outcome.lives]
    for life in outcome.lives:
        assert life.arrival.at_s < life.first_token_s < life.finished_s
        assert next(state for _, state in life.states) == "queued"
        assert [state for _, state in life.states][-2:] == ["running", "ended"]


def test_equal_setups_give_equal_runs_and_another_seed_another():
    """Also with several workers, random routes and losses: only the seed decides."""
    setup = Setup(workers=2, route="random", loss=0.2, seed=3)
    one, other = run(crowd(), setup), run(crowd(), setup)
    assert story(one) == story(other)
    assert (one.messages, one.lost, one.commands, one.steps) == (
        other.messages,
        other.lost,
        other.commands,
        other.steps,
    )
    assert story(run(crowd(), Setup(workers=2, route="random", loss=0.2, seed=4))) != story(one)


@pytest.mark.parametrize("admission", ["reserve", "vllm"])
def test_our_fcfs_is_vllms_own_to_the_microsecond(admission):
    """Steering that steers nothing changes nothing: every token at the same time as under stock vLLM."""
    ours = run(crowd(), Setup(policy="fcfs", admission=admission))
    stock = run(crowd(), Setup(policy="stock-fcfs", admission=admission))
    assert story(ours) == story(stock)


@pytest.mark.parametrize(("device", "admission"), [("a10g-7b", "vllm"), ("vtc-a10g", "reserve")])
def test_a_lone_request_takes_a_prefill_and_its_decode_steps(device, admission):
    """Times are the roofline's: a step of the prompt, then one per token with a context that grows.

    Reserving, the prefill is a pass of its own and costs what that costs; decode steps do not.
    """
    arrival = Arrival(at_s=1.0, tenant="a", prompt_tokens=100, output_tokens=5)
    chosen = DEVICES[device]
    (life,) = run([arrival], Setup(policy="stock-fcfs", device=chosen, admission=admission)).lives
    prefill = chosen.pass_s + chosen.preset.step_s(Work().plus(100, 0, decode=False))
    decodes = [chosen.preset.step_s(Work().plus(1, 100 + done, decode=True)) for done in range(4)]
    assert life.ttft_s == pytest.approx(prefill)
    assert life.latency_s == pytest.approx(prefill + sum(decodes))


def test_tenants_share_under_vtc_and_not_under_fcfs():
    """One tenant floods, the other sends little: only under vtc does it not wait behind the flood."""
    flood = [Arrival(at_s=0.01 * n, tenant="flood", prompt_tokens=400, output_tokens=40) for n in range(80)]
    quiet = [Arrival(at_s=2.0 + n, tenant="quiet", prompt_tokens=50, output_tokens=10) for n in range(3)]
    arrivals = sorted((*flood, *quiet), key=lambda arrival: arrival.at_s)

    def wait_s(policy):
        lives = run(arrivals, Setup(policy=policy, admission="reserve")).lives
        return max(life.ttft_s for life in lives if life.arrival.tenant == "quiet")

    assert wait_s("vtc") < wait_s("fcfs") / 2


def test_weights_of_the_tenant_table_reach_the_engine():
    """3 against 1, both always waiting: service in proportion while both are."""
    arrivals = [
        Arrival(at_s=0.001 * n, tenant="ab"[n % 2], prompt_tokens=150, output_tokens=20) for n in range(240)
    ]
    tables = Tables(tenants={"a": TenantPolicy(weight=3.0), "b": TenantPolicy(weight=1.0)})
    lives = run(arrivals, Setup(policy="vtc", admission="reserve", tables=tables)).lives
    end_s = max(life.first_token_s for life in lives if life.arrival.tenant == "a") * 0.8
    started = [
        sum(life.first_token_s < end_s for life in lives if life.arrival.tenant == name) for name in "ab"
    ]
    assert started[0] / started[1] == pytest.approx(3.0, rel=0.15)


def test_a_rate_limit_refuses_what_is_over_it_and_says_so():
    """rpm4: the fifth request of a tenant within a minute is refused, another tenant's is not."""
    arrivals = [Arrival(at_s=float(n), tenant="a", prompt_tokens=10, output_tokens=2) for n in range(6)]
    arrivals.append(Arrival(at_s=6.0, tenant="b", prompt_tokens=10, output_tokens=2))
    arrivals.append(Arrival(at_s=61.5, tenant="a", prompt_tokens=10, output_tokens=2))
    lives = run(arrivals, Setup(policy="rpm4")).lives
    assert [life.refused for life in lives] == [False] * 4 + [True] * 2 + [False] * 2
    assert [life.done for life in lives] == [not life.refused for life in lives]


def test_a_token_bucket_holds_ten_seconds_worth_and_fills_again():
    """bucket12: two at once, and one more after each five seconds, for every tenant on its own."""
    times = {"a": [0.0, 0.1, 0.2, 5.1, 5.2, 10.1, 40.0, 40.1, 40.2], "b": [0.3]}
    arrivals = sorted(
        (
            Arrival(at_s=at, tenant=name, prompt_tokens=8, output_tokens=2)
            for name, some in times.items()
            for at in some
        ),
        key=lambda each: each.at_s,
    )
    lives = run(arrivals, Setup(policy="bucket12")).lives
    refused = [(each.arrival.tenant, each.arrival.at_s) for each in lives if each.refused]
    assert refused == [("a", 0.2), ("a", 5.2), ("a", 40.2)]
    assert all(each.done != each.refused for each in lives)


@pytest.mark.parametrize(
    ("setup", "error", "says"),
    [
        (Setup(policy="nosuch"), PolicyError, "no policy 'nosuch'"),
        (Setup(policy="vtc", settings=("wq=cheap",)), PolicyError, "wq"),
        (Setup(policy="stock-fcfs", settings=("a=1",)), PolicyError, "takes no settings"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_before_anything_runs(setup, error, says):
    """With the words that the controller itself has for it."""
    with pytest.raises(error, match=says):
        run(crowd(1), setup)


def test_a_request_that_never_fits_is_refused_before_anything_runs():
    """It would wait for ever, and everybody behind it."""
    with pytest.raises(TraceError, match="room for"):
        run([Arrival(at_s=0, tenant="a", prompt_tokens=9_000, output_tokens=2_000)], Setup())


def test_an_oracle_knows_lengths_beforehand():
    """Equal prompts, outputs of 5 and 100: told of that, vtc lets the short ones in first, untold it cannot."""
    arrivals = [
        Arrival(at_s=0.001 * n, tenant="ab"[n % 2], prompt_tokens=400, output_tokens=5 + 95 * (n % 2))
        for n in range(100)
    ]

    def ahead(policy):
        lives = run(arrivals, Setup(policy=policy, admission="reserve")).lives
        short, long = (
            sorted(life.first_token_s for life in lives if life.arrival.tenant == name)[20] for name in "ab"
        )
        return long / short

    assert ahead("vtc-oracle") > ahead("vtc")


@pytest.mark.parametrize("policy", sorted(policies.available()))
def test_every_policy_that_ships_brings_every_request_to_its_end(policy):
    """No hold, cap or order of any of them leaves a request behind."""
    outcome = run(crowd(), Setup(policy=policy))
    assert all(life.done for life in outcome.lives)
    assert outcome.rejected == 0


# Admission


@pytest.mark.parametrize(
    ("requests", "most"),
    [
        ([], 0),
        ([(10, 5)], 15),
        ([(10, 5), (2, 50)], 2 * 2 + 55),
        ([(5, 5), (5, 5), (5, 5)], 30),
    ],
)
def test_the_peak_is_reached_when_the_next_one_ends(requests, most):
    """By hand: whoever has least to come ends first, and gives back all that it has."""
    assert peak(requests) == most


def test_reserving_never_preempts_and_vllm_does():
    """Short prompts with long outputs: vLLM lets all of them in and then has to throw some out."""
    arrivals = [Arrival(at_s=0.001 * n, tenant="a", prompt_tokens=20, output_tokens=400) for n in range(30)]
    reserved = run(arrivals, Setup(policy="vtc", admission="reserve"))
    optimistic = run(arrivals, Setup(policy="vtc", admission="vllm"))
    assert sum(life.preempted for life in reserved.lives) == 0
    assert sum(life.preempted for life in optimistic.lives) > 0
    assert all(life.done for life in (*reserved.lives, *optimistic.lives))
    assert _most_kv(reserved) <= 1.05 * DEVICE.preset.kv_tokens < _most_kv(optimistic)


def _most_kv(outcome):
    """The most tokens of KV that requests had together when one of them ended, each growing evenly."""
    lives = outcome.lives
    return max(
        sum(
            life.arrival.prompt_tokens
            + life.tokens * (moment - life.first_token_s) / (life.finished_s - life.first_token_s)
            for life in lives
            if life.first_token_s <= moment <= life.finished_s
        )
        for moment in [life.finished_s for life in lives]
    )


# The network and the controller


@pytest.fixture
def world():
    """A function that makes one engine with a controller, and steps it until something is so; returns when."""
    engines = []

    def make(*, latency_s=0.0, loss=0.0, outages=(), cadence_s=0.05):
        agenda = Agenda(START)
        engine = Engine("w0", Build(DEVICE, "vllm", "steered", 1_000, 0.05), agenda, lambda life: None)
        engines.append(engine)
        link = Link(agenda, latency_s=latency_s, loss=loss, seed=1)
        controller = Controller(
            [engine],
            agenda,
            lambda: policies.load("fcfs"),
            Tables(),
            cadence_s=cadence_s,
            link=link,
            outages=outages,
        )

        def until(condition, within_s=30.0):
            while not condition(engine.scheduler.core):
                assert agenda.now - START < within_s, "it never came to that"
                agenda.step()
            return agenda.now - START

        return until, engine, controller, link

    yield make
    for engine in engines:
        engine.shutdown()


def _ruled(core):
    return core.classes["default"].order == "priority"


@pytest.mark.parametrize("latency_s", [0.0, 0.2, 1.0])
def test_a_command_comes_two_latencies_and_at_most_a_cadence_later(world, latency_s):
    """One way for the frame that says who is there, one for the command."""
    until, *_ = world(latency_s=latency_s)
    at_s = until(_ruled)
    assert 2 * latency_s <= at_s <= 2 * latency_s + 2 * 0.05


@pytest.mark.parametrize("cadence_s", [0.01, 0.5])
def test_the_cadence_is_how_often_the_controller_decides(world, cadence_s):
    """What it hears between two steps waits for the next."""
    until, *_ = world(latency_s=0.001, cadence_s=cadence_s)
    assert until(_ruled) == pytest.approx(cadence_s + 0.001, abs=0.002)


def test_what_a_link_loses_never_arrives_and_the_rest_does_in_time():
    """Each message by itself, as the seed has it."""
    agenda, arrived = Agenda(START), []
    link = Link(agenda, latency_s=0.5, loss=0.3, seed=1)
    for _ in range(1_000):
        link.send(lambda: arrived.append(agenda.now))
    while agenda.step():
        pass
    assert set(arrived) == {START + 0.5}
    assert len(arrived) == link.sent - link.lost
    assert link.lost == pytest.approx(300, abs=50)


def test_messages_are_lost_as_often_as_asked_and_what_rules_comes_all_the_same(world):
    """Levels, not edges: half of all messages are lost, and the table is in force a little later."""
    until, _, _, link = world(loss=0.5)
    assert until(_ruled, within_s=60.0) > 0.0
    until(lambda core: link.sent > 400, within_s=3_600.0)
    assert link.lost / link.sent == pytest.approx(0.5, abs=0.1)


def test_a_dead_controller_says_nothing_and_its_successor_has_a_later_epoch(world):
    """The engine gives its leader up 5 s after its last heartbeat, of which two come a second; it obeys the next."""
    until, engine, *_ = world(outages=(Outage(1.0, 8.0),))
    until(_ruled)
    assert engine.scheduler.core.epoch == (START, 1)
    silent_at = until(lambda core: core._leader_silent)
    assert 0.5 + 5.0 <= silent_at <= 1.0 + 5.0
    assert 9.0 <= until(lambda core: core.epoch == (START, 2)) <= 9.2


def test_the_first_controller_on_a_running_fleet_starves_nobody():
    """Whom workers served by themselves before, and lifted: both tenants get as much once one controller leads them."""
    arrivals = [
        Arrival(at_s=begin_s + 0.02 * number, tenant=tenant, prompt_tokens=200, output_tokens=100)
        for tenant, begin_s in (("early", 0.0), ("late", 10.0))
        for number in range(300)
    ]
    outcome = run(ordered(arrivals), Setup(workers=2, route="round", outages=(Outage(0.0, 15.0),)))
    begin = np.array([17.0])
    early, late = service_rates(outcome.lives, begin, begin + 10.0)
    assert 0.7 <= early[0] / late[0] <= 1.4


def test_losses_and_outages_cost_no_request():
    """The token path does not wait for the control path."""
    setup = Setup(
        policy="vtc", workers=2, route="skewed", loss=0.3, latency_s=0.3, outages=(Outage(1.0, 4.0),)
    )
    outcome = run(crowd(), setup)
    assert all(life.done for life in outcome.lives)
    assert outcome.lost > 0

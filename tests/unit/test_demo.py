"""The demo's pure parts (metric, load, claims, report), and the promise that it leaves no process behind."""

import asyncio
import io
import itertools
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rich.console import Console

from coxswain.control.demo import load, metrics, stack, stay
from coxswain.control.demo.metrics import Gap, Sample, Standing, percentile, service_gap
from coxswain.control.demo.processes import Crew, DemoError, run_once, tail
from coxswain.control.demo.report import Context, Fairness, Hold, Priority, Report, claims
from coxswain.control.demo.screen import Screen
from coxswain.control.demo.streams import Choice, Chunk, Endpoint, Stream, Usage
from coxswain.schemas.status import TenantStatus


def at(second: float, **tenants: tuple[int, int]) -> Sample:
    """A sample: `name=(queued, service)`."""
    return Sample(second, {name: Standing(*standing) for name, standing in tenants.items()})


class TestServiceGap:
    """The service gap, on cases worked out by hand."""

    def test_both_counts_begin_at_zero_when_both_first_are_backlogged(self):
        """What was served before both wait does not count."""
        samples = [at(0, a=(1, 500), b=(0, 0)), at(1, a=(1, 900), b=(1, 100)), at(2, a=(1, 930), b=(1, 110))]
        assert service_gap(samples, "a", "b") == Gap(largest=20, began_at=1, ended_at=2)

    def test_it_is_the_largest_difference_over_time_not_the_last(self):
        """A difference that was made up later still counts."""
        services = [(0, 0), (70, 0), (70, 50), (80, 80)]
        samples = [at(number, a=(1, a), b=(1, b)) for number, (a, b) in enumerate(services)]
        assert service_gap(samples, "a", "b") == Gap(largest=70, began_at=0, ended_at=3)

    def test_it_is_absolute(self):
        """It does not matter which of the two is ahead."""
        samples = [at(0, a=(1, 0), b=(1, 0)), at(1, a=(1, 10), b=(1, 45))]
        assert service_gap(samples, "a", "b") == service_gap(samples, "b", "a") == Gap(35, 0, 1)

    def test_it_ends_when_one_is_backlogged_no_more(self):
        """The sample in which one has nothing waiting, and all later ones, do not count."""
        samples = [
            at(0, a=(2, 0), b=(2, 0)),
            at(1, a=(2, 5), b=(1, 0)),
            at(2, a=(2, 900), b=(0, 0)),
            at(3, a=(2, 9000), b=(3, 0)),
        ]
        assert service_gap(samples, "a", "b") == Gap(largest=5, began_at=0, ended_at=1)

    def test_never_backlogged_together_has_no_gap(self):
        """Without a common backlog there is nothing to measure, which is not a gap of zero."""
        samples = [at(0, a=(1, 0)), at(1, a=(0, 90), b=(1, 0)), at(2, a=(0, 90), b=(0, 8))]
        assert service_gap(samples, "a", "b") is None
        assert service_gap([], "a", "b") is None

    def test_the_span_is_from_first_to_last_common_backlog(self):
        """How long it was measured is known."""
        samples = [at(10.5, a=(1, 0), b=(1, 0)), at(14.0, a=(1, 1), b=(1, 0))]
        gap = service_gap(samples, "a", "b")
        assert gap is not None
        assert gap.lasted_s == 3.5


class TestService:
    """Service and its growth."""

    def test_cached_prompt_tokens_count_in_full_and_output_twice(self):
        """30 + 10 prompt tokens and 7 of output are 54, recomputed ones are free."""
        assert metrics.service(tenant_row()) == 54

    def test_growth_is_from_first_to_last_sample(self):
        """A tenant that nobody saw before began at zero."""
        samples = [at(0, a=(0, 10)), at(1, a=(0, 15)), at(2, a=(0, 40), b=(0, 6))]
        assert metrics.growth(samples, "a") == 30
        assert metrics.growth(samples, "b") == 6
        assert metrics.growth([], "a") == 0


class TestPercentile:
    """Percentiles by nearest rank."""

    @pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 10), (95, 19), (96, 20), (100, 20)])
    def test_of_twenty(self, percent: float, value: float):
        """Of 1 to 20, p95 is the 19th."""
        assert percentile([*range(20, 0, -1)], percent) == value

    def test_of_one(self):
        """A single value is every percentile."""
        assert percentile([3.5], 50) == percentile([3.5], 95) == 3.5

    def test_of_none_is_refused(self):
        """No values is an error, not a zero."""
        with pytest.raises(ValueError, match="no values"):
            percentile([], 50)


class TestLoad:
    """The load of act 1."""

    def test_it_is_the_same_every_time(self):
        """Both policies meet the same prompts, lengths and moments."""
        stocks = [load.asks("flood", load.FLOOD.sizes, seed=1) for _ in range(2)]
        first, second = (list(itertools.islice(stock, 50)) for stock in stocks)
        assert first == second
        assert load.moments(load.POLITE, 30, seed=1) == load.moments(load.POLITE, 30, seed=1)

    def test_tenants_and_seeds_differ(self):
        """No tenant sends what another sends, so that no prefix is shared by accident."""
        stocks = [
            list(itertools.islice(load.asks(tenant, load.FLOOD.sizes, seed), 20))
            for tenant, seed in (("flood", 1), ("busy", 1), ("flood", 2))
        ]
        assert not set(stocks[0]) & set(stocks[1])
        assert not set(stocks[0]) & set(stocks[2])

    def test_sizes_stay_within_their_bounds_and_reach_them(self):
        """Prompts and outputs are drawn from the whole range, bounds included."""
        drawn = list(itertools.islice(load.asks("t", load.Sizes((2, 4), (5, 6)), seed=0), 200))
        assert {len(ask.prompt.split()) for ask in drawn} == {2, 3, 4}
        assert {ask.output_tokens for ask in drawn} == {5, 6}

    def test_polite_asks_once_per_period_in_order_and_never_late(self):
        """One request in each period but the first, none after the measured time."""
        times = load.moments(load.Spaced("polite", 2.0, load.POLITE.sizes), 20.0, seed=1)
        assert times == sorted(times)
        assert [int(time // 2.0) for time in times] == list(range(1, 10))

    def test_busy_wants_half_of_what_flood_wants_and_more_than_its_share(self):
        """What the issue asks of the two: half as much, still more than a third of the places."""
        assert load.BUSY.outstanding * 2 == load.FLOOD.outstanding
        assert load.BUSY.outstanding > stack.SLOTS

    def test_closed_tenants_start_interleaved(self):
        """Every third of the first requests is busy's, so that neither begins with a block of its own."""
        flood, busy = load.starts(load.FLOOD, 1.0), load.starts(load.BUSY, 1.0)
        merged = [name for _, name in sorted([(at, "f") for at in flood] + [(at, "b") for at in busy])]
        assert merged == ["f", "b", "f"] * load.BUSY.outstanding
        assert max(flood) < 1.0


class TestClaims:
    """What decides the exit code."""

    def test_what_was_seen_holds(self):
        """A good report has only claims that hold."""
        assert all(claim.holds for claim in claims(report(), context()))

    @pytest.mark.parametrize(
        "bad",
        [
            {"vtc": {"polite_ttft_p95_s": 3.0}},
            {"vtc": {"service_gap_tokens": 5_000}},
            {"hold": {"tokens_while_held": 1}},
            {"hold": {"recomputed_tokens": 1}},
            {"hold": {"identical": False}},
            {"priority": {"waiting_position_before": 4}},
            {"priority": {"waiting_position_after": 1}},
            {"priority": {"finished_before_others": False}},
        ],
    )
    def test_one_bad_number_fails_one_claim(self, bad: dict[str, dict[str, object]]):
        """No claim can be lost in the others: each measured number alone can fail the demo."""
        good = report()
        ((part, changes),) = bad.items()
        changed = msgspec.structs.replace(getattr(good, part), **changes)
        found = claims(msgspec.structs.replace(good, **{part: changed}), context())
        assert [claim.holds for claim in found].count(False) == 1

    @pytest.mark.parametrize(
        "change", [{"polite_share": 0.4}, {"backlogged_s": 14.0}, {"others_while_held": 0}]
    )
    def test_a_load_that_shows_nothing_fails(self, change: dict[str, float]):
        """Numbers taken under a load that was not what the act needs are no evidence."""
        found = claims(report(), context()._replace(**change))
        assert [claim.holds for claim in found].count(False) == 1

    def test_the_report_has_the_documented_keys(self):
        """The JSON is what people's scripts read: these keys, no others."""
        fairness = {"polite_ttft_p50_s", "polite_ttft_p95_s", "output_tokens", "service_gap_tokens"}
        found = msgspec.json.decode(report().json())
        assert {part: set(keys) for part, keys in found.items()} == {
            "fcfs": fairness,
            "vtc": fairness,
            "hold": {
                "tokens_while_held",
                "recomputed_tokens",
                "identical",
                "publish_to_applied_s",
                "continue_to_next_token_s",
            },
            "priority": {"waiting_position_before", "waiting_position_after", "finished_before_others"},
        }


class TestStream:
    """A completion as its client sees it."""

    def test_pieces_add_up(self):
        """Text, tokens and the time of the first token come from the pieces; usage alone adds no text."""
        stream = Stream("polite", load.Ask("x", 3), sent_at=10.0)
        stream.take(Chunk((Choice(" one"),), Usage(1)), now=10.5)
        stream.take(Chunk((Choice(" two three", "length"),), Usage(3)), now=11.0)
        stream.take(Chunk((), Usage(3)), now=11.5)
        assert (stream.text, stream.tokens, stream.reason, stream.ttft_s) == (
            " one two three",
            3,
            "length",
            0.5,
        )
        assert stream.arrivals == [(10.5, 1), (11.0, 3)]

    def test_without_a_token_there_is_no_first(self):
        """A request that waits has no time to first token yet."""
        assert Stream("polite", load.Ask("x", 3), sent_at=10.0).ttft_s is None


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


class TestProcesses:
    """Nothing stays behind."""

    def test_a_process_that_ignores_us_and_its_children_are_ended(self, tmp_path: Path, monkeypatch):
        """SIGTERM first, then SIGKILL to the whole group."""
        monkeypatch.setattr("coxswain.control.demo.processes.PATIENCE_S", 0.2)
        crew = Crew(tmp_path / "logs")
        process = crew.start("stubborn", [sys.executable, "-c", STUBBORN], os.environ)
        eventually(lambda: tail(process.log))
        child = int(tail(process.log)[0])
        crew.close()
        eventually(lambda: not alive(process.pid))
        eventually(lambda: not alive(child))

    def test_the_last_started_ends_first(self, tmp_path: Path):
        """What was started on top of something ends before it."""
        script = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(print(time.monotonic())))\n"
        script += "print('ready', flush=True)\ntime.sleep(60)"
        crew = Crew(tmp_path / "logs")
        both = [crew.start(name, [sys.executable, "-c", script], os.environ) for name in ("first", "second")]
        for process in both:
            eventually(lambda process=process: tail(process.log))
        crew.close()
        first, second = (float(tail(process.log)[-1]) for process in both)
        assert second < first

    def test_a_process_that_ended_is_named_with_its_log(self, tmp_path: Path):
        """The message says who died and how, and where its last words are."""
        crew = Crew(tmp_path / "logs")
        process = crew.start(
            "brittle", [sys.executable, "-c", "print('oh'); raise SystemExit(3)"], os.environ
        )
        with pytest.raises(DemoError, match="brittle ended with exit code 3") as caught:
            eventually(lambda: crew.check() or False)
        assert caught.value.log == process.log
        assert tail(process.log) == ["oh"]

    async def test_a_worker_that_still_says_something_is_waited_for(self, tmp_path: Path, monkeypatch):
        """However long it takes to start; one that is silent for long is given up, by name."""
        crew, log = Crew(tmp_path / "logs"), tmp_path / "worker.log"
        log.touch()
        worker: Any = SimpleNamespace(log=log)
        now, asked = 0.0, 0

        async def healthy(_: Endpoint) -> bool:
            nonlocal now, asked
            now, asked = now + stack.WORKER_SILENT_S * 0.7, asked + 1
            if asked < 5:
                with log.open("a") as out:
                    out.write("importing\n")
            return asked == 5

        monkeypatch.setattr(Endpoint, "healthy", healthy)
        monkeypatch.setattr(stack, "time", SimpleNamespace(monotonic=lambda: now))
        async with Endpoint("http://127.0.0.1:1", {}) as endpoint:
            await stack.serves(endpoint, crew, worker)
            with pytest.raises(DemoError, match="said nothing for 180 s") as caught:
                await stack.serves(endpoint, crew, worker)
        assert (asked, caught.value.log) == (8, log)

    def test_a_log_s_endless_line_takes_one_row(self):
        """vLLM's whole configuration stands in one: the end of the log must not be lost in it."""
        shown = io.StringIO()
        screen = Screen(Console(file=shown, force_terminal=True, width=40))
        screen.failure("It failed", ["x" * 4_000, "the reason"])
        first, second, third = shown.getvalue().splitlines()
        assert ("It failed" in first, "the reason" in third) == (True, True)
        assert second.count("x") < 40

    def test_a_program_that_is_missing_is_named(self, tmp_path: Path):
        """No such program is an error for people, not a traceback."""
        with pytest.raises(DemoError, match="ghost cannot be started"):
            Crew(tmp_path).start("ghost", [str(tmp_path / "none")], {})

    async def test_a_short_program_gives_its_output_or_its_complaint(self):
        """What it printed comes back; a failure carries what it said on stderr."""
        assert await run_once("echo", [sys.executable, "-c", "print('hello')"], os.environ) == "hello\n"
        with pytest.raises(DemoError, match="exit code 1: no luck"):
            await run_once("sad", [sys.executable, "-c", "raise SystemExit('no luck')"], os.environ)

    async def test_a_short_program_ends_when_we_are_cancelled(self, tmp_path: Path):
        """Ctrl-C during a start-up step leaves no program behind."""
        mark = tmp_path / "pid"
        script = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
        task = asyncio.create_task(run_once("slow", [sys.executable, "-c", script], os.environ))
        await asyncio.to_thread(eventually, lambda: mark.exists() and mark.read_text())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not alive(int(mark.read_text()))


class TestEnvironment:
    """What the processes see."""

    def test_the_users_own_fleet_is_out_of_reach(self, tmp_path: Path):
        """Settings of a real deployment in the caller's environment never reach the demo's processes."""
        users = {"COX_NATS_URL": "nats://prod:4222", "COX_NATS_CREDS": "/secret", "PATH": "/bin"}
        env = stack.environment(users, tmp_path, "nats://127.0.0.1:1")
        assert (env["COX_NATS_URL"], env["COX_FLEET"], env["PATH"]) == ("nats://127.0.0.1:1", "demo", "/bin")
        assert "COX_NATS_CREDS" not in env

    def test_scratch_files_stay_in_the_folder(self, tmp_path: Path):
        """Temporary files of every process go when the folder goes."""
        assert Path(stack.environment({}, tmp_path, "nats://x")["TMPDIR"]).parent == tmp_path


async def test_who_keeps_asking_bears_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--keep`, a client that is capped or drained by hand asks again: there is always something to steer."""
    monkeypatch.setattr(stay, "AGAIN_S", 0.0)
    asked: list[Stream] = []

    async def run(stream: Stream) -> None:
        asked.append(stream)
        if len(asked) == 1:
            raise DemoError("the worker refused a request with 429")
        if len(asked) == 4:
            raise asyncio.CancelledError

    endpoint: Any = SimpleNamespace(run=run)
    with pytest.raises(asyncio.CancelledError):
        await stay.keep_asking(endpoint, "busy", load.asks("busy", stay.LONG, 4))
    assert [stream.tenant for stream in asked] == ["busy"] * 4
    assert len({stream.ask for stream in asked}) == 4


def tenant_row() -> TenantStatus:
    """A tenant's row with every total different."""
    return TenantStatus(
        tenant="t", class_="default", queued=1, running=0, held=0, oldest_queued_s=0.0, virtual_time=0.0,
        base=0.0, charged=0.0, lift=0.0, weight=1.0, uncached_input_tokens_total=30,
        cached_input_tokens_total=10, output_tokens_total=7, recomputed_tokens_total=99, finished_total=1,
    )  # fmt: skip


def report() -> Report:
    """A report in which every claim holds."""
    tokens = {"flood": 2, "busy": 2, "polite": 1}
    return Report(
        fcfs=Fairness(
            polite_ttft_p50_s=2.0, polite_ttft_p95_s=4.0, output_tokens=tokens, service_gap_tokens=9_000
        ),
        vtc=Fairness(
            polite_ttft_p50_s=0.2, polite_ttft_p95_s=0.5, output_tokens=tokens, service_gap_tokens=400
        ),
        hold=Hold(
            tokens_while_held=0,
            recomputed_tokens=0,
            identical=True,
            publish_to_applied_s=0.01,
            continue_to_next_token_s=0.02,
        ),
        priority=Priority(waiting_position_before=6, waiting_position_after=0, finished_before_others=True),
    )


def context() -> Context:
    """A context in which every claim holds."""
    return Context(polite_share=0.1, backlogged_s=29.0, wanted_s=30.0, others_while_held=300)


def eventually(fact, seconds: float = 10.0) -> None:
    """Wait until `fact()` is true."""
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False

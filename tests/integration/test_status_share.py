"""What status may cost the engine."""

import time

import pytest

from bench.rig import Rig, vllm_config
from coxswain.service.port import FrameOut
from coxswain.service.scheduler import report

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("cost_s", "least_s", "most_s"), [(0.0, 0.049, 0.4), (0.01, 0.5, 1.0), (0.1, 1.0, 1.0)]
)
@pytest.mark.parametrize("to", ["build", "hand over"])
def test_a_dear_frame_puts_off_the_next(
    monkeypatch: pytest.MonkeyPatch, to: str, cost_s: float, least_s: float, most_s: float
) -> None:
    """The time to the next frame is the interval, or what keeps status at 2 % of the engine's time, up to 1 s."""
    from coxswain.service.scheduler import SteeredScheduler

    monkeypatch.delenv("COX_NATS_URL", raising=False)
    rig = Rig(SteeredScheduler, vllm_config())
    scheduler = rig.scheduler
    scheduler.port.connected = True
    scheduler._draft(scheduler.now())  # the first one is slow: it runs code that never ran before
    cheap = scheduler.reporter.draft
    sent: list[object] = []

    def work() -> None:
        until = time.thread_time() + cost_s
        while time.thread_time() < until:
            pass

    def dear(*args: object, **fields: object) -> object:
        work()
        return cheap(*args, **fields)

    def encode() -> None:
        if to == "hand over":
            work()
        sent.extend(scheduler.port.collect())

    scheduler.port.attach_bus(encode)
    if to == "build":
        monkeypatch.setattr(scheduler.reporter, "draft", dear)
    moments: list[float] = []
    real = scheduler.now
    monkeypatch.setattr(scheduler, "now", lambda: moments.append(real()) or moments[-1])
    rig.add("r", tokens=4)
    moments.clear()
    rig.step()
    assert [type(item) for item in sent] == [FrameOut]
    assert least_s <= scheduler.cadence.at - moments[0] <= most_s
    scheduler.shutdown()


def test_an_engine_that_goes_to_sleep_says_everything_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bus that knows nothing is told in several drafts, with a time to wake between them; then nothing more.

    And once more, should it be another bus by then.
    """
    from coxswain.service.scheduler import SteeredScheduler

    monkeypatch.delenv("COX_NATS_URL", raising=False)
    monkeypatch.setattr(report, "ROWS_PER_STEP", 10)
    rig = Rig(SteeredScheduler, vllm_config())
    scheduler = rig.scheduler
    scheduler.port.connected = True
    now = 5_000.0
    monkeypatch.setattr(scheduler, "now", lambda: now)
    for number in range(25):
        scheduler.core.tenants.account(f"t{number}").seen = True
    scheduler.reporter.anew()
    said: list[FrameOut] = []
    scheduler.port.attach_bus(lambda: said.extend(scheduler.port.collect()))
    wishes: list[float | None] = []
    monkeypatch.setattr(scheduler.port, "wake_later", wishes.append)
    for _ in range(2):
        for _ in range(6):
            assert not scheduler.has_requests()
            assert wishes[-1] is None or wishes[-1] > 0
            now += wishes[-1] or 0.1
        assert [(item.idle, item.draft.fresh, item.draft.complete, len(item.draft.tenants)) for item in said] == [
            (True, True, False, 10), (True, False, False, 10), (True, False, True, 5)
        ]  # fmt: skip
        assert wishes[-3:] == [None] * 3
        said.clear()
        scheduler.port.begin_anew()
    scheduler.shutdown()

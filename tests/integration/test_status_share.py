"""What status may cost the engine."""

import time

import pytest

from bench.rig import Rig, vllm_config
from coxswain.service.port import FrameOut

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
    scheduler._frame(scheduler.now())  # the first one is slow: it runs code that never ran before
    cheap = scheduler.reporter.frame
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
        monkeypatch.setattr(scheduler.reporter, "frame", dear)
    monkeypatch.setattr(
        scheduler.cadence, "full", lambda *_, **__: False
    )  # a full one would come beside the delta, and cost as much again
    moments: list[float] = []
    real = scheduler.now
    monkeypatch.setattr(scheduler, "now", lambda: moments.append(real()) or moments[-1])
    rig.add("r", tokens=4)
    moments.clear()
    rig.step()
    assert [type(item) for item in sent] == [FrameOut]
    assert least_s <= scheduler.cadence.at - moments[0] <= most_s
    scheduler.shutdown()


def test_an_engine_with_a_dear_full_frame_goes_to_sleep_in_two_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """First what changed, with a time to wake; once a full frame has been paid for that one, which its bus repeats."""
    from coxswain.service.scheduler import SteeredScheduler

    monkeypatch.delenv("COX_NATS_URL", raising=False)
    rig = Rig(SteeredScheduler, vllm_config())
    scheduler = rig.scheduler
    scheduler.port.connected = True
    now = 5_000.0
    monkeypatch.setattr(scheduler, "now", lambda: now)
    scheduler.cadence.sent(now, 0.0, 0.03)  # it cost 30 ms, so three seconds pass to the next
    said: list[tuple[bool, bool]] = []

    def take() -> None:
        said.extend((item.draft.frame.full, item.idle) for item in scheduler.port.collect())

    scheduler.port.attach_bus(take)
    wishes: list[float | None] = []
    monkeypatch.setattr(scheduler.port, "wake_later", wishes.append)
    heard: list[list[tuple[bool, bool]]] = []
    for _ in range(8):
        assert not scheduler.has_requests()
        heard.append(said[:])
        said.clear()
        assert wishes[-1] is None or wishes[-1] > 0
        now += wishes[-1] or 0.0
    scheduler.shutdown()
    delta, full = (False, False), (True, True)
    assert heard[:6] == [[], [delta], [delta], [delta], [delta, full], []]
    assert wishes[4:] == [None] * 4

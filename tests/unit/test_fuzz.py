"""Whatever strangers send: no exception escapes, what is refused changes nothing, memory stays bounded."""

import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coxswain.schemas.commands import COMMANDS, VERBS, encode
from coxswain.schemas.events import Finished
from coxswain.schemas.policy import ClassPolicy, Lead, TenantPolicy
from coxswain.schemas.status import ClassStatus, Frame, KvBlocks, QueueQuery, RequestStatus
from coxswain.schemas.subjects import CONTROLLER
from tests.support import structs
from tests.support.frames import frame, request, row
from tests.support.fuzz import TARGETS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {"frame": 60}
"""Inputs per target, 100 where nothing is said. The same ones every time: `make fuzz` explores."""
ODD = st.sampled_from(
    ["Infinity", "NaN", "1e999", "-0", "9" * 400, "1e308", "-1e308", '"\\ud800"', "[" * 2_000, "null"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode())


KV = KvBlocks(total=100, used=50, held=0)
FEW = KvBlocks(total=100, used=1, held=0)


def class_row(name: str) -> ClassStatus:
    """A class of which one runs and one waits."""
    return ClassStatus(class_=name, queued=1, running=1, held=0, oldest_queued_s=0.0)


def waiting(name: str, **fields: Any) -> RequestStatus:
    """A request that waits."""
    return request(name, state="queued", position=0, **fields)


def held(name: str) -> RequestStatus:
    """A request that some controller holds."""
    return request(name, state="held", kv="kept", held_by=(CONTROLLER,))


def good(target: str) -> st.SearchStrategy[bytes]:
    """Inputs that the target takes, whole."""
    if target == "command":
        made = {verb: structs.of(COMMANDS[verb]).map(encode) for verb in VERBS}
        roles = st.sampled_from([0x00, 0x40, 0x80])
        # The target takes the verb from the first byte, modulo all and one more.
        return st.sampled_from(VERBS).flatmap(
            lambda verb: st.tuples(roles, made[verb]).map(
                lambda both: bytes([_first(VERBS.index(verb), both[0])]) + both[1]
            )
        )
    if target == "row":
        return (structs.of(TenantPolicy) | structs.of(ClassPolicy)).map(lambda row: b"YWNtZQ\n" + encode(row))
    if target == "question":
        return structs.of(QueueQuery).map(lambda query: b"queue\n" + encode(query))
    kinds = {"lead": Lead, "frame": Frame, "edge_frame": Frame, "answer": Finished}
    if target in kinds:
        return structs.of(kinds[target]).map(encode)
    if target == "headers":
        names = st.sampled_from(
            [
                "x-request-id",
                "x-vllm-priority",
                "x-cox-class",
                "x-tenant",
                "authorization",
                "x-api-key",
                "X-COX-CLASS",
            ]
        )
        lines = st.tuples(
            names, st.sampled_from(["batch", "gold", "beta", "-99", "9e9", "cox.beta..X"]) | st.text()
        )
        return st.lists(lines.map(": ".join), max_size=5).map(
            lambda each: "\n".join(each).encode(errors="replace")
        )
    return st.text().map(lambda text: text.encode(errors="surrogatepass"))


def _first(verb: int, role: int) -> int:
    return next(byte for byte in range(role, role + 0x40) if byte % (len(VERBS) + 1) == verb)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Good input with a piece cut out, doubled, or replaced by what parsers stumble over."""
    data = draw(whole)
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, len(data)))
    middle = draw(st.binary(max_size=8) | ODD.map(str.encode) | st.just(data[start:end] * 2))
    return data[:start] + middle + data[end:]


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_escapes(target: str) -> None:
    """Bytes, JSON of any shape, good messages and damaged ones: refused or taken, never a crash."""
    whole = good(target)

    @settings(
        max_examples=EXAMPLES.get(target, 100),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(max_size=200) | JSON | whole | damaged(whole))
    def run(data: bytes) -> None:
        TARGETS[target](data)

    run()


FORGED = {
    "a class, and somebody waits": [
        frame("w1", "01A", 1, row("a", queued=1), kv_blocks=KV, classes=(class_row("cha=t"),), running=2)
    ],
    "no tenant": [frame("w1", "01A", 1, row("", queued=1, max_running=1), row("a", queued=1))],
    "a long tenant": [frame("w1", "01A", 1, row("é" * 65, queued=1, max_running=1), row("a", queued=1))],
    "no request": [frame("w1", "01A", 1, requests=(waiting("", deadline_s=5.0), held("")))],
    "a long request": [frame("w1", "01A", 1, requests=(waiting("r" * 513), held("s" * 513)))],
    "what nobody was charged": [
        frame("w1", "01A", 1, row("a", queued=1)),
        frame("w1", "01A", 3, row("a", queued=1, charged=1e30)),
        frame("w2", "01A", 1, row("a", queued=1)),
    ],
    "more that run than there can be": [
        frame("w1", "01A", 1, row("a"), kv_blocks=FEW, classes=(class_row("chat"),), running=2**31 - 1)
    ],
    "a request before all time": [
        frame("w1", "01A", 1, requests=(waiting("r", arrived_at=-1e200),), queued=1)
    ],
    "more tokens than there are": [
        frame("w1", "01A", 1, row("a", queued=1), requests=(request("r", output_tokens=2**62),)),
        frame("w1", "01A", 3, row("a", queued=1)),
        frame("w2", "01A", 1, row("a", queued=1)),
    ],
}
"""What a worker may say of names and numbers that nobody can have: the frames of one or more."""


@pytest.mark.parametrize("said", FORGED)
def test_nobody_is_blamed_for_what_a_worker_forges(said: str) -> None:
    """Policies raise at none of it, and nothing of it comes into a command."""
    TARGETS["frame"](b"\n".join(map(encode, FORGED[said])))


@pytest.mark.parametrize("target", ["command", "question", "lead", "headers", "names"])
def test_floods_leave_nothing_behind(target: str) -> None:
    """Thousands of different inputs: what Python holds at the end is what it held after the first few hundred."""
    dice = random.Random(7)

    def flood(count: int) -> None:
        for number in range(count):
            text = b'{"id": "%d", "tenants": {"t%d": {}}, "incarnation": "i"}' % (
                number,
                dice.randrange(10**9),
            )
            TARGETS[target](bytes([dice.randrange(256)]) + text + dice.randbytes(20))

    flood(300)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        flood(1_500)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 2_000_000


@pytest.mark.timeout(60)
def test_libfuzzer_finds_nothing_in_a_few_seconds(tmp_path: Path) -> None:
    """A short run guided by coverage, from the protocol's examples: the same one every time. `make fuzz` explores."""
    pytest.importorskip("atheris")
    fuzz = [sys.executable, ROOT / "scripts" / "fuzz.py", "-runs=12000", "-rss_limit_mb=1024", "-seed=1"]
    # By a shell: Linux hands the most memory that we have had on to the program that we begin, and libFuzzer judges it.
    line = ["/bin/sh", "-c", '"$@"; exit $?', "sh", *fuzz]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONHASHSEED": "0"}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    # What was raised is in the one, the input that did it in the other.
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert "Done 12000 runs" in done.stderr, done.stderr[-2000:]

"""Keep what the documents quote equal to its source.

The JSON in `docs/protocol.md` is what the contract's own encoders write, between `<!-- example: NAME -->` and
`<!-- end -->`. Programs are files of `examples/`, between `<!-- program: PATH -->` and `<!-- end -->`.
`generated.py` compares or renews both.
"""

import json
import re
from pathlib import Path
from typing import Any, Final

import msgspec

from coxswain.schemas import commands as c
from coxswain.schemas import events as ev
from coxswain.schemas import policy as p
from coxswain.schemas import status as st
from coxswain.service import request_id

ROOT: Final = Path(__file__).resolve().parent.parent
DOCUMENTS: Final = ("README.md", "docs/protocol.md", "docs/policies.md", "docs/events.md")
WIDTH: Final = 100
"""Characters of a line: what is longer is spread over several."""

_EXAMPLE: Final = re.compile(r"(<!-- example: ([a-z_ ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_PROGRAM: Final = re.compile(r"(<!-- program: (examples/[a-z_]+\.py) -->\n).*?(<!-- end -->)", re.DOTALL)

AT: Final = 1767225600.0
EPOCH: Final = (1767139200.0, 12)
WORKER: Final = "w1"
INCARNATION: Final = "01KDWDQ8Q0J4E8Q7W3F9Z5T2YB"
REQUEST: Final = request_id.make(b"the example's key", "acme", "chat", "01KDWDTPT0C9W2K6R3X8M1N7VA")
OTHER: Final = request_id.make(b"the example's key", "globex", "", "01KDWDTQS8V5B7J2F4G6H8K0MD")
IDS: Final = iter(f"01KDWDV{number:019d}" for number in range(1_000))

CHAT: Final = p.ClassPolicy(position=0, order="fair", slo_s=30.0)
BATCH: Final = p.ClassPolicy(position=10, order="priority", cut_in="slots")
ACME: Final = p.TenantPolicy(weight=2.0, class_="chat", classes=("batch",), priority_min=0)

ROW: Final = st.RequestStatus(
    request=REQUEST, child=0, tenant="acme", class_="chat", priority=0, state="held", kv="kept",
    arrived_at=AT - 4.2, prompt_tokens=812, cached_tokens=512, output_tokens=57, deadline_s=AT + 25.8,
    held_by=("operator",),
)  # fmt: skip
WAITING: Final = st.RequestStatus(
    request=OTHER, child=0, tenant="globex", class_="default", priority=0, state="queued", kv="none",
    arrived_at=AT - 0.3, prompt_tokens=40, cached_tokens=0, output_tokens=0, deadline_s=None, position=0,
)  # fmt: skip
TENANT: Final = st.TenantStatus(
    tenant="acme", class_="chat", queued=0, running=0, held=1, oldest_queued_s=0.0, virtual_time=207.0,
    base=0.0, charged=207.0, lift=0.0, weight=2.0, uncached_input_tokens_total=300,
    cached_input_tokens_total=512, output_tokens_total=57, recomputed_tokens_total=0, finished_total=0,
    max_running=8,
)  # fmt: skip
CLASS: Final = st.ClassStatus(
    class_="chat", queued=0, running=0, held=1, oldest_queued_s=0.0, max_running=12, max_queued=200,
)  # fmt: skip
LEADER: Final = st.Leader(epoch=EPOCH, age_s=0.21, policy="vtc")
FRAME: Final = st.Frame(
    worker=WORKER, incarnation=INCARNATION, seq=88, full=True, part=0, parts=1, sent_at=AT, step=1204,
    model="Qwen/Qwen3-0.6B", vllm_version="0.32.0", state="serving",
    slots=st.Slots(active=16, total=24, running=0, held=1),
    kv_blocks=st.KvBlocks(total=512, used=28, held=28), step_s=0.018, queued=1, running=0, held=1,
    preempted_total=0, recomputed_tokens_total=0,
    commands=st.CommandStats(
        applied_total=3, rejected_total={"410": 1}, queue_depth=0,
        outcomes_total={"preempt": {"applied": 2}, "prioritize": {"applied": 1, "410": 1}},
    ), leader=LEADER,
    config=p.digest({"chat": CHAT}, {"acme": ACME}), events_dropped_total=0,
    tenants=(TENANT,), classes=(CLASS,), requests=(ROW, WAITING),
)  # fmt: skip


def _reply(**fields: Any) -> c.Reply:
    return c.Reply(id=next(IDS), worker=WORKER, incarnation=INCARNATION, worker_now=AT, step=1205, **fields)


def _event(kind: type[ev.Event], seq: int, **fields: Any) -> ev.Event:
    return kind(
        id=f"{WORKER}:{INCARNATION}:{seq}", worker=WORKER, incarnation=INCARNATION, seq=seq, at=AT, step=1205,
        request=REQUEST, child=0, tenant="acme", class_="chat", priority=0, **fields,
    )  # fmt: skip


def _named(*requests: str) -> c.Targets:
    return c.Targets(requests=requests)


EXAMPLES: Final[dict[str, msgspec.Struct]] = {
    "prioritize": c.Prioritize(
        id=next(IDS), issuer="ana@desk", expires_at=AT + 10, targets=_named(REQUEST), priority=-10
    ),
    "preempt": c.Preempt(
        id=next(IDS), issuer="ana@desk", expires_at=AT + 10, targets=_named(REQUEST), lease_s=30.0
    ),
    "continue": c.Continue(id=next(IDS), issuer="ana@desk", targets=c.Targets(tenants=("acme",))),
    "rank": c.Rank(
        id=next(IDS), issuer="ctl-1", epoch=EPOCH, expires_at=AT + 5, incarnation=INCARNATION,
        tenants={"acme": p.TenantRank(base=-35.0, weight=2.0), "globex": p.TenantRank()}, prices=p.Prices(),
    ),
    "configure": c.Configure(
        id=next(IDS), issuer="ctl-1", epoch=EPOCH, expires_at=AT + 5,
        classes={"chat": CHAT, "batch": BATCH}, tenants={"acme": ACME},
    ),
    "abort": c.Abort(id=next(IDS), issuer="ana@desk", targets=_named(REQUEST), reason="ran away"),
    "limit": c.Limit(id=next(IDS), issuer="ana@desk", targets=c.Targets(classes=("batch",)), max_running=4),
    "drain": c.Drain(id=next(IDS), issuer="ana@desk", on=True),
    "reply": _reply(
        outcome="partial", counts={"applied": 1, "not_found": 1},
        results=(
            c.TargetResult(request=REQUEST, child=0, outcome="applied", in_flight_tokens=1),
            c.TargetResult(
                request=OTHER, outcome="not_found", detail="no such request: finished, aborted, or never here"
            ),
        ),
    ),
    "refusal": _reply(
        outcome="rejected", code=410, error="expires_at passed 2.310 s ago by this worker's clock"
    ),
    "frame": FRAME,
    "queue query": st.QueueQuery(limit=100),
    "queue page": st.QueuePage(requests=(WAITING,), next=None, total=1),
    "request query": st.RequestQuery(request=REQUEST),
    "request report": st.RequestReport(
        request=REQUEST,
        children=(
            st.Child(
                status=ROW,
                story=(
                    st.StoryLine(at=AT - 4.2, step=1140, kind="queued", detail="prompt_tokens=812"),
                    st.StoryLine(
                        at=AT - 4.1, step=1141, kind="admitted",
                        detail="uncached_input_tokens=300 cached_input_tokens=512 queued_s=0.100",
                    ),
                    st.StoryLine(
                        at=AT, step=1204, kind="held",
                        detail="by=operator kv=kept reason=ana@desk lease_s=30.000 in_flight_tokens=1",
                    ),
                ),
            ),
        ),
    ),
    "config": st.Config(
        worker=WORKER, incarnation=INCARNATION, digest=p.digest({"chat": CHAT}, {"acme": ACME}),
        classes={"default": p.ClassPolicy(), "chat": CHAT}, tenants={"acme": ACME}, prices=p.Prices(),
        leader=LEADER, vllm_version="0.32.0",
        scheduler={"max_num_seqs": 24, "max_num_active_seqs": 16, "max_num_batched_tokens": 2048,
                   "async_scheduling": True, "enable_prefix_caching": True, "block_size": 16,
                   "model_runner": "v2", "kv_connector": None},
    ),
    "held": _event(
        ev.Held, 41, by="operator", kv="kept", reason="ana@desk", lease_s=30.0, in_flight_tokens=1,
        output_tokens=57,
    ),
    "continued": _event(
        ev.Continued, 42, by="operator", reason="command", held_s=3.1, output_tokens=58
    ),
    "finished": _event(
        ev.Finished, 57, reason="stop", uncached_input_tokens=300, cached_input_tokens=512, output_tokens=140,
        recomputed_tokens=0, discarded_tokens=1, queued_s=0.1, ttft_s=0.14, held_s=3.1, run_s=2.6,
    ),
    "command": ev.CommandSeen(
        id=f"{WORKER}:{INCARNATION}:43", worker=WORKER, incarnation=INCARNATION, seq=43, at=AT, step=1205,
        command="01KDWDV0000000000000000001", verb="preempt", role="operator", issuer="ana@desk",
        outcome="applied", counts={"applied": 1},
    ),
    "lead": p.Lead(
        epoch=EPOCH, controller="ctl-1", policy="vtc", at=AT,
        sees=p.Sight(workers=1, tenants=2, queued=1, running=0, held=1),
    ),
    "lease holder": p.LeaseHolder(controller="ctl-1", policy="vtc", version="0.1.0", since=AT - 3_600),
    "class row": CHAT,
    "tenant row": ACME,
}  # fmt: skip


def payload(name: str) -> bytes:
    """The example as it crosses the wire."""
    return c.encode(EXAMPLES[name])


def shown(name: str) -> str:
    """The example as the document shows it: the wire's JSON, laid out for people."""
    return _laid_out(json.loads(payload(name)), "", 0)


def _laid_out(value: Any, indent: str, used: int) -> str:
    """JSON in lines of at most `WIDTH`: a field to a line outside, as many as fit inside."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + used + len(line) <= WIDTH or not isinstance(value, dict | list):
        return line
    inner = indent + "  "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _laid_out(item, inner, 1) for item in value) + f"\n{indent}]"
    fields = [f"{json.dumps(key)}: {_laid_out(item, inner, len(key) + 5)}" for key, item in value.items()]
    lines = _filled(fields, WIDTH - len(inner)) if indent else fields
    return "{\n" + ",\n".join(inner + line for line in lines) + f"\n{indent}}}"


def _filled(fields: list[str], width: int) -> list[str]:
    lines: list[str] = []
    for field in fields:
        if lines and "\n" not in lines[-1] + field and len(lines[-1]) + 3 + len(field) <= width:
            lines[-1] += f", {field}"
        else:
            lines.append(field)
    return lines


def renewed(text: str) -> str:
    """A document with everything that it quotes as it is now.

    Raises:
        KeyError: if it asks for an example that does not exist.
        OSError: if it asks for a program that does not exist.
    """
    text = _EXAMPLE.sub(lambda match: f"{match[1]}```json\n{shown(match[2])}\n```\n{match[3]}", text)
    return _PROGRAM.sub(
        lambda match: f"{match[1]}```python\n{(ROOT / match[2]).read_text()}```\n{match[3]}", text
    )


def quoted_in(text: str) -> set[str]:
    """The examples and programs that a document quotes."""
    return {match[2] for pattern in (_EXAMPLE, _PROGRAM) for match in pattern.finditer(text)}


def texts() -> dict[Path, str]:
    """Every document as it should be."""
    return {ROOT / name: renewed((ROOT / name).read_text()) for name in DOCUMENTS}

"""The commands that steer: `hold`, `continue`, `prioritize`, `abort` requests, `rank` and `limit` tenants, `drain`.

Lives here: their options and one way to send; `verdict.py` says what replies mean. Called by `__init__.py`.
"""

import getpass
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
import typer
from ulid import ULID

from coxswain.control.cli import parse
from coxswain.control.cli.app import Cox, option, or_none
from coxswain.control.cli.exits import CliError, Exit
from coxswain.control.cli.verdict import judge, outcome, skew_s
from coxswain.control.cli.words import plural, span
from coxswain.schemas import commands
from coxswain.schemas.names import ALL
from coxswain.schemas.policy import TenantRank
from coxswain.schemas.subjects import OPERATOR

if TYPE_CHECKING:
    from coxswain.control.client import Client

EXPIRY_S: Final = 30.0
"""A command that could not be delivered at once dies after this: nothing happens later, unexpectedly.
Half of what the protocol allows, so that clocks may be 30 s apart in either direction."""
SKEW_S: Final = 1.0
"""Clocks further apart than this are reported."""

Requests = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="REQUEST",
        parser=option(parse.request),
        show_default=False,
        help="Request ids: the X-Request-Id of the response, or the body's id; `-` reads them from stdin.",
    ),
]
Tenants = Annotated[
    list[str] | None,
    typer.Option(
        "--tenant",
        metavar="TENANT",
        parser=option(parse.tenant),
        help="All requests of this tenant; repeatable.",
    ),
]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        metavar="CLASS",
        parser=option(parse.class_name),
        help="All requests of this class; repeatable.",
    ),
]
All = Annotated[bool, typer.Option("--all", help="All requests that the workers have now.")]
Worker = Annotated[
    str,
    typer.Option(
        "--worker",
        metavar="NAME",
        parser=option(parse.worker_or_all),
        help="One worker, or `all`.",
    ),
]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a steering command prints with `--json`."""

    verb: str
    outcome: str
    """`applied`, `partial` or `rejected`, over all workers."""
    missing: tuple[str, ...]
    """Named requests and classes that no worker knows, where some were found."""
    replies: tuple[commands.Reply, ...]


async def hold(
    cox: Cox,
    requests: Requests = None,
    tenant: Tenants = None,
    class_: Classes = None,
    all: All = False,
    kv: Annotated[
        Literal["keep", "drop"],
        typer.Option(
            help="keep: nothing is computed twice; drop: free the KV blocks, recompute on continue."
        ),
    ] = "keep",
    lease: Annotated[
        float | None,
        typer.Option(
            metavar="DURATION",
            parser=option(parse.lease_s),
            help="Continue automatically after this: 30s, 10m; at most a day. Without it: until continued.",
        ),
    ] = None,
    worker: Worker = ALL,
) -> Exit:
    """Hold requests: no step runs them until they are continued."""
    targets = _targets(requests, tenant, class_, all)
    command = commands.Preempt(**envelope(), targets=targets, kv=kv, lease_s=lease)
    return await _send(cox, worker, "preempt", command, done="held")


async def continue_(
    cox: Cox,
    requests: Requests = None,
    tenant: Tenants = None,
    class_: Classes = None,
    all: All = False,
    worker: Worker = ALL,
) -> Exit:
    """Continue held requests, whoever holds them."""
    command = commands.Continue(**envelope(), targets=_targets(requests, tenant, class_, all))
    return await _send(cox, worker, "continue", command, done="continued")


async def prioritize(
    cox: Cox,
    requests: Requests = None,
    tenant: Tenants = None,
    from_class: Annotated[
        list[str] | None,
        typer.Option(
            "--from-class",
            metavar="CLASS",
            parser=option(parse.class_name),
            help="All requests that are in this class now; repeatable.",
        ),
    ] = None,
    all: All = False,
    priority: Annotated[
        int | None,
        typer.Option(metavar="N", parser=option(parse.priority), help="New priority; lower runs first."),
    ] = None,
    class_: Annotated[
        str | None,
        typer.Option("--class", metavar="CLASS", parser=option(parse.class_name), help="New class."),
    ] = None,
    worker: Worker = ALL,
) -> Exit:
    """Change the priority or class of queued and running requests."""
    if priority is None and class_ is None:
        raise CliError(Exit.USAGE, "nothing to change: give --priority N (lower runs first) or --class CLASS")
    targets = _targets(requests, tenant, from_class, all)
    command = commands.Prioritize(**envelope(), targets=targets, priority=priority, class_=class_)
    return await _send(cox, worker, "prioritize", command, done="changed")


async def abort(
    cox: Cox,
    requests: Requests = None,
    tenant: Tenants = None,
    class_: Classes = None,
    all: All = False,
    reason: Annotated[
        str, typer.Option(metavar="TEXT", help="For logs and events; at most 512 characters.")
    ] = "",
    worker: Worker = ALL,
) -> Exit:
    """End requests; their clients see finish_reason `abort` at once."""
    targets = _targets(requests, tenant, class_, all)
    command = commands.Abort(**envelope(), targets=targets, reason=reason[:512])
    return await _send(cox, worker, "abort", command, done="aborted")


async def rank(
    cox: Cox,
    weights: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TENANT=WEIGHT",
            parser=option(parse.tenant_weight),
            show_default=False,
            help="Share of each tenant relative to the others.",
        ),
    ] = None,
    worker: Annotated[
        str,
        typer.Option(
            metavar="NAME", parser=option(parse.worker_name), help="The worker: ranks are per worker."
        ),
    ] = ...,  # type: ignore[assignment]
    base: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TENANT=TOKENS",
            parser=option(parse.tenant_number),
            help="Base of virtual time, in priced tokens per weight; lower runs first; repeatable.",
        ),
    ] = None,
) -> Exit:
    """Set weights and bases of tenants on one worker, by hand; a controller's next rank replaces them."""
    by_weight, by_base = dict(_pairs(weights)), dict(_pairs(base))
    if not by_weight and not by_base:
        raise CliError(
            Exit.USAGE, "nothing to set: give TENANT=WEIGHT, for example acme=2, or --base TENANT=TOKENS"
        )
    async with cox.client() as client:
        [frame] = await client.query(worker, "status", timeout_s=cox.timeout_s)
        # A rank sets both values of a tenant: what is not given stays as the worker has it.
        now = {row.tenant: TenantRank(base=row.base, weight=row.weight) for row in frame.tenants}
        tenants = {
            tenant: TenantRank(
                base=by_base.get(tenant, now.get(tenant, TenantRank()).base),
                weight=by_weight.get(tenant, now.get(tenant, TenantRank()).weight),
            )
            for tenant in sorted(by_weight.keys() | by_base.keys())
        }
        command = commands.Rank(**envelope(), incarnation=frame.incarnation, tenants=tenants)
        done = f"ranked {plural(len(tenants), 'tenant')}"
        return await _send_over(client, cox, worker, "rank", command, done=done, noun="tenant")


async def limit(
    cox: Cox,
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            "--tenant", metavar="TENANT", parser=option(parse.tenant), help="Cap this tenant; repeatable."
        ),
    ] = None,
    class_: Annotated[
        list[str] | None,
        typer.Option(
            "--class", metavar="CLASS", parser=option(parse.class_name), help="Cap this class; repeatable."
        ),
    ] = None,
    max_running: Annotated[
        Any, or_none("Requests that may run at once; none: no cap.", parse.count_or_none, "N|none")
    ] = None,
    max_queued: Annotated[
        Any, or_none("Requests that may wait; none: no cap.", parse.count_or_none, "N|none")
    ] = None,
    max_prefill_tokens_per_step: Annotated[
        Any, or_none("Prompt tokens in one step; none: no cap.", parse.count_or_none, "N|none")
    ] = None,
    worker: Worker = ALL,
) -> Exit:
    """Cap the requests of tenants or classes on each worker, until lifted or until the worker restarts."""
    given = {
        "max_running": max_running,
        "max_queued": max_queued,
        "max_prefill_tokens_per_step": max_prefill_tokens_per_step,
    }
    caps: dict[str, Any] = {
        name: None if value is msgspec.UNSET else value for name, value in given.items() if value is not None
    }
    if not caps:
        raise CliError(
            Exit.USAGE,
            "nothing to cap: give --max-running N, --max-queued N or another cap; `none` lifts one",
        )
    if not tenant and not class_:
        raise CliError(Exit.USAGE, "no target: name a --tenant or a --class")
    command = commands.Limit(**envelope(), targets=_targets(None, tenant, class_, all_=False), **caps)
    return await _send(cox, worker, "limit", command, done="changed the caps of", noun="target")


async def drain(
    cox: Cox,
    worker: Annotated[
        str,
        typer.Option(
            "--worker",
            metavar="NAME",
            parser=option(parse.worker_or_all),
            help="The worker, or `all`.",
        ),
    ] = ...,  # type: ignore[assignment]
    off: Annotated[bool, typer.Option("--off", help="Serve again.")] = False,
) -> Exit:
    """Empty a worker: refuse new requests (503), run the others to their end, end all holds."""
    command = commands.Drain(**envelope(), on=not off)
    done = "serving again" if off else "draining"
    async with cox.client() as client:
        return await _send_over(client, cox, worker, "drain", command, done=done, noun="request")


def _targets(
    requests: list[str] | None,
    tenants: list[str] | None,
    classes: list[str] | None,
    all_: bool,
) -> commands.Targets:
    named = [line for each in requests or () for line in (_stdin_ids() if each == "-" else (each,))]
    targets = commands.Targets(
        requests=tuple(dict.fromkeys(named)),
        tenants=tuple(dict.fromkeys(tenants or ())),
        classes=tuple(dict.fromkeys(classes or ())),
        all=all_,
    )
    if not targets.count and not targets.all:
        raise CliError(Exit.USAGE, "no target: name requests, a tenant or a class, or give --all")
    return targets


def _stdin_ids() -> list[str]:
    try:
        return [parse.request(line.strip()) for line in sys.stdin if line.strip()]
    except ValueError as error:  # also of bytes that are no UTF-8
        raise CliError(Exit.USAGE, f"stdin: {error}") from error


def _pairs(values: list[Any] | None) -> list[tuple[str, float]]:
    return list(values or ())  # the option's parser has made them pairs


def envelope() -> dict[str, Any]:
    """What every command of an operator has: an id, who asks, until when it may be applied."""
    return {"id": str(ULID()), "issuer": _issuer(), "expires_at": time.time() + EXPIRY_S}


def _issuer() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry for this user
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"[:128]


async def _send(
    cox: Cox, worker: str, verb: str, command: commands.Targeted, *, done: str, noun: str = "request"
) -> Exit:
    async with cox.client() as client:
        return await _send_over(client, cox, worker, verb, command, done=done, noun=noun)


async def _send_over(
    client: "Client",
    cox: Cox,
    worker: str,
    verb: str,
    command: commands.Command,
    *,
    done: str,
    noun: str,
) -> Exit:
    asked_at = time.time()
    replies = await client.command(worker, verb, command, role=OPERATOR, timeout_s=cox.timeout_s)
    answered_at = time.time()
    replies = sorted(replies, key=lambda reply: reply.worker)
    targets = command.targets if isinstance(command, commands.Targeted) else None
    verdict = judge(done, noun, targets, replies)
    cox.emit(Outcome(verb=verb, outcome=outcome(verdict), missing=verdict.missing, replies=tuple(replies)))
    for line in verdict.lines:
        cox.say(line, hang=2)
    for problem in verdict.problems:
        cox.warn(f"cox: {problem}")
    for reply in replies:
        _warn_of(cox, reply, skew_s(reply.worker_now, asked_at, answered_at))
    return verdict.code


def _warn_of(cox: Cox, reply: commands.Reply, skew: float) -> None:
    if reply.ignored:
        cox.warn(f"cox: {reply.worker} ignored fields it does not know: {', '.join(reply.ignored)}")
    if abs(skew) > SKEW_S:
        side = "ahead of" if skew > 0 else "behind"
        cox.warn(
            f"cox: the clock of {reply.worker} is {span(abs(skew))} {side} this machine's: check NTP on both"
        )

"""A fleet on a NATS that asks everybody who they are, over TLS: every role does its work, refusals are seen."""

import asyncio
import datetime as dt
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec.structs import replace
from typer.testing import CliRunner

from coxswain.common.connection import Connection
from coxswain.control.cli import app
from coxswain.control.cli.exits import Exit
from coxswain.control.client import Client
from coxswain.control.daemon import Controller
from coxswain.control.errors import DeniedError, UnreachableError
from coxswain.control.policies.vtc import Vtc
from coxswain.control.tables import init
from coxswain.schemas.commands import Abort, Targets, encode
from coxswain.schemas.policy import Lead, TenantPolicy
from coxswain.service.port import LeadIn
from tests.support.bus import Worker
from tests.support.nats import NatsServer, binary
from tests.support.secured import FLEET, Secured, secured
from tests.support.steered import engine_id, public_id, steered_rig
from tests.support.waiting import eventually

pytestmark = [pytest.mark.nats, pytest.mark.timeout(120)]

ABORT = Abort(id="a1", targets=Targets(all=True))
VIOLATION = " Violation - "
"""In the server's log: a publish or subscription was refused."""


def certificate(folder: Path, name: str = "server") -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, private = folder / f"{name}.pem", folder / f"{name}.key"
    pem.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    encoding = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private.write_bytes(key.private_bytes(*encoding))
    return pem, private


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Secured, str]]:
    """A server over TLS, and the file that verifies it."""
    folder = tmp_path_factory.mktemp("tls")
    pem, key = certificate(folder)
    server = Secured(folder, f'tls {{ cert_file: "{pem}", key_file: "{key}" }}')
    server.nats.start()
    yield server, str(pem)
    server.nats.kill()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A server with every role, without TLS."""
    with secured(tmp_path_factory.mktemp("plain")) as server:
        yield server


@pytest.mark.vllm
async def test_every_role_does_its_work_over_tls(tls: tuple[Secured, str]) -> None:
    """`init`, tables, a leader, a worker, a command, the log, a viewer's look: the server refuses nothing."""
    server, ca = tls
    async with await Client.connect(server.at("admin", ca=ca)) as admin:
        await init(admin.js, admin.subjects)
    controller = Controller(server.at("controller", ca=ca), Vtc(Vtc.Params()))
    leading = asyncio.create_task(controller.run())
    env = {**server.env("worker-w1"), "COX_NATS_CA": ca}
    try:
        async with (
            await Client.connect(server.at("operator", ca=ca)) as operator,
            await Client.connect(server.at("viewer", ca=ca)) as viewer,
            await Client.connect(server.at("edge", ca=ca)) as edge,
        ):
            await operator.tenants.put("acme", TenantPolicy(weight=2.0))
            with steered_rig(server.nats.url, env=env) as rig:
                core = rig.scheduler.core
                await eventually(lambda: core.tenants.table.get("acme"))
                public = public_id("acme")
                rig.submit(engine_id(public), tokens=900)
                await eventually(lambda: core.roster.families.get(public))
                await operator.command("w1", "abort", Abort(id="a1", targets=Targets(requests=(public,))))
                for client in (viewer, edge):
                    assert (await anext(client.frames())).worker == "w1"
                assert (await viewer.query("w1", "status"))[0].tenants
                assert (await viewer.tenants.get_all()).good["acme"].weight == 2.0
                assert await operator.tenants.delete("acme")
                kinds = []
                async with asyncio.timeout(60), aclosing(viewer.events(start="all", tenant="acme")) as log:
                    async for event in log:
                        kinds.append(event.__struct_config__.tag)
                        if kinds[-1] == "finished":
                            break
                assert kinds[0] == "queued"
    finally:
        controller.stopping.set()
        with suppress(asyncio.CancelledError):
            await leading
    assert VIOLATION not in server.nats.log.read_text()


def test_cox_says_nothing_of_its_own_accord_over_tls(tls: tuple[Secured, str]) -> None:
    """What asyncio has to say of the end of a TLS connection is not for people who asked for their tables."""
    server, ca = tls
    env = {**os.environ, **server.env("admin"), "COX_NATS_CA": ca}
    done = subprocess.run(
        [sys.executable, "-c", "from coxswain.control.cli import main; main()", "init"],
        env=env, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""


async def test_tls_is_never_given_up(tls: tuple[Secured, str], plain: Secured, tmp_path: Path) -> None:
    """A stranger's certificate, no CA, and a server that offers no TLS: the connection is refused, with the reason."""
    server, ca = tls
    strange, _ = certificate(tmp_path, "stranger")
    for connection, why in (
        (server.at("viewer", ca=str(strange)), "(?i)certificate"),
        (server.at("viewer"), "(?i)certificate"),
        (plain.at("viewer", ca=ca), "offers no TLS"),
        (replace(plain.at("viewer"), urls=(plain.nats.url.replace("nats:", "tls:"),)), "offers no TLS"),
    ):
        with pytest.raises(UnreachableError, match=why):
            await Client.connect(connection, timeout_s=5)
    with Worker(plain.nats.url, COX_NATS_CA=ca) as worker:
        await eventually(lambda: worker.logged("nats.unreachable"))
        assert "offers no TLS" in worker.logged("nats.unreachable")[0]["error"]


async def test_clients_say_at_once_what_their_role_may_not(plain: Secured) -> None:
    """Commands, tables, queries and subscriptions: an error that names the subject, well before any time-out."""
    async with (
        await Client.connect(plain.at("viewer")) as viewer,
        await Client.connect(plain.at("admin")) as admin,
    ):
        for attempt, subject in (
            (lambda: viewer.command("w1", "abort", ABORT, timeout_s=60), r"cmd\.operator\.w1\.abort"),
            (lambda: viewer.command("all", "abort", ABORT, timeout_s=60), r"cmd\.operator\.all\.abort"),
            (lambda: viewer.tenants.put("acme", TenantPolicy()), r"\$kv\.cox_main_tenants"),
            (lambda: admin.query("w1", "status", timeout_s=60), r"query\.w1\.status"),
            (lambda: anext(admin.frames()), r"hear cox\.v1\.main\.status"),
            (lambda: anext(admin.events()), r"hear cox\.v1\.main\.event"),
            (admin.tenants.get_all, r"consumer\.create"),
        ):  # fmt: skip
            async with asyncio.timeout(4):
                with pytest.raises(DeniedError, match=subject):
                    await attempt()


def cox(server: Secured, label: str, *words: str) -> Any:
    """Run `cox` as a user."""
    return CliRunner().invoke(app, words, env=server.env(label))


def test_cox_says_what_the_role_may_not(plain: Secured) -> None:
    """Exit 5 and one line with the subject and what to do, for commands and tables alike."""
    for words in (("abort", "r1"), ("tenants", "set", "acme", "--weight", "2")):
        refused = cox(plain, "viewer", *words)
        assert refused.exit_code == Exit.REFUSED
        assert "NATS refused: this user may not send to" in refused.stderr
        assert "COX_NATS_NKEY" in refused.stderr


async def test_a_worker_with_a_peers_key_says_so_and_is_deaf(plain: Secured) -> None:
    """A worker whose name is not its key's hears nothing and logs an error with what to do."""
    with Worker(plain.nats.url, **plain.env("worker-w2")) as worker:
        await eventually(lambda: worker.logged("nats.denied"))
        assert any("cmd.*.w1.*" in line["error"] for line in worker.logged("nats.denied"))
        assert "cox init --auth" in worker.logged("nats.denied")[0]["hint"]


async def test_a_controller_with_another_roles_key_says_so_and_goes_on_trying(
    plain: Secured, capsys: pytest.CaptureFixture[str]
) -> None:
    """It neither dies nor leads; its log names the subject."""
    controller = Controller(plain.at("admin"), Vtc(Vtc.Params()))
    running = asyncio.create_task(controller.run())
    told = ""

    def said() -> bool:
        nonlocal told
        told += "".join(capsys.readouterr())
        return "nats.denied" in told

    await eventually(said)
    assert "cox.v1.main.status" in told
    assert not running.done()
    controller.stopping.set()
    await running


async def test_only_a_controller_can_claim_to_lead(plain: Secured) -> None:
    """A forged `lead` of any other role does not reach a worker; a controller's absurd epoch is not believed."""
    future = Lead(epoch=(4e9, 9), controller="forged", policy="none", at=0.0)
    with Worker(plain.nats.url, **plain.env("worker-w1")) as worker:
        await worker.connected()
        for label in ("viewer", "operator", "edge", "admin", "worker-w2"):
            async with await Client.connect(plain.at(label)) as client:
                await client.nc.publish(client.subjects.lead, encode(future))
                await client.nc.flush()
        async with await Client.connect(plain.at("controller")) as controller:
            await controller.nc.publish(controller.subjects.lead, encode(future))
            await eventually(lambda: worker.logged("lead.not_believed"))
    assert [line["times"] for line in worker.logged("lead.not_believed")] == [1]
    assert not any(isinstance(item, LeadIn) for item in worker.engine.taken)


def test_keys_are_made_once_kept_and_revoked(tmp_path: Path) -> None:
    """Seeds are readable by the owner only and never printed; a second run keeps them; a revoked user is gone."""
    folder = tmp_path / "auth"
    words = ("init", "--auth", "--out", str(folder))
    first = CliRunner().invoke(app, [*words, "--worker", "w1", "--worker", "big:2"])
    assert first.exit_code == Exit.DONE, first.output
    seeds = {path.name: path.read_text().strip() for path in (folder / "keys").iterdir()}
    assert {"worker-w1.nk", "worker-big.nk", "operator.nk", "admin.nk"} <= set(seeds)
    for path in (folder / "keys").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "keys").stat().st_mode) == 0o700
    again = CliRunner().invoke(app, [*words, "--worker", "w2", "--revoke", "worker-w1", "--json"])
    told = json.loads(again.stdout)
    assert list(told["made"]) == ["worker-w2"]
    assert told["revoked"] == ["worker-w1"]
    assert seeds["operator.nk"] == (folder / "keys" / "operator.nk").read_text().strip()
    written = (
        first.output + again.output + (folder / "auth.conf").read_text() + (folder / "users.json").read_text()
    )
    assert not any(seed in written for seed in seeds.values())
    assert "status.big-dp1" in written
    assert "# worker-w1" not in (folder / "auth.conf").read_text()
    wrong = CliRunner().invoke(app, [*words, "--fleet", "second"])
    assert (wrong.exit_code, "use another folder" in wrong.stderr) == (Exit.UNEXPECTED, True)
    assert CliRunner().invoke(app, [*words, "--user", "god"]).exit_code == Exit.USAGE


@pytest.mark.parametrize("content", [None, b"", b"SUNOSEED", b"\xff\xfe"])
async def test_a_bad_seed_is_named_and_not_shown(
    tmp_path: Path, nats_server: NatsServer, content: bytes | None
) -> None:
    """No file, an empty one, nonsense: the file's name and the variable, never what stands in it."""
    path = tmp_path / "user.nk"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreachableError, match="COX_NATS_NKEY") as told:
        await Client.connect(Connection(urls=(nats_server.url,), fleet=FLEET, nkey=str(path)))
    assert "SUNOSEED" not in str(told.value)


def test_the_configuration_that_we_ship_starts_a_server(tmp_path: Path) -> None:
    """`deploy/nats-server.conf` with `auth.conf` beside it: nats-server takes it, but for its paths."""
    text = (Path(__file__).parents[2] / "deploy" / "nats-server.conf").read_text()
    pem, key = certificate(tmp_path)
    for path, ours in (
        ("/etc/nats/tls/server.pem", pem),
        ("/etc/nats/tls/server.key", key),
        ("/var/lib/nats", tmp_path),
    ):
        assert path in text
        text = text.replace(path, str(ours))
    Secured(tmp_path)  # writes auth.conf
    (tmp_path / "auth" / "shipped.conf").write_text(text)
    done = subprocess.run(
        [binary(), "-t", "--config", tmp_path / "auth" / "shipped.conf"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

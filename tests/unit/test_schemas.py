"""The wire contract: what decodes, what is refused and why, what is ignored; nothing is lost on the way."""

import json
import re

import jsonschema
import msgspec
import nkeys
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from coxswain.common.connection import (
    DEFAULT_URL,
    MAX_PINGS,
    PING_INTERVAL_S,
    AddressRefusedError,
    Connection,
    IdentityRefusedError,
)
from coxswain.schemas import commands, events, names, policy, status
from coxswain.schemas.commands import VERBS
from coxswain.schemas.errors import UNREADABLE, Code, RefusedError
from coxswain.schemas.jsonschema import ROOTS, document
from coxswain.schemas.names import NameRefusedError
from coxswain.schemas.status import ClassStatus, decode_glance
from coxswain.schemas.subjects import QUERIES, ROLES, Subjects
from tests.support import structs
from tests.support.frames import frame, request, row

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
TARGETS = {"requests": ["r1"]}
MINIMAL = {
    "prioritize": {"targets": TARGETS},
    "preempt": {"targets": TARGETS},
    "continue": {"targets": TARGETS},
    "limit": {"targets": TARGETS},
    "rank": {"incarnation": "01J"},
    "configure": {},
    "abort": {"targets": TARGETS},
    "drain": {"on": True},
}


def _payload(verb, **fields):
    return json.dumps({"id": "c1", **MINIMAL[verb], **fields}).encode()


def _refusal(verb, raw):
    with pytest.raises(RefusedError) as caught:
        commands.decode(verb, raw)
    return caught.value


def _by_name(struct):
    return struct.__name__


# Commands


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_needs_little_more_than_an_id(verb):
    """The smallest payload of each verb decodes into that verb's struct, and nothing in it is ignored."""
    command, ignored = commands.decode(verb, _payload(verb))
    assert type(command) is commands.COMMANDS[verb]
    assert command.id == "c1"
    assert ignored == ()


@pytest.mark.parametrize(("verb", "struct"), commands.COMMANDS.items(), ids=VERBS)
@quick
@given(data=st.data())
def test_commands_come_back_as_they_were_sent(verb, struct, data):
    """Encoding and decoding any command gives an equal one, whatever its fields hold."""
    sent = data.draw(structs.of(struct).filter(_names_something))
    received, ignored = commands.decode(verb, commands.encode(sent))
    assert received == sent
    assert ignored == ()


def _names_something(command):
    return not isinstance(command, commands.Targeted) or command.targets.all or command.targets.count


@pytest.mark.parametrize("verb", ["", "hold", "PREEMPT", "preempt "])
def test_an_unknown_verb_is_refused_with_the_known_ones(verb):
    """A verb that nobody knows is malformed, and the text lists those that exist."""
    error = _refusal(verb, _payload("preempt"))
    assert error.code == Code.MALFORMED
    assert all(known in error.message for known in VERBS)


MALFORMED = [
    ("preempt", b"", "truncated"),
    ("preempt", b"{", "truncated"),
    ("preempt", b"\xff\xfe", "malformed"),
    ("preempt", b'{"id": "\xff"}', "utf-8"),
    ("preempt", b'{"a":' * 50_000, "recursion"),
    ("preempt", b"null", "Expected `object`, got `null`"),
    ("preempt", b"[]", "Expected `object`, got `array`"),
    ("preempt", b"{}", "`id`"),
    ("preempt", b'{"id": "c1"}', "`targets`"),
    ("preempt", _payload("preempt", id=""), "$.id"),
    ("preempt", _payload("preempt", id="a b"), "$.id"),
    ("preempt", _payload("preempt", id="c1\n"), "$.id"),
    ("preempt", _payload("preempt", id="x" * 65), "$.id"),
    ("preempt", _payload("preempt", issuer="x" * 129), "$.issuer"),
    ("preempt", _payload("preempt", epoch=1), "$.epoch"),
    ("preempt", _payload("preempt", epoch=[1.0]), "$.epoch"),
    ("preempt", _payload("preempt", epoch=[1.0, -1]), "$.epoch[1]"),
    ("preempt", _payload("preempt", epoch=[1.0, 2**63]), "$.epoch[1]"),
    ("preempt", _payload("preempt", expires_at="soon"), "$.expires_at"),
    ("preempt", _payload("preempt", expires_at=10**400), "$.expires_at"),
    ("preempt", _payload("preempt", kv="park"), "$.kv"),
    ("preempt", _payload("preempt", lease_s=0), "$.lease_s"),
    ("preempt", _payload("preempt", lease_s=86_401), "$.lease_s"),
    ("preempt", _payload("preempt", targets=None), "$.targets"),
    ("preempt", _payload("preempt", targets=["r1"]), "$.targets"),
    ("preempt", _payload("preempt", targets={"requests": "r1"}), "$.targets.requests"),
    ("preempt", _payload("preempt", targets={"requests": [""]}), "$.targets.requests[0]"),
    ("preempt", _payload("preempt", targets={"requests": ["x" * 513]}), "$.targets.requests[0]"),
    ("preempt", _payload("preempt", targets={"classes": ["Gold"]}), "$.targets.classes[0]"),
    ("preempt", _payload("preempt", targets={"classes": ["gold\n"]}), "$.targets.classes[0]"),
    ("preempt", _payload("preempt", targets={"tenants": ["ä" * 65]}), "130 bytes"),
    ("preempt", _payload("preempt", targets={"all": 1}), "$.targets.all"),
    ("prioritize", _payload("prioritize", priority=2**31), "$.priority"),
    ("prioritize", _payload("prioritize", priority=1.5), "$.priority"),
    ("prioritize", _payload("prioritize", **{"class": "a.b"}), "$.class"),
    ("limit", _payload("limit", max_running=-1), "$.max_running"),
    ("rank", b'{"id": "c1"}', "`incarnation`"),
    ("rank", _payload("rank", tenants={"a": None}), "$.tenants[...]"),
    ("rank", _payload("rank", tenants={"": {}}), "$.tenants"),
    ("rank", _payload("rank", tenants={"ä" * 65: {}}), "130 bytes"),
    ("rank", _payload("rank", tenants={"a": {"weight": 0}}), "$.tenants[...].weight"),
    ("rank", _payload("rank", tenants={"a": {"base": 1e300}}), "$.tenants[...].base"),
    ("rank", _payload("rank", prices={"input": -1}), "$.prices.input"),
    ("configure", _payload("configure", classes={"a b": {}}), "$.classes"),
    ("configure", _payload("configure", classes={"a": {"order": "lifo"}}), "$.classes[...].order"),
    ("configure", _payload("configure", classes={"a": {"slo_s": 0}}), "$.classes[...].slo_s"),
    ("configure", _payload("configure", tenants={"ä" * 65: {}}), "130 bytes"),
    ("configure", _payload("configure", tenants={"a": {"class": "Gold"}}), "$.tenants[...].class"),
    ("abort", _payload("abort", reason=7), "$.reason"),
    ("drain", _payload("drain", on="yes"), "$.on"),
]


@pytest.mark.parametrize(("verb", "raw", "where"), MALFORMED)
def test_what_does_not_fit_is_refused_with_the_place(verb, raw, where):
    """A malformed payload is a 400 whose text says which verb, which field and why."""
    error = _refusal(verb, raw)
    assert error.code == Code.MALFORMED
    assert error.message.startswith(f"{verb}: ")
    assert where in error.message


@pytest.mark.parametrize("targets", [{}, {"requests": []}, {"all": False}])
def test_targets_that_name_nothing_are_refused(targets):
    """A command about nothing is a mistake, not a success."""
    assert _refusal("abort", _payload("abort", targets=targets)).code == Code.MALFORMED


def test_ten_thousand_targets_are_the_most():
    """Targets are counted over all three lists; one too many is refused as too large, with both numbers."""
    at_most = {"requests": [f"r{n}" for n in range(9_998)], "tenants": ["t"], "classes": ["c"]}
    command, _ = commands.decode("preempt", _payload("preempt", targets=at_most))
    assert command.targets.count == commands.MAX_TARGETS
    at_most["classes"].append("d")
    error = _refusal("preempt", _payload("preempt", targets=at_most))
    assert error.code == Code.TOO_LARGE
    assert "10001" in error.message
    assert "10000" in error.message


@pytest.mark.parametrize("table", ["classes", "tenants"])
def test_a_table_has_at_most_ten_thousand_rows(table):
    """One row too many refuses the whole command."""
    rows = {f"n{n}": {} for n in range(commands.MAX_ROWS)}
    commands.decode("configure", _payload("configure", **{table: rows}))
    rows["one-more"] = {}
    assert f"$.{table}" in _refusal("configure", _payload("configure", **{table: rows})).message


def test_an_absent_limit_differs_from_null():
    """Null lifts a cap; an absent field leaves it as it is."""
    command, _ = commands.decode("limit", _payload("limit", max_running=None))
    assert command.max_running is None
    assert command.max_queued is msgspec.UNSET


IGNORED = [
    ("preempt", _payload("preempt", leese_s=3), ("leese_s",)),
    ("preempt", _payload("preempt", targets={"all": True, "clases": []}), ("targets.clases",)),
    ("rank", _payload("rank", tenants={"a": {"bse": 1}}), ("tenants.a.bse",)),
    ("rank", _payload("rank", prices={"inptu": 1}), ("prices.inptu",)),
    ("configure", _payload("configure", classes={"a": {"oder": "fair"}}), ("classes.a.oder",)),
    ("configure", _payload("configure", tenants={"a": {"wieght": 3}}), ("tenants.a.wieght",)),
]


@pytest.mark.parametrize(("verb", "raw", "paths"), IGNORED)
def test_a_field_without_effect_is_named(verb, raw, paths):
    """A typo is accepted and named by its path."""
    assert commands.decode(verb, raw)[1] == paths


def test_the_list_of_ignored_fields_is_bounded():
    """Neither many unknown fields nor long ones make a long reply."""
    _, ignored = commands.decode(
        "drain", _payload("drain", **{f"{n}".ljust(5_000, "x"): 0 for n in range(2_000)})
    )
    assert len(ignored) == commands.MAX_RESULTS
    assert max(map(len, ignored)) == 128


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
WORDS = (
    "id issuer epoch expires_at targets priority class kv lease_s max_running incarnation tenants prices "
    "classes reason on requests all x"
)
fields = st.sampled_from(WORDS.split())
near_misses = st.dictionaries(
    fields, json_values | st.dictionaries(fields, json_values, max_size=4), max_size=6
)


@settings(quick, max_examples=300)
@given(verb=st.sampled_from(VERBS) | st.text(max_size=12), raw=st.binary(max_size=200))
@example(verb="drain", raw=b"[" * 100_000)
@example(verb="drain", raw=b'{"id":"a","on":true,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
@example(verb="drain", raw=b'{"id":"a","on":true,"x":1' + b"0" * 5_000 + b"}")
@example(verb="drain", raw=b'{"id":"a","on":true,"issuer":"\\ud800"}')
def test_no_bytes_do_worse_than_a_refusal(verb, raw):
    """Whatever arrives, `decode` returns a command or raises RefusedError, nothing else."""
    _decode_or_refuse(verb, raw)


@settings(quick, max_examples=300)
@given(verb=st.sampled_from(VERBS), fields_=near_misses)
def test_no_near_miss_does_worse_than_a_refusal(verb, fields_):
    """Right names with wrong values, at any depth, are refused or ignored, never an error of ours."""
    _decode_or_refuse(verb, json.dumps({"id": "c1", **MINIMAL[verb], **fields_}).encode())


def _decode_or_refuse(verb, raw):
    code = None
    try:
        command, _ = commands.decode(verb, raw)
    except RefusedError as error:
        code = error.code
    if code is None:
        assert type(command) is commands.COMMANDS[verb]
    else:
        assert code in {Code.MALFORMED, Code.TOO_LARGE}


# Everything else that crosses the wire


@pytest.mark.parametrize("struct", ROOTS, ids=_by_name)
@quick
@given(data=st.data())
def test_messages_come_back_as_they_were_sent(struct, data):
    """Encoding and decoding any message of the contract gives an equal one."""
    sent = data.draw(structs.of(struct))
    assert msgspec.json.decode(commands.encode(sent), type=struct) == sent


@pytest.mark.parametrize("struct", ROOTS, ids=_by_name)
@settings(quick, max_examples=10)
@given(data=st.data())
def test_the_published_schema_accepts_what_is_sent(struct, data):
    """JSON Schema and structs agree: no message of ours fails its own published definition."""
    sent = json.loads(commands.encode(data.draw(structs.of(struct))))
    VALIDATOR.evolve(schema={"$ref": f"#/$defs/{struct.__name__}", "$defs": SCHEMA["$defs"]}).validate(sent)


SCHEMA = document()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_the_published_schema_is_one_and_covers_every_subject():
    """The document is valid JSON Schema and says what travels on each command, event and query subject."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    ends = {subject.rpartition(".")[2] for subject in SCHEMA["x-subjects"]}
    assert ends >= {*VERBS, *QUERIES, *events.KINDS, "lead", "<worker>"}
    named = set(re.findall(r"[A-Z]\w+", " ".join(SCHEMA["x-subjects"].values())))
    assert named <= SCHEMA["$defs"].keys()


@pytest.mark.parametrize(("kind", "struct"), events.KINDS.items(), ids=events.KINDS)
@quick
@given(data=st.data())
def test_events_are_told_apart_by_kind(kind, struct, data):
    """Each event says its kind, and decodes into that kind's struct."""
    sent = data.draw(structs.of(struct))
    raw = commands.encode(sent)
    assert json.loads(raw)["kind"] == kind
    received = events.decode_event(raw)
    assert received == sent
    assert type(received) is struct


def test_an_event_of_a_later_version_is_data():
    """A kind that nobody here knows comes as a dict with all its fields."""
    assert events.decode_event(b'{"kind": "sung", "loud": true}') == {"kind": "sung", "loud": True}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{}",
        b'{"kind": null}',
        b'{"kind": []}',
        b'{"kind": {}}',
        b'{"kind": "queued"}',
        b'{"kind": "\xff"}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_event_is_unreadable(raw):
    """A payload that is no event raises one of the errors that readers are told to expect, and no other."""
    with pytest.raises(UNREADABLE):
        events.decode_event(raw)


def test_a_frame_that_lacks_a_field_is_refused():
    """Status frames are whole: one without its sequence number is not a frame."""
    with pytest.raises(msgspec.ValidationError, match="incarnation"):
        status.decode_frame(b'{"worker": "w"}')


# Names


@pytest.mark.parametrize("name", ["a", "gpu-0", "a_b", "0" * 64])
def test_tokens_are_short_lower_case_words(name):
    """What may be part of a subject is returned as it is."""
    assert names.check_token("worker", name) == name


@pytest.mark.parametrize("name", ["", "A", "a.b", "a b", "a\n", "*", ">", "ä", "0" * 65, "all", "other"])
def test_other_tokens_are_refused_by_name(name):
    """The text says what was to be named, and how it was called."""
    with pytest.raises(NameRefusedError, match="worker name") as caught:
        names.check_token("worker", name)
    assert repr(name) in str(caught.value)


@quick
@given(st.text())
def test_any_text_sanitises_to_a_token_or_nothing(text):
    """A host name, whatever it holds, becomes something that a subject can carry."""
    assert re.fullmatch(r"[a-z0-9_-]{0,64}", names.sanitise_token(text))


@pytest.mark.parametrize(
    ("name", "fits"), [("", False), ("a" * 128, True), ("ä" * 65, False), ("\ud800", False)]
)
def test_tenants_are_bounded_in_bytes(name, fits):
    """Any UTF-8 of 1 to 128 bytes is a tenant; more, none, or half a surrogate pair is not."""
    if fits:
        assert names.check_tenant(name) == name
    else:
        with pytest.raises(NameRefusedError):
            names.check_tenant(name)


@quick
@given(st.text(min_size=1, max_size=32))
def test_a_tenants_key_is_safe_and_names_it(tenant):
    """A tenant's KV key has only characters that NATS allows in keys, and leads back to the tenant."""
    key = names.tenant_key(tenant)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", key)
    assert names.tenant_of_key(key) == tenant


@settings(quick, max_examples=200)
@given(st.text(max_size=12))
@example("é")
@example("Y!Q")
@example("YR")
@example("A")
def test_a_key_names_one_tenant_or_none(key):
    """Whatever stands in the bucket is the key of the tenant that it decodes to, or is refused."""
    try:
        tenant = names.tenant_of_key(key)
    except NameRefusedError:
        return
    assert names.tenant_key(tenant) == key


# Subjects, settings, tables


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("verb", VERBS)
def test_a_command_subject_says_role_worker_and_verb(role, verb):
    """What a subject was built from is what a worker reads out of it."""
    subject = Subjects("main").command(role, "w-1", verb)
    assert subject == f"cox.v1.main.cmd.{role}.w-1.{verb}"
    assert Subjects("main").parse_command(subject) == (role, "w-1", verb)


def test_subjects_and_buckets_carry_the_fleet():
    """Two fleets on one NATS share no subject, stream or bucket."""
    one, two = (vars(Subjects(fleet)) for fleet in ("one", "two"))
    assert not set(one.values()) & set(two.values())
    assert Subjects("one").stream == "COX_one_EVENTS"


def test_a_worker_listens_to_its_name_and_to_all():
    """One subscription for what is meant for it, one for what is meant for everybody."""
    subjects = Subjects("main")
    assert subjects.commands_of("w") == ("cox.v1.main.cmd.*.w.*", "cox.v1.main.cmd.*.all.*")
    assert subjects.queries_of("w") == ("cox.v1.main.query.w.*", "cox.v1.main.query.all.*")


@pytest.mark.parametrize("fleet", ["", "a.b", "all", ">"])
def test_a_fleet_that_would_break_subjects_is_refused(fleet):
    """Nothing that NATS reads as more than one token can be a fleet."""
    with pytest.raises(NameRefusedError, match="fleet"):
        Subjects(fleet)


def nkey():
    """A user's seed and public key."""
    seed = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER)
    return seed, nkeys.from_seed(seed).public_key.decode()


def test_connection_reads_the_environment(tmp_path):
    """Addresses, a fleet and the paths of credentials come from COX_ variables; answers go to the key's own inbox."""
    seed, public = nkey()
    path = tmp_path / "user.nk"
    path.write_bytes(seed + b"\n")
    connection = Connection.from_env(
        {"COX_NATS_URL": "nats://a:1, nats://b:2,", "COX_FLEET": "lab", "COX_NATS_NKEY": str(path)}
    )
    assert connection.urls == ("nats://a:1", "nats://b:2")
    assert connection.fleet == "lab"
    assert connection.options() == {
        "servers": ["nats://a:1", "nats://b:2"],
        "ping_interval": PING_INTERVAL_S,
        "max_outstanding_pings": MAX_PINGS,
        "nkeys_seed": str(path),
        "inbox_prefix": f"_INBOX.{public}",
    }


def test_an_empty_environment_means_this_machine():
    """Without any variable, or with empty ones, NATS is expected where it listens by default."""
    assert Connection.from_env({}) == Connection.from_env({"COX_NATS_URL": "", "COX_FLEET": ""})
    assert Connection.from_env({}).urls == (DEFAULT_URL,)


@pytest.mark.parametrize(
    "url",
    [
        "::::", "nats://", "nats://host:99999", "nats://host:0", "nats://[::1", "nats://u:hunter2@host:x",
        "nats://u:hunter2/x@host", "nats://u:1/hunter2@host", "u:22/hunter2@host", "nats://u:1?hunter2@host",
        "nats://u:1#hunter2@host",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_by_its_place(url):
    """What cannot be an address is refused with its place in the list, and without the secret in it."""
    with pytest.raises(AddressRefusedError, match="address 2 of 2") as refused:
        Connection(urls=(DEFAULT_URL, url)).check()
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("creds", "SU" + "A2" * 28),
        ("creds", "-----BEGIN USER NKEY SEED-----\nhunter2"),
        ("nkey", "SU" + "A2" * 28),
        ("ca", "-----BEGIN CERTIFICATE-----\nhunter2"),
        ("key", "-----BEGIN PRIVATE KEY-----\nhunter2"),
    ],
)
def test_a_secret_in_place_of_its_path_is_not_shown(name, secret):
    """Whoever puts it into the variable is told which, and no error quotes it."""
    connection = Connection(**{"cert": "cert.pem", name: secret})
    with pytest.raises(IdentityRefusedError, match=f"COX_NATS_{name.upper()} must be the path") as refused:
        connection.options() and connection.tls()
    assert secret not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["host", "host:4222", "nats://u:p@host", "nats://u:p@p@host", "tls://[::1]:4222", "ws://host:80/x"]
)
def test_addresses_of_every_kind_pass(url):
    """With or without scheme, port and user; IPv6 too."""
    assert Connection(urls=(url,)).check().urls == (url,)


def test_the_digest_names_tables_whatever_their_order():
    """Equal tables have one digest in any order of rows; another weight gives another digest."""
    a, b = policy.TenantPolicy(weight=1), policy.TenantPolicy(weight=2)
    assert policy.digest({}, {"a": a, "b": b}) == policy.digest({}, {"b": b, "a": a})
    assert policy.digest({}, {"a": a, "b": b}) != policy.digest({}, {"a": b, "b": a})


def test_the_digest_is_that_of_a_version_without_fields_that_nobody_uses():
    """A worker of another version is not sent the tables again and again for a field that is in none of their rows."""
    newer = msgspec.defstruct(
        "Newer",
        [("fresh", int, 0)],
        bases=(policy.TenantPolicy,),
        frozen=True,
        kw_only=True,
        omit_defaults=True,
    )
    for weight in (1.0, 2.0):
        plain = policy.TenantPolicy(weight=weight)
        assert policy.digest({}, {"a": newer(weight=weight)}) == policy.digest({}, {"a": plain})
        assert policy.digest({}, {"a": newer(weight=weight, fresh=1)}) != policy.digest({}, {"a": plain})


def test_the_largest_tables_fit_into_one_command():
    """Ten thousand tenants with a weight and a class, as many as a table may have, are no payload that is refused."""
    rows = {f"tenant-{number:05}": policy.TenantPolicy(weight=2.5, class_="chat") for number in range(10_000)}
    payload = commands.encode(
        commands.Configure(id="id", issuer="c", epoch=(1.0, 1), classes={}, tenants=rows)
    )
    assert len(payload) < 2**20 / 2
    sent, _ = commands.decode("configure", payload)
    assert policy.digest(sent.classes, sent.tenants) == policy.digest({}, rows)


def test_a_glance_at_a_frame_leaves_out_requests_alone() -> None:
    """Whatever a tenant is called and in whatever order fields come, everything else of the frame is there."""
    odd = 'x","requests":[],"tenants":[{'
    classes = (ClassStatus(class_="chat", queued=1, running=0, held=0, oldest_queued_s=0.0),)
    requests = (request("r1"), request("r2"))
    full = frame("w1", "01A", 3, row(odd, charged=2.0), row("b"), requests=requests, classes=classes)
    seen = msgspec.structs.replace(full, requests=())
    payload = msgspec.json.encode(full)
    assert decode_glance(payload) == seen
    fields = msgspec.json.decode(payload)
    for first in ("requests", "tenants", "classes", "gone", "config"):
        reordered = {first: fields[first]} | fields
        assert decode_glance(msgspec.json.encode(reordered)) == seen
        last = {name: fields[name] for name in (*(each for each in fields if each != first), first)}
        assert decode_glance(msgspec.json.encode(last)) == seen
    with pytest.raises(msgspec.MsgspecError):
        decode_glance(b'{"requests":[]}')


def test_an_address_of_another_scheme_is_refused() -> None:
    """An address of HTTP is no address of NATS, and nobody looks for a host of that name."""
    with pytest.raises(AddressRefusedError, match="scheme other than nats, tls, ws, wss"):
        Connection(urls=("http://127.0.0.1:4222",)).check()
    Connection(urls=("127.0.0.1:4222", "TLS://nats.example", "wss://nats.example:443")).check()

"""Identity in request ids: what the scheduler may believe, and what a command may name."""

import hmac
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coxswain.schemas.request_id import MAX_CHARS, normalise
from coxswain.service import plugin, request_id
from coxswain.service.request_id import KEY_VARIABLE, Claim, insert, make, parse

KEY = b"k" * 32
ULID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
UUID = "0123456789abcdef0123456789abcdef"
ACME = make(KEY, "acme", "interactive", ULID)

tenants = st.text(min_size=1, max_size=128).filter(
    lambda text: not any(0xD800 <= ord(letter) <= 0xDFFF for letter in text) and len(text.encode()) <= 128,
)
classes = st.text(alphabet=string.ascii_lowercase + string.digits + "_-", max_size=64)
# Names that look like the mark's own word, wherever a separator may follow them.
tenants |= st.sampled_from(("cox", "cox.", "my-cox", "cox.cox.", "%cox", "cox.a.cox"))
classes |= st.sampled_from(("cox", "a-cox", "cox_cox"))
# Every form that vLLM 0.32 makes of an id, with and without its random suffix.
FORMS = (
    "chatcmpl-{}",
    "cmpl-{}-0",
    "cmpl-{}-17",
    "chatcmpl-{}_3",
    "generate-tokens-{}",
    "2_chatcmpl-{}",
    "11_cmpl-{}-4",
    "cmpl-{}-" + UUID + "-beam-2",
    "resp_" + UUID + "_0-{}",
    "0_resp_client-chosen_0-{}",
)


@given(tenants, classes, st.sampled_from(FORMS), st.booleans())
def test_round_trip(tenant: str, class_: str, form: str, suffixed: bool) -> None:
    """Any tenant and class come back out of every form of internal id."""
    public = make(KEY, tenant, class_, ULID)
    internal = form.format(public) + ("-1a2b3c4d" if suffixed else "")
    assert parse(KEY, internal) == Claim(tenant, class_, public)
    assert public.isascii()
    assert len(public) <= MAX_CHARS


@given(st.integers(0, len(ACME) - 1), st.characters())
def test_altered_is_not_believed(at: int, letter: str) -> None:
    """An id with any one character changed proves nothing."""
    altered = ACME[:at] + letter + ACME[at + 1 :]
    found = parse(KEY, f"chatcmpl-{altered}-1a2b3c4d").tenant
    assert found is None or altered == ACME


@given(st.text(alphabet=string.ascii_letters + string.digits + ".", min_size=1, max_size=8))
def test_lengthened_is_not_believed(more: str) -> None:
    """Letters behind the signature make it another id, which proves nothing."""
    assert parse(KEY, f"chatcmpl-{ACME}{more}-1a2b3c4d").tenant is None


@given(key=st.binary(min_size=16, max_size=200))
def test_the_signature_is_an_hmac_whatever_the_length_of_the_key(key: bytes) -> None:
    """Whoever signs elsewhere needs nothing but HMAC-SHA256, as the protocol says."""
    text, _, signature = make(key, "acme", "chat", ULID).rpartition(".")
    assert signature == hmac.new(key, text.encode(), "sha256").hexdigest()[:16]


def test_another_key_is_not_believed() -> None:
    """An id signed with another key, or read without a key, keeps its public form but proves nothing."""
    internal = f"chatcmpl-{ACME}-1a2b3c4d"
    assert parse(b"x" * 32, internal) == Claim(None, "", ACME)
    assert parse(None, internal) == Claim(None, "", ACME)


def test_only_the_last_id_counts() -> None:
    """Somebody else's signed id in a client-chosen part of the id is not taken for the request's own."""
    mine = make(KEY, "mallory", "", ULID)
    assert parse(KEY, insert(f"{ACME}_0-1a2b3c4d", mine)) == Claim("mallory", "", mine)
    named_like_it = make(KEY, "cox", "cox", ULID)
    assert parse(KEY, insert(f"{ACME}_0-1a2b3c4d", named_like_it)) == Claim("cox", "cox", named_like_it)
    forged_last = f"chatcmpl-{mine}-cox.acme..{ULID}.0123456789abcdef-1a2b3c4d"
    assert parse(KEY, forged_last).tenant is None


@given(st.text(max_size=700))
def test_survives_garbage(text: str) -> None:
    """Any text gives a printable, bounded public id without identity, and a fixed point of `normalise`."""
    found = parse(KEY, text)
    assert found.tenant is None
    assert len(found.request) <= MAX_CHARS
    assert found.request.isascii()
    assert not found.request or found.request.isprintable()
    assert normalise(found.request) == found.request


@given(st.text(max_size=40), st.sampled_from(FORMS))
def test_normalise_is_a_fixed_point_around_marks(text: str, form: str) -> None:
    """Normalising twice changes nothing, also when a cut bares a mark."""
    long = text + "x" * (MAX_CHARS - len(ACME) - len(text)) + ACME + form.format("y") * 50 + "cox."
    once = normalise(long)
    assert normalise(once) == once


@pytest.mark.parametrize(
    ("internal", "public"),
    [
        (f"chatcmpl-{UUID}-1a2b3c4d", UUID),
        (f"chatcmpl-{UUID}_1-1a2b3c4d", UUID),
        ("chatcmpl-job_7-1a2b3c4d", "job_7"),
        (f"cmpl-{UUID}-0-1a2b3c4d", UUID),
        ("cmpl-my-id-12-1a2b3c4d", "my-id"),
        (f"3_cmpl-{UUID}-0-1a2b3c4d", UUID),
        (f"cmpl-{UUID}-0", UUID),
        (f"resp_{UUID}_0-1a2b3c4d", UUID),
        (f"generate-tokens-{UUID}-1a2b3c4d", UUID),
        (f"cmpl-{UUID}-0-{UUID[::-1]}-beam-2-1a2b3c4d", UUID),
        ("chatcmpl--1a2b3c4d", "-1a2b3c4d"),
        ("warmup", "warmup"),
    ],
)
def test_unsigned_ids_lose_what_vllm_added(internal: str, public: str) -> None:
    """Without a mark the public id is the client's X-Request-Id or vLLM's uuid."""
    assert parse(KEY, internal) == Claim(None, "", public)


@pytest.mark.parametrize("body_id", ["{}", "chatcmpl-{}", "cmpl-{}"])
@pytest.mark.parametrize("public", [ACME, UUID, "job_7"])
def test_commands_may_name_the_body_id(body_id: str, public: str) -> None:
    """The header's id and the body's id mean the same request."""
    assert normalise(body_id.format(public)) == public


def test_insert_keeps_the_suffix_last() -> None:
    """The signed id goes before vLLM's random suffix, or at the end where there is none."""
    assert insert(f"resp_{UUID}_0-1a2b3c4d", ACME) == f"resp_{UUID}_0-{ACME}-1a2b3c4d"
    assert insert(f"resp_{UUID}_0", ACME) == f"resp_{UUID}_0-{ACME}"


def test_plugin_makes_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin sets a key that can be read, and leaves one that is there."""
    monkeypatch.setenv(KEY_VARIABLE, "")
    plugin.load()
    environment = dict(plugin.os.environ)
    key = request_id.read_key(environment)
    assert key is not None
    assert len(key) == 32
    plugin.load()
    assert request_id.read_key(plugin.os.environ) == key


@pytest.mark.parametrize("text", ["short", "ab" * 15, "zz" * 32])
def test_bad_key_is_refused_without_showing_it(text: str) -> None:
    """A key that is not 32 hexadecimal digits is refused, and the refusal does not repeat it."""
    with pytest.raises(ValueError, match=KEY_VARIABLE) as refusal:
        request_id.read_key({KEY_VARIABLE: text})
    assert text not in str(refusal.value)

"""Settings from the environment: defaults, names, and refusals in words."""

import pytest

from coxswain.service.config import SettingRefusedError, Settings


def test_defaults_without_any_variable() -> None:
    """With an empty environment the bus is off, and the worker is called as its host."""
    settings = Settings.from_env({}, hostname="GPU-Box.example.org")
    assert not settings.enabled
    assert settings.worker == "gpu-box-example-org"
    assert (settings.status_interval_s, settings.full_interval_s, settings.head) == (0.05, 1.0, 64)
    assert settings.leader_lease_s == 5.0


def test_everything_set() -> None:
    """Each variable reaches its setting."""
    settings = Settings.from_env(
        {
            "COX_NATS_URL": "nats://a:1, nats://b:2",
            "COX_FLEET": "blue",
            "COX_WORKER": "w1",
            "COX_STATUS_INTERVAL_S": "0.2",
            "COX_STATUS_HEAD": "10",
            "COX_LEADER_LEASE_S": "7.5",
        },
    )
    assert settings.enabled
    assert settings.connection.urls == ("nats://a:1", "nats://b:2")
    assert (settings.connection.fleet, settings.worker) == ("blue", "w1")
    assert (settings.status_interval_s, settings.head, settings.leader_lease_s) == (0.2, 10, 7.5)


def test_data_parallel_ranks_have_names_of_their_own() -> None:
    """Engines of one deployment append their rank, even to a host name that fills the limit."""
    assert Settings.from_env({"COX_WORKER": "w"}, dp_rank=3, dp_size=4).worker == "w-dp3"
    assert Settings.from_env({"COX_WORKER": "w"}, dp_rank=0, dp_size=1).worker == "w"
    long = Settings.from_env({}, dp_rank=12, dp_size=16, hostname="h" * 200).worker
    assert len(long) == 64
    assert long.endswith("-dp12")


def test_host_without_a_usable_name() -> None:
    """A host name without a single allowed character still gives a worker's name."""
    assert Settings.from_env({}, hostname="…").worker == "worker"


@pytest.mark.parametrize("hostname", ["ALL", "other"])
def test_host_with_a_reserved_name(hostname: str) -> None:
    """Who never set COX_WORKER is told that the host's name is the trouble, and that COX_WORKER is the way out."""
    with pytest.raises(
        SettingRefusedError, match=f"this host is called '{hostname}', and COX_WORKER.*reserved"
    ):
        Settings.from_env({}, hostname=hostname)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("COX_STATUS_INTERVAL_S", "fast", "0.01 to 1 "),
        ("COX_STATUS_INTERVAL_S", "0", "0.01 to 1 "),
        ("COX_STATUS_INTERVAL_S", "nan", "0.01 to 1 "),
        ("COX_STATUS_INTERVAL_S", "1.5", "0.01 to 1 "),
        ("COX_BUS", "pigeon", "process or thread"),
        ("COX_LOG", "xml", "json or text"),
        ("COX_LOG_LEVEL", "WARN", "info, warning or error"),
        ("COX_STATUS_HEAD", "1.5", "a whole number"),
        ("COX_STATUS_HEAD", "-1", "0 to 10000"),
        ("COX_LEADER_LEASE_S", "inf", "0.5 to 3600"),
        ("COX_WORKER", "My Worker", "a-z 0-9 _ -"),
        ("COX_WORKER", "all", "reserved"),
        ("COX_FLEET", "a.b", "a-z 0-9 _ -"),
        ("COX_NATS_URL", "nats://host:port", "nats://host:port"),
    ],
)
def test_bad_value(name: str, value: str, allowed: str) -> None:
    """A bad value is refused with the variable's name and what is allowed."""
    with pytest.raises(SettingRefusedError) as refused:
        Settings.from_env({name: value})
    assert name in str(refused.value)
    assert allowed in str(refused.value)


def test_password_of_a_bad_address_is_not_repeated() -> None:
    """The refusal of an address does not show the secret in it."""
    with pytest.raises(SettingRefusedError) as refused:
        Settings.from_env({"COX_NATS_URL": "nats://user:hunter2@host:x"})
    assert "hunter2" not in str(refused.value)

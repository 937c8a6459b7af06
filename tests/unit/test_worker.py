"""The launcher: what it adds to `vllm serve`, what it leaves alone, what it refuses."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from coxswain.service import worker
from coxswain.service.config import SettingRefusedError
from coxswain.service.worker import MIDDLEWARE, SCHEDULER, SHUTDOWN_S, Launch, WorkerRefusedError


def plan(*argv: str, env: dict[str, str] | None = None, **options: Any) -> Launch:
    """Plan on a big GPU machine where vLLM's own default is 256 requests, unless told otherwise."""
    machine: dict[str, Any] = {"cpu": False, "cores": 64, "default_slots": lambda: 256}
    return worker.plan(argv, env or {}, **(machine | options))


def last(launch: Launch, flag: str) -> str | None:
    """The value of an option that counts: vLLM takes the last one."""
    found = None
    for position, argument in enumerate(launch.argv):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else launch.argv[position + 1]
    return found


def test_adds_scheduler_and_middleware() -> None:
    """Both flags of Coxswain follow the user's own arguments, which are passed on untouched."""
    launch = plan("m", "--dtype", "float32", "--middleware", "their.Own", "--port=1")
    assert launch.argv[:7] == ["serve", "m", "--dtype", "float32", "--middleware", "their.Own", "--port=1"]
    assert last(launch, "--scheduler-cls") == SCHEDULER
    # The last middleware is the outermost one: nothing may run before it.
    assert last(launch, "--middleware") == MIDDLEWARE


@pytest.mark.parametrize(
    ("asked", "total"), [("1", "9"), ("16", "24"), ("64", "72"), ("256", "288"), ("1000", "1125")]
)
@pytest.mark.parametrize("style", ["--max-num-seqs {}", "--max-num-seqs={}", "--max_num_seqs {}"])
def test_number_of_running_requests_stays_the_users(asked: str, total: str, style: str) -> None:
    """`--max-num-seqs N` is how many run; spare slots for holds come on top."""
    launch = plan("m", *style.format(asked).split())
    assert last(launch, "--max-num-active-seqs") == asked
    assert last(launch, "--max-num-seqs") == total


def test_default_number_is_vllms_own() -> None:
    """Without a number, as many run as vLLM would run by itself."""
    launch = plan("m", default_slots=lambda: 1024)
    assert last(launch, "--max-num-active-seqs") == "1024"
    assert last(launch, "--max-num-seqs") == "1152"


@pytest.mark.parametrize(
    "argv", [("--max-num-active-seqs", "4", "--max-num-seqs", "6"), ("--max-num-active-seqs=4",)]
)
def test_explicit_slots_are_left_alone(argv: tuple[str, ...]) -> None:
    """Whoever says how many are active decides both numbers."""
    launch = plan("m", *argv)
    assert [argument for argument in launch.argv if "seqs" in argument] == [a for a in argv if "seqs" in a]


def test_requests_under_way_have_time_to_end() -> None:
    """vLLM's own default aborts them at SIGTERM; the user's number, in whatever form, is the user's."""
    assert last(plan("m"), "--shutdown-timeout") == str(SHUTDOWN_S)
    assert last(plan("m", "--shutdown-timeout", "5"), "--shutdown-timeout") == "5"
    assert last(plan("m", "--shutdown_timeout=0"), "--shutdown-timeout") == "0"
    assert last(plan("m", config={"shutdown-timeout": 5}), "--shutdown-timeout") is None


@pytest.mark.parametrize(
    "argv",
    [
        ("--data-parallel-size", "1"), ("--api-server-count=1", "-dp", "2"), ("-dp=4", "-dpn", "1"),
        ("--data_parallel_size", "4", "--data-parallel-external-lb"), ("-dp", "4", "--headless"),
    ],
)  # fmt: skip
def test_one_api_server_waits_for_its_requests(argv: tuple[str, ...]) -> None:
    """However many ranks there are, a server that is alone before its engines serves what they have."""
    assert last(plan("m", *argv), "--shutdown-timeout") == str(SHUTDOWN_S)


@pytest.mark.parametrize(
    "argv", [("-dp", "2"), ("--data-parallel-size=2",), ("-asc", "2"), ("--api_server_count=2",)]
)
def test_several_api_servers_keep_vllms_default(argv: tuple[str, ...]) -> None:
    """They leave their engine at once; with a timeout their clients would only wait for longer to be told."""
    assert last(plan("m", *argv), "--shutdown-timeout") is None


def test_config_file_counts_as_given() -> None:
    """What vLLM's own `--config` file says is not overridden by a default, and is where N may stand."""
    config = {"model": "m", "max_num_seqs": 16, "block-size": 64}
    launch = plan("--config", "c.yaml", config=config, cpu=True)
    assert last(launch, "--max-num-active-seqs") == "16"
    assert last(launch, "--block-size") is None


@pytest.mark.parametrize("value", ["many", "-1", "", "1e3"])
def test_bad_number_is_vllms_to_refuse(value: str) -> None:
    """A number that is none is passed on for vLLM to explain."""
    launch = plan("m", f"--max-num-seqs={value}")
    assert last(launch, "--max-num-seqs") == value


def test_cpu_defaults_only_on_cpu_and_only_where_unset() -> None:
    """Block size and CPU variables are set on CPU, never over the user's own."""
    assert "VLLM_CPU_KVCACHE_SPACE" not in plan("m").env
    assert last(plan("m"), "--block-size") is None
    small = plan("m", cpu=True, cores=2)
    assert last(small, "--block-size") == "32"
    assert small.env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert small.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in plan("m", cpu=True, cores=64).env
    own = {"VLLM_CPU_KVCACHE_SPACE": "40", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    theirs = plan("m", "--block-size", "128", cpu=True, cores=2, env=own)
    assert not own.keys() & theirs.env.keys()
    assert last(theirs, "--block-size") == "128"
    assert "VLLM_CPU_KVCACHE_SPACE" not in plan("m", "--kv-cache-memory-bytes", "9", cpu=True).env


def test_own_flags_become_variables_and_vanish(tmp_path: Path) -> None:
    """vLLM never sees --name, --nats, --fleet, --keys and --dry-run."""
    keys = tmp_path / "keys.json"
    launch = plan("m", "--name", "w1", "--nats=nats://h:1", "--fleet", "f", "--keys", str(keys), "--dry-run")
    assert launch.dry_run
    wanted = {"COX_WORKER": "w1", "COX_NATS_URL": "nats://h:1", "COX_FLEET": "f", "COX_KEYS": str(keys)}
    assert wanted.items() <= launch.env.items()
    assert not {"--name", "w1", "--fleet", "--keys", "--dry-run"} & set(launch.argv)


def test_environment_is_respected() -> None:
    """Variables that are set stay; the plugin is added to a list that would leave it out."""
    env = {"COX_NATS_URL": "nats://there:4222", "VLLM_NO_USAGE_STATS": "0", "VLLM_PLUGINS": "other"}
    launch = plan("m", env=env)
    assert "COX_NATS_URL" not in launch.env
    assert "VLLM_NO_USAGE_STATS" not in launch.env
    assert launch.env["VLLM_PLUGINS"] == "other,coxswain"
    assert "VLLM_PLUGINS" not in plan("m").env
    assert "VLLM_PLUGINS" not in plan("m", env={"VLLM_PLUGINS": "coxswain"}).env


@pytest.mark.parametrize("argv", [(), ("--port", "1"), ("--dtype", "float32", "m")])
def test_missing_model_is_refused(argv: tuple[str, ...]) -> None:
    """Without a model in front the launcher asks for one."""
    with pytest.raises(WorkerRefusedError, match="no model"):
        plan(*argv)


def test_another_scheduler_is_refused() -> None:
    """A scheduler of the user's own would not be steered: that is said, not ignored."""
    with pytest.raises(WorkerRefusedError, match="scheduler-cls"):
        plan("m", "--scheduler-cls", "their.Own")
    assert plan("m", "--scheduler-cls", SCHEDULER).argv.count(SCHEDULER) == 1


@pytest.mark.parametrize(
    "argv", [("--name", "Not A Token"), ("--fleet", "all"), ("--nats", "nats://h:notaport")]
)
def test_bad_name_is_refused_before_anything_starts(argv: tuple[str, ...]) -> None:
    """Names that cannot be subjects and addresses that are none are refused at once."""
    with pytest.raises(SettingRefusedError):
        plan("m", *argv)


@pytest.mark.parametrize(
    "address",
    [
        "nats://me:hunter2@h:4222",
        "me:hunter2@h:4222",
        "nats://h,hunter2@h",
        "nats://me:x@hunter2@h",
        "nats://me:hunter2 x@h",
    ],
)
def test_dry_run_text_hides_passwords(address: str) -> None:
    """The printed command can be pasted into a ticket, whether or not an address has a scheme, or a password an `@`."""
    text = plan("m", "--nats", address, "--served-model-name", "two words").text()
    assert "hunter2" not in text
    assert "'two words'" in text
    assert text.startswith("COX_NATS_URL=")


def test_main_dry_run_prints_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """`--dry-run` on this machine prints one `vllm serve` command and exits 0."""
    assert worker.main(["m", "--max-num-seqs", "4", "--dry-run"]) == 0
    assert f"vllm serve m --max-num-seqs 4 --scheduler-cls {SCHEDULER}" in capsys.readouterr().out


def test_main_refuses_bad_keys_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A keys file that is not good is refused before the model is loaded."""
    for name in ("COX_KEYS", "COX_NATS_URL", "COX_IDENTITY_KEY", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(worker, "run_vllm", lambda _launch: pytest.fail("vLLM was started"))
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [{"tenant": "acme"}]}))
    file.chmod(0o600)
    assert worker.main(["m", "--max-num-seqs", "4", "--keys", str(file)]) == 2
    assert "keys.json" in capsys.readouterr().err


def test_main_without_vllm_says_which_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where vLLM is missing the error names the extra to install."""
    monkeypatch.setattr(worker.importlib.util, "find_spec", lambda _name: None)
    assert worker.main(["m"]) == 2
    assert "'.[cpu]'" in capsys.readouterr().err


def test_help_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` explains the slots rule and our own flags."""
    assert worker.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--max-num-seqs N stays" in shown
    assert "--keys" in shown


def test_help_of_vllms_own_arguments_is_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--help=all`, which our help names, is answered by vLLM."""
    ran: list[Launch] = []
    monkeypatch.setattr(worker.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(worker, "run_vllm", lambda launch: ran.append(launch) or 0)
    assert worker.main(["m", "--help=all"]) == 0
    assert [launch.argv for launch in ran] == [["serve", "--help=all"]]


@pytest.mark.parametrize(
    ("installed", "env", "cpu"),
    [
        ({"vllm": "0.32.0"}, {}, False),
        ({"vllm": "0.32.0+cpu"}, {}, True),
        ({"vllm-cpu": "0.32.0"}, {}, True),
        ({"vllm": "0.32.0"}, {"VLLM_TARGET_DEVICE": "cpu"}, True),
    ],
)
def test_cpu_build_is_known_by_its_distribution(
    installed: dict[str, str], env: dict[str, str], cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU build is told as vLLM tells it, without importing vLLM."""

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(worker.importlib.metadata, "version", version)
    assert worker._is_cpu_build(env) is cpu

"""The Helm chart, rendered by Helm itself: what comes out is Kubernetes's, and is what our programs take."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

import coxswain
from coxswain.control import auth
from coxswain.control.cli import app
from coxswain.control.cli.parse import address
from coxswain.service.edge.core import READY
from coxswain.service.worker import SHUTDOWN_S

helm = pytest.importorskip("helm_python", reason="HELM IS NOT HERE: the chart was not rendered")

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "coxswain"
PLAIN: dict[str, Any] = {"nats": {"url": "nats://nats.nats.svc:4222"}}
ALL: dict[str, Any] = {
    "fleet": "main",
    "nats": {
        "url": "tls://a:4222,tls://b:4222",
        "ca": "nats-ca",
        "keys": {"controller": "ctl", "workers": "wrk", "admin": "adm"},
    },
    "controller": {"set": ["wq=2"], "metrics": True, "web": {"enabled": True, "names": ["cox.example"]}},
    "init": {"args": ["--max-age", "1d"]},
    "worker": {
        "replicas": 2, "args": ["--max-num-seqs", "64"], "env": [{"name": "HF_TOKEN", "value": "x"}],
        "cache": "models", "keys": "api-keys", "identity": "identity",
        "nodeSelector": {"gpu": "h200"}, "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    },
    "imagePullSecrets": [{"name": "registry"}],
}  # fmt: skip


def rendered(values: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """All objects by kind and name, of a release `prod`."""
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name="prod", namespace="llm")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    objects = [each for text in texts for each in yaml.safe_load_all(text) if each]
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


def container(thing: Any) -> Any:
    """The container of a workload."""
    [only] = thing["spec"]["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("values", [PLAIN, ALL], ids=["plain", "all"])
def test_helm_and_kubernetes_accept_it(values: dict[str, Any]) -> None:
    """No finding of the linter beyond the missing picture, and no field that Kubernetes does not know."""
    found = helm.lint(CHART, values, strict=True)
    assert [each["error"] for each in found["messages"]] == ["icon is recommended"]
    for thing in rendered(values).values():
        for version in ("1.25", "1.37"):
            kubernetes_validate.validate(thing, version, strict=True)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"nats": {"url": "nats.nats.svc:4222"}},
        PLAIN | {"fleet": "My Fleet"},
        PLAIN | {"workers": {"replicas": 3}},
        PLAIN | {"controller": {"web": {"enable": True}}},
        PLAIN | {"worker": {"args": [64]}},
    ],
)
def test_what_would_not_run_is_refused_before(values: dict[str, Any]) -> None:
    """A forgotten address, a name that no fleet may have, and slips of the finger."""
    with pytest.raises(helm.HelmError):
        rendered(values)


def test_each_part_sees_its_own_key_alone(tmp_path: Path) -> None:
    """Under the name that `cox init --auth` gives the file; a worker not even its neighbours'."""
    users = [auth.user(each) for each in ("controller", "admin", "worker:prod-worker-0")]
    made = {label: Path(path).name for label, path in auth.write(tmp_path, "main", users, []).made.items()}
    objects = rendered(ALL)
    worker = container(objects["StatefulSet", "prod-worker"])
    env = {each["name"]: each for each in worker["env"]}
    assert env["COX_WORKER"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    keys = [each for each in worker["volumeMounts"] if each["name"] == "key"]
    assert [each["mountPath"] for each in keys] == [env["COX_NATS_NKEY"]["value"]]
    file = keys[0]["subPathExpr"].replace("$(COX_WORKER)", "prod-worker-0")
    assert file == made["worker-prod-worker-0"]
    for kind, name, secret, label in (
        ("Deployment", "prod-controller", "ctl", "controller"),
        ("Job", "prod-init", "adm", "admin"),
    ):
        thing = objects[kind, name]
        env = {each["name"]: each.get("value") for each in container(thing)["env"]}
        mounts = {each["name"]: each["mountPath"] for each in container(thing)["volumeMounts"]}
        assert env["COX_NATS_NKEY"] == f"{mounts['key']}/{made[label]}"
        volumes = {each["name"]: each for each in thing["spec"]["template"]["spec"]["volumes"]}
        assert volumes["key"]["secret"]["secretName"] == secret


def test_the_controllers_arguments_are_those_that_it_takes() -> None:
    """Every option is one of `cox controller`'s, and the page's port is the one that the Service leads to."""
    objects = rendered(ALL)
    [verb, *options] = container(objects["Deployment", "prod-controller"])["args"]
    shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"}).stdout
    for option in options:
        assert option.partition("=")[0] in shown
    given = dict(option.split("=", 1) for option in options)
    ports = {
        each["name"]: each["containerPort"]
        for each in container(objects["Deployment", "prod-controller"])["ports"]
    }
    assert address(given["--web"]).port == ports["page"]
    assert address(given["--metrics"]).port == ports["metrics"]
    assert objects["Service", "prod-page"]["spec"]["ports"][0]["targetPort"] == "page"


def test_one_worker_at_a_time_is_evicted() -> None:
    """Where there are several; a budget of one would keep its machine from ever being emptied."""
    budget = rendered(ALL)["PodDisruptionBudget", "prod-worker"]["spec"]
    pod = rendered(ALL)["StatefulSet", "prod-worker"]["spec"]["template"]["metadata"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"].items() <= pod["labels"].items()
    assert ("PodDisruptionBudget", "prod-worker") not in rendered(PLAIN)


def test_images_are_those_of_this_version() -> None:
    """The chart's version and the package's are one."""
    with helm.Chart.load(CHART) as chart:
        assert chart.metadata["appVersion"] == chart.version == coxswain.__version__
    for thing in rendered(PLAIN).values():
        if thing["kind"] in {"Deployment", "StatefulSet", "Job"}:
            assert container(thing)["image"].endswith(f":{coxswain.__version__}")


def test_a_worker_has_time_to_end() -> None:
    """It serves until no Service sends to it any more, then what it has to its end; only then is it killed."""
    pod = rendered(PLAIN)["StatefulSet", "prod-worker"]["spec"]["template"]["spec"]
    [worker] = pod["containers"]
    program, seconds = worker["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    assert worker["readinessProbe"]["httpGet"]["path"] == READY
    assert pod["terminationGracePeriodSeconds"] >= int(seconds) + SHUTDOWN_S + 20

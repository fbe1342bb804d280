"""deploy/kubernetes and docker-compose.yaml against the schemas of those who read them, and against our server."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from server.app import AREAS
from server.launcher.args import parse_args
from server.launcher.children import LAST_EVENTS_TIMEOUT_S, STOP_TIMEOUT_S
from server.launcher.flags import VARIABLES, every_flag
from server.operation import operations_of
from tests.e2e.kubernetes import Manifest, complaints_about, render
from tests.e2e.wheel_files import wheel_files

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
COMPOSE_SCHEMA = "check_jsonschema/builtin_schemas/vendor/compose-spec.json"
OVERLAYS = ("cpu", "gpu", "keda")
KINDS = "ConfigMap Deployment NetworkPolicy PersistentVolumeClaim PodDisruptionBudget Service".split()
AUTOSCALERS = {"HorizontalPodAutoscaler", "ScaledObject"}
LONGEST_LOAD_S = 3600


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """What an overlay applies; `keda` is the overlay gpu as its comments say, with the other autoscaler."""
    if request.param != "keda":
        return render(KUBERNETES / "overlays" / request.param)
    copied = tmp_path_factory.mktemp("deploy") / "kubernetes"
    for path in KUBERNETES.rglob("*.yaml"):
        target = copied / path.relative_to(KUBERNETES)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text().replace("components/hpa", "components/keda"))
    return render(copied / "overlays" / "gpu")


def one(manifests: list[Manifest], *kinds: str) -> Manifest:
    (manifest,) = [manifest for manifest in manifests if manifest["kind"] in kinds]
    return manifest


def container_of(manifests: list[Manifest]) -> dict[str, Any]:
    (container,) = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(container)


def environ_of(manifests: list[Manifest]) -> dict[str, str]:
    return dict(one(manifests, "ConfigMap")["data"])


def test_every_resource_is_valid(manifests: list[Manifest]) -> None:
    assert {manifest["kind"] for manifest in manifests} - AUTOSCALERS == set(KINDS)
    for manifest in manifests:
        assert complaints_about(manifest) == []


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_the_schemas_find_a_mistake(overlay: str) -> None:
    for manifest in render(KUBERNETES / "overlays" / overlay):
        if "spec" in manifest:
            wrong = copy.deepcopy(manifest)
            wrong["spec"]["spce"] = wrong["spec"].pop(next(iter(wrong["spec"])))
            assert complaints_about(wrong), manifest["kind"]


def test_the_launcher_takes_the_variables(manifests: list[Manifest]) -> None:
    environ = environ_of(manifests)
    ours = {flag.variable for flag in every_flag() if flag.has_variable} | {row.name for row in VARIABLES}
    assert environ.keys() <= ours
    args = parse_args([], environ)
    assert not args.warnings
    (port,) = container_of(manifests)["ports"]
    assert port["containerPort"] == args.port == int(_annotation(manifests, "port"))
    gpus = container_of(manifests)["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus is None or int(gpus) == args.sharding.size == int(environ["NUM_SHARD"])


def _annotation(manifests: list[Manifest], name: str) -> str:
    return str(one(manifests, "Deployment")["spec"]["template"]["metadata"]["annotations"][f"prometheus.io/{name}"])


def test_probes_ask_routes_that_need_no_key_on_the_right_port(manifests: list[Manifest]) -> None:
    container = container_of(manifests)
    is_open = {operation.path: operation.is_open for operation in operations_of(AREAS) if operation.method == "GET"}
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    for probe in probes.values():
        assert is_open[probe["httpGet"]["path"]]
        assert probe["httpGet"]["port"] == container["ports"][0]["name"]
    assert is_open[_annotation(manifests, "path")]
    # A slow engine may be not ready for a while; only a dead one is to be restarted.
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= LONGEST_LOAD_S


def test_a_pod_has_time_to_end(manifests: list[Manifest]) -> None:
    pod = one(manifests, "Deployment")["spec"]["template"]["spec"]
    waiting, seconds = container_of(manifests)["lifecycle"]["preStop"]["exec"]["command"]
    assert waiting == "sleep"
    drain_s = parse_args([], environ_of(manifests)).graceful_termination_timeout_s
    assert int(seconds) + drain_s + LAST_EVENTS_TIMEOUT_S + STOP_TIMEOUT_S < pod["terminationGracePeriodSeconds"]


def test_names_that_refer_to_each_other_exist(manifests: list[Manifest]) -> None:
    deployment = one(manifests, "Deployment")
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    for kind, path in {
        "Deployment": ("selector", "matchLabels"),
        "Service": ("selector",),
        "PodDisruptionBudget": ("selector", "matchLabels"),
        "NetworkPolicy": ("podSelector", "matchLabels"),
    }.items():
        selector = one(manifests, kind)["spec"]
        for name in path:
            selector = selector[name]
        assert selector and selector.items() <= labels.items(), kind
    scaler = one(manifests, *AUTOSCALERS)
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    container = container_of(manifests)
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    claim = one(manifests, "PersistentVolumeClaim")["metadata"]["name"]
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim
    assert container["envFrom"][0]["configMapRef"]["name"] == one(manifests, "ConfigMap")["metadata"]["name"]
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in one(manifests, "Service")["spec"]["ports"]} <= ports
    (ingress,) = one(manifests, "NetworkPolicy")["spec"]["ingress"]
    assert {port["port"] for port in ingress["ports"]} <= ports


def test_what_is_written_has_a_volume_under_a_root_that_is_read_only(manifests: list[Manifest]) -> None:
    container = container_of(manifests)
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/data", "/dev/shm", "/tmp"}


def test_the_image_is_a_target_of_the_dockerfile(manifests: list[Manifest]) -> None:
    name, _, target = container_of(manifests)["image"].partition(":")
    assert name == "pytgi" and f" AS {target}\n" in (ROOT / "Dockerfile").read_text()


def test_the_adapter_gives_the_autoscaler_its_metric() -> None:
    component = KUBERNETES / "components" / "hpa"
    (rule,) = yaml.safe_load((component / "adapter-rules.yaml").read_text())["rules"]["custom"]
    (metric,) = yaml.safe_load((component / "autoscaler.yaml").read_text())["spec"]["metrics"]
    assert rule["seriesQuery"].partition("{")[0] == metric["pods"]["metric"]["name"]


def test_the_compose_file_is_valid() -> None:
    schema = json.loads(wheel_files("check-jsonschema", COMPOSE_SCHEMA).read_text())
    validator = jsonschema.Draft202012Validator(schema)
    compose = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    assert [error.message for error in validator.iter_errors(compose)] == []
    compose["services"]["gpus"]["shmsize"] = compose["services"]["gpus"].pop("shm_size")
    assert list(validator.iter_errors(compose)), "the schema finds a mistake"

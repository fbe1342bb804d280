"""docker-compose.yaml and what it mounts: our launcher takes the flags, and what names each other exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.launcher.args import LauncherArgs, parse_args
from server.launcher.children import LAST_EVENTS_TIMEOUT_S, STOP_TIMEOUT_S

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = {name: service for name, service in SERVICES.items() if "build" in service}
IMAGE = {"PORT": "80", "HF_HOME": "/data"}
"""What the Dockerfile sets."""
PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"


def interpolate(text: str) -> str:
    """Compose's `${NAME:-default}` where nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def launched(service: dict[str, Any]) -> LauncherArgs:
    environ = IMAGE | {name: interpolate(value) for name, value in service["environment"].items()}
    return parse_args(service.get("command", []), environ)


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Paths in the container, and what is mounted there."""
    pairs = (volume.split(":") for volume in service["volumes"])
    return {target: source for source, target, *_ in pairs}


@pytest.mark.parametrize("name", SERVERS)
def test_the_launcher_takes_the_command_line(name: str) -> None:
    service = SERVERS[name]
    args = launched(service)
    assert not args.warnings
    (published,) = service["ports"]
    assert published == f"8080:{args.port}"
    devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    assert sum(device["count"] for device in devices) == (0 if name == "cpu" else args.sharding.size)
    assert ("shm_size" in service) == (args.sharding.size > 1)
    needed_s = args.graceful_termination_timeout_s + LAST_EVENTS_TIMEOUT_S + STOP_TIMEOUT_S
    assert needed_s < int(service["stop_grace_period"].removesuffix("s"))


def test_each_profile_runs_one_server_and_the_monitoring() -> None:
    profiles = {profile for service in SERVICES.values() for profile in service["profiles"]}
    assert profiles == SERVERS.keys() == {"gpu", "gpus", "cpu"}
    for profile in profiles:
        running = {name for name, service in SERVICES.items() if profile in service["profiles"]}
        assert running == {profile, "prometheus", "grafana"}


def test_the_header_says_the_profiles_and_ports() -> None:
    header = "".join((ROOT / "docker-compose.yaml").read_text().partition("\nx-server")[0])
    assert re.findall(r"--profile (\w+) up", header) == list(SERVERS)
    ports = {port.split(":")[0] for service in SERVICES.values() for port in service["ports"]}
    assert ports == set(re.findall(r"\b\d{4}\b", header))


def test_targets_are_built_by_the_dockerfile() -> None:
    stages = re.findall(r"^FROM .* AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for service in SERVERS.values():
        assert service["build"]["target"] in stages
        assert service["image"] == f"pytgi:{service['build']['target']}"


def test_what_is_mounted_is_there() -> None:
    sources = [source for service in SERVICES.values() for source in mounts(service).values()]
    for source in sources:
        is_kept = source == "./data" or source in COMPOSE["volumes"]
        assert is_kept or (ROOT / source).exists(), source
    assert set(COMPOSE["volumes"]) <= set(sources)


def test_prometheus_asks_the_servers() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert mounts(SERVICES["prometheus"])["/etc/prometheus"] == "./deploy/prometheus"
    (job,) = config["scrape_configs"]
    assert "metrics_path" not in job, "it is /metrics by default"
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    for service in SERVERS.values():
        assert host in service["networks"]["default"]["aliases"]
        assert int(port) == launched(service).port
    assert all((ROOT / "deploy" / "prometheus" / name).is_file() for name in config["rule_files"])


def test_grafana_finds_prometheus_and_our_dashboard() -> None:
    at = mounts(SERVICES["grafana"])
    assert ROOT / at["/etc/grafana/provisioning"] == PROVISIONING
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (published,) = SERVICES["prometheus"]["ports"]
    assert source["url"] == f"http://prometheus:{published.split(':')[1]}"
    assert source["isDefault"] and source["type"] == "prometheus"
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "pytgi.yaml").read_text())["providers"]
    (dashboard,) = [target for target in at if target.startswith(provider["options"]["path"])]
    assert at[dashboard] == "./docs/grafana.json"

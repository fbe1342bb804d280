"""Debian's Prometheus with our configuration: it scrapes a server, the alerts fire, the dashboard's panels have data.

Grafana itself is in no registry that can be reached here: that it imports the dashboard was not tried.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.launched import LaunchedServer, free_port, launched, read_streams
from tests.slow.debian import debian_program

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "docs" / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
START_TIMEOUT_S = 60


def promtool(*arguments: str) -> str:
    command = [str(debian_program("prometheus", "promtool")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_takes_the_configuration_and_the_rules() -> None:
    assert "SUCCESS" in promtool("check", "config", "--lint-fatal", str(PROMETHEUS / "prometheus.yml"))
    assert "SUCCESS" in promtool("check", "rules", "--lint-fatal", str(PROMETHEUS / "alerts.yml"))


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    tests = (Path(__file__).parent / "alerts.yml").read_text().replace("ALERTS", str(PROMETHEUS / "alerts.yml"))
    (tmp_path / "tests.yml").write_text(tests)
    assert "SUCCESS" in promtool("test", "rules", str(tmp_path / "tests.yml"))
    alerts = re.findall(r"alert: (\w+)", (PROMETHEUS / "alerts.yml").read_text())
    fired = re.findall(r"alertname: (\w+)\n +eval_time: \w+\n +exp_alerts:\n", tests)
    assert sorted(fired) == sorted(alerts)


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    with launched(tiny_model_dir, tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(server: LaunchedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has the configuration of docker-compose.yaml, but for the server's address."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = (PROMETHEUS / "prometheus.yml").read_text()
    assert config.count("pytgi:80") == 1
    config = config.replace("pytgi:80", f"127.0.0.1:{server.port}").replace(
        "scrape_interval: 5s", "scrape_interval: 1s"
    )
    (folder / "prometheus.yml").write_text(config)
    (folder / "alerts.yml").write_text((PROMETHEUS / "alerts.yml").read_text())
    command = [
        str(debian_program("prometheus", "prometheus")),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: httpx.get(f"{url}/-/ready").status_code == 200)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(httpx.ConnectError):
            if is_so():
                return
        assert time.monotonic() < deadline
        time.sleep(0.2)


def query(prometheus: str, expression: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    results: list[dict[str, Any]] = answer["data"]["result"]
    return results


def health_of_rules(prometheus: str) -> list[str]:
    """`unknown` until a rule is first evaluated, then `ok` or `err`."""
    groups = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    return [rule["health"] for group in groups for rule in group["rules"]]


def test_promtool_has_nothing_against_the_format_of_our_metrics(server: LaunchedServer) -> None:
    server.generate("Hello", max_new_tokens=4)
    command = [str(debian_program("prometheus", "promtool")), "check", "metrics"]
    text = httpx.get(f"{server.url}/metrics").text
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    complaints = (done.stdout + done.stderr).splitlines()
    about_names = [line for line in complaints if line.endswith(" suffix")]
    assert complaints == about_names, "ours are named in the manner of TGI's"


def test_it_scrapes_and_every_panel_has_data(server: LaunchedServer, prometheus: str) -> None:
    up = f'up{{job="pytgi",instance="127.0.0.1:{server.port}"}} == 1'
    wait_until(lambda: query(prometheus, up))
    with ThreadPoolExecutor() as pool:
        for _ in range(3):
            read_streams(server, 1, pool, 400)  # runs while the next ones join it
            read_streams(server, 3, pool, 8)
            time.sleep(1.5)
    wait_until(lambda: query(prometheus, "increase(tgi_request_success[1m]) > 0"))
    for expression in EXPRESSIONS:
        concrete = expression.replace("$instance", ".*").replace("$__rate_interval", "1m")
        assert query(prometheus, concrete), concrete
    wait_until(lambda: set(health_of_rules(prometheus)) == {"ok"})
    assert query(prometheus, "sum(max_over_time(pytgi_requests_waiting[30s]))"), "what KEDA asks"

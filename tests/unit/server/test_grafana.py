"""docs/grafana.json can be imported, and asks for exactly the names that /metrics has; docs/metrics.md lists them.

What deploy/ asks for, in alerts and autoscalers, exists as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.link.messages import EngineStats, StepOutput, StepReport
from tests.unit.server.harness import FakeEngine

DOCS = Path(__file__).parents[3] / "docs"
DEPLOY = DOCS.parent / "deploy"
DASHBOARD = json.loads((DOCS / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("", "_sum", "_count")}
JOINING = StepReport(is_prefill=True, num_sequences=2, num_admitted=1, num_draft_hits=[0])


@pytest.fixture
async def kinds(client: httpx.AsyncClient, engine: FakeEngine) -> dict[str, str]:
    """Every family of a server at work, and its kind."""
    await client.post("/generate", json={"inputs": "Hello", "parameters": {}})
    engine.observe_output(StepOutput(events=[], stats=EngineStats(), reports=[JOINING]), 0.001)
    text = (await client.get("/metrics")).text
    return {family.name: family.type for family in text_string_to_metric_families(text)}


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:py)?tgi_\w+", expression))


def test_every_name_is_exposed(kinds: dict[str, str]) -> None:
    exposed = {name + suffix: name for name, kind in kinds.items() for suffix in SUFFIXES.get(kind, ("",))}
    asked = {name for expression in EXPRESSIONS for name in names_in(expression)}
    assert asked <= exposed.keys()
    assert {exposed[name] for name in asked} == kinds.keys(), "a family that no panel shows"


def test_what_alerts_and_autoscalers_ask_for_is_exposed(kinds: dict[str, str]) -> None:
    files = (path for path in DEPLOY.rglob("*.y*ml"))
    asked = {name for path in files for name in names_in(path.read_text())}
    assert {"tgi_request_failure", "pytgi_requests_waiting"} <= asked <= kinds.keys()


async def test_labels_that_alerts_choose_have_those_values(client: httpx.AsyncClient) -> None:
    text = (await client.get("/metrics")).text
    alerts = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    chosen = [value for values in re.findall(r'err=~?"([^"]*)"', alerts) for value in values.split("|")]
    assert chosen
    for value in chosen:
        assert f'tgi_request_failure{{err="{value}"}} 0' in text


def test_every_family_is_in_the_document(kinds: dict[str, str]) -> None:
    rows = [line for line in (DOCS / "metrics.md").read_text().splitlines() if re.match(r"\| `(py)?tgi_", line)]
    listed = {
        name: row.split(" | ")[1] for row in rows for name in re.findall(r"`((?:py)?tgi_\w+)`", row.split(" | ")[0])
    }
    assert listed == kinds


def test_quantiles_are_of_buckets_and_rates_of_counts(kinds: dict[str, str]) -> None:
    gauges = {name for name, kind in kinds.items() if kind == "gauge"}
    for expression in EXPRESSIONS:
        assert expression.count("(") == expression.count(")")
        for name in names_in(expression):
            assert (f"rate({name}{{" in expression) == (name not in gauges), expression
            assert name.endswith("_bucket") == expression.startswith("histogram_quantile("), expression


def test_labels_exist() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"])))) - {"le"}
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert grouped <= {"method", "err", "reason"}
            assert shown == (grouped or shown & {"instance"})


def test_the_structure() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["title"] and DASHBOARD["uid"]
    assert "id" not in DASHBOARD, "it would overwrite another dashboard on import"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    for panel in PANELS:
        assert panel["type"] == "timeseries"
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert references and len(set(references)) == len(references)


def test_variables() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    used = {name for text in strings_in(DASHBOARD) for name in re.findall(r"\$\{?([a-z]\w*)", text)}
    assert used == variables.keys()


def strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def test_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        own = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        assert not cells & own
        cells |= own

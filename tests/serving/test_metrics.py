"""What workers tell TorchServe is what its configuration names, what Prometheus can read, and all that the dashboard asks for."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from deepdisc_ops.serving import metrics
from deepdisc_ops.serving.metrics import MONITORING, Metrics, names, render_metrics_config, worker_name

LINE = re.compile(r"\s*([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)(\|#type:([^|,]+))?\|#hostname:([^,]+),([^,]+)(,(.*))?")
"""The pattern of TorchServe 0.12's front end (org.pytorch.serve.metrics.Metric)."""
WORDS = re.compile(r"and|or|offset|sum|max|count|rate|increase|histogram_quantile|up")
RUNBOOK = Path(__file__).parents[2] / "docs" / "runbook.md"


@pytest.fixture
def cache(spaced: Path) -> MetricsCacheYamlImpl:
    """TorchServe's own cache, as a worker makes it from the file that the server wrote."""
    path = spaced / "metrics.yaml"
    path.write_text(render_metrics_config())
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # it leaves the file open
        cache = MetricsCacheYamlImpl(str(path))
    cache.initialize_cache()
    return cache


def emitted(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str, dict[str, str]]]:
    """Name, value, type and dimensions of every line, as TorchServe reads it."""
    found = []
    for record in caplog.records:
        if record.getMessage().startswith("[METRICS]"):
            match = LINE.fullmatch(record.getMessage().removeprefix("[METRICS]"))
            assert match is not None, record.getMessage()
            found.append((match[1], match[3], match[6], dict(pair.split(":") for pair in match[4].split(",") if pair)))
    return found


def expressions() -> dict[str, str]:
    """Every expression of dashboard and alerts, by where it is."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    alerts = [rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
    shown = {f"{panel['title']} {target['refId']}": target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    return shown | {rule["alert"]: rule["expr"] for rule in alerts}


def asked_for(expression: str) -> set[str]:
    """Names in an expression that are neither words of the language nor labels."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(by|on|ignoring|group_left) ?\([^)]*\)', " ", expression)
    return {name for name in re.findall(r"(?<![\w$])[A-Za-z_]\w*", bare) if not WORDS.fullmatch(name)}


def test_a_request_is_told_in_lines_that_torchserve_reads(cache: MetricsCacheYamlImpl, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    told = Metrics(cache, ["worker.py", "--sock-name", "/tmp/.ts.sock.9001"])
    told.ready(version="0123456789ab", package="0.1.0", members=3)
    told.request(status=200, objects=41, megapixels=1.048576, seconds={"read": 1e-7, "predict": 3.5})
    told.members(2, 1)
    lines = emitted(caplog)
    assert {name for name, *_ in lines} == {metric.name for metric in metrics.OWN}
    values = {(name, *dimensions.values()): value for name, value, _, dimensions in lines}
    assert values[("deepdisc_requests_total", "200")] == "1"
    assert float(values[("deepdisc_megapixels_total",)]) == 1.048576
    assert float(values[("deepdisc_stage_seconds_total", "predict")]) == 3.5
    assert float(values[("deepdisc_request_seconds",)]) == 3.5
    assert values[("deepdisc_members", "9001")] == "2"
    assert int(values[("deepdisc_resident_bytes", "9001")]) > 50e6
    assert {kind for *_, kind, _ in lines} == {"COUNTER", "GAUGE", "HISTOGRAM"}


@given(st.text(min_size=1), st.floats(0, 1e12), st.integers(100, 599))
def test_no_stage_or_number_breaks_a_line(stage: str, duration: float, status: int) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ts.metrics.caching_metric")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        empty = object.__new__(MetricsCacheYamlImpl)
        empty.cache = {}
        Metrics(empty, []).request(status=status, seconds={stage: duration})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert len(records) == 6
    for text in records:
        match = LINE.fullmatch(text.removeprefix("[METRICS]"))
        assert match is not None, text
        assert all(pair.count(":") == 1 for pair in match[4].split(",") if pair)


def test_without_a_cache_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Metrics(None).request(status=200, seconds={"predict": 1.0})
    assert emitted(caplog) == []


def test_a_worker_keeps_its_name_when_it_is_started_again() -> None:
    assert worker_name(["w.py", "--sock-type", "unix", "--sock-name", "/run dir/.ts.sock.9004", "--metrics-config", "m"]) == "9004"
    assert worker_name(["w.py", "--sock-type", "tcp", "--port", "9100"]) == "9100"
    assert worker_name(["pytest"]).isdigit()


@pytest.mark.parametrize("where", expressions())
def test_dashboard_and_alerts_ask_for_nothing_that_is_not_told(where: str) -> None:
    found = asked_for(expressions()[where])
    assert found <= names()
    assert found or "up{" in expressions()[where]


@pytest.mark.parametrize("where", expressions())
def test_expressions_are_promql(where: str) -> None:
    promql = pytest.importorskip("promql_parser")
    promql.parse(re.sub(r"\$__rate_interval", "5m", expressions()[where]))


def test_everything_of_ours_is_shown_somewhere() -> None:
    asked = set[str]().union(*(asked_for(expression) for expression in expressions().values()))
    assert all(asked & set(metric.series) for metric in metrics.OWN)


def test_every_alert_has_a_page_in_the_runbook_and_every_page_an_alert() -> None:
    rules = [rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
    headings = re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in rules]
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["annotations"]["summary"]


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 and panel["description"] for panel in panels)
    taken = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(taken)) == len(taken)
    variables = {entry["name"] for entry in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) - {"__rate_interval", "__all"} == variables

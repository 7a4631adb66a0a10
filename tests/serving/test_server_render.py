"""How a server is set up, as text and numbers; tests/integration starts real ones."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.config import InferenceSettings
from deepdisc_ops.serving import plan, render, wire
from deepdisc_ops.serving.memory import ALLOCATOR
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane

PORTS = render.Ports(40001, 40002, 40003, 40004, 40005)


def read_properties(text: str) -> dict[str, str]:
    """What java.util.Properties reads from our file."""
    pairs = (line.split("=", 1) for line in text.splitlines())
    return {
        key: value.encode("ascii").decode("unicode_escape").encode("utf-16", "surrogatepass").decode("utf-16")
        for key, value in pairs
    }


def rendered(store: Path, **changes: object) -> dict[str, str]:
    limits = {"workers": 2, "request_bytes": 1000, "response_bytes": 2000, "startup_timeout_s": 60} | changes
    return read_properties(render.render_config(store=store, ports=PORTS, **limits))  # type: ignore[arg-type]


def test_everything_listens_on_loopback_only() -> None:
    config = rendered(Path("/run/store"))
    addresses = {key: value for key, value in config.items() if key.endswith("_address")}
    assert len(addresses) == 5
    assert all(value.removeprefix("http://").split(":")[0] == "127.0.0.1" for value in addresses.values())
    assert {config["grpc_inference_port"], config["grpc_management_port"]} == {"40004", "40005"}


def test_off_loopback_only_predictions_are_served_and_by_tls() -> None:
    tls = render.Tls(Path("/c.pem"), Path("/k.pem"))
    config = rendered(Path("/run/store"), host="192.0.2.7", tls=tls)
    assert config["inference_address"] == "https://192.0.2.7:40001"
    assert (config["certificate_file"], config["private_key_file"]) == ("/c.pem", "/k.pem")
    others = {value for key, value in config.items() if key.endswith("_address") and key != "inference_address"}
    assert all(value.removeprefix("http://").split(":")[0] == "127.0.0.1" for value in others)


def test_tokens_are_required_and_models_cannot_be_registered() -> None:
    config = rendered(Path("/run/store"), token_minutes=12.5)
    assert config["disable_token_authorization"] == "false"
    assert config["enable_model_api"] == "false"
    assert config["token_expiration_min"] == "12.5"
    assert config["allowed_urls"] == "file:///run/store/.*"


def test_workers_and_limits_are_written() -> None:
    config = rendered(Path("/run/store"), workers=3, request_bytes=77, response_bytes=88, response_timeout_s=9)
    assert config["default_workers_per_model"] == "3"
    assert config["max_request_size"] == "77"
    assert config["max_response_size"] == "88"
    assert config["default_response_timeout"] == "9"
    assert config["load_models"] == f"{wire.MODEL_NAME}={wire.MODEL_NAME}.mar"


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1))
def test_paths_of_any_letters_reach_java_as_they_are(name: str) -> None:
    assert rendered(Path("/x", name))["model_store"] == str(Path("/x", name))


def test_the_log_settings_are_xml_with_rotated_files() -> None:
    tree = ElementTree.fromstring(render.render_log_config())
    files = [file.attrib["name"] for file in tree.iter("RollingFile")]
    assert files == ["access_log", "model_log", "ts_log"]
    assert len(list(tree.iter("SizeBasedTriggeringPolicy"))) == 3


def test_the_environment_is_the_servers_own(tmp_path: Path) -> None:
    base = {"PATH": "/usr/bin", "TS_CONFIG_FILE": "/evil", "JDK_JAVA_OPTIONS": "-x", "HOME": "/home/me"}
    run, folder, logs, temp = (tmp_path / name for name in ("run", "g1", "logs", "tmp"))
    made = render.server_environment(base, Path("/java"), run, folder, logs, temp, 3)
    assert "TS_CONFIG_FILE" not in made
    assert "JDK_JAVA_OPTIONS" not in made
    assert made["HOME"] == "/home/me"
    assert made["PATH"].split(os.pathsep)[0] == "/java/bin"
    assert made["OMP_NUM_THREADS"] == "3"
    assert made["DEEPDISC_OPS_SERVICE"] == str(folder / "service.json")
    assert made[render.MARK] == str(run)
    assert {made[name] for name in ("TEMP", "TMPDIR")} == {str(temp)}
    assert {made[name] for name in ("LOG_LOCATION", "METRICS_LOCATION")} == {str(logs)}
    assert ALLOCATOR.items() <= made.items()
    own = base | {"MALLOC_TRIM_THRESHOLD_": "0"}
    assert render.server_environment(own, Path("/java"), run, folder, logs, temp, 3)["MALLOC_TRIM_THRESHOLD_"] == "0"


def test_the_command_names_scratch_space_and_settings(tmp_path: Path) -> None:
    command = render.java_command(Path("/java/bin/java"), Path("/site/ts"), tmp_path / "a run", tmp_path / "t", 700)
    assert command[0] == "/java/bin/java"
    assert "-Xmx700m" in command
    assert f"-Djava.io.tmpdir={tmp_path / 't'}" in command
    assert command[command.index("-f") + 1] == str(tmp_path / "a run" / "config.properties")
    assert command[command.index("-cp") + 1] == "/site/ts/frontend/*"
    assert "--disable-token-auth" not in command


def test_a_full_queue_of_the_largest_requests_fits_into_the_heap() -> None:
    for workers in (1, 4):
        queue = int(rendered(Path("/s"), workers=workers)["job_queue_size"])
        assert render.heap_mb(workers, 100 << 20, 50 << 20) >= (queue + workers) * 100 + 50


@pytest.mark.parametrize(("bands", "side"), [(1, 64), (6, 200)])
def test_the_largest_window_fits_into_the_request_limit(bands: int, side: int) -> None:
    names = [f"band{i}" for i in range(bands)]
    mask = np.zeros((side, side), bool)
    body, _ = wire.encode_image(np.zeros((bands, side, side), np.float32), names, mask, EbvPlane.constant(0.0))
    assert len(body) <= plan.request_limit(bands, side)


def test_limits_fit_into_torchserves_numbers() -> None:
    assert plan.request_limit(6, 20000) == 2**31 - 1
    assert plan.response_limit(20, 8000, 20000) == 2**31 - 1


def test_a_cap_on_detections_counts_in_the_response_limit() -> None:
    assert plan.detections_per_megapixel(InferenceSettings(proposals_per_megapixel=8000, crowding=2)) == 8000
    capped = InferenceSettings(max_detections=5000, tile=512, overlap=12)
    assert plan.detections_per_megapixel(capped) == pytest.approx(20000)


def test_the_fullest_reply_fits_into_the_response_limit() -> None:
    most = int(1.4 * 16000 / 2 * 512**2 / 1e6)
    zero, mixture, index = np.zeros(most, np.float32), np.zeros((most, 20), np.float32), np.zeros(most, np.int32)
    full = Detections(np.zeros((most, 4), np.float32), zero, index, mixture, mixture, mixture, zero, index, index)
    body = wire.encode_detections(full, model_version="abc", package_version="1")
    assert len(body) <= plan.response_limit(20, 8000, 512)


@pytest.mark.parametrize(("wish", "threads"), [("3", 3), ("", None), ("0", None), ("many", None)])
def test_threads_follow_the_environment_or_share_the_cores(wish: str, threads: int | None) -> None:
    cores = len(os.sched_getaffinity(0))
    assert plan.default_threads(2, {"OMP_NUM_THREADS": wish}) == (threads or max(1, cores // 2))

"""How a server is set up, as text and numbers; tests/integration starts real ones."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.config import InferenceSettings
from deepdisc_ops.errors import ArchiveError, ConfigError, ServerError, ServerUnreachable
from deepdisc_ops.serving import server, wire
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane

PORTS = server.Ports(40001, 40002, 40003, 40004, 40005)
INFO = server.ServerInfo(
    url="http://127.0.0.1:40001",
    token="inference-secret",
    management_url="http://127.0.0.1:40002",
    management_token="management-secret",
    metrics_url="http://127.0.0.1:40003",
    model="deepdisc",
    archive="/a/b.mar",
    model_version="abc",
    bands=("g", "r"),
    pixel_scale=0.2,
    workers=1,
    max_window=1024,
    pid=2**22 + 1,  # above the largest process id of Linux
    worker_pids=(2**22 + 2,),
    started=0.0,
    token_expires="2026-12-21T23:32:45Z",
    temp_dir="/nonexistent",
    package_version="0",
)


def read_properties(text: str) -> dict[str, str]:
    """What java.util.Properties reads from our file."""
    pairs = (line.split("=", 1) for line in text.splitlines())
    return {
        key: value.encode("ascii").decode("unicode_escape").encode("utf-16", "surrogatepass").decode("utf-16")
        for key, value in pairs
    }


def render(store: Path, **changes: int) -> dict[str, str]:
    limits = {"workers": 2, "request_bytes": 1000, "response_bytes": 2000, "startup_timeout_s": 60} | changes
    return read_properties(server.render_config(store=store, ports=PORTS, **limits))


def test_everything_listens_on_loopback_only() -> None:
    config = render(Path("/run/store"))
    addresses = {key: value for key, value in config.items() if key.endswith("_address")}
    assert len(addresses) == 5
    assert all(value.removeprefix("http://").split(":")[0] == "127.0.0.1" for value in addresses.values())
    assert {config["grpc_inference_port"], config["grpc_management_port"]} == {"40004", "40005"}


def test_tokens_are_required_and_models_cannot_be_registered() -> None:
    config = render(Path("/run/store"))
    assert config["disable_token_authorization"] == "false"
    assert config["enable_model_api"] == "false"
    assert int(config["token_expiration_min"]) > 60
    assert config["allowed_urls"] == "file:///run/store/.*"


def test_workers_and_limits_are_written() -> None:
    config = render(Path("/run/store"), workers=3, request_bytes=77, response_bytes=88)
    assert config["default_workers_per_model"] == "3"
    assert config["max_request_size"] == "77"
    assert config["max_response_size"] == "88"
    assert config["load_models"] == f"{wire.MODEL_NAME}={wire.MODEL_NAME}.mar"


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1))
def test_paths_of_any_letters_reach_java_as_they_are(name: str) -> None:
    assert render(Path("/x", name))["model_store"] == str(Path("/x", name))


def test_the_log_settings_are_xml_with_rotated_files() -> None:
    tree = ElementTree.fromstring(server.render_log_config())
    files = [file.attrib["name"] for file in tree.iter("RollingFile")]
    assert files == ["access_log", "model_log", "ts_log"]
    assert len(list(tree.iter("SizeBasedTriggeringPolicy"))) == 3


def test_the_environment_is_the_servers_own(tmp_path: Path) -> None:
    base = {"PATH": "/usr/bin", "TS_CONFIG_FILE": "/evil", "JDK_JAVA_OPTIONS": "-x", "HOME": "/home/me"}
    made = server.server_environment(base, Path("/java"), tmp_path / "run", tmp_path / "tmp", 3)
    assert "TS_CONFIG_FILE" not in made
    assert "JDK_JAVA_OPTIONS" not in made
    assert made["HOME"] == "/home/me"
    assert made["PATH"].split(os.pathsep)[0] == "/java/bin"
    assert made["OMP_NUM_THREADS"] == "3"
    assert {made[name] for name in ("TEMP", "TMPDIR")} == {str(tmp_path / "tmp")}
    assert {made[name] for name in ("LOG_LOCATION", "METRICS_LOCATION")} == {str(tmp_path / "run" / "logs")}


def test_the_command_names_scratch_space_and_settings(tmp_path: Path) -> None:
    command = server.java_command(Path("/java/bin/java"), Path("/site/ts"), tmp_path / "a run", tmp_path / "t", 700)
    assert command[0] == "/java/bin/java"
    assert f"-Djava.io.tmpdir={tmp_path / 't'}" in command
    assert command[command.index("-f") + 1] == str(tmp_path / "a run" / "config.properties")
    assert command[command.index("-cp") + 1] == "/site/ts/frontend/*"
    assert "--disable-token-auth" not in command


@pytest.mark.parametrize(("bands", "side"), [(1, 64), (6, 200)])
def test_the_largest_window_fits_into_the_request_limit(bands: int, side: int) -> None:
    names = [f"band{i}" for i in range(bands)]
    body, _ = wire.encode_image(np.zeros((bands, side, side), np.float32), names, None, EbvPlane.constant(0.0))
    assert len(body) <= server.request_limit(bands, side)


def test_a_cap_on_detections_counts_in_the_response_limit() -> None:
    assert server.detections_per_megapixel(InferenceSettings(proposals_per_megapixel=8000, crowding=2)) == 8000
    capped = InferenceSettings(max_detections=5000, tile=512, overlap=12)
    assert server.detections_per_megapixel(capped) == pytest.approx(20000)


def test_the_fullest_reply_fits_into_the_response_limit() -> None:
    most = int(1.4 * 16000 / 2 * 512**2 / 1e6)
    zero, mixture, index = np.zeros(most, np.float32), np.zeros((most, 20), np.float32), np.zeros(most, np.int32)
    full = Detections(np.zeros((most, 4), np.float32), zero, index, mixture, mixture, mixture, zero, index, index)
    body = wire.encode_detections(full, model_version="abc", package_version="1")
    assert len(body) <= server.response_limit(20, 8000, 512)


@pytest.mark.parametrize(("wish", "threads"), [("3", 3), ("", None), ("0", None), ("many", None)])
def test_threads_follow_the_environment_or_share_the_cores(wish: str, threads: int | None) -> None:
    cores = len(os.sched_getaffinity(0))
    assert server.default_threads(2, {"OMP_NUM_THREADS": wish}) == (threads or max(1, cores // 2))


def test_free_ports_differ_and_can_be_bound() -> None:
    assert len(set(server.free_ports(5))) == 5


PREFIX = "2026-11-21T23:24:27,088 [INFO ] W-9000-deepdisc_1.0-stdout MODEL_LOG - "
WORKER_LOG = "\n".join(
    PREFIX + line
    for line in (
        "Backend worker process died.",
        "Traceback (most recent call last):",
        "    raise ArchiveError(",
        "deepdisc_ops.errors.ArchiveError: member member-1 is damaged; rebuild it",
    )
)
SERVER_LOG = """\
2026-11-21T23:29:22,843 [WARN ] main org.pytorch.serve.ModelServer - Failed to load model: deepdisc.mar
java.util.zip.ZipException: invalid entry CRC (expected 0x1 but got 0x2)
\tat java.util.zip.ZipInputStream.readEnd(Unknown Source) ~[?:?]
"""


def test_the_reason_of_a_failed_load_is_found_in_the_logs() -> None:
    assert server.failure_in_log(WORKER_LOG) == "ArchiveError: member member-1 is damaged; rebuild it"
    assert server.failure_in_log(SERVER_LOG) == "java.util.zip.ZipException: invalid entry CRC (expected 0x1 but got 0x2)"


def test_a_log_without_a_failed_load_gives_no_reason() -> None:
    assert server.failure_in_log("") is None
    assert server.failure_in_log("... MODEL_LOG - RuntimeError: one request failed\n") is None


def test_torchserves_own_last_words_do_not_hide_the_reason() -> None:
    text = "\n".join([PREFIX + "Failed to load model deepdisc, exception x", PREFIX + "RuntimeError: size mismatch for conv"])
    assert (
        server.failure_in_log(text + f"\n{PREFIX}RuntimeError: 500 - Unknown exception") == "RuntimeError: size mismatch for conv"
    )


def test_a_log_is_summed_up_by_its_exception_or_its_last_line() -> None:
    assert server._summary(SERVER_LOG.splitlines()).startswith("java.util.zip.ZipException")
    assert server._summary(["first", "last", ""]) == "last"
    assert server._summary([]) == "its log is empty"


@pytest.mark.parametrize(
    ("console", "kind", "text"),
    [
        ("java.io.IOException: Failed to bind to address: http://127.0.0.1:1\n", server._PortTaken, "port"),
        ("WARNING: x\njava.lang.OutOfMemoryError: Java heap space\n", ServerError, "ended with code 3.*heap space"),
        ("", ServerError, "its log is empty"),
    ],
)
def test_a_server_that_ends_early_tells_why(spaced: Path, console: str, kind: type[Exception], text: str) -> None:
    (spaced / "logs").mkdir()
    (spaced / "logs" / "console.log").write_text(console)
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        process.wait()
        with pytest.raises(kind, match=text):
            server._wait_until_ready(process, spaced, PORTS, 1, 5.0)


def test_tokens_are_not_shown() -> None:
    assert "secret" not in repr(INFO)
    assert "secret" not in repr(server.ServerStatus("ready", "", INFO))


def test_private_files_are_private_and_complete(spaced: Path) -> None:
    server._write_private(spaced / "x", "text")
    assert (spaced / "x").read_text() == "text"
    assert stat.S_IMODE((spaced / "x").stat().st_mode) == 0o600
    assert [path.name for path in spaced.iterdir()] == ["x"]


def test_a_discovery_file_comes_home(spaced: Path) -> None:
    (spaced / "server.json").write_text(json.dumps(asdict(INFO)))
    assert server.discover(spaced) == INFO
    assert server.discover(spaced / "server.json") == INFO


def test_a_missing_or_foreign_discovery_file_is_named(spaced: Path) -> None:
    with pytest.raises(ServerUnreachable, match="serve start"):
        server.discover(spaced)
    for text in ("", "[]", "{}", '{"url": 1}'):
        (spaced / "server.json").write_text(text)
        with pytest.raises(ServerUnreachable, match="server.json"):
            server.discover(spaced)


def test_without_a_server_there_is_nothing_to_stop(tmp_path: Path) -> None:
    assert server.status(tmp_path / "none").state == "stopped"
    assert not server.stop(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_server_that_has_died_is_told_and_cleared_away(spaced: Path) -> None:
    scratch = spaced / "tmp"
    scratch.mkdir()
    (spaced / "server.json").write_text(json.dumps(asdict(replace(INFO, temp_dir=str(scratch)))))
    assert server.status(spaced).state == "stopped"
    assert "ended" in server.status(spaced).what
    assert server.stop(spaced)
    assert not (spaced / "server.json").exists()
    assert not scratch.exists()


def test_a_folder_of_other_things_is_not_made_a_run_directory(spaced: Path) -> None:
    (spaced / "thesis.tex").write_text("")
    with pytest.raises(ServerError, match=r"thesis\.tex"):
        server._check_own(spaced)
    assert [path.name for path in spaced.iterdir()] == ["thesis.tex"]


def test_two_commands_do_not_work_on_one_run_directory(spaced: Path) -> None:
    with server._locked(spaced), pytest.raises(ServerError, match="another start or stop"), server._locked(spaced):
        pass
    with server._locked(spaced):
        pass


def test_sockets_fit_however_deep_the_run_directory_lies(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    scratch = server._temp_dir(deep)
    try:
        assert len(str(scratch / ".ts.sock.65535")) < 104
        assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
    finally:
        scratch.rmdir()


def test_processes_of_others_are_never_ours(tmp_path: Path) -> None:
    assert server._group(os.getpgid(0), tmp_path) == []


def test_an_archive_that_is_not_there_starts_nothing(spaced: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist"):
        server.start(spaced / "none.mar", spaced / "run")
    with pytest.raises(ConfigError, match="at least 1"):
        server.start(spaced / "none.mar", spaced / "run", workers=0)
    assert not (spaced / "run").exists()

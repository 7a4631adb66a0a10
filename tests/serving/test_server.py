"""A run directory as the commands see it, without a server in it; tests/integration starts real ones."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import pytest
from discovered import INFO

from deepdisc_ops.errors import ArchiveError, ConfigError, ServerError, ServerUnreachable
from deepdisc_ops.serving import discovery, management, processes, render, server, state
from deepdisc_ops.serving.generation import Generation, _PortTaken, make_temp_dir, remove_folder
from deepdisc_ops.serving.plan import Plan, ServerSettings

PORTS = render.Ports(40001, 40002, 40003, 40004, 40005)
SAID = state.SupervisorState(2**22 + 3, "serving", 1, 2**22 + 1, "/a/b.mar", None, (), 0, 1.0, 0.0)


def generation(run_dir: Path, **settings: object) -> Generation:
    plan = Plan(run_dir / "a.mar", "a.mar", "abc", "def", ("g", "r"), 0.2, 1000, 2000)
    return Generation(1, plan, ServerSettings.model_validate(settings), run_dir)


@pytest.mark.parametrize(
    ("console", "kind", "text"),
    [
        ("java.io.IOException: Failed to bind to address: http://127.0.0.1:1\n", _PortTaken, "port"),
        ("WARNING: x\njava.lang.OutOfMemoryError: Java heap space\n", ServerError, "ended with code 3.*heap space"),
        ("", ServerError, "its log is empty"),
    ],
)
def test_a_server_that_ends_early_tells_why(spaced: Path, console: str, kind: type[Exception], text: str) -> None:
    (spaced / "logs" / "1").mkdir(parents=True)
    (spaced / "logs" / "1" / "console.log").write_text(console)
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        process.wait()
        with pytest.raises(kind, match=text):
            generation(spaced, wait_s=5)._wait_until_ready(process, PORTS, lambda: None)


def test_waiting_for_a_server_can_be_given_up(spaced: Path) -> None:
    class GivenUp(Exception):
        pass

    def give_up() -> None:
        raise GivenUp

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with pytest.raises(GivenUp):
            generation(spaced)._wait_until_ready(process, PORTS, give_up)
        process.communicate(b"\n")


def test_tokens_are_renewed_after_two_thirds_of_their_life(spaced: Path) -> None:
    young = generation(spaced, token_minutes=3)
    young._renewed = 1000.0
    assert not young.renewal_due(1119)
    assert young.renewal_due(1120)


def test_tokens_are_not_shown() -> None:
    assert "secret" not in repr(INFO)
    status = server.ServerStatus("ready", "", INFO, True, SAID, (management.Worker("9000", 1, "READY", 5),))
    assert "secret" not in repr(status)
    public = json.dumps(status.public())
    assert "secret" not in public
    assert "2026-12-21T23:32:45Z" in public


def test_private_files_are_private_and_complete(spaced: Path) -> None:
    discovery.write_private(spaced / "x", "text")
    assert (spaced / "x").read_text() == "text"
    assert stat.S_IMODE((spaced / "x").stat().st_mode) == 0o600
    assert [path.name for path in spaced.iterdir()] == ["x"]


def test_a_full_disk_leaves_the_old_file(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    discovery.write_private(spaced / "x", "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        discovery.write_private(spaced / "x", "new")
    assert (spaced / "x").read_text() == "old"
    assert [path.name for path in spaced.iterdir()] == ["x"]


def test_what_was_reserved_and_not_written_changes_nothing(spaced: Path) -> None:
    discovery.write_private(spaced / "x", "old")
    with pytest.raises(ZeroDivisionError), discovery.reserved(spaced / "x"):
        raise ZeroDivisionError
    assert [path.read_text() for path in spaced.iterdir()] == ["old"]


def test_a_discovery_file_comes_home(spaced: Path) -> None:
    (spaced / "server.json").write_text(discovery.encode_discovery(INFO))
    assert server.discover(spaced) == INFO
    assert server.discover(spaced / "server.json") == INFO


def test_prometheus_is_told_where_the_metrics_are() -> None:
    (target,) = json.loads(discovery.encode_targets(INFO))
    assert target["targets"] == ["127.0.0.1:40003"]
    assert target["labels"] == {"run_dir": "/run", "generation": "1", "model_version": "abc"}


def test_a_missing_or_foreign_discovery_file_is_named(spaced: Path) -> None:
    with pytest.raises(ServerUnreachable, match="serve start"):
        server.discover(spaced)
    for text in ("", "[]", "{}", '{"url": 1}'):
        (spaced / "server.json").write_text(text)
        with pytest.raises(ServerUnreachable, match=r"server\.json"):
            server.discover(spaced)


def test_without_a_server_there_is_nothing_to_stop(tmp_path: Path) -> None:
    assert server.status(tmp_path / "none").state == "stopped"
    assert not server.stop(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for order in (server.rollback, server.renew_tokens):
        with pytest.raises(ServerUnreachable, match="serve start"):
            order(tmp_path / "none")


def test_a_server_that_has_died_is_told_and_cleared_away(spaced: Path) -> None:
    (spaced / "server.json").write_text(json.dumps(asdict(INFO)))
    state.write_state(spaced, SAID)
    (spaced / "g1").mkdir()
    make_temp_dir(spaced / "g1")
    found = server.status(spaced)
    assert (found.state, found.healthy) == ("stopped", False)
    assert "died" in found.what
    assert server.stop(spaced)
    assert [path.name for path in spaced.iterdir()] == [state.LOCK]


@pytest.mark.parametrize("stage", ["starting", "restarting", "draining"])
def test_a_server_that_is_not_ready_yet_is_healthy(spaced: Path, stage: state.Stage) -> None:
    with state.locked(spaced):
        state.write_state(spaced, replace(SAID, stage=stage))
        found = server.status(spaced)
    assert (found.state, found.healthy) == ("unready", True)
    assert stage in found.what


def test_a_server_that_does_not_answer_is_not_healthy(spaced: Path) -> None:
    url = f"http://127.0.0.1:{processes.free_ports(1)[0]}"
    with state.locked(spaced):
        state.write_state(spaced, SAID)
        discovery.write_private(spaced / "server.json", discovery.encode_discovery(replace(INFO, management_url=url)))
        found = server.status(spaced)
    assert (found.state, found.healthy) == ("unready", False)
    assert "does not answer" in found.what


def test_readiness_counts_the_workers(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [{"id": str(9000 + i), "pid": i, "status": status} for i, status in enumerate(["READY", "UNLOADING"])]
    reply = [{"workers": workers, "jobQueueStatus": {"pendingRequests": 3}}]
    monkeypatch.setattr(httpx, "get", lambda *_, **__: httpx.Response(200, json=reply))
    with state.locked(spaced):
        state.write_state(spaced, replace(SAID, retiring=(1,)))
        for wanted, expected in ((1, "ready"), (2, "unready")):
            discovery.write_private(spaced / "server.json", discovery.encode_discovery(replace(INFO, workers=wanted)))
            found = server.status(spaced)
            assert (found.state, found.healthy, found.pending) == (expected, True, 3)
    assert "server 1 finishes" in found.what


def test_a_token_renewed_while_the_status_is_asked_is_read_anew(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(_: str, headers: dict[str, str], **__: object) -> httpx.Response:
        if headers["Authorization"] == "Bearer renewed":
            return httpx.Response(200, json=[{"workers": [{"id": "9000", "pid": 1, "status": "READY"}]}])
        if renews:
            renewed = replace(INFO, management_token="renewed", workers=1)
            discovery.write_private(spaced / "server.json", discovery.encode_discovery(renewed))
        return httpx.Response(400, json={"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed."})

    monkeypatch.setattr(httpx, "get", get)
    monkeypatch.setattr(server, "RENEWAL_S", 1)
    with state.locked(spaced):
        state.write_state(spaced, SAID)
        for renews, expected in ((False, "unready"), (True, "ready")):
            discovery.write_private(spaced / "server.json", discovery.encode_discovery(INFO))
            found = server.status(spaced)
            assert (found.state, found.healthy) == (expected, True)  # it answers, so that nobody has to start it anew
            assert renews or "does not accept the token" in found.what


def test_a_folder_of_other_things_is_not_made_a_run_directory(spaced: Path) -> None:
    (spaced / "thesis.tex").write_text("")
    with pytest.raises(ServerError, match=r"thesis\.tex"):
        server.start(spaced / "none.mar", spaced)
    assert [path.name for path in spaced.iterdir()] == ["thesis.tex"]


def test_sockets_fit_however_deep_the_run_directory_lies(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    make_temp_dir(deep)
    scratch = (deep / "tmp").resolve()
    assert len(str(scratch / ".ts.sock.65535")) < 104
    assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
    remove_folder(deep)
    assert not scratch.exists()
    assert not deep.exists()


def test_free_ports_differ_and_can_be_bound() -> None:
    assert len(set(processes.free_ports(5))) == 5


def test_processes_of_others_are_never_ours(tmp_path: Path) -> None:
    assert processes.group(os.getpgid(0), tmp_path) == []


def test_a_worker_that_was_killed_at_work_is_not_waited_for(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = generation(spaced)
    monkeypatch.setattr(ours, "model", lambda: management.ModelStatus((), 2))
    ours.busy.mkdir(parents=True)
    assert ours.unanswered() == 2
    (ours.busy / str(2**22 + 1)).touch()
    assert ours.unanswered() == 2
    (ours.busy / str(os.getpid())).touch()
    assert ours.unanswered() == 3


def test_a_key_file_is_read_when_it_is_whole(spaced: Path) -> None:
    path = spaced / "key_file.json"
    whole = {kind: {"key": kind, "expiration time": "soon"} for kind in ("inference", "management")} | {"API": {"key": "api"}}
    for text in ("", "{", "{}", json.dumps({**whole, "API": {}})):
        path.write_text(text)
        with pytest.raises(ValueError, match="."):
            management.read_keys(path)
    path.write_text(json.dumps(whole))
    assert management.read_keys(path) == management.Keys("inference", "management", "api", "soon")


def test_an_archive_that_is_not_there_starts_nothing(spaced: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist"):
        server.start(spaced / "none.mar", spaced / "run")
    with pytest.raises(ConfigError, match="workers"):
        server.start(spaced / "none.mar", spaced / "run", workers=0)
    assert not (spaced / "run").exists()

"""Who may do what: one server off loopback, run by an ordinary user who can write nowhere but in its run directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from deepdisc_ops.errors import AccessDenied, ConfigError
from deepdisc_ops.serving import archive, server
from deepdisc_ops.serving.client import Client
from deepdisc_ops.serving.discovery import DISCOVERY
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane

pytestmark = pytest.mark.integration

WAIT_S = 600
TOKEN_MINUTES = 0.3
NOBODY = 65534
TLS_HOST = "127.0.0.2"


def address_of_this_machine() -> str:
    """An address that others may reach, or where there is none another one of loopback."""
    found = [address.address for card in psutil.net_if_addrs().values() for address in card if address.family == 2]
    return next((address for address in found if not address.startswith("127.")), TLS_HOST)


@pytest.fixture(scope="module")
def everyone() -> Iterator[Path]:
    """A folder that every user may look into, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="deepdisc access ") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def place(everyone: Path) -> Path:
    """A folder of the ordinary user's, who is this one where this is no root."""
    folder = everyone / "ordinary user"
    folder.mkdir()
    if os.getuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    return folder


@pytest.fixture(scope="module")
def as_ordinary_user(place: Path) -> list[str]:
    """What a command is prefixed with: root's own files can then be read, as a package is, but not written."""
    if os.getuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root without setpriv (util-linux) cannot become another user here")
    read = "+dac_read_search"
    return [
        "setpriv",
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        "--inh-caps",
        f"-all,{read}",
        "--ambient-caps",
        read,
    ]


@pytest.fixture(scope="module")
def run_dir(everyone: Path, place: Path, as_ordinary_user: list[str], tiny_ensemble: Path) -> Iterator[Path]:
    """A server in the foreground of another user's process."""
    store = everyone / "store"
    store.mkdir()
    mar = archive.build_archive([tiny_ensemble], store / "tiny.mar")
    host, run_dir = address_of_this_machine(), place / "run"
    for name in ("key", "crt"):
        (place / f"tls.{name}").touch(mode=0o600)
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test", "-addext"]
    command += [f"subjectAltName=IP:{host}", "-keyout", "tls.key", "-out", "tls.crt"]
    subprocess.run(command, cwd=place, check=True, capture_output=True)
    if as_ordinary_user:
        for name in ("key", "crt"):
            os.chown(place / f"tls.{name}", NOBODY, NOBODY)
    store.chmod(0o555)
    command = [*as_ordinary_user, sys.executable, "-m", "deepdisc_ops", "serve", "start", str(mar), "--run-dir", str(run_dir)]
    command += ["--foreground", "--threads", "1", "--max-window", "128", "--wait", str(WAIT_S), "--host", host]
    command += ["--certificate", str(place / "tls.crt"), "--private-key", str(place / "tls.key")]
    command += ["--token-minutes", str(TOKEN_MINUTES)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(place / "none")}
    (store / "begun").touch()
    with subprocess.Popen(
        command, env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while process.poll() is None and not (run_dir / DISCOVERY).exists():
            time.sleep(0.2)
        if process.poll() is not None:
            pytest.fail(process.communicate()[0])
        yield run_dir
        process.terminate()
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said


@pytest.fixture
def info(run_dir: Path) -> server.ServerInfo:
    return server.discover(run_dir)


def predict(client: Client, info: server.ServerInfo) -> Detections:
    sky = np.random.default_rng(1).normal(size=(len(info.bands), 64, 64)).astype(np.float32)
    return client.predict_array(sky, info.bands, None, EbvPlane.constant(0.02))


def status_of(url: str, token: str | None, method: str = "GET", **options: object) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.request(method, url, headers=headers, trust_env=False, timeout=60, **options).status_code  # type: ignore[arg-type]


def test_it_serves_by_tls_at_its_address(run_dir: Path, info: server.ServerInfo) -> None:
    assert info.url.startswith(f"https://{address_of_this_machine()}:")
    with Client.from_discovery(run_dir, patience_s=WAIT_S) as client:
        predict(client, info)


def test_plain_http_and_strangers_certificates_get_nothing(info: server.ServerInfo) -> None:
    assert status_of(f"{info.url.replace('https', 'http')}/predictions/{info.model}", info.token, "POST") == 403
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        status_of(f"{info.url}/ping", None)


def test_management_and_metrics_stay_on_loopback(info: server.ServerInfo) -> None:
    listening = [c.laddr for c in psutil.Process(info.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    public = {one.port for one in listening if one.ip.removeprefix("::ffff:") != "127.0.0.1"}
    assert len(listening) == 5
    assert public == {int(info.url.rpartition(":")[2])}
    for url in (info.management_url, info.metrics_url):
        with pytest.raises(httpx.ConnectError):
            status_of(url.replace("127.0.0.1", address_of_this_machine()), None)


def test_only_the_predictions_token_predicts(info: server.ServerInfo) -> None:
    trusted = Path(info.certificate or "")
    for token in ("wrong", info.management_token):
        with Client(info.url, token, certificate=trusted, patience_s=0) as stranger, pytest.raises(AccessDenied, match="token"):
            predict(stranger, info)
    context = ssl.create_default_context(cafile=info.certificate)
    url = f"{info.url}/predictions/{info.model}"
    assert 400 <= status_of(url, None, "POST", verify=context) < 500


def test_nobody_registers_scales_or_removes_a_model(run_dir: Path, info: server.ServerInfo) -> None:
    context = ssl.create_default_context(cafile=info.certificate)
    changes = [
        ("POST", "/models?url=file:///x.mar"),
        ("PUT", f"/models/{info.model}?min_worker=4"),
        ("DELETE", f"/models/{info.model}"),
    ]
    for method, path in changes:
        for token in (None, "wrong", info.token, info.management_token):
            if (method, token) != ("PUT", info.management_token):  # whose server it is may start more workers
                assert 400 <= status_of(info.management_url + path, token, method) < 500
            assert 400 <= status_of(info.url + path, token, method, verify=context) < 500
    for token in (None, "wrong", info.token):
        assert 400 <= status_of(f"{info.management_url}/models", token) < 500
    for url, options in ((info.management_url, {}), (info.url, {"verify": context})):
        for token in (None, info.token, info.management_token):
            assert 400 <= status_of(f"{url}/token?type=inference", token, **options) < 500
    assert len(server.status(run_dir).workers) == 1


def test_an_expired_token_counts_no_more_and_clients_find_the_next(run_dir: Path) -> None:
    """The supervisor is held up, as by a machine that sleeps, until the token has run out."""
    os.kill(server.discover(run_dir).supervisor_pid, signal.SIGSTOP)
    info = server.discover(run_dir)
    try:
        with Client(info.url, info.token, certificate=Path(info.certificate or ""), patience_s=0) as former:
            time.sleep(60 * TOKEN_MINUTES)
            with pytest.raises(AccessDenied):
                predict(former, info)
    finally:
        os.kill(info.supervisor_pid, signal.SIGCONT)
    with Client.from_discovery(run_dir, patience_s=60) as client:
        predict(client, info)
    assert server.discover(run_dir).token != info.token


def test_it_writes_below_its_run_directory_only(everyone: Path, run_dir: Path, info: server.ServerInfo) -> None:
    store = everyone / "store"
    since = (store / "begun").stat().st_mtime
    assert [path.name for path in store.iterdir() if path.stat().st_mtime > since] == []
    owner = run_dir.stat().st_uid
    uids = psutil.Process(info.pid).uids()
    assert {uids.real, uids.effective, uids.saved} == {owner}
    if os.getuid() == 0:
        elsewhere = [path for top in ("/tmp", "/var/tmp", "/dev/shm", "/home") for path in written(Path(top), owner, since)]
        scratch = (run_dir / f"g{info.generation}" / "tmp").resolve()  # a link to /tmp where paths get too long for sockets
        assert [path for path in elsewhere if not path.is_relative_to(run_dir.parent) and not path.is_relative_to(scratch)] == []
    assert all(stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0 for path in run_dir.iterdir() if path.suffix == ".json")
    tree = json.loads((run_dir / DISCOVERY).read_text())
    assert tree["run_dir"] == str(run_dir)


def written(top: Path, owner: int, since: float) -> list[Path]:
    """What ``owner`` has made or changed below ``top``."""
    found = []
    for folder, _, names in os.walk(top):
        for path in (Path(folder), *(Path(folder, name) for name in names)):
            try:
                about = path.lstat()
            except OSError:
                continue
            if about.st_uid == owner and about.st_mtime >= since:
                found.append(path)
    return found


def test_loopback_is_what_is_served_unless_asked_and_never_without_tls(tiny_ensemble: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--certificate"):
        server.start(tiny_ensemble, tmp_path / "run", host="192.0.2.1")
    assert server.ServerSettings().host == "127.0.0.1"

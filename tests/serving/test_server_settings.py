"""What an operator may ask for, and what is refused because it would lay the server open."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from deepdisc_ops.errors import ConfigError
from deepdisc_ops.serving.contents import DustSource
from deepdisc_ops.serving.discovery import trust
from deepdisc_ops.serving.plan import Plan, ServerSettings, check_settings, service_settings
from deepdisc_ops.serving.service import VARIABLE, ServiceSettings, read_service


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two self-signed pairs, a key in an older form and one with a password."""
    folder = tmp_path_factory.mktemp("pem files")
    for name in ("one", "other"):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        command += ["-keyout", f"{name}.key", "-out", f"{name}.crt"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    convert = ["openssl", "rsa", "-in", "one.key", "-out"]
    subprocess.run([*convert, "older.key", "-traditional"], cwd=folder, check=True, capture_output=True)
    subprocess.run([*convert, "locked.key", "-aes256", "-passout", "pass:x"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("host", ["0.0.0.0", "no.such.host.invalid", "not a host"])
def test_only_one_address_that_exists_is_served(host: str) -> None:
    with pytest.raises(ConfigError, match="clients"):
        check_settings({"host": host})


def test_off_loopback_needs_tls(pem: Path) -> None:
    with pytest.raises(ConfigError, match="--certificate and --private-key"):
        check_settings({"host": "192.0.2.1"})
    pair = {"certificate": pem / "one.crt", "private_key": pem / "one.key"}
    assert check_settings({"host": "192.0.2.1", **pair}).host == "192.0.2.1"
    assert check_settings({"host": "localhost"}).certificate is None


@pytest.mark.parametrize(
    ("certificate", "key", "text"),
    [
        ("one.crt", None, "needs its private key"),
        (None, "one.key", "needs its private key"),
        ("one.crt", "other.key", "belong together"),
        ("one.crt", "locked.key", "encrypted"),
        ("one.crt", "none.key", "No such file"),
        ("one.key", "one.key", "PEM"),
        ("one.crt", "older.key", "openssl pkcs8 -topk8"),
    ],
)
def test_a_pair_that_cannot_be_served_is_told(pem: Path, certificate: str | None, key: str | None, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_settings({"certificate": certificate and pem / certificate, "private_key": key and pem / key})


def test_all_faults_are_told_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)workers.*drain_s"):
        check_settings({"workers": 0, "drain_s": -1})
    with pytest.raises(ConfigError, match="wrokers"):
        check_settings({"wrokers": 1})


def test_roots_are_folders_and_absolute(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (spaced / "images").mkdir()
    monkeypatch.chdir(spaced)
    assert check_settings({"roots": ["images"]}).roots == (spaced / "images",)
    with pytest.raises(ConfigError, match="is no folder"):
        check_settings({"roots": ["none"]})


def test_workers_read_what_the_server_wrote(spaced: Path) -> None:
    plan = Plan(spaced / "a.mar", "a.mar", "1", "2", ("g",), None, 12345, 23456)
    settings = ServerSettings(max_window=300, roots=(spaced,), memory="swap", dust_map="sfd", dust_folder=spaced, dust_scale=0.86)
    told = service_settings(plan, settings, spaced / "busy")
    (spaced / "service.json").write_text(told.model_dump_json())
    read = read_service({VARIABLE: str(spaced / "service.json")})
    assert read == told
    assert (read.request_bytes, read.reply_bytes, read.max_window, read.memory) == (12345, 23456, 300, "swap")
    assert (read.busy, read.roots, read.dust_map, read.dust_scale) == (spaced / "busy", (spaced,), "sfd", 0.86)


@pytest.mark.parametrize(
    ("trained", "asked", "told"),
    [
        (None, {}, (None, 1.0)),
        (DustSource(source="0.02"), {}, ("0.02", 1.0)),
        (DustSource(source="sfd", scale=0.86), {}, (None, 1.0)),
        (DustSource(source="sfd", scale=0.86), {"dust_folder": Path("maps")}, ("sfd", 0.86)),
        (DustSource(source="sfd", scale=0.86), {"dust_map": "csfd", "dust_folder": Path("maps")}, ("csfd", 1.0)),
    ],
)
def test_without_a_dust_map_the_archives_is_taken_where_its_files_can_be(
    spaced: Path, trained: DustSource | None, asked: dict[str, Any], told: tuple[str | None, float]
) -> None:
    plan = Plan(spaced / "a.mar", "a.mar", "1", "2", ("g",), None, 12345, 23456, trained)
    settings = service_settings(plan, ServerSettings(**asked), spaced / "busy")
    assert (settings.dust_map, settings.dust_scale) == told


def test_without_a_server_the_defaults_hold_and_a_damaged_file_is_told(spaced: Path) -> None:
    assert read_service({}) == ServiceSettings()
    (spaced / "service.json").write_text('{"max_window": "wide"}')
    for name in ("service.json", "none.json"):
        with pytest.raises(ConfigError, match="start the server anew"):
            read_service({VARIABLE: str(spaced / name)})


def test_plain_http_is_not_verified_against_a_file(pem: Path) -> None:
    assert trust(None) is True
    assert trust(pem / "one.crt").get_ca_certs()  # type: ignore[union-attr]

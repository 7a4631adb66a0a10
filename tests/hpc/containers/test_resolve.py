"""What only a site knows is asked of its registry and its apt."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.hpc.containers.resolve import Reference, base_image, debian_mirror, parse_reference
from deepdisc_ops.hpc.containers.sbom import Audit, debian_component, read_audit

DIGEST = f"sha256:{'ab' * 32}"


class Registry(BaseHTTPRequestHandler):
    """A registry that wants an anonymous token, as public ones do."""

    def do_HEAD(self) -> None:
        host = self.headers["Host"]
        if self.headers.get("Authorization") != "Bearer let-me":
            self.send_response(401)
            self.send_header("WWW-Authenticate", f'Bearer realm="http://{host}/token",service="here",scope="pull"')
        elif self.path == "/v2/library/python/manifests/3.11-slim":
            self.send_response(200)
            self.send_header("Docker-Content-Digest", DIGEST)
        else:
            self.send_response(404)
        self.end_headers()

    def do_GET(self) -> None:
        found = self.path.startswith("/token?service=here&scope=pull")
        body = json.dumps({"token": "let-me"}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def registry() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_base_is_pinned_by_the_digest_of_its_registry(registry: str) -> None:
    assert base_image(f"docker://{registry}/library/python:3.11-slim") == f"{registry}/library/python@{DIGEST}"


def test_a_registry_without_the_image_says_so(registry: str) -> None:
    with pytest.raises(SetupError, match="answered 404 for library/none:1, and no digest"):
        base_image(f"{registry}/library/none:1")


def test_a_registry_that_does_not_answer_says_so() -> None:
    with pytest.raises(SetupError, match="does not answer"):
        base_image("127.0.0.1:9/library/python:3.11")


@pytest.mark.parametrize(
    "text", ["python", "python:3.11", "library/python:3.11", "host.example.org/python", "host.example.org/Python:1"]
)
def test_nothing_is_added_to_what_is_not_said(text: str) -> None:
    with pytest.raises(ConfigError, match="not of the form HOST/REPOSITORY:TAG"):
        parse_reference(text)


def test_other_machines_are_asked_by_https() -> None:
    assert parse_reference("host.example.org:5000/a/b:1") == Reference("host.example.org:5000", "a/b", "1")
    assert parse_reference("host.example.org/a:1").scheme == "https"
    assert parse_reference("localhost:5000/a:1").scheme == "http"


def test_the_mirror_is_that_of_apt() -> None:
    assert (
        debian_mirror(lambda: "http://x.example.org/debian-security/\nhttp://x.example.org/debian/\n")
        == "http://x.example.org/debian"
    )
    with pytest.raises(SetupError, match="apt names no mirror"):
        debian_mirror(lambda: "\n")


def test_debians_packages_are_components() -> None:
    assert debian_component("libc6 2.36-9+deb12u1 amd64")["purl"] == "pkg:deb/debian/libc6@2.36-9+deb12u1?arch=amd64"


def test_what_an_index_does_not_tell_is_no_clean_bill() -> None:
    well = {"name": "numpy", "version": "2", "vulns": []}
    bad = {"name": "urllib3", "version": "1.24", "vulns": [{"id": "CVE-1", "fix_versions": ["1.25", "2"]}]}
    untold = {"name": "ours", "skip_reason": "not found"}
    report = json.dumps({"dependencies": [well, bad, untold]})
    found = Audit([{"package": "urllib3", "version": "1.24", "id": "CVE-1", "fixed": "1.25, 2"}], ["ours"])
    assert read_audit(report) == found
    with pytest.raises(SetupError, match=r"tells nothing of 1 packages \(not found\); audit where"):
        read_audit(json.dumps({"dependencies": [untold]}))
    with pytest.raises(SetupError, match="tells no vulnerabilities: no route; audit where"):
        read_audit("", "Traceback\nno route\n")

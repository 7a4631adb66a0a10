"""What only a site can know, asked there: the digest of a base in its registry, the mirror of its apt, the wheels of its index."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from deepdisc_ops.errors import ConfigError, SetupError

MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Reference:
    """An image in a registry: HOST/REPOSITORY:TAG."""

    host: str
    repository: str
    tag: str

    @property
    def scheme(self) -> str:
        """Plain http for this machine's own registries, https for all others."""
        return "http" if self.host.partition(":")[0] in ("localhost", "127.0.0.1") else "https"


def parse_reference(text: str) -> Reference:
    """HOST/REPOSITORY:TAG in its parts. Raises `ConfigError`: nothing is added to what is not said, neither host nor tag."""
    found = re.fullmatch(r"([\w.-]+(?::\d+)?)/([a-z0-9][a-z0-9._/-]*):([\w][\w.-]{0,127})", text.removeprefix("docker://"))
    if found is None or not re.search(r"[.:]|^localhost$", found[1]):
        raise ConfigError(f"{text!r} is not of the form HOST/REPOSITORY:TAG; name the site's registry and the tag in full")
    return Reference(*found.groups())


def base_image(text: str) -> str:
    """The reference pinned by the digest that its registry tells. Raises `SetupError` where it does not answer."""
    import httpx

    reference = parse_reference(text)
    url = f"{reference.scheme}://{reference.host}/v2/{reference.repository}/manifests/{reference.tag}"
    try:
        with httpx.Client(timeout=PATIENCE_S, follow_redirects=True) as client:
            answer = client.head(url, headers={"Accept": MANIFESTS})
            if answer.status_code == 401 and (token := _token(client, answer.headers.get("www-authenticate", ""))):
                answer = client.head(url, headers={"Accept": MANIFESTS, "Authorization": f"Bearer {token}"})
    except httpx.HTTPError as error:
        raise SetupError(
            f"the registry {reference.host} does not answer: {error}; give BASE_IMAGE=NAME@sha256:DIGEST yourself"
        ) from None
    digest = answer.headers.get("docker-content-digest", "")
    if answer.status_code != 200 or not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise SetupError(
            f"{reference.host} answered {answer.status_code} for {reference.repository}:{reference.tag}, and no digest"
        )
    return f"{reference.host}/{reference.repository}@{digest}"


def debian_mirror(ask: Callable[[], str] | None = None) -> str:
    """The mirror of this machine's apt. Raises `SetupError` where there is none."""
    try:
        told = ask() if ask else _apt()
    except (OSError, subprocess.SubprocessError):
        raise SetupError("this machine has no apt to name a Debian mirror; give MIRROR=URL, or take --base registry") from None
    uris = [line.strip().rstrip("/") for line in told.splitlines() if "security" not in line.lower() and line.strip()]
    if not uris:
        raise SetupError("apt names no mirror; run apt-get update, or give MIRROR=URL")
    return uris[0]


def _apt() -> str:
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def _token(client: object, challenge: str) -> str | None:
    """An anonymous token, as a registry's challenge asks for one."""
    import httpx

    assert isinstance(client, httpx.Client)
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = fields.pop("realm", "")
    if not challenge.lower().startswith("bearer") or not realm.startswith(("https://", "http://127.0.0.1", "http://localhost")):
        return None
    answer = client.get(realm, params=fields)
    found = answer.json() if answer.status_code == 200 else {}
    return found.get("token") or found.get("access_token")

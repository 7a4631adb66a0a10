"""docs/endpoint.md and docs/openapi.yaml say what the code does: statuses, codes, headers, media types, fields."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deepdisc_ops.serving import wire
from deepdisc_ops.serving.wire.protocol import MAX_BANDS, MAX_BOXES, MAX_HEADER_BOXES
from deepdisc_ops.serving.wire.reference import Reference

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    tree = yaml.safe_load((DOCS / "openapi.yaml").read_text())
    assert isinstance(tree, dict)
    return tree


@pytest.fixture(scope="module")
def post(openapi: dict[str, Any]) -> dict[str, Any]:
    operation = openapi["paths"][wire.PREDICT_PATH]["post"]
    assert isinstance(operation, dict)
    return operation


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "endpoint.md").read_text()


def test_openapi_has_every_status_and_no_other(post: dict[str, Any]) -> None:
    ours = {reason.status for reason in wire.REASONS.values()}
    assert {int(status) for status in post["responses"]} == {200} | ours | set(wire.FRONT_END)
    with_json = {int(status) for status, response in post["responses"].items() if "$ref" in response}
    assert with_json == ours


def test_openapi_has_every_header_with_its_meaning(post: dict[str, Any]) -> None:
    said = {parameter["name"]: parameter["description"] for parameter in post["parameters"]}
    assert said == wire.HEADERS
    forms = next(parameter for parameter in post["parameters"] if parameter["name"] == wire.REPLY_HEADER)
    assert forms["schema"]["enum"] == list(wire.REPLY_TYPES)


def test_openapi_has_every_media_type(post: dict[str, Any]) -> None:
    bodies = {kind: body["schema"].get("description") for kind, body in post["requestBody"]["content"].items()}
    assert bodies.keys() == wire.BODY_TYPES.keys()
    assert all(text in (None, wire.BODY_TYPES[kind]) for kind, text in bodies.items())
    assert set(post["responses"]["200"]["content"]) == set(wire.REPLY_TYPES.values())


def test_openapi_describes_faults_and_references(openapi: dict[str, Any]) -> None:
    schemas = openapi["components"]["schemas"]
    assert schemas["Fault"]["properties"]["code"]["enum"] == list(wire.REASONS)
    assert list(openapi["components"]["responses"]["Fault"]["content"]) == [wire.FAULT_TYPE]
    assert set(schemas["Reference"]["properties"]) == set(Reference.model_fields)
    assert schemas["Reference"]["properties"]["paths"]["maxItems"] == MAX_BANDS
    fault = yaml.safe_load(wire.encode_fault(wire.Fault("bad_core", "what", "remedy", "name")))
    jsonschema.validate(fault, schemas["Fault"])
    jsonschema.validate(
        Reference(paths=("a",), window=(0, 0, 1, 1), bad_bits=3).model_dump(mode="json", exclude_none=True), schemas["Reference"]
    )


def test_openapi_refers_to_what_is_there(openapi: dict[str, Any]) -> None:
    text = (DOCS / "openapi.yaml").read_text()
    for reference in re.findall(r'\$ref: "#/([^"]+)"', text):
        node: Any = openapi
        for part in reference.split("/"):
            node = node[part]


def test_the_page_has_every_reason_header_and_type(page: str) -> None:
    for code, reason in wire.REASONS.items():
        assert f"| {reason.status} | `{code}` | {reason.when} |" in page
    for status, when in wire.FRONT_END.items():
        assert f"| {status} | {when} |" in page
    for header in wire.HEADERS:
        assert f"| `{header}` |" in page
    for kind in wire.BODY_TYPES:
        assert f"| `{kind}` |" in page
    assert f"up to {MAX_HEADER_BOXES}" in page
    assert f"up to {MAX_BOXES}" in page
    assert all(f"`{form}`" in page for form in wire.REPLY_TYPES)

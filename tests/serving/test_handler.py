"""The handler as TorchServe meets it: loaded by path, one class, a reply for every request of a batch."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ts.context import Context, RequestProcessor
from ts.utils.util import list_classes_from_module

from deepdisc_ops import resources
from deepdisc_ops.errors import ImageError
from deepdisc_ops.serving import wire
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane

BANDS = ("g", "r")
PATH = resources.find("handlers/ensemble_handler.py")


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ensemble_handler", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def predict_brightness(data: np.ndarray, ebv: EbvPlane, mask: np.ndarray) -> Detections:
    """One object that carries what arrived: scores are the first plane's brightest pixel, flags the masked pixels."""
    one = np.full(1, data[0].max(), np.float32)
    mixture = np.full((1, 2), ebv.corners[3], np.float32)
    index = np.full(1, mask.sum(), np.int32)
    return Detections(np.zeros((1, 4), np.float32), one, index, mixture, mixture, mixture, one, index, index)


def serve(
    module: ModuleType, predict: Callable[..., Detections], *requests: tuple[bytes, dict[str, str]]
) -> tuple[list[Any], Context]:
    handler = module.EnsembleHandler()
    handler.ensemble, handler.version = SimpleNamespace(bands=BANDS, predict=predict), "abc"
    context = Context("deepdisc", ".", None, len(requests), None, "0")
    context.request_processor = [RequestProcessor({"body": {"content-type": "x"}, **headers}) for _, headers in requests]
    context.request_ids = {i: str(i) for i in range(len(requests))}
    return handler.handle([{"body": bytearray(body)} for body, _ in requests], context), context


def request(value: float, bands: tuple[str, ...] = BANDS) -> tuple[bytes, dict[str, str]]:
    image = np.stack([np.full((4, 5), value + i, np.float32) for i in range(len(bands))])
    return wire.encode_image(image, bands, None, EbvPlane((0.0, 0.0, 0.0, 0.5)))


def test_torchserve_sees_one_class(module: ModuleType) -> None:
    assert [found.__name__ for found in list_classes_from_module(module)] == ["EnsembleHandler"]


def test_the_module_itself_imports_the_standard_library_only() -> None:
    imports = [node for node in ast.parse(PATH.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else alias.name for node in imports for alias in node.names}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"__future__"}


def test_bands_in_another_order_are_found_by_name(module: ModuleType) -> None:
    replies, context = serve(module, predict_brightness, request(1.0), request(1.0, ("r", "g")))
    assert [wire.decode_detections(reply).scores[0] for reply in replies] == [1.0, 2.0]
    assert wire.decode_detections(replies[0]).means[0, 0] == 0.5
    assert wire.reply_versions(replies[0])["model_version"] == "abc"
    assert context.get_response_status(0)[0] == 200
    assert context.get_response_content_type(0) == wire.REPLY_TYPE


def test_header_names_may_be_in_capitals(module: ModuleType) -> None:
    body, headers = request(3.0)
    replies, _ = serve(module, predict_brightness, (body, {key.title(): value for key, value in headers.items()}))
    assert wire.decode_detections(replies[0]).scores[0] == 3.0


def test_a_refused_request_does_not_spoil_its_neighbours(module: ModuleType) -> None:
    replies, context = serve(module, predict_brightness, request(1.0), request(2.0, ("g", "i")), (b"junk", {}), request(4.0))
    assert [context.get_response_status(i)[0] for i in range(4)] == [200, 422, 400, 200]
    assert wire.decode_detections(replies[3]).scores[0] == 4.0
    fault = wire.decode_fault(replies[1].encode())
    assert fault is not None
    assert fault.code == "missing_band"
    assert "band r missing" in fault.what


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ImageError("too small"), 422, "unusable"),
        (MemoryError(), 507, "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 507, "out_of_memory"),
        (RuntimeError("boom"), 500, "internal"),
    ],
)
def test_every_failure_is_an_answer(module: ModuleType, error: Exception, status: int, code: str) -> None:
    def fail(*_: object) -> Detections:
        raise error

    replies, context = serve(module, fail, request(1.0))
    assert context.get_response_status(0)[0] == status
    fault = wire.decode_fault(replies[0].encode())
    assert fault is not None
    assert fault.code == code


def test_an_empty_batch_has_no_replies(module: ModuleType) -> None:
    assert serve(module, predict_brightness)[0] == []


@pytest.mark.parametrize("body", [None, "text", {"instances": []}])
def test_a_body_that_is_no_bytes_is_refused(module: ModuleType, body: object) -> None:
    handler = module.EnsembleHandler()
    context = Context("deepdisc", ".", None, 1, None, "0")
    context.request_processor, context.request_ids = [RequestProcessor({})], {0: "0"}
    assert "binary body" in handler.handle([{"body": body}], context)[0]
    assert context.get_response_status(0)[0] == 400

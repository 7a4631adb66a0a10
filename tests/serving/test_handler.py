"""The handler as TorchServe meets it: loaded by path, one class, a reply for every request of a batch."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ts.context import Context, RequestProcessor
from ts.utils.util import list_classes_from_module

from deepdisc_ops import resources
from deepdisc_ops.errors import ArchiveError, ImageError
from deepdisc_ops.serving import wire
from deepdisc_ops.serving.answering import Answerer
from deepdisc_ops.serving.service import ServiceSettings
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


def predict_brightness(data: np.ndarray, ebv: EbvPlane, mask: np.ndarray, *, masks: bool = False) -> Detections:
    """One object that carries what arrived: scores are the first plane's brightest pixel, flags the masked pixels."""
    one = np.full(1, data[0].max(), np.float32)
    mixture = np.full((1, 2), ebv.corners[3], np.float32)
    index = np.full(1, mask.sum(), np.int32)
    return Detections(np.zeros((1, 4), np.float32), one, index, mixture, mixture, mixture, one, index, index)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the handler tells of its requests, in place of TorchServe's metrics."""
    calls: list[dict[str, Any]] = []
    metrics = ModuleType("deepdisc_ops.serving.metrics")
    metrics.Metrics = lambda cache: SimpleNamespace(request=lambda **values: calls.append(values))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, metrics.__name__, metrics)
    return calls


def serve(
    module: ModuleType,
    predict: Callable[..., Detections],
    *requests: tuple[object, dict[str, str]],
    service: ServiceSettings | None = None,
) -> tuple[list[Any], Context]:
    handler = module.EnsembleHandler()
    ensemble = SimpleNamespace(bands=BANDS, pixel_scale=0.2, names=("a",), seats=(), failures={}, predict=predict)
    handler.answerer = Answerer(ensemble, "abc", service or ServiceSettings())  # type: ignore[arg-type]
    context = Context("deepdisc", ".", None, len(requests), None, "0")
    context.request_processor = [RequestProcessor({"body": {"content-type": "x"}, **headers}) for _, headers in requests]
    context.request_ids = {i: f"ts-{i}" for i in range(len(requests))}
    bodies = [{"body": bytearray(body) if isinstance(body, bytes) else body} for body, _ in requests]
    return handler.handle(bodies, context), context


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
        (RuntimeError("[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: can't allocate memory"), 507, "out_of_memory"),
        (ArchiveError("member a: its weights are gone"), 500, "member_failed"),
        (RuntimeError("boom"), 500, "internal"),
    ],
)
def test_every_failure_is_an_answer(module: ModuleType, error: Exception, status: int, code: str) -> None:
    def fail(*_: object, masks: bool) -> Detections:
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
    (reply,), context = serve(module, predict_brightness, (body, {}))
    assert "binary body" in reply
    assert context.get_response_status(0)[0] == 415


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "text/plain"}, {"content-type": "multipart/form-data; boundary=x"}, {"content-encoding": "gzip"}],
)
def test_a_body_of_another_type_is_refused(module: ModuleType, headers: dict[str, str]) -> None:
    body, own = request(1.0)
    (reply,), context = serve(module, predict_brightness, (body, {**own, **headers}))
    assert context.get_response_status(0) == (415, "unsupported_type")
    assert json.loads(reply)["remedy"]


def test_a_request_keeps_its_name_in_reply_fault_log_and_metrics(
    module: ModuleType, told: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    body, headers = request(1.0)
    with caplog.at_level(logging.INFO):
        replies, context = serve(
            module,
            predict_brightness,
            (body, {**headers, wire.REQUEST_HEADER: "tile-7.a_B"}),
            (b"junk", {**headers, wire.REQUEST_HEADER: "tile-8"}),
            (body, headers),
            (body, {**headers, wire.REQUEST_HEADER: "two\nlines"}),
        )
    names = [context.get_response_headers(i)[wire.REQUEST_HEADER] for i in range(4)]
    assert names[:2] == ["tile-7.a_B", "tile-8"]
    assert len(names[2]) == len(names[3]) == 32
    assert wire.reply_origin(replies[0]).request == "tile-7.a_B"
    assert json.loads(replies[1])["request"] == "tile-8"
    assert json.loads(replies[3])["code"] == "bad_request_id"
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("request ")]
    assert [line.split(" seconds=")[0] for line in lines] == [
        "request tile-7.a_B ts-0 200 objects=1 megapixels=0.000",
        "request tile-8 ts-1 400 objects=0 megapixels=0.000",
        f"request {names[2]} ts-2 200 objects=1 megapixels=0.000",
        f"request {names[3]} ts-3 400 objects=0 megapixels=0.000",
    ]
    assert [call["status"] for call in told] == [200, 400, 200, 400]
    assert set(told[0]["seconds"]) == {"read", "predict", "write"}
    assert told[0]["megapixels"] == pytest.approx(20e-6)


def test_a_worker_says_that_it_is_at_work_while_it_answers(module: ModuleType, spaced: Path) -> None:
    seen: list[list[str]] = []

    def look(*arguments: Any, masks: bool) -> Detections:
        seen.append([path.name for path in spaced.iterdir()])
        return predict_brightness(*arguments)

    service = ServiceSettings(busy=spaced)
    serve(module, look, request(1.0), service=service)
    assert seen == [[str(os.getpid())]]
    assert list(spaced.iterdir()) == []
    gone = ServiceSettings(busy=spaced / "gone")
    assert serve(module, predict_brightness, request(1.0), service=gone)[1].get_response_status(0)[0] == 200


def test_a_reply_over_the_limit_is_refused_before_it_ends_the_worker(module: ModuleType) -> None:
    (reply,), context = serve(module, predict_brightness, request(1.0), service=ServiceSettings(reply_bytes=1000))
    assert context.get_response_status(0) == (413, "reply_too_large")
    assert "smaller windows" in json.loads(reply)["remedy"]


def test_a_window_over_the_limit_is_refused(module: ModuleType) -> None:
    wide = wire.encode_image(np.zeros((2, 4, 65), np.float32), BANDS, None, EbvPlane.constant(0.0))
    _, context = serve(module, predict_brightness, wide, service=ServiceSettings(max_window=64))
    assert context.get_response_status(0) == (413, "window_too_large")


def test_torchserve_may_ask_what_is_served(module: ModuleType) -> None:
    (reply,), context = serve(module, predict_brightness, (b"", {"describe": "True"}))
    told = json.loads(reply)
    assert (told["model_version"], told["bands"], told["max_window"]) == ("abc", list(BANDS), 2048)
    assert context.get_response_content_type(0) == wire.JSON_TYPE

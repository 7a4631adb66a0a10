"""The handler with real members of which one fails: the reply names it, or the others answer if the ensemble says so."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ts.context import Context, RequestProcessor

from deepdisc_ops import resources
from deepdisc_ops.errors import ArchiveError
from deepdisc_ops.inference.engine import Member
from deepdisc_ops.serving import wire
from deepdisc_ops.sky.dust import EbvPlane

BANDS = ("u", "g", "r", "i", "z", "y")


def serving(ensemble: Path, folder: Path, on_failure: str | None = None) -> Any:
    """A handler that has read a copy of the ensemble, whose description may say what a failure does."""
    shutil.copytree(ensemble, folder)
    if on_failure is not None:
        description = yaml.safe_load((folder / "ensemble.yaml").read_text())
        (folder / "ensemble.yaml").write_text(yaml.safe_dump(description | {"on_failure": on_failure}))
    spec = importlib.util.spec_from_file_location("ensemble_handler", resources.find("handlers/ensemble_handler.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EnsembleHandler()
    handler.initialize(SimpleNamespace(system_properties={"model_dir": str(folder), "gpu_id": None}))
    return handler


def asked(handler: Any, bands: tuple[str, ...] = BANDS) -> tuple[Any, int]:
    """The reply to a window of noise, and its status."""
    noise = np.random.default_rng(1).normal(0, 9, (len(bands), 96, 96)).astype(np.float32)
    body, headers = wire.encode_image(noise, bands, None, EbvPlane.constant(0.02))
    context = Context("deepdisc", ".", None, 1, None, "0")
    context.request_processor, context.request_ids = [RequestProcessor({"body": {"content-type": "x"}, **headers})], {0: "0"}
    (reply,) = handler.handle([{"body": bytearray(body)}], context)
    return reply, context.get_response_status(0)[0]


@pytest.fixture
def second_fails(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """What the second member raises once something is in the list."""
    errors: list[Exception] = []
    predict, order = Member.predict_batch, list[Member]()

    def failing(self: Member, *arguments: Any) -> Any:
        if not any(self is member for member in order):
            order.append(self)
        if errors and len(order) > 1 and self is order[1]:
            raise errors[0]
        return predict(self, *arguments)

    monkeypatch.setattr(Member, "predict_batch", failing)
    return errors


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RuntimeError("illegal instruction"), 500, "member_failed"),
        (ArchiveError("its weights are gone"), 500, "member_failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), 507, "out_of_memory"),
    ],
)
def test_a_member_that_fails_is_named(
    tiny_ensemble: Path, spaced: Path, second_fails: list[Exception], error: Exception, status: int, code: str
) -> None:
    handler = serving(tiny_ensemble, spaced / "ensemble")
    assert asked(handler)[1] == 200
    second_fails.append(error)
    reply, answered = asked(handler)
    fault = wire.decode_fault(reply.encode())
    assert fault is not None
    assert (answered, fault.code) == (status, code)
    assert "member-1" in fault.what
    assert "member-0" not in fault.what
    assert asked(handler, BANDS[:5])[1] == 422


def test_the_others_answer_where_the_ensemble_says_so(tiny_ensemble: Path, spaced: Path, second_fails: list[Exception]) -> None:
    handler = serving(tiny_ensemble, spaced / "ensemble", "skip")
    second_fails.append(RuntimeError("illegal instruction"))
    reply, status = asked(handler)
    assert status == 200
    found = wire.decode_detections(reply)
    assert len(found) > 0
    assert (found.n_members == 1).all()
    assert handler.ensemble.failures == {"member-1": "RuntimeError: illegal instruction"}


def test_a_member_that_cannot_be_read_is_left_out_only_where_the_ensemble_says_so(tiny_ensemble: Path, spaced: Path) -> None:
    damaged = Path(shutil.copytree(tiny_ensemble, spaced / "damaged"))
    weights = damaged / "member-0.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ArchiveError, match="member-0: .* is damaged"):
        serving(damaged, spaced / "raise")
    reply, status = asked(serving(damaged, spaced / "skip", "skip"))
    assert status == 200
    assert (wire.decode_detections(reply).n_members == 1).all()
    with pytest.raises(ArchiveError, match=r"on_failure is 'ignore' in ensemble\.yaml; expected raise or skip"):
        serving(tiny_ensemble, spaced / "other", "ignore")

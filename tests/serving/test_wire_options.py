"""Headers say what is wanted, survive a round trip, and are refused by name where they say nothing sensible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.serving import wire
from deepdisc_ops.serving.wire.protocol import MAX_GRID, MAX_HEADER_BOXES, REASONS
from deepdisc_ops.sky.dust import EbvPlane

names = st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,9}", fullmatch=True), unique=True, max_size=5).map(tuple)
edges = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=2, unique=True).map(sorted)
ebvs = st.tuples(*[st.floats(-100, 100)] * 4).map(EbvPlane)
grids = st.builds(wire.Grid, st.floats(0, 40), st.floats(41, 100), st.integers(2, MAX_GRID))
boxes = st.lists(st.tuples(edges, edges).map(lambda xy: [xy[0][0], xy[1][0], xy[0][1], xy[1][1]]), max_size=4)


@given(
    ebv=st.none() | ebvs,
    bands=names,
    core=st.none() | st.tuples(edges, edges).map(lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1])),
    given_boxes=st.none() | boxes,
    masks=st.booleans(),
    members=names,
    pdf=st.sampled_from(["mixture", "none"]) | grids,
    reply=st.sampled_from(list(wire.REPLY_TYPES)),
)
def test_options_come_home(ebv, bands, core, given_boxes, masks, members, pdf, reply) -> None:  # type: ignore[no-untyped-def]
    array = None if given_boxes is None else np.array(given_boxes, np.float32).reshape(-1, 4)
    sent = wire.Options(ebv, bands, core, array, masks, members, pdf, reply)
    headers = wire.render_options(sent, "a-name")
    assert set(headers) <= set(wire.HEADERS)
    assert all(value.isascii() and value.isprintable() for value in headers.values())
    received = wire.parse_options(headers)
    assert wire.request_name(headers) == "a-name"
    for name in ("ebv", "bands", "core", "masks", "members", "pdf", "reply"):
        assert getattr(received, name) == getattr(sent, name)
    if array is None:
        assert received.boxes is None
    else:
        np.testing.assert_array_equal(received.boxes, array)


WRONG = {
    wire.EBV_HEADER: ("bad_ebv", ["", "0,0,0", "0,0,0,nan", "0,0,0,1e9", "map"]),
    wire.BANDS_HEADER: ("bad_bands", ["", ",", "g,g", "g r", "g\r\nx: y", "g," * 100, "a" * 40]),
    wire.CORE_HEADER: ("bad_core", ["", "0,0,1", "1,0,0,1", "0,0,inf,1", "0,0,0,0", "nan,0,1,1"]),
    wire.BOXES_HEADER: ("bad_boxes", [";", "1,2,3", "a,b,c,d", "1,2,3,4;" * (MAX_HEADER_BOXES + 1) + "1,2,3,4"]),
    wire.MASKS_HEADER: ("bad_masks", ["", "2", "yes"]),
    wire.MEMBERS_HEADER: ("bad_members", ["", "a,", "a,a"]),
    wire.PDF_HEADER: (
        "bad_pdf",
        ["", "grid", "grid:0,1", "grid:1,0,5", "grid:0,1,1", "grid:0,1,1e9", "grid:0,inf,9", "grid:0,1,2.5"],
    ),
    wire.REPLY_HEADER: ("bad_reply", ["", "csv", "HDF5"]),
}


@pytest.mark.parametrize(("header", "code", "value"), [(h, code, value) for h, (code, values) in WRONG.items() for value in values])
def test_a_header_without_sense_is_refused_by_name(header: str, code: str, value: str) -> None:
    with pytest.raises(wire.Refused) as refused:
        wire.parse_options({wire.EBV_HEADER: "0,0,0,0", header: value})
    assert refused.value.fault.code == code
    assert header in refused.value.fault.what or "boxes in the header" in refused.value.fault.what
    assert refused.value.fault.remedy
    assert len(refused.value.fault.what) < 600


@pytest.mark.parametrize("name", ["", "a" * 65, "a b", "a\nb", "\u00e9", "../x"])
def test_a_request_may_not_have_any_name(name: str) -> None:
    with pytest.raises(wire.Refused) as refused:
        wire.request_name({wire.REQUEST_HEADER: name})
    assert refused.value.fault.code == "bad_request_id"


def test_every_reason_is_a_refusal_or_a_failure_of_the_server() -> None:
    assert all(400 <= reason.status < 600 and reason.when for reason in REASONS.values())
    assert {code for code, reason in REASONS.items() if reason.status >= 500} == {"member_failed", "internal", "out_of_memory"}

"""The words of the protocol: media types, headers, limits, and every reason for which a request is refused.

docs/endpoint.md and docs/openapi.yaml say the same to people and programs; a test holds them to this file.
"""

from __future__ import annotations

from typing import NamedTuple

MODEL_NAME = "deepdisc"
PREDICT_PATH = f"/predictions/{MODEL_NAME}"

IMAGE_TYPE = "application/octet-stream"
FITS_TYPE = "application/fits"
HDF5_TYPE = "application/x-hdf5"
JSON_TYPE = "application/json"
PARQUET_TYPE = "application/vnd.apache.parquet"
BODY_TYPES = {
    IMAGE_TYPE: "an .npy of little-endian float32 (C, H, W) in nJy",
    FITS_TYPE: "a FITS file with a band an extension, in any unit that its headers tell",
    HDF5_TYPE: "datasets data (C, H, W) in nJy, mask (H, W) and boxes (N, 4)",
    JSON_TYPE: "paths of files that the server sees, and a window of them",
}
"""Media types of request bodies and what they mean."""
REPLY_TYPE = HDF5_TYPE
FAULT_TYPE = JSON_TYPE
REPLY_TYPES = {"hdf5": HDF5_TYPE, "parquet": PARQUET_TYPE, "fits": FITS_TYPE, "json": JSON_TYPE}
"""Media types of replies by what the reply header asks for."""
REPLY_FORMAT = 1

BANDS_HEADER = "x-deepdisc-bands"
EBV_HEADER = "x-deepdisc-ebv"
CORE_HEADER = "x-deepdisc-core"
BOXES_HEADER = "x-deepdisc-boxes"
MASKS_HEADER = "x-deepdisc-masks"
MEMBERS_HEADER = "x-deepdisc-members"
PDF_HEADER = "x-deepdisc-pdf"
REPLY_HEADER = "x-deepdisc-reply"
REQUEST_HEADER = "x-deepdisc-request"
HEADERS = {
    BANDS_HEADER: "names of the planes, in their order; needed with .npy, elsewhere where the body names none",
    EBV_HEADER: "E(B-V) in mag at the window's corners (x0, y0), (x1, y0), (x0, y1), (x1, y1), or `server` for the server's map",
    CORE_HEADER: "x0,y0,x1,y1 in pixels of the window: only objects whose centre lies in it come back",
    BOXES_HEADER: "given boxes x0,y0,x1,y1;... in pixels of the window: redshifts of these instead of a search; may be empty",
    MASKS_HEADER: "1 to have the masks of the objects, 0 (default) to leave them out",
    MEMBERS_HEADER: "names of the members to ask, all by default",
    PDF_HEADER: "mixture (default), none, or grid:z0,z1,n for p(z) at n redshifts",
    REPLY_HEADER: "form of the reply: hdf5 (default), parquet, fits or json",
    REQUEST_HEADER: "a name of the request for logs and replies, up to 64 of A-Z a-z 0-9 . _ -",
}
"""Headers of requests and what they say; names are lower-case, as HTTP/2 wants them."""
SERVER_EBV = "server"

MAX_BANDS = 64
MAX_SIDE = 32768
MAX_EBV = 100.0
MAX_NJY = 1e12
"""Pixels further from zero than this, a 1.4 mag star in one pixel, count as invalid: a network may overflow on them."""
MAX_BOXES = 65536
MAX_HEADER_BOXES = 256
"""Given boxes in the header, for the front end takes 8 kB of a header line at most; more go into an HDF5 body."""
MAX_COVERAGE = 256
"""Pixels of all given boxes together, in windows: the cost of pooling goes with them."""
MAX_GRID = 4096


class Reason(NamedTuple):
    """HTTP status of a code, and when it is used."""

    status: int
    when: str


REASONS = {
    "no_bands": Reason(400, "the header that names the planes is missing"),
    "bad_bands": Reason(400, "a band has no name, an odd one, or one that another has"),
    "no_ebv": Reason(400, "the header with E(B-V) is missing"),
    "bad_ebv": Reason(400, "the header with E(B-V) holds no four numbers"),
    "bad_core": Reason(400, "the core is no rectangle in the window"),
    "bad_boxes": Reason(400, "given boxes are no finite rectangles near the window, or are there twice"),
    "bad_masks": Reason(400, "the header masks is neither 0 nor 1"),
    "bad_members": Reason(400, "the header members names none, or one twice"),
    "bad_pdf": Reason(400, "the header pdf asks for no form that there is"),
    "bad_reply": Reason(400, "the header reply asks for no form that there is"),
    "bad_request_id": Reason(400, "the name of the request has letters that logs do not take"),
    "not_npy": Reason(400, "the body is no .npy"),
    "bad_dtype": Reason(400, "pixels of another type or order"),
    "bad_shape": Reason(400, "no (bands, rows, columns), or no plane a band"),
    "bad_size": Reason(400, "more or fewer bytes than the shape needs"),
    "bad_image": Reason(400, "an image and its bands do not fit"),
    "bad_fits": Reason(400, "the FITS body is compressed as a whole, damaged or hostile"),
    "bad_hdf5": Reason(400, "the HDF5 body lacks a dataset, filters it, leads elsewhere, is damaged or hostile"),
    "bad_reference": Reason(400, "the JSON is no reference, or its files cannot be read"),
    "no_references": Reason(403, "this server reads no files for its clients"),
    "not_found": Reason(404, "no regular file of that name below the folders that the server reads"),
    "window_too_large": Reason(413, "a side of the window is over the server's limit"),
    "too_many_boxes": Reason(413, "more given boxes, or more pixels in them, than one request may ask for"),
    "reply_too_large": Reason(413, "the reply would be over the server's limit"),
    "unsupported_type": Reason(415, "the body's media type or encoding is none of ours"),
    "missing_band": Reason(422, "a band that the model needs is missing"),
    "unknown_member": Reason(422, "the ensemble has no such member"),
    "no_masks": Reason(422, "masks are wanted, and a member that is asked has no mask head"),
    "no_dust_map": Reason(422, "the server has no dust map, or the body no WCS to ask it with"),
    "unusable": Reason(422, "the image is readable and cannot be used, for the reason given"),
    "member_failed": Reason(500, "a member of the ensemble failed and none may be left out"),
    "internal": Reason(500, "a fault of the server"),
    "out_of_memory": Reason(507, "the window does not fit in the worker's memory"),
}
"""Every code of a refusal."""
FRONT_END = {
    400: "without JSON of ours: the token is missing, wrong or expired, or the request is no HTTP",
    404: "no such path or model",
    405: "another method than POST",
    413: "an empty body: the request is over the server's limit in bytes",
    500: "the worker died; it is started again",
    503: "the queue is full, or no worker is ready",
}
"""What TorchServe answers by itself, by status."""

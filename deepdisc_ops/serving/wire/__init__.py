"""What travels between client and endpoint; docs/endpoint.md tells it to people, docs/openapi.yaml to programs.

Request: one window, its body by media type - an .npy of little-endian float32 (C, H, W) in nJy per pixel with invalid pixels NaN,
FITS, HDF5, or a JSON that names files the server sees - and headers that say what is wanted of it. Reply: HDF5 with one dataset for
each field of `Detections`, or a catalogue. A refusal is JSON: ``{"code": ..., "what": ..., "remedy": ..., "request": ...}`` with a
4xx or 5xx status.

protocol: names, limits and reasons; options: headers; image, hdf5, reference: bodies; request: any of them; files and reader:
what reads FITS and HDF5 in a process of its own; fault and reply: what comes back.
Glossary: C bands, H x W pixels, N objects, K mixture components.
"""

from deepdisc_ops.serving.wire.fault import Fault, Refused, decode_fault, encode_fault
from deepdisc_ops.serving.wire.hdf5 import encode_hdf5
from deepdisc_ops.serving.wire.image import Request, decode_image, encode_image, order_planes
from deepdisc_ops.serving.wire.options import Grid, Options, parse_options, render_options, request_name
from deepdisc_ops.serving.wire.protocol import (
    BANDS_HEADER,
    BODY_TYPES,
    BOXES_HEADER,
    CORE_HEADER,
    EBV_HEADER,
    FAULT_TYPE,
    FITS_TYPE,
    FRONT_END,
    HDF5_TYPE,
    HEADERS,
    IMAGE_TYPE,
    JSON_TYPE,
    MASKS_HEADER,
    MAX_BANDS,
    MAX_BOXES,
    MAX_EBV,
    MAX_SIDE,
    MEMBERS_HEADER,
    MODEL_NAME,
    PARQUET_TYPE,
    PDF_HEADER,
    PREDICT_PATH,
    REASONS,
    REPLY_FORMAT,
    REPLY_HEADER,
    REPLY_TYPE,
    REPLY_TYPES,
    REQUEST_HEADER,
    SERVER_EBV,
)
from deepdisc_ops.serving.wire.reply import Origin, decode_detections, encode_detections, reply_origin, reply_versions

__all__ = [
    "BANDS_HEADER",
    "BODY_TYPES",
    "BOXES_HEADER",
    "CORE_HEADER",
    "EBV_HEADER",
    "FAULT_TYPE",
    "FITS_TYPE",
    "FRONT_END",
    "HDF5_TYPE",
    "HEADERS",
    "IMAGE_TYPE",
    "JSON_TYPE",
    "MASKS_HEADER",
    "MAX_BANDS",
    "MAX_BOXES",
    "MAX_EBV",
    "MAX_SIDE",
    "MEMBERS_HEADER",
    "MODEL_NAME",
    "PARQUET_TYPE",
    "PDF_HEADER",
    "PREDICT_PATH",
    "REASONS",
    "REPLY_FORMAT",
    "REPLY_HEADER",
    "REPLY_TYPE",
    "REPLY_TYPES",
    "REQUEST_HEADER",
    "SERVER_EBV",
    "Fault",
    "Grid",
    "Options",
    "Origin",
    "Refused",
    "Request",
    "decode_detections",
    "decode_fault",
    "decode_image",
    "encode_detections",
    "encode_fault",
    "encode_hdf5",
    "encode_image",
    "order_planes",
    "parse_options",
    "render_options",
    "reply_origin",
    "reply_versions",
    "request_name",
]

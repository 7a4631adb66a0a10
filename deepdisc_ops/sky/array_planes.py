"""The bands in arrays without FITS: .npy, .npz and HDF5.

- ``.npy``: (C, H, W) or (H, W), read from the file window by window. Bands, zero point and pixel scale come from the caller.
- ``.npz``: ``images`` (C, H, W) or (H, W), ``filters`` or ``bands`` (C names); optional ``variance`` and ``mask`` (of the same
  shape or (H, W)), ``zero_point`` (one or C), ``unit``, ``wcs``, ``pixel_scale``. It is read whole.
- HDF5: a dataset ``images`` (C, H, W), or one 2-D dataset a band, named by it, in a group ``images`` or at the top. Optional
  ``variance`` and ``mask`` alike: a dataset (C, H, W) or (H, W), or a group with a dataset a band. Attributes of the dataset, of
  its group or of the file: ``bands`` or ``filters``, ``zero_point`` (AB, one or C) or ``unit`` (as in BUNIT), ``wcs`` (cards of a
  FITS header as one text), ``pixel_scale`` (arcsec); MP_* of a mask number its planes.

A mask of bool or bytes marks invalid pixels; a wider one holds bits, of which those named count (`fits_planes.bad_value`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from deepdisc_ops.errors import ImageError
from deepdisc_ops.sky.coordinates import celestial_wcs, pixel_area_arcsec2
from deepdisc_ops.sky.fits_planes import bad_value
from deepdisc_ops.sky.fluxes import njy_per_unit
from deepdisc_ops.sky.planes import Hdf5Pixels, Mask, MemoryPixels, Noise, Pixels, Plane, RawPixels, Stamp, Wishes

Source = TypeVar("Source", bound=Pixels)

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
SUFFIXES = (".npy", ".npz", *HDF5_SUFFIXES)


@dataclass(frozen=True)
class _Stack:
    """C planes of one shape, however they are stored: sources by plane, and the words that describe them.

    variance, mask: a source a plane, or none; bits: what names the mask's planes, is_bool: whether it has no bits.
    """

    names: Sequence[str]
    shape: tuple[int, int]
    images: Sequence[Pixels]
    words: Mapping[str, Any]
    variance: Sequence[Pixels] = ()
    mask: Sequence[Pixels] = ()
    bits: Mapping[str, Any] | None = None
    is_bool: bool = False


def array_planes(path: Path, wishes: Wishes) -> list[Plane]:
    """The planes of one file with their companions; a plane that nothing names has an empty band."""
    try:
        stamp = Stamp.of(path.stat())
        if path.suffix == ".npy":
            stack = _npy(path, stamp)
        elif path.suffix == ".npz":
            stack = _npz(path)
        else:
            stack = _hdf5(path, stamp)
    except FileNotFoundError:
        raise ImageError(f"image {path} does not exist") from None
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise ImageError(f"{path} cannot be read as {path.suffix}: {error}") from None
    return _planes(path, stack, wishes)


def _planes(path: Path, stack: _Stack, wishes: Wishes) -> list[Plane]:
    names = stack.names
    if names and len(names) != len(stack.images):
        raise ImageError(f"{path}: {len(stack.images)} image planes for {len(names)} bands {', '.join(names)}; name each once")
    wcs = _wcs(path, stack.words.get("wcs"))
    scale = wishes.pixel_scale or stack.words.get("pixel_scale")
    area = pixel_area_arcsec2(wcs, stack.shape[1], stack.shape[0]) if wcs is not None else (float(scale) ** 2 if scale else None)
    bad = bad_value(path, stack.bits or {}, wishes.bad_bits, stack.is_bool) if stack.mask else 0
    planes = []
    for i, pixels in enumerate(stack.images):
        factor, problem = _factor(stack.words, i, len(stack.images), wishes.zero_point, area)
        planes.append(
            Plane(
                names[i].lower() if names else "",
                path,
                "images",
                i,
                stack.shape,
                wcs,
                factor,
                pixels,
                str(stack.words.get("unit", "none")),
                problem,
                Noise(stack.variance[i], "variance") if stack.variance else None,
                None if bad == 0 else Mask(stack.mask[i], bad),
            )
        )
    return planes


def _factor(words: Mapping[str, Any], i: int, count: int, zero_point: float | None, area: float | None) -> tuple[float | None, str]:
    header: dict[str, Any] = {"BUNIT": words["unit"]} if "unit" in words else {}
    if "zero_point" in words:
        given = np.ravel(words["zero_point"])
        if len(given) not in (1, count):
            return None, f"zero_point has {len(given)} values for {count} bands; give one, or one a band"
        header["MAGZERO"] = given[i % len(given)]
    try:
        return njy_per_unit(header, zero_point, area), ""
    except ImageError as error:
        return None, str(error)


def _wcs(path: Path, text: Any) -> WCS | None:
    if text is None or not str(text).strip():
        return None
    try:
        wcs = celestial_wcs(fits.Header.fromstring(str(text), sep="\n" if "\n" in str(text) else ""))
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None
    if wcs is None:
        raise ImageError(f"{path}: wcs {str(text)[:60]!r} is no celestial FITS header; write WCS.to_header_string() there")
    return wcs


def _sources(
    path: Path, name: str, shape: tuple[int, ...], images: tuple[int, ...], of: Callable[[int | None], Source]
) -> list[Source]:
    """A companion's source for each of the C planes: of its own, or of the one plane for all."""
    if shape == images:
        return [of(i) for i in range(images[0])]
    if shape == images[1:]:
        return [of(None)] * images[0]
    raise ImageError(f"{path}: {name} has shape {shape}, images {images}; make them of one size")


def _stacked(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int, int]:
    """(C, H, W) of an array of two or three axes that holds numbers."""
    if len(shape) not in (2, 3) or 0 in shape or dtype.kind not in "fiub":
        raise ImageError(f"{path}: images of shape {shape} and type {dtype}; expected numbers (bands, rows, columns)")
    planes, rows, columns = shape if len(shape) == 3 else (1, *shape)
    return planes, rows, columns


def _npy(path: Path, stamp: Stamp) -> _Stack:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    planes, rows, columns = _stacked(path, array.shape, array.dtype)
    if not array.flags.c_contiguous:
        raise ImageError(f"{path} is stored column by column; save numpy.ascontiguousarray of it")
    size = rows * columns * array.itemsize
    sources = [RawPixels(path, array.offset + i * size, array.dtype.str, (rows, columns), stamp) for i in range(planes)]
    return _Stack((), (rows, columns), sources, {})


def _npz(path: Path) -> _Stack:
    with np.load(path, allow_pickle=False) as file:
        if "images" not in file:
            raise ImageError(f"{path} holds {', '.join(file.files)}; expected an array 'images' (bands, rows, columns)")
        content = {name: file[name] for name in _NPZ_NAMES if name in file}
    images = content["images"]
    shape = _stacked(path, images.shape, images.dtype)

    def sources(name: str) -> list[MemoryPixels]:
        if name not in content:
            return []
        array = content[name]
        return _sources(path, name, array.shape, shape, lambda i: MemoryPixels(array if i is None else array[i]))

    names = content.get("filters", content.get("bands", ()))
    words: dict[str, Any] = {name: content[name] for name in ("zero_point", "unit", "wcs", "pixel_scale") if name in content}
    content["images"] = images.reshape(shape)
    mask = content.get("mask")
    return _Stack(
        [str(name) for name in np.ravel(names)],
        shape[1:],
        sources("images"),
        words,
        sources("variance"),
        sources("mask"),
        is_bool=mask is not None and _is_bool(mask.dtype),
    )


_NPZ_NAMES = ("images", "filters", "bands", "variance", "mask", "zero_point", "unit", "wcs", "pixel_scale")


def _is_bool(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "b" or dtype.itemsize == 1


def _hdf5(path: Path, stamp: Stamp) -> _Stack:
    import h5py

    with h5py.File(path, "r") as file:
        images = file.get("images", file)
        words = {key: _plain(value) for node in (file, images) for key, value in node.attrs.items()}
        if isinstance(images, h5py.Dataset):
            shape = _stacked(path, images.shape, images.dtype)
            indices = range(shape[0]) if images.ndim == 3 else [None]
            own: list[Pixels] = [Hdf5Pixels(path, images.name, i, shape[1:], stamp) for i in indices]
            names = [str(name) for name in np.ravel(words.get("bands", words.get("filters", ())))]
        else:
            names = [name for name, node in images.items() if isinstance(node, h5py.Dataset) and node.ndim == 2]
            names = [name for name in names if name not in ("variance", "mask")]
            own, shape, words = _hdf5_bands(path, images, names, words, stamp)
        flags = _hdf5_companion(path, file.get("mask"), names, shape, stamp)
        bits = {key: value for node in ([file["mask"]] if flags else []) for key, value in node.attrs.items()}
        is_bool = all(_is_bool(file[source.dataset].dtype) for source in flags)
        variance = _hdf5_companion(path, file.get("variance"), names, shape, stamp)
        return _Stack(names, shape[1:], own, words, variance, flags, bits, is_bool)


def _hdf5_companion(path: Path, node: Any, names: Sequence[str], shape: tuple[int, int, int], stamp: Stamp) -> list[Hdf5Pixels]:
    """A source a plane of a companion: a dataset, or a group with a dataset a band; none where the file has none."""
    if node is None:
        return []
    if hasattr(node, "shape"):
        return _sources(path, node.name, node.shape, shape, lambda i: Hdf5Pixels(path, node.name, i, shape[1:], stamp))
    for name in names:
        found = node[name].shape if name in node else "nothing"
        if found != shape[1:]:
            raise ImageError(f"{path}: {node.name}/{name} is {found}, the image {shape[1:]}; make them of one size")
    return [Hdf5Pixels(path, node[name].name, None, shape[1:], stamp) for name in names]


def _hdf5_bands(
    path: Path, group: Any, names: Sequence[str], words: Mapping[str, Any], stamp: Stamp
) -> tuple[list[Pixels], tuple[int, int, int], dict[str, Any]]:
    """Sources of one dataset a band, (C, H, W), and the words with the bands' own zero points among them."""
    if not names:
        raise ImageError(f"{path} holds {', '.join(group) or 'nothing'}; expected a dataset 'images' or one 2-D dataset a band")
    shapes = {name: _stacked(path, group[name].shape, group[name].dtype)[1:] for name in names}
    first = shapes[names[0]]
    for name, shape in shapes.items():
        if shape != first:
            raise ImageError(f"{path}: band {name} has shape {shape}, band {names[0]} {first}; resample them to one grid")
    result = dict(words)
    for key in ("zero_point", "unit", "wcs", "pixel_scale"):
        own = [_plain(group[name].attrs[key]) for name in names if key in group[name].attrs]
        if own and key == "zero_point" and len(own) == len(names):
            result[key] = own
        elif own and len(own) == len(names) and len(set(map(str, own))) == 1:
            result[key] = own[0]
        elif own:
            raise ImageError(f"{path}: {key} is said of {len(own)} of {len(names)} bands or differs; say it once, on the group")
    return [Hdf5Pixels(path, group[name].name, None, first, stamp) for name in names], (len(names), *first), result


def _plain(value: Any) -> Any:
    """Attributes as numbers, texts and lists of them."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value.tolist()]
    return value

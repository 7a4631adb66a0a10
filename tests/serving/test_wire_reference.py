"""References: files below the server's folders and nothing else, whatever the name and whatever changes meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.io import fits

from deepdisc_ops.errors import ImageError
from deepdisc_ops.serving import wire
from deepdisc_ops.serving.service import ServiceSettings
from deepdisc_ops.serving.wire import reference
from deepdisc_ops.serving.wire.protocol import JSON_TYPE
from deepdisc_ops.serving.wire.reader import Reader
from deepdisc_ops.serving.wire.request import Model, decode_request, make_reader

MODEL = Model(("g", "r"), 0.2)
HEADERS = {"x-deepdisc-ebv": "0,0,0,0", "content-type": JSON_TYPE}
PIXELS = np.arange(2 * 30 * 40, dtype=np.float32).reshape(2, 30, 40)


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with make_reader(MODEL, ServiceSettings()) as reader:
        yield reader


@pytest.fixture
def root(spaced: Path) -> Path:
    """A folder that the server reads: a file a band, an HDF5, an .npy, and next to it what it must not read."""
    folder = spaced / "data"
    folder.mkdir()
    for band, plane in zip("gr", PIXELS, strict=True):
        hdu = fits.PrimaryHDU(plane)
        hdu.header["MAGZERO"], hdu.header["FILTER"] = 31.4, band
        hdu.writeto(folder / f"{band}.fits")
        hdu.writeto(spaced / f"outside {band}.fits")
    with h5py.File(folder / "cube.h5", "w") as file:
        file["images"] = PIXELS
        file.attrs["bands"], file.attrs["zero_point"] = ["g", "r"], 31.4
    np.save(folder / "cube.npy", PIXELS)
    return folder


def ask(reader: Reader, root: Path | None, tree: object, **headers: str) -> wire.Request:
    service = ServiceSettings(roots=() if root is None else (root,), max_window=64)
    return decode_request(tree, {**HEADERS, **headers}, MODEL, service, reader)


def test_a_window_of_files_is_what_is_in_them(reader: Reader, root: Path) -> None:
    forms = (
        {"paths": ["g.fits", "r.fits"]},
        {"paths": [str(root / "r.fits"), "g.fits"]},
        {"paths": ["cube.h5"]},
        {"paths": ["cube.npy"], "plane_bands": ["g", "r"], "zero_point": 31.4},
    )
    for form in forms:
        request = ask(reader, root, {**form, "window": [4, 3, 20, 25]})
        np.testing.assert_allclose(request.data, PIXELS[:, 3:25, 4:20])
        assert request.bands == ("g", "r")
    assert ask(reader, root, {"paths": ["g.fits", "r.fits"]}).data.shape == PIXELS.shape


def test_a_link_inside_is_followed(reader: Reader, root: Path) -> None:
    (root / "link.h5").symlink_to(root / "cube.h5")
    assert ask(reader, root, {"paths": ["link.h5"]}).data.shape == PIXELS.shape


@pytest.mark.parametrize(
    "name",
    [
        "../outside g.fits",
        "sub/../../outside g.fits",
        "missing.fits",
        "",
        ".",
        "/etc/passwd",
        "/dev/zero",
        "/proc/self/environ",
        "a\0b",
        "a\nb",
        "x" * 5000,
        "\ud800",
        "fifo",
        "out",
        "loop",
        "folder out/outside g.fits",
        "socket",
    ],
)
def test_what_is_outside_or_no_file_is_not_found(reader: Reader, root: Path, name: str) -> None:
    os.mkfifo(root / "fifo")
    os.mknod(root / "socket", 0o140600)
    (root / "sub").mkdir()
    (root / "out").symlink_to(root.parent / "outside g.fits")
    (root / "loop").symlink_to(root / "loop")
    (root / "folder out").symlink_to(root.parent)
    with pytest.raises(wire.Refused) as refused:
        ask(reader, root, {"paths": [name]})
    assert refused.value.fault.code in ("not_found", "bad_reference")
    assert 400 <= refused.value.status < 500


def test_a_link_changed_after_it_was_followed_leads_nowhere(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = os.open

    def swapped(path: Path, *arguments: int) -> int:
        path = Path(path)
        path.unlink()
        path.symlink_to(root.parent / "outside g.fits")
        return opening(path, *arguments)

    monkeypatch.setattr(reference.os, "open", swapped)
    with pytest.raises(wire.Refused, match="no regular file"):
        reference.open_files(["g.fits"], [root])


def test_a_folder_changed_after_it_was_followed_leads_nowhere(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = os.open
    inner = root / "inner"
    inner.mkdir()
    (root / "g.fits").rename(inner / "outside g.fits")

    def swapped(path: Path, *arguments: int) -> int:
        inner.rename(root / "gone")
        inner.symlink_to(root.parent)
        return opening(path, *arguments)

    monkeypatch.setattr(reference.os, "open", swapped)
    with pytest.raises(wire.Refused, match="no regular file"):
        reference.open_files(["inner/outside g.fits"], [root])


def test_no_descriptor_is_left_open(reader: Reader, root: Path) -> None:
    ask(reader, root, {"paths": ["cube.h5"]})
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    for tree in ({"paths": ["cube.h5"]}, {"paths": ["g.fits", "missing"]}, {"paths": ["g.fits"]}):
        try:
            ask(reader, root, tree)
        except (wire.Refused, ImageError):
            continue
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_hdf5_that_leads_out_of_the_root_is_refused(reader: Reader, root: Path) -> None:
    with h5py.File(root.parent / "secret.h5", "w") as file:
        file["images"] = PIXELS
    with h5py.File(root / "linked.h5", "w") as file:
        file["images"] = h5py.ExternalLink(str(root.parent / "secret.h5"), "images")
        file.attrs["bands"], file.attrs["zero_point"] = ["g", "r"], 31.4
    layout = h5py.VirtualLayout(PIXELS.shape, "<f4")
    layout[:] = h5py.VirtualSource(str(root.parent / "secret.h5"), "images", PIXELS.shape)
    with h5py.File(root / "virtual.h5", "w") as file:
        file.create_virtual_dataset("images", layout)
        file.attrs["bands"], file.attrs["zero_point"] = ["g", "r"], 31.4
    for name in ("linked.h5", "virtual.h5"):
        with pytest.raises(wire.Refused, match="in another file"):
            ask(reader, root, {"paths": [name]})


@pytest.mark.parametrize(
    "tree",
    [
        None,
        [],
        "g.fits",
        {},
        {"paths": []},
        {"paths": "g.fits"},
        {"paths": ["g.fits"] * 65},
        {"paths": ["g.fits"], "window": [0, 0, 0, 5]},
        {"paths": ["g.fits"], "window": [-1, 0, 4, 5]},
        {"paths": ["g.fits"], "window": [0, 0, 4, 10**30]},
        {"paths": ["g.fits"], "zero_point": float("nan")},
        {"paths": ["g.fits"], "require_wcs": True},
        {"paths": [{}]},
    ],
)
def test_json_that_is_no_reference_is_refused(reader: Reader, root: Path, tree: object) -> None:
    with pytest.raises(wire.Refused) as refused:
        ask(reader, root, tree)
    assert refused.value.fault.code == "bad_reference"


def test_windows_and_limits(reader: Reader, root: Path) -> None:
    with pytest.raises(ImageError, match="no window of 40x30"):
        ask(reader, root, {"paths": ["cube.h5"], "window": [0, 0, 41, 30]})
    with pytest.raises(wire.Refused, match="sides up to 64"):
        ask(reader, root, {"paths": ["cube.h5"], "window": [0, 0, 65, 30]})
    with pytest.raises(wire.Refused) as refused:
        ask(reader, None, {"paths": ["cube.h5"]})
    assert refused.value.status == 403


def test_a_damaged_file_is_named_as_its_user_knows_it(reader: Reader, root: Path) -> None:
    (root / "cut.fits").write_bytes((root / "g.fits").read_bytes()[:3000])
    with pytest.raises(ImageError, match=r"^cut\.fits is"):
        ask(reader, root, {"paths": ["cut.fits", "r.fits"]})

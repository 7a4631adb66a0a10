"""Bad input through the command line: one line that names the fault and the remedy, exit code 2, nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from astropy.io import fits
from typer.testing import CliRunner

from deepdisc_ops import cli


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deepdisc_ops.config import SkySettings
    from deepdisc_ops.data.simulate import simulate_scene, write_scene

    path = tmp_path_factory.mktemp("sky") / "mosaic.fits"
    write_scene(simulate_scene(SkySettings(), size=160, seed=8), path)
    return path


@pytest.fixture(autouse=True)
def _plain_logging() -> Iterator[None]:
    """The command line sets up logging and warnings for its process; put them back for the next test."""
    import logging
    import warnings

    level, handlers = logging.root.level, logging.root.handlers[:]
    with warnings.catch_warnings():
        yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def run(*arguments: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["deepdisc-ops", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().err


def edit(mosaic: Path, out: Path, change: str) -> Path:
    """A copy of the mosaic with one thing wrong."""
    with fits.open(mosaic) as file:
        if change == "missing band":
            del file["Z"]
        elif change == "no wcs":
            for hdu in file[1:7]:
                for key in ("CTYPE1", "CTYPE2"):
                    hdu.header.remove(key)
        elif change == "wcs differs":
            file["R"].header["CRPIX1"] += 0.4
        elif change == "all nan":
            for hdu in file[1:7]:
                hdu.data[:] = np.nan
        elif change == "two shapes":
            file["Y"].data = file["Y"].data[:100]
        file.writeto(out)
    if change == "truncated":
        out.write_bytes(out.read_bytes()[: out.stat().st_size // 2])
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing band", "band z missing: found u, g, r, i, y, expected u, g, r, i, z, y"),
        ("no wcs", "no celestial WCS"),
        ("wcs differs", "WCS of band r is 0.4 px off that of band u"),
        ("all nan", "no pixel of 160x160 is valid"),
        ("truncated", "is truncated"),
        ("two shapes", "band y has shape (100, 160), band u (160, 160)"),
    ],
)
def test_a_faulty_mosaic(
    mosaic: Path,
    tiny_ensemble: Path,
    spaced: Path,
    change: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = edit(mosaic, spaced / "bad.fits", change)
    out = spaced / "catalog.parquet"
    code, errors = run("predict", image, "--model", tiny_ensemble, "--out", out, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert message in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert [path.name for path in spaced.iterdir()] == ["bad.fits"]


def test_bands_in_another_order_are_no_fault(
    mosaic: Path, tiny_ensemble: Path, spaced: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepdisc_ops.sky.catalog import read_catalog

    with fits.open(mosaic) as file:
        fits.HDUList([file[0], *(file[i] for i in range(6, 0, -1))]).writeto(spaced / "turned.fits")
    for image, name in ((mosaic, "a.parquet"), (spaced / "turned.fits", "b.parquet")):
        code, errors = run(
            "predict", image, "--model", tiny_ensemble, "--out", spaced / name, capsys=capsys, monkeypatch=monkeypatch
        )
        assert (code, errors) == (0, "")
    one, other = read_catalog(spaced / "a.parquet"), read_catalog(spaced / "b.parquet")
    assert len(one) > 0
    np.testing.assert_array_equal(one["mix_means"], other["mix_means"])


def test_wrong_number_of_planes(
    tiny_ensemble: Path, spaced: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fits.PrimaryHDU(np.zeros((5, 64, 64), np.float32)).writeto(spaced / "cube.fits")
    words = (
        "predict",
        spaced / "cube.fits",
        "--model",
        tiny_ensemble,
        "--out",
        spaced / "c.fits",
        "--zero-point",
        27,
        "--pixels-only",
    )
    code, errors = run(*words, "--plane-bands", "u,g,r,i,z,y", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert "5 image planes for 6 bands" in errors


def test_a_model_of_another_pixel_scale(
    mosaic: Path,
    tiny_ensemble: Path,
    spaced: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from deepdisc_ops.sky.catalog import read_catalog
    from deepdisc_ops.sky.detections import Flag

    with fits.open(mosaic) as file:
        for hdu in file[1:7]:
            for key in ("CDELT1", "CDELT2"):
                hdu.header[key] *= 2
        file.writeto(spaced / "coarse.fits")
    words = ("predict", spaced / "coarse.fits", "--model", tiny_ensemble, "--out", spaced / "c.parquet")
    with caplog.at_level("WARNING"):
        assert run(*words, capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    told = "pixel scale is 0.4 arcsec, in training 0.2"
    assert any(told in record.getMessage() for record in caplog.records)
    table = read_catalog(spaced / "c.parquet")
    assert ((np.asarray(table["flags"]) & Flag.OUT_OF_DOMAIN) > 0).all()
    assert told in table.meta["warnings"]


def test_a_damaged_archive(
    mosaic: Path, tiny_ensemble: Path, spaced: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_ensemble, spaced / "ensemble"))
    weights = folder / "member-0.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    words = ("predict", mosaic, "--model", folder, "--out", spaced / "c.fits")
    code, errors = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert "member-0: member-0.safetensors is damaged" in errors


def test_an_endpoint_that_is_down(
    mosaic: Path, spaced: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("predict", mosaic, "--server", spaced / "server", "--out", spaced / "c.fits")
    code, errors = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert "deepdisc-ops serve start" in errors


def test_everything_at_once_and_then_the_given_list(
    mosaic: Path, tiny_ensemble: Path, spaced: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photometry, area, picture and other settings of the ensemble; the catalogue then given back as a list."""
    from deepdisc_ops.sky.catalog import read_catalog

    names = ("c.parquet", "c.hdf5", "c.reg", "a.moc.fits")
    out = [word for name in names for word in ("--out", spaced / name)]
    words = ("predict", mosaic, "--model", tiny_ensemble, *out, "--set", "match=union", "--picture", spaced / "p.png")
    assert run(*words, "--memory", "swap", "--window", 128, capsys=capsys, monkeypatch=monkeypatch) == (0, "")
    assert {path.name for path in spaced.iterdir()} == {*names, "p.png"}
    table = read_catalog(spaced / "c.parquet")
    assert len(table) > 10
    assert {"flux_i", "flux_iso_err_y", "snr_g"} <= set(table.colnames)
    assert '"match": "union"' in table.meta["members"]
    assert float(table.meta["seconds"]) > 0
    assert set(table["n_members"]) == {1, 2}
    listed = ("--forced", spaced / "c.parquet", "--forced-columns", "id,z_mode", "--no-photometry", "--out", spaced / "f.fits")
    assert run("predict", mosaic, "--model", tiny_ensemble, *listed, capsys=capsys, monkeypatch=monkeypatch) == (0, "")
    forced = read_catalog(spaced / "f.fits")
    np.testing.assert_array_equal(forced["given_id"], table["id"])
    np.testing.assert_array_equal(forced["id"], table["id"])
    assert set(forced["n_members"]) == {2}
    assert "flux_i" not in forced.colnames
    words = ("predict", mosaic, "--model", tiny_ensemble, "--masks", "--out", spaced / "m.fits")
    code, errors = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert (code, errors.count("\n")) == (2, 1)
    assert "error: member member-0: " in errors
    assert not list(spaced.glob("m.fits*"))


def test_a_run_whose_disk_fills_up_goes_on(
    mosaic: Path, tiny_ensemble: Path, spaced: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file size limit of the process stands for the disk: pages of the journal fit below it, the catalogue does not."""
    import resource
    import signal

    from deepdisc_ops.sky.catalog import read_catalog

    words = ("predict", mosaic, "--model", tiny_ensemble, "--window", 128)
    assert run(*words, "--out", spaced / "whole.fits", capsys=capsys, monkeypatch=monkeypatch) == (0, "")
    size = (spaced / "whole.fits").stat().st_size
    pages = size // 2
    out = spaced / "c.fits"
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (pages, before[1]))
        code, errors = run(*words, "--out", out, capsys=capsys, monkeypatch=monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2
    assert errors.count("\n") == 1
    assert "free space or choose another place" in errors
    assert {path.name for path in spaced.iterdir()} == {"whole.fits", "c.fits.unfinished"}
    kept = sorted(path.name for path in (spaced / "c.fits.unfinished").glob("*.npz"))
    assert len(kept) >= 4

    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("a window was looked at twice")

    monkeypatch.setattr("deepdisc_ops.inference.ensemble.Ensemble.predict", nothing)
    assert run(*words, "--out", out, capsys=capsys, monkeypatch=monkeypatch) == (0, "")
    one, other = read_catalog(out), read_catalog(spaced / "whole.fits")
    for name in one.colnames:
        np.testing.assert_array_equal(one[name], other[name])
    assert {path.name for path in spaced.iterdir()} == {"whole.fits", "c.fits"}


def test_members_are_gathered_as_they_are_to_be_combined(tiny_checkpoints: list[Path], spaced: Path) -> None:
    from deepdisc_ops.inference.ensemble import read_description

    words = ["members", "gather", *map(str, tiny_checkpoints), "--out", str(spaced / "both")]
    for overrides, match in (([], "intersection"), (["--set", "match=majority"], "majority")):
        result = CliRunner().invoke(cli.app, [*words, *overrides])
        assert result.exit_code == 0, result.output
        assert read_description(spaced / "both")["combination"]["match"] == match
    assert CliRunner().invoke(cli.app, [*words, "--set", "match=most"]).exit_code != 0


def test_a_member_is_tuned(
    tiny_checkpoints: list[Path],
    mini_dataset: Path,
    spaced: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepdisc_ops.model.weights import read_info

    member = Path(shutil.copytree(tiny_checkpoints[0], spaced / "member"))
    words = ("members", "tune", member, "--data", mini_dataset)
    monkeypatch.setattr(sys, "argv", ["deepdisc-ops", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    told = capsys.readouterr().out
    assert "overlap 0.7" in told
    assert "best:" in told
    assert "tuned_f1" in read_info(member).metrics


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--set", "train.stepz=3"), "unknown key 'train.stepz', did you mean 'train.steps'?"),
        (("train", "--set", "data.path=absent"), "absent"),
        (("simulate", "--survey", "lssst", "--out", "x"), "did you mean 'lsst'?"),
        (("simulate", "--set", "clusterin=0.4", "--out", "x"), "unknown key 'clusterin', did you mean 'clustering'?"),
        (("simulate", "--artifact", "trial", "--out", "x"), "artifacts.0: Input should be 'saturation', 'spikes', 'trail'"),
        (
            ("simulate", "--reference", "lsst_reference", "--out", "x", "--seed", "0", "--train", "9"),
            "is frozen: leave out --train, --seed",
        ),
        (("simulate", "--reference", "lsst_reference", "--out", "x", "--density", "0"), "is frozen: leave out --density"),
        (("predict", "m.fits", "--out", "c.fits"), "give either --model or --server"),
        (("predict", "m.fits", "--out", "c.csv", "--model", "m"), "expected one of .parquet, .fits"),
        (
            ("predict", "m.fits", "--out", "c.fits", "--model", "m", "--bad-bits", "0xyz"),
            "neither an integer, as 5 or 0x5, nor names",
        ),
        (("predict", "m.fits", "--out", "c.fits", "--server", "s", "--skip-failing"), "does not understand --skip-failing;"),
        (("predict", "m.fits", "--out", "c.fits", "--model", "m", "--ray-address", "a:1"), "of use with --actors alone"),
        (("predict", "m.fits", "--out", "c.reg", "--model", "m", "--picture", "p.png"), "--picture is drawn from a table"),
        (("predict", "m.fits", "--out", "c.fits", "--model", "m", "--forced", "l.fits", "--masks"), "given objects have no masks"),
        (("predict", "m.fits", "--out", "a.moc.fits", "--model", "m", "--forced", "l.fits"), "--forced-for all searches no area"),
        (("predict", "m.fits", "--out", "c.fits", "--model", "m", "--set", "match=union"), "model m does not exist"),
        (("members", "tune", "m", "--data", "d"), "m"),
        (("archive", "build", "--out", "x.mar"), "name either checkpoint folders or --members"),
        (("serve", "start", "absent.mar"), "absent.mar"),
        (("evaluate", "absent.parquet", "--truth", "absent.fits"), "absent.parquet does not exist"),
    ],
)
def test_wrong_words(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, errors = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_sky_of_ones_own(spaced: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from deepdisc_ops.data.store import open_dataset

    out = spaced / "scenes"
    sky = ("--survey", "roman", "--colours", "templates", "--artifact", "trail", "--artifact", "spikes", "--set", "clustering=0.4")
    words = ("simulate", "--out", out, *sky, "--train", 2, "--validation", 0, "--size", 40, "--packed", "--processes", 1)
    assert run(*words, capsys=capsys, monkeypatch=monkeypatch) == (0, "")
    dataset = open_dataset(out)
    assert dataset.info.bands == ("f106", "f129", "f158", "f184")
    assert len(dataset.records("train")) == 2
    found = dataset.settings["sky"]
    assert (found["clustering"], found["artifacts"], found["years"]) == (0.4, ["trail", "spikes"], 5.0)


def test_a_sweep_with_a_bad_range(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.yaml").write_text("name: s\nspace: {train.lr: {loguniform: [-1.0, 0.1]}}\n")
    code, errors = run("sweep", "run", tmp_path / "s.yaml", "--out", tmp_path / "o", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert "train.lr" in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "o").exists()


def commands(app: typer.Typer, *names: str) -> Iterator[tuple[str, ...]]:
    for command in app.registered_commands:
        yield (*names, command.name or str(command.callback.__name__))  # type: ignore[union-attr]
    for group in app.registered_groups:
        yield from commands(group.typer_instance, *names, str(group.name))  # type: ignore[arg-type]


@pytest.mark.parametrize("words", list(commands(cli.app)), ids=" ".join)
def test_every_verb_has_help_with_an_example(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["deepdisc-ops", *words, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert f"deepdisc-ops {' '.join(words)}" in " ".join(capsys.readouterr().out.split())


def test_help_imports_no_framework() -> None:
    """Help must come at once; what makes it slow is importing the rooms (benchmarks/startup.py times it)."""
    heavy = ("torch", "ray", "mlflow", "astropy", "numpy", "matplotlib", "pyarrow", "httpx", "h5py", "spython")
    program = (
        "import sys; sys.argv = ['deepdisc-ops', *sys.argv[1:]]\nfrom deepdisc_ops.cli import main\ntry: main()\n"
        f"finally: print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    for words in (["--help"], ["predict", "--help"], ["--version"]):
        answer = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
        assert answer.stderr.strip() == "[]", words

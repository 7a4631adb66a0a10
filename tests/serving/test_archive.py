"""An archive holds what went in, byte for byte, and says what is wrong with it when it does not."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from deepdisc_ops.config import TrainingConfig, validate
from deepdisc_ops.errors import ArchiveError
from deepdisc_ops.inference import ensemble as engine
from deepdisc_ops.model.build import DeepDisc
from deepdisc_ops.model.weights import save_member
from deepdisc_ops.serving import archive, contents, memory
from deepdisc_ops.serving.contents import DustSource

SETTINGS = {
    "model": {
        "bands": ["g", "r"],
        "pixel_scale": 0.2,
        "input": {"noise_njy": [1.0, 1.0]},
        "backbone": {"name": "tiny", "fpn_channels": 16},
        "box_head": {"hidden": [16]},
        "redshift_head": {"hidden": [16], "components": 3},
    }
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs, of two")
    config = validate(TrainingConfig, SETTINGS, "test")
    for seed in range(2):
        torch.manual_seed(seed)
        save_member(folder / str(seed), DeepDisc(config.model, config.inference), config, {"val_nll": 1.0 + seed}, 10)
    return [folder / "0", folder / "1"]


@pytest.fixture(scope="module")
def mar(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive.build_archive(checkpoints, tmp_path_factory.mktemp("a folder") / "two.mar", ["run-a", "run-b"])


def rewrite(mar: Path, out: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of the archive with the contents of its members changed, valid as a zip; None leaves a member out."""
    with zipfile.ZipFile(mar) as source, zipfile.ZipFile(out, "w") as target:
        for member in source.infolist():
            contents = change(member.filename, source.read(member))
            if contents is not None:
                target.writestr(member.filename, contents)
    return out


def flip(contents: bytes, position: int) -> bytes:
    changed = bytearray(contents)
    changed[position] ^= 1
    return bytes(changed)


def test_the_same_checkpoints_make_the_same_bytes(checkpoints: list[Path], mar: Path, spaced: Path) -> None:
    again = archive.build_archive(checkpoints, spaced / "two.mar", ["run-a", "run-b"])
    assert again.read_bytes() == mar.read_bytes()
    assert [path.name for path in spaced.iterdir()] == ["two.mar"]


def test_weights_of_a_selection_are_those_of_the_ensemble(checkpoints: list[Path], spaced: Path) -> None:
    mar = archive.build_archive(checkpoints, spaced / "weighted.mar", weights=(3.0, 1.0))
    assert [member["weight"] for member in archive.inspect_archive(mar)["members"]] == pytest.approx([0.75, 0.25])


def test_relative_paths_are_taken_from_here(checkpoints: list[Path], spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(spaced)
    archive.build_archive(checkpoints, Path("e.mar"))
    assert [path.name for path in spaced.iterdir()] == ["e.mar"]


def test_an_ensemble_folder_is_packed_as_it_is(tiny_ensemble: Path, spaced: Path) -> None:
    mar = archive.build_archive([tiny_ensemble], spaced / "e.mar")
    folder = archive.unpack_archive(mar, spaced / "again")
    assert contents.read_contents(folder) is not None
    for path in tiny_ensemble.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_an_archive_tells_what_it_holds(mar: Path) -> None:
    contents = archive.verify_archive(mar)
    assert contents["bands"] == ["g", "r"]
    assert contents["pixel_scale"] == 0.2
    assert contents["sha256"] == hashlib.sha256(mar.read_bytes()).hexdigest()
    assert [member["run_id"] for member in contents["members"]] == ["run-a", "run-b"]
    assert sum(member["weight"] for member in contents["members"]) == pytest.approx(1)
    assert all(member["bytes"] > 0 for member in contents["members"])
    assert all(validate(TrainingConfig, member["config"], "member") for member in contents["members"])


def test_an_unpacked_archive_is_the_ensemble(mar: Path, checkpoints: list[Path], spaced: Path) -> None:
    folder = archive.unpack_archive(mar, spaced / "unpacked")
    for number, checkpoint in enumerate(checkpoints):
        packed, original = load_file(folder / f"member-{number}.safetensors"), load_file(checkpoint / "member.safetensors")
        assert packed.keys() == original.keys()
        assert all(torch.equal(packed[key], original[key]) for key in original)
    assert engine.Ensemble.load(folder).names == tuple(f"member-{number}" for number in range(len(checkpoints)))


def test_torchserve_finds_the_handler_in_the_manifest(mar: Path) -> None:
    with zipfile.ZipFile(mar) as opened:
        manifest = json.loads(opened.read("MAR-INF/MANIFEST.json"))
        assert manifest["model"]["handler"] == "ensemble_handler.py"
        assert "ensemble_handler.py" in opened.namelist()
        assert {member.compress_type for member in opened.infolist()} == {zipfile.ZIP_STORED}


def test_the_version_follows_the_description(mar: Path, checkpoints: list[Path], spaced: Path) -> None:
    other = archive.build_archive(checkpoints[:1], spaced / "one.mar")
    assert archive.inspect_archive(mar)["version"] != archive.inspect_archive(other)["version"]
    description = (archive.unpack_archive(mar, spaced / "u") / "ensemble.yaml").read_bytes()
    assert archive.description_digest(description) == archive.inspect_archive(mar)["version"]


def test_a_changed_member_is_named(mar: Path, spaced: Path) -> None:
    damaged = rewrite(mar, spaced / "x.mar", lambda name, data: flip(data, 2000) if name == "member-1.safetensors" else data)
    with pytest.raises(ArchiveError, match=r"member-1 \(member-1\.safetensors\) is damaged"):
        archive.verify_archive(damaged)
    with pytest.raises(ArchiveError, match="member-1"):
        engine.Ensemble.load(archive.unpack_archive(damaged, spaced / "unpacked"))


def test_a_flipped_byte_is_named(mar: Path, spaced: Path) -> None:
    with zipfile.ZipFile(mar) as opened:
        offset = opened.getinfo("member-0.safetensors").header_offset
    damaged = spaced / "x.mar"
    damaged.write_bytes(flip(mar.read_bytes(), offset + 5000))
    for read in (archive.verify_archive, lambda path: archive.unpack_archive(path, spaced / "unpacked")):
        with pytest.raises(ArchiveError, match=r"member-0\.safetensors is damaged"):
            read(damaged)


@pytest.mark.parametrize("name", ["canary.safetensors", "ensemble_handler.py", "archive.yaml"])
def test_any_other_file_that_changed_is_named(mar: Path, spaced: Path, name: str) -> None:
    for number, change in enumerate((lambda data: flip(data, 40), lambda data: None)):
        damaged = rewrite(mar, spaced / f"{number}.mar", lambda file, data, change=change: change(data) if file == name else data)
        if name == "archive.yaml" and number == 1:  # as of archives made before there was one
            assert archive.verify_archive(damaged)["canary"] is None
            with pytest.raises(ArchiveError, match="has no canary"):
                archive.try_archive(damaged)
            continue
        with pytest.raises(ArchiveError, match=name):
            archive.verify_archive(damaged)


def test_an_unpacked_archive_is_checked_file_by_file(mar: Path, spaced: Path) -> None:
    folder = archive.unpack_archive(mar, spaced / "unpacked")
    contents.check_files(folder)
    with (folder / "ensemble_handler.py").open("a") as file:
        file.write("\n")
    with pytest.raises(ArchiveError, match=r"ensemble_handler\.py is damaged"):
        contents.check_files(folder)
    (folder / "ensemble_handler.py").unlink()
    with pytest.raises(ArchiveError, match=r"ensemble_handler\.py is missing"):
        contents.check_files(folder)


@pytest.mark.parametrize(
    ("own", "served", "refused"),
    [
        ("0.3.1", ["0.3.0", "0.3.9", "0.3", "0.3.0.dev1"], ["0.2.9", "0.4.0", "1.0", "0.30.0", "no version", "None"]),
        ("1.4.0", ["1.0", "1.4.9", "1.0.0"], ["1.5.0", "2.0", "0.9"]),
    ],
)
def test_an_archive_is_served_by_its_own_series(
    own: str, served: list[str], refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepdisc_ops.__version__", own)
    for version in served:
        archive.check_version({"package_version": version})
    for version in refused:
        with pytest.raises(ArchiveError, match="build"):
            archive.check_version({"package_version": version})


def test_an_archive_of_another_series_is_not_verified(mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepdisc_ops.__version__", "9.0.0")
    with pytest.raises(ArchiveError, match=r"made by deepdisc-ops .*, this is 9\.0\.0"):
        archive.verify_archive(mar)
    assert archive.inspect_archive(mar)["members"]


def test_half_the_bytes_at_a_price_that_is_told(checkpoints: list[Path], mar: Path, spaced: Path) -> None:
    small = archive.build_archive(checkpoints, spaced / "half.mar", half=True, on_failure="skip", dust=DustSource(source="sfd"))
    told, whole = archive.try_archive(small), archive.inspect_archive(mar)
    assert 0.4 < told["members"][0]["bytes"] / whole["members"][0]["bytes"] < 0.65
    assert 0 < told["half"]["density"] < 0.2
    assert 0 < told["half"]["redshift"] < 0.05
    assert whole["half"] is None
    assert (told["on_failure"], whole["on_failure"]) == ("skip", "raise")
    assert told["dust"] == {"source": "sfd", "scale": 1.0}
    again = archive.build_archive(
        checkpoints, spaced / "x" / "half.mar", half=True, on_failure="skip", dust=DustSource(source="sfd")
    )
    assert again.read_bytes() == small.read_bytes()


def test_memory_follows_members_windows_and_swapping(mar: Path, checkpoints: list[Path], spaced: Path) -> None:
    two, one = (archive.inspect_archive(archive.build_archive(c, spaced / "m.mar")) for c in (checkpoints, checkpoints[:1]))
    both, alone = memory.estimate(two, 512), memory.estimate(one, 512)
    assert both.weights == 2 * alone.weights
    assert memory.estimate(two, 512, "swap") == alone
    parameters = sum(tensor.nbytes for tensor in load_file(checkpoints[0] / "member.safetensors").values())
    assert parameters < alone.weights < 3 * parameters
    assert memory.estimate(one, 1024).window == 4 * alone.window
    assert memory.estimate(one, 1024).network == alone.network


def test_a_missing_member_is_named(mar: Path, spaced: Path) -> None:
    damaged = rewrite(mar, spaced / "x.mar", lambda name, data: None if name == "member-1.safetensors" else data)
    with pytest.raises(ArchiveError, match=r"lacks the member member-1\.safetensors"):
        archive.verify_archive(damaged)


@pytest.mark.parametrize("text", ["", "[]", "members: []", "members: [1]", "members: [{name: a}]", "members: [unclosed"])
def test_a_description_without_members_is_refused(mar: Path, spaced: Path, text: str) -> None:
    damaged = rewrite(mar, spaced / "x.mar", lambda name, data: text.encode() if name == "ensemble.yaml" else data)
    with pytest.raises(ArchiveError, match=r"ensemble\.yaml"):
        archive.inspect_archive(damaged)


def test_what_is_no_archive_is_refused(spaced: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist"):
        archive.inspect_archive(spaced / "none.mar")
    (spaced / "text.mar").write_text("not a zip")
    with pytest.raises(ArchiveError, match="not a readable archive"):
        archive.unpack_archive(spaced / "text.mar", spaced)
    with zipfile.ZipFile(spaced / "other.mar", "w") as other:
        other.writestr("model.pt", b"")
    with pytest.raises(ArchiveError, match=r"no ensemble\.yaml"):
        archive.verify_archive(spaced / "other.mar")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "a\\..\\outside"])
def test_names_that_lead_out_of_the_folder_are_refused(spaced: Path, name: str) -> None:
    with zipfile.ZipFile(spaced / "x.mar", "w") as opened:
        opened.writestr("ensemble.yaml", b"")
        opened.writestr(name, b"")
    with pytest.raises(ArchiveError, match="outside its folder"):
        archive.unpack_archive(spaced / "x.mar", spaced / "in" / "unpacked")
    assert not (spaced / "in").exists()


def test_links_and_bombs_are_refused(spaced: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(spaced / "link.mar", "w") as opened:
        opened.writestr(link, "/etc/passwd")
    with pytest.raises(ArchiveError, match="outside its folder"):
        archive.unpack_archive(spaced / "link.mar", spaced / "unpacked")
    with zipfile.ZipFile(spaced / "bomb.mar", "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("zeros", bytes(10_000_000))
    with pytest.raises(ArchiveError, match="times its size"):
        archive.unpack_archive(spaced / "bomb.mar", spaced / "unpacked")
    assert not (spaced / "unpacked").exists()


@pytest.mark.parametrize("name", ["ensemble.zip", "two words.mar", "-x.mar", "a,b.mar"])
def test_names_torchserve_cannot_serve_are_refused(checkpoints: list[Path], spaced: Path, name: str) -> None:
    with pytest.raises(ArchiveError, match="cannot be served"):
        archive.build_archive(checkpoints, spaced / name)


def test_nothing_half_written_is_left(checkpoints: list[Path], mar: Path, spaced: Path) -> None:
    old = spaced / "two.mar"
    shutil.copyfile(mar, old)
    broken = spaced / "broken"
    shutil.copytree(checkpoints[0], broken)
    description = yaml.safe_load((broken / "member.yaml").read_text())
    del description["metrics"]["val_nll"]
    (broken / "member.yaml").write_text(yaml.safe_dump(description))
    with pytest.raises(Exception, match="val_nll"):
        archive.build_archive([broken, checkpoints[1]], old)
    assert old.read_bytes() == mar.read_bytes()
    assert sorted(path.name for path in spaced.iterdir()) == ["broken", "two.mar"]


def test_an_empty_ensemble_and_missing_run_ids_are_refused(checkpoints: list[Path], spaced: Path) -> None:
    with pytest.raises(ArchiveError, match="at least one member"):
        archive.build_archive([], spaced / "x.mar")
    with pytest.raises(ArchiveError, match="1 run ids for 2 checkpoints"):
        archive.build_archive(checkpoints, spaced / "x.mar", ["run-a"])

"""Locks and wheelhouses: every file by its hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.hpc.containers import lock, wheelhouse
from deepdisc_ops.hpc.containers.lock import Pin, canonical, last_error, pinned_lines, read_lock, read_report, render_lock

names = st.from_regex(r"[a-z][a-z0-9]{0,8}(-[a-z0-9]{1,4})?", fullmatch=True)
pins = st.builds(
    Pin, names, st.from_regex(r"[0-9]\.[0-9]{1,2}(\+cpu)?", fullmatch=True), st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
)


@given(st.lists(pins))
def test_a_lock_survives_a_round_trip(found: list[Pin]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lock.txt")
        path.write_text(render_lock(found, "constraints.txt"))
        assert read_lock(path) == sorted(found)


def test_a_line_without_hash_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock.txt"
    path.write_text("# a comment\n\nnumpy==2.0\n")
    with pytest.raises(ConfigError, match=r"lock.txt, line 3: expected NAME==VERSION --hash=sha256:DIGEST, found 'numpy==2.0'"):
        read_lock(path)


def test_a_constraint_without_version_is_no_pin(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("numpy==2.0  # why\ntorch>=2\n")
    with pytest.raises(ConfigError, match="'torch>=2' is no pin"):
        pinned_lines(path)


def test_what_pip_reports_becomes_pins() -> None:
    item = {
        "metadata": {"name": "Ruamel.YAML", "version": "1"},
        "download_info": {"archive_info": {"hashes": {"sha256": "a" * 64}}},
    }
    assert read_report({"install": [item]}) == [Pin("ruamel-yaml", "1", "a" * 64)]
    assert canonical("a__b.C") == "a-b-c"


def test_torch_of_another_index_brings_its_own_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], list[str], bool]] = []

    def resolve(lines: list[str], index: list[str], *, dependencies: bool = False) -> dict[str, list[object]]:
        asked.append((lines, index, dependencies))
        return {"install": []}

    monkeypatch.setattr(lock, "_resolve", resolve)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("numpy==2.0\nnvidia-nccl-cu13==1\ncuda-toolkit==13\ntriton==3\ntorch==2.1\ntorchvision==0.2\n")
    lock.make_lock(constraints, tmp_path / "out.txt", torch_index="https://index.example.org/rocm")
    assert asked == [
        (["numpy==2.0"], [], False),
        (["torch==2.1", "torchvision==0.2"], ["--index-url", "https://index.example.org/rocm"], True),
    ]


def test_only_what_a_lock_lacks_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    item = {"metadata": {"name": "scipy", "version": "1.1"}, "download_info": {"archive_info": {"hashes": {"sha256": "b" * 64}}}}

    def resolve(lines: list[str], index: list[str], *, dependencies: bool = False) -> dict[str, list[object]]:
        asked.append(lines)
        return {"install": [item]}

    monkeypatch.setattr(lock, "_resolve", resolve)
    constraints, out = tmp_path / "constraints.txt", tmp_path / "lock.txt"
    constraints.write_text("numpy==2.0\nscipy==1.1\n")
    out.write_text(render_lock([Pin("numpy", "2.0", "a" * 64), Pin("scipy", "1.0", "c" * 64), Pin("gone", "1.0", "d" * 64)], "x"))
    for _ in range(2):
        assert lock.make_lock(constraints, out) == 2
        assert read_lock(out) == [Pin("numpy", "2.0", "a" * 64), Pin("scipy", "1.1", "b" * 64)]
    assert asked == [["scipy==1.1"]]


def test_the_last_error_of_pip_is_told() -> None:
    assert last_error("WARNING: x\nERROR: a\nERROR: b\nWARNING: y\n") == "b"
    assert last_error("") == "pip said nothing"


@pytest.fixture
def house(spaced: Path) -> Path:
    """A wheelhouse of two wheels and detectron2's."""
    (spaced / "detectron2").mkdir()
    (spaced / "detectron2" / "x.whl").write_text("x")
    (spaced / "numpy-2.0-cp311-cp311-linux_x86_64.whl").write_text("numpy")
    (spaced / "deepdisc_ops-0.1-py3-none-any.whl").write_text("ours")
    (spaced / "requirements.txt").write_text(wheelhouse.requirements([Pin("numpy", "2.0", "0" * 64)], spaced))
    return spaced


def test_a_wheelhouse_lists_every_wheel_by_its_own_hash(house: Path) -> None:
    pinned = {pin.name: pin for pin in read_lock(house / "requirements.txt")}
    assert set(pinned) == {"numpy", "deepdisc-ops"}
    assert pinned["numpy"].sha256 == hashlib.sha256(b"numpy").hexdigest()
    found = wheelhouse.check(house)
    assert (found.wheels, found.size) == (3, len("numpy" + "ours" + "x"))


@pytest.mark.parametrize(
    ("spoil", "told"),
    {
        "change": "is not the wheel that requirements.txt names: sha256 is",
        "remove": "lacks the wheel of numpy 2.0; run `deepdisc-ops images wheelhouse` again",
        "detectron2": "holds 0 wheels, expected one",
        "unlist": "is no wheelhouse: no requirements.txt in it",
    }.items(),
)
def test_a_wheelhouse_with_something_wrong_is_refused(house: Path, spoil: str, told: str) -> None:
    wheel = house / "numpy-2.0-cp311-cp311-linux_x86_64.whl"
    {
        "change": lambda: wheel.write_text("other"),
        "remove": wheel.unlink,
        "detectron2": (house / "detectron2" / "x.whl").unlink,
        "unlist": (house / "requirements.txt").unlink,
    }[spoil]()
    with pytest.raises((SetupError, ConfigError), match=told):
        wheelhouse.check(house)


def test_wheels_that_pip_left_out_are_named(house: Path) -> None:
    with pytest.raises(SetupError, match="pip left no wheel of scipy 1.0"):
        wheelhouse.requirements([Pin("scipy", "1.0", "0" * 64)], house)


def test_a_file_that_is_not_the_locks_is_refused_by_pip(tmp_path: Path) -> None:
    package = tmp_path / "small-1.0-py3-none-any.whl"
    package.write_bytes(b"not what the lock names")
    locked = tmp_path / "lock.txt"
    locked.write_text(f"small==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(SetupError, match="does not match its hash in the lock"):
        wheelhouse._pip(
            [
                "--require-hashes",
                "--no-index",
                "--find-links",
                str(tmp_path),
                "--wheel-dir",
                str(tmp_path / "out"),
                "-r",
                str(locked),
            ]
        )

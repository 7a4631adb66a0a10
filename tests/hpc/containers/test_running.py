"""What is seen inside, and instances by their names."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.hpc.containers import instances
from deepdisc_ops.hpc.containers.binds import bind_options, parse_bind
from deepdisc_ops.hpc.containers.run import ROLES, Place, _forwarding, execute, job_words, options, run, try_roles

from .conftest import StandIn


def test_the_home_is_not_seen_and_the_folder_is(spaced: Path) -> None:
    words = bind_options([f"{spaced}:/data:ro"], folder=spaced, temporary=spaced / "t" if (spaced / "t").mkdir() is None else None)
    assert words[:4] == ["--contain", "--no-home", "--pwd", str(spaced)]
    binds = [words[number + 1] for number, word in enumerate(words) if word == "--bind"]
    assert binds == [f"{spaced}:/data:ro", str(spaced), "/dev/shm", f"{spaced / 't'}:/tmp"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/no/such", "does not exist on this machine"),
        ("", "is not of the form"),
        ("/tmp:/a:rx", "is not of the form"),
        ("/tmp:/a:ro:b", "is not of the form"),
        ("/tmp:a", "must have an absolute path"),
        ("/tmp,/a", "holds a comma"),
    ],
)
def test_binds_that_cannot_be_are_told(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_bind(text)


@pytest.mark.parametrize(("target", "flag"), [("cpu", None), ("cuda", "--nv"), ("rocm", "--rocm")])
def test_devices_are_those_of_the_images_target(stand_in: StandIn, spaced: Path, target: str, flag: str | None) -> None:
    words = options(stand_in.runtime, stand_in.image(spaced / "a.sif", target), Place(spaced))
    assert {"--nv", "--rocm"} & set(words) == ({flag} if flag else set())


def test_a_job_shares_the_temporary_folder_of_its_node(stand_in: StandIn, spaced: Path) -> None:
    words = job_words(stand_in.runtime, stand_in.image(spaced / "a.sif"), Place(spaced))
    assert words[1] == "exec"
    assert "/tmp:/tmp" in words
    assert words[-1] == str(spaced / "a.sif")


def test_temporary_folders_are_short_and_removed(stand_in: StandIn, spaced: Path) -> None:
    image = stand_in.image(spaced / "a.sif")
    assert execute(stand_in.runtime, image, ["true"], Place(spaced)).code == 0
    (words,) = [one["words"] for one in stand_in.log if one["words"][0] == "exec"]
    (bound,) = [word.removesuffix(":/tmp") for word in words if word.endswith(":/tmp")]
    assert not Path(bound).exists()


def test_the_exit_code_of_a_verb_is_ours(stand_in: StandIn, spaced: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image = stand_in.image(spaced / "a.sif")
    assert run(stand_in.runtime, image, ["train"], Place(spaced)) == 0
    stand_in.go_wrong("fails")
    assert run(stand_in.runtime, image, ["small"], Place(spaced), app="train") == 3
    assert capfd.readouterr().err == "some complaint\n"
    words = stand_in.log[-1]["words"]
    assert words[words.index("--app") + 1] == "train"


def test_a_killed_program_has_the_exit_code_of_a_shell() -> None:
    assert _forwarding([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"]) == 143


def test_signals_reach_what_runs_inside() -> None:
    program = "import os, signal, sys, time; signal.signal(10, lambda *_: sys.exit(7)); os.kill(os.getppid(), 10); time.sleep(30)"
    assert _forwarding([sys.executable, "-c", program]) == 7


def test_roles_are_tried_one_by_one(stand_in: StandIn, spaced: Path) -> None:
    image = stand_in.image(spaced / "a.sif")
    assert [one.role for one in try_roles(stand_in.runtime, image, Place(spaced))] == list(ROLES)
    stand_in.go_wrong("fails")
    (one,) = try_roles(stand_in.runtime, image, Place(spaced), ["serve"])
    assert (one.answer.code, one.answer.fault) == (3, "some complaint")
    with pytest.raises(ConfigError, match="no app 'sing'"):
        list(try_roles(stand_in.runtime, image, Place(spaced), ["sing"]))


def test_what_is_no_image_is_not_run(stand_in: StandIn, spaced: Path) -> None:
    with pytest.raises(SetupError, match="is no image"):
        run(stand_in.runtime, spaced / "none.sif", [], Place(spaced))
    with pytest.raises(ConfigError, match="does not exist"):
        run(stand_in.runtime, stand_in.image(spaced / "a.sif"), [], Place(spaced / "none"))


def start(stand_in: StandIn, spaced: Path, name: str = "sky") -> instances.Instance:
    return instances.start(
        stand_in.runtime, stand_in.image(spaced / "a.sif"), name, ["x"], Place(spaced), app="serve", settle_s=0.0
    )


def left() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"{instances.TEMPORARY}sky-*"))


def test_an_instance_is_started_listed_and_stopped_by_name(stand_in: StandIn, spaced: Path) -> None:
    assert instances.running(stand_in.runtime) == []
    assert "--pwd" in options(stand_in.runtime, stand_in.image(spaced / "a.sif"), Place(spaced))
    assert start(stand_in, spaced).name == "sky"
    (words,) = [one["words"] for one in stand_in.log if one["words"][:2] == ["instance", "start"]]
    assert "--pwd" not in words  # which Apptainer does not know there
    start(stand_in, spaced, "other")
    assert {one.name for one in instances.running(stand_in.runtime)} == {"sky", "other"}
    assert instances.stop(stand_in.runtime, "sky")
    assert {one.name for one in instances.running(stand_in.runtime)} == {"other"}
    assert not instances.stop(stand_in.runtime, "sky")
    assert not left()
    assert instances.stop(stand_in.runtime, "other")


def test_a_name_in_use_is_refused(stand_in: StandIn, spaced: Path) -> None:
    start(stand_in, spaced)
    with pytest.raises(ConfigError, match="an instance sky runs already; stop it with `deepdisc-ops images stop sky`"):
        start(stand_in, spaced)
    with pytest.raises(ConfigError, match="is no name of an instance"):
        start(stand_in, spaced, "a b")
    instances.stop(stand_in.runtime, "sky")


@pytest.mark.parametrize(("fault", "told"), [("start", "container creation failed: mount failure"), ("ends", "it ended at once")])
def test_an_instance_that_does_not_run_is_an_error(stand_in: StandIn, spaced: Path, fault: str, told: str) -> None:
    stand_in.go_wrong(fault)
    with pytest.raises(SetupError, match=f"instance sky does not run: .*{told}"):
        start(stand_in, spaced)
    assert not left()


def test_instances_that_cannot_be_listed_or_stopped_are_errors(stand_in: StandIn, spaced: Path) -> None:
    start(stand_in, spaced)
    stand_in.go_wrong("stays")
    with pytest.raises(SetupError, match="instance sky was not stopped"):
        instances.stop(stand_in.runtime, "sky")
    stand_in.go_wrong("list")
    with pytest.raises(SetupError, match="instances cannot be listed: FATAL: Could not retrieve"):
        instances.running(stand_in.runtime)
    stand_in.go_wrong("")
    instances.stop(stand_in.runtime, "sky")

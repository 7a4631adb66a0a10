"""The command line, ``deepdisc-ops``. A room is imported only when its command runs."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import deepdisc_ops
from deepdisc_ops.cli.archive import archive_app
from deepdisc_ops.cli.colours import colours
from deepdisc_ops.cli.compare import compare
from deepdisc_ops.cli.console import console, progress_bar
from deepdisc_ops.cli.data import data_app
from deepdisc_ops.cli.doctor import doctor
from deepdisc_ops.cli.evaluate import evaluate
from deepdisc_ops.cli.features import features
from deepdisc_ops.cli.image_use import images_app
from deepdisc_ops.cli.members import members_app
from deepdisc_ops.cli.model import model_app
from deepdisc_ops.cli.predict import predict
from deepdisc_ops.cli.pretrain import pretrain
from deepdisc_ops.cli.serve import serve_app
from deepdisc_ops.cli.slurm import app as slurm_app
from deepdisc_ops.cli.sweep import sweep_app
from deepdisc_ops.cli.track import app as track_app
from deepdisc_ops.cli.truth import truth_app
from deepdisc_ops.cli.weights import weights_app
from deepdisc_ops.errors import ConfigError, DeepdiscOpsError

if TYPE_CHECKING:
    from deepdisc_ops.data.store import Dataset

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help=deepdisc_ops.__doc__)
setup_app = typer.Typer(no_args_is_help=True, help="Parts that pip alone does not install.")
for name, sub in {
    "sweep": sweep_app,
    "members": members_app,
    "archive": archive_app,
    "serve": serve_app,
    "setup": setup_app,
    "data": data_app,
    "images": images_app,
    "model": model_app,
    "truth": truth_app,
    "track": track_app,
    "slurm": slurm_app,
    "weights": weights_app,
}.items():
    app.add_typer(sub, name=name)
sweep_app.command("compare")(compare)
members_app.command("features")(features)
app.command()(pretrain)
app.command()(predict)
app.command()(evaluate)
app.command()(colours)
app.command()(doctor)

REFERENCE_WORDS = ("out", "reference", "packed", "processes")  # what may be said with --reference
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting, as in train.lr=0.001; may be repeated.")]
SkyOverrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting of the sky, as in clustering=0.4.")]


def main() -> None:
    """Run a command; errors meant for the user are one line on stderr and exit code 2."""
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # detectron2's use of it is announced at every import
    try:
        app()
    except DeepdiscOpsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        print(deepdisc_ops.__version__)
        raise typer.Exit


@app.command()
def simulate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Data set folder, or with --mosaic a .fits file.")],
    survey: Annotated[str | None, typer.Option(help="lsst, hsc, jades or roman; lsst without one.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="A frozen sky, lsst_reference or lsst_reference_dc2, whole; only OUT and how count then.")
    ] = None,
    train: Annotated[int, typer.Option(min=0, help="Training scenes.")] = 200,
    validation: Annotated[int, typer.Option(min=0, help="Validation scenes.")] = 24,
    calibration: Annotated[int, typer.Option(min=0, help="Calibration scenes.")] = 0,
    test: Annotated[int, typer.Option(min=0, help="Test scenes.")] = 0,
    size: Annotated[int, typer.Option(min=32, help="Side of a scene in pixels.")] = 256,
    mosaic: Annotated[int, typer.Option(min=0, help="Write one mosaic of this side instead of a data set.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same sky.")] = 0,
    years: Annotated[float | None, typer.Option(help="Depth of LSST's coadds in years, 5 without one.")] = None,
    density: Annotated[float | None, typer.Option(help="Number of galaxies and stars relative to the real sky.")] = None,
    colours: Annotated[str | None, typer.Option(help="templates, or dc2: painted from cosmoDC2 photometry.")] = None,
    artifact: Annotated[list[str] | None, typer.Option(help="saturation, spikes, trail or missing_band; may be repeated.")] = None,
    overrides: SkyOverrides = None,
    packed: Annotated[bool, typer.Option("--packed", help="Keep pixels inside the data set, not in a FITS file a scene.")] = False,
    processes: Annotated[int, typer.Option(min=0, help="Scenes made at once; 0 takes all processors.")] = 0,
) -> None:
    """Simulate a sky with its truth: a training set, or one mosaic.

    Example: `deepdisc-ops simulate --survey lsst --out scenes --train 200 --validation 24 --seed 1 --set clustering=0.4`
    """
    from deepdisc_ops import config as settings
    from deepdisc_ops.data import simulate as room
    from deepdisc_ops.data.surveys import survey as find_survey

    named = {"survey": survey, "years": years, "density": density, "colours": colours, "artifacts": artifact or None}
    if reference:
        said = [
            option.opts[0]
            for option in context.command.params
            if option.name not in REFERENCE_WORDS and _stated(context, option.name)
        ]
        if said:
            raise ConfigError(f"the sky {reference} is frozen: leave out {', '.join(said)}")
        _simulate_reference(reference, out, packed=packed, processes=processes)
        return
    given = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    sky = settings.load(None, [*(overrides or ()), *given], settings.SkySettings)
    if years is not None and find_survey(sky.survey).reference_years is None:
        raise ConfigError(f"--years {years:g} means nothing for {sky.survey}, whose depth does not depend on it; leave it out")
    if mosaic:
        if out.suffix != ".fits" or not out.absolute().parent.is_dir():
            raise ConfigError(f"--out {out} is not a .fits file in a folder that exists; name one for the mosaic")
        scene = room.simulate_scene(sky, size=mosaic, seed=seed)
        room.write_scene(scene, out)
        console.print(
            f"{out}: {mosaic}x{mosaic} pixels, bands {' '.join(scene.survey.bands)}, {len(scene.truth)} sources above 3 sigma"
        )
        return
    asked = {"train": train, "validation": validation, "calibration": calibration, "test": test}
    counts = {split: count for split, count in asked.items() if count}
    if not counts:
        raise ConfigError("no scenes asked: give --train, --validation, --calibration or --test, or --mosaic for one image")
    with progress_bar("simulating", sum(counts.values()), "scenes") as advance:
        dataset = room.simulate_dataset(
            sky,
            out,
            counts=counts,
            size=size,
            seed=seed,
            processes=processes,
            packed=packed,
            progress=lambda done, _: advance(done, ""),
        )
    _tell_scenes(out, dataset)


def _stated(context: typer.Context, option: str | None) -> bool:
    """Whether an option was given, be it with the value it has without."""
    source = None if option is None else context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def _simulate_reference(name: str, out: Path, *, packed: bool, processes: int) -> None:
    from deepdisc_ops.data import reference

    scenes = sum(split.scenes for split in reference.load_reference(name).splits.values())
    with progress_bar("simulating", scenes, "scenes") as advance:
        dataset = reference.build_reference(
            name, out, packed=packed, processes=processes, progress=lambda done, _: advance(done, "")
        )
    _tell_scenes(out, dataset)


def _tell_scenes(out: Path, dataset: Dataset) -> None:
    parts = ", ".join(f"{count} {split}" for split, count in dataset.split_sizes.items())
    console.print(f"{out}: {parts} scenes, bands {' '.join(dataset.info.bands)}")


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML of a training config, or a preset: lsst, jades, small.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and curves; an unfinished run there goes on.")] = Path("run"),
    overrides: Overrides = None,
) -> None:
    """Train one network; writes OUT/best (the member), OUT/last (to resume) and OUT/loss.png.

    SIGTERM and SIGUSR1 save after the step in flight and end with exit code 85: start the same command again. Under torchrun or
    srun each process is a rank; `--set train.ranks=4` starts four on this machine.

    Example: `deepdisc-ops train small --out runs/a --set data.path=scenes --set train.steps=500`
    """
    from deepdisc_ops import config as settings

    loaded = settings.load(config, overrides or (), settings.TrainingConfig)
    from deepdisc_ops.training import distributed, loop

    world = distributed.world_from_environment(os.environ)
    total = loop.planned_steps(loaded)
    with progress_bar("training", total, "steps") as advance:

        def report(step: int, metrics: Any) -> None:
            names = ("val_nll", "val_sigma_iqr", "val_completeness")
            advance(step, ", ".join(f"{name} {metrics[name]:.4f}" for name in names))

        best = loop.train(loaded, out, report=report, world=world)
    if world is None or world.main:
        console.print(f"best checkpoint in {best}, curves in {out / 'loss.png'}")


@setup_app.command("detectron2")
def setup_detectron2(
    wheel: Annotated[Path | None, typer.Option(help="The wheel on disk, where there is no package index.")] = None,
) -> None:
    """Install detectron2 without a compiler, its wheel checked against a known hash.

    Example: `deepdisc-ops setup detectron2`
    """
    from deepdisc_ops.installation import install_detectron2

    print(install_detectron2(wheel, progress=print))

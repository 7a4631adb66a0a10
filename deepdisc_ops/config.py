"""Every setting of training and inference, as typed models that reject unknown keys.

`load` reads YAML, applies ``a.b=c`` overrides and reports all faults at once, each with its dotted key.
Lengths are pixels of the survey's images unless a name says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from deepdisc_ops.errors import ConfigError, did_you_mean, nearest

PRESETS = Path(__file__).with_name("presets")
NonEmpty = Field(min_length=1)
Fraction = Annotated[float, Field(gt=0, le=1)]
NormName = Literal["BN", "GN", "FrozenBN", "SyncBN", "LN"]
BACKBONES = (
    *("tiny", "small", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("mvitv2_t", "mvitv2_s", "mvitv2_b", "mvitv2_l", "mvitv2_h"),
    *("swin_t", "swin_s", "swin_b", "swin_l", "vitdet_b", "vitdet_l"),
)
TIMM = "timm/"  # before the name of any model of timm that gives feature maps


def _timm_models() -> list[str]:
    """Every model that timm knows, or nothing where it is not installed."""
    try:
        import timm
    except ImportError:
        return []
    return [f"{TIMM}{name}" for name in timm.list_models()]


def _known_backbone(name: str) -> str:
    """``name``, if there is such a backbone; a timm model passes unseen where timm is not installed."""
    if name in BACKBONES:
        return name
    timm_models = _timm_models()
    if name.startswith(TIMM) and (name in timm_models or not timm_models):
        return name
    candidates = timm_models if name.startswith(TIMM) else (*BACKBONES, *timm_models)
    near = nearest(name, candidates) or nearest(TIMM + name, timm_models)
    suggestion = f"did you mean {near!r}?" if near else f"there are {', '.join(BACKBONES)}, and the models of timm as {TIMM}NAME"
    raise ValueError(f"no backbone has this name; {suggestion}")


BackboneName = Annotated[str, AfterValidator(_known_backbone)]


class Settings(BaseModel):
    """Base of all sections: frozen, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError(f"range {limits} runs from the larger to the smaller value")
    return limits


Range = Annotated[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]], AfterValidator(_ascending)]


class AugmentSettings(Settings):
    """How training crops are varied; validation sees images as they are. All but the symmetries are off by default."""

    symmetries: Literal["none", "flips", "all"] = Field("all", description="all: flips, rotations by 90 degrees and transposes")
    blur_px: Range = Field((0.0, 0.0), description="range of the sigma of a Gaussian that blurs the crop, all bands alike")
    noise_factor: Range = Field(
        (1.0, 1.0), description="range of the noise in units of that of the image; 10 years look like 1 at sqrt(10)"
    )
    band_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="chance that a band is zero, as one without coverage is; one band always stays"
    )

    @model_validator(mode="after")
    def _noisier(self) -> AugmentSettings:
        if self.noise_factor[0] < 1:
            raise ValueError(f"noise_factor {self.noise_factor} is below 1; noise can be added but not taken away")
        return self


class DataSettings(Settings):
    """Where the training set lies and how it is cut for the network."""

    path: Path = Path("scenes")
    fraction: Fraction = Field(1.0, description="share of the training split that is used; smaller shares are nested")
    partition: Annotated[int, Field(ge=0)] | None = Field(
        None, description="number of the stored random partition into training and validation; none: the stored split"
    )
    crop: PositiveInt = Field(128, description="side of the square training crops")
    min_box: PositiveFloat = Field(11.0, description="boxes are widened to this size about the object's centre")
    centred_boxes: bool = Field(
        False, description="widen boxes until the object's position is their centre: that of a mask may lie arcseconds off"
    )
    balance: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="0: every image once an epoch; 1: redshift labels flat in z, crops drawn around objects and labels of crowded "
        "redshifts left out; between: density of labels to the power 1 - balance",
    )
    default_ebv: Annotated[float, Field(ge=0, lt=10)] = Field(
        0.03, description="E(B-V) mag where the data set has none: typical of extragalactic fields"
    )
    augment: AugmentSettings = AugmentSettings()
    workers: Annotated[int, Field(ge=0)] = Field(0, description="processes that prepare crops; 0: a thread of the trainer does")
    cache_gb: Annotated[float, Field(ge=0)] = Field(
        6.0, description="room in the temporary folder for decoded images, shared by all workers; 0 reads every crop from its files"
    )


class BackboneSettings(Settings):
    """A network of stages, each at half the resolution of the one before, and the feature pyramid over them."""

    name: BackboneName = Field("small", description=f"{', '.join(BACKBONES)}, or any timm model with feature maps as {TIMM}NAME")
    stem_stride: Literal[1, 2, 4] = Field(2, description="reduction before the first stage; small for 5-pixel objects")
    levels: Annotated[int, Field(ge=1, le=5)] = Field(
        3, description="pyramid levels, each half the resolution of the one before; most networks have 4 stages for them"
    )
    norm: NormName = Field("BN", description="of the convolutions; transformers keep their LN and take it in the pyramid alone")
    fpn_channels: PositiveInt = 64
    fpn_norm: NormName | Literal[""] | None = Field(None, description="of the pyramid: that of norm when not given; '' for none")
    top_level: bool = Field(False, description="one more level by halving the last, for proposals alone (detectron2's p6)")
    stem_pool: bool = Field(False, description="residual networks: a max pooling does the last halving, as in published weights")
    stride_in_1x1: bool = Field(False, description="bottleneck blocks: stride in their first convolution, as in R-50.pkl")
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="chance that a block is skipped in training (not in residual networks); the published one when not given"
    )
    recompute: bool = Field(
        False, description="MViTv2, Swin, ViTDet: compute activations inside blocks again backwards; less memory, slower"
    )

    @model_validator(mode="after")
    def _possible(self) -> BackboneSettings:
        family = self.name.split("_", maxsplit=1)[0]
        residual = self.name in ("tiny", "small") or (family == self.name and self.name.startswith("resnet"))
        transformer = family in ("mvitv2", "swin", "vitdet")
        bottleneck = self.name in ("resnet50", "resnet101", "resnet152")
        if self.levels > 4 and not self.name.startswith(TIMM):
            raise ValueError(f"{self.name} has 4 stages, not the {self.levels} of levels; top_level adds one without a stage")
        if self.stem_pool and not residual:
            raise ValueError(f"stem_pool means nothing for {self.name}; only residual networks can pool in their stem")
        if self.stem_pool and self.stem_stride == 1:
            raise ValueError("stem_pool halves the resolution, which stem_stride 1 forbids; set stem_stride to 2 or 4")
        if self.stride_in_1x1 and not bottleneck:
            raise ValueError(f"stride_in_1x1 means nothing for {self.name}; resnet50, resnet101 and resnet152 have such blocks")
        if self.drop_path is not None and residual:
            raise ValueError(f"drop_path means nothing for {self.name}, whose blocks are never skipped; leave it out")
        if self.recompute and not transformer:
            raise ValueError(f"recompute is not possible with {self.name}; MViTv2, Swin and ViTDet can")
        return self


class PoolerSettings(Settings):
    """ROIAlign: a box of ``canonical_size`` px comes from the level of stride 2^canonical_level (FPN paper, Eq. 1).

    Twice as large a box comes from the next level; boxes beyond the first or last level come from that level.
    """

    canonical_size: PositiveFloat = Field(14.0, description="detectron2 and the published networks: 224")
    canonical_level: Annotated[int, Field(ge=0)] = Field(1, description="detectron2 and the published networks: 4")
    samples: Annotated[int, Field(ge=0)] = Field(0, description="per bin and axis; 0: as many as the bin has feature pixels")


class ProposalSettings(Settings):
    """The region proposal network. Defaults in brackets are those of detectron2 and of the published networks."""

    convolutions: PositiveInt = Field(1, description="3x3 convolutions before objectness and offsets [1; MViTv2: 2]")
    aspect_ratios: Annotated[tuple[PositiveFloat, ...], NonEmpty] = Field((1.0,), description="height / width [0.5, 1, 2]")
    anchor_offset: Annotated[float, Field(ge=0, lt=1)] = Field(0.5, description="of the first anchor, in strides [0]")
    iou: Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)] = Field(
        (0.3, 0.6), description="an anchor is background below the first, an object above the second [0.3, 0.7]"
    )
    samples: PositiveInt = Field(256, description="anchors per image that train it [256]")
    nms_threshold: Fraction = Field(0.7, description="[0.7]")
    before_nms: PositiveInt = Field(1000, description="best proposals per level and image in training, before NMS [2000]")


class BoxHeadSettings(Settings):
    """Classification and box regression on pooled features; three stages make a cascade."""

    stages: Literal[1, 3] = 1
    convolutions: tuple[PositiveInt, ...] = Field((), description="channels of 3x3 convolutions before the hidden layers")
    norm: NormName | Literal[""] = Field("", description="of these convolutions; '' for none")
    hidden: Annotated[tuple[PositiveInt, ...], NonEmpty] = (256,)
    pool: PositiveInt = Field(5, description="side of the pooled feature grid")
    samples: PositiveInt = Field(128, description="proposals per image that train it [detectron2: 512]")
    positive_fraction: Fraction = Field(0.5, description="largest share of objects among them [detectron2: 0.25]")


class MaskHeadSettings(Settings):
    """Convolutions on pooled features of 14x14, one transposed to 28x28, and a probability per class."""

    convolutions: PositiveInt = Field(2, description="3x3 convolutions [detectron2: 4]")
    norm: NormName | Literal[""] = ""


class RedshiftHeadSettings(Settings):
    """The mixture density head (LSST paper, Table 1: hidden 1024, 64, tanh, pool 7, 5 components)."""

    components: PositiveInt = 5
    hidden: tuple[PositiveInt, ...] = (256, 64)
    activation: Literal["tanh", "gelu"] = "gelu"
    pool: PositiveInt = 5
    ebv: bool = Field(True, description="E(B-V) is one more input")
    sigma_floor: Annotated[float, Field(ge=0)] = Field(
        0.003, description="smallest width of a component in redshift; 0: none, as in the published networks"
    )
    gold_band: str = "i"
    gold_limit: float | None = Field(
        25.3, description="only labelled objects brighter than this train the head, AB mag; none: all of them"
    )
    stars: Literal["z_pure", "z_all"] = Field(
        "z_pure", description="z_pure: galaxies alone train the head; z_all: stars brighter than the limit do too, at z = 0"
    )
    loss_weight: PositiveFloat = Field(1.0, description="of its term in the total loss [1]")
    max_boxes: PositiveInt = Field(64, description="boxes per image that train the head")
    true_boxes: bool = Field(False, description="the true boxes train it beside the proposals, as in the published networks")


class InputSettings(Settings):
    """From nanojansky to what the network sees, per band.

    arcsinh: arcsinh(flux / (softening * noise)); linear: flux / (softening * noise); snr: flux / noise;
    zscore: (flux - mean) / std over the training pixels (JADES).
    """

    scaling: Literal["arcsinh", "linear", "snr", "zscore"] = "arcsinh"
    softening: PositiveFloat = 3.0
    noise_njy: tuple[PositiveFloat, ...] | None = Field(
        None, description="noise per pixel and band, nJy; measured on the training set when not given"
    )
    mean_njy: tuple[float, ...] | None = Field(
        None, description="mean per band, nJy, for zscore; measured on the training set when not given"
    )
    std_njy: tuple[PositiveFloat, ...] | None = Field(
        None, description="standard deviation per band, nJy, for zscore; measured on the training set when not given"
    )


class ModelSettings(Settings):
    """The whole network. Band order is the order of the input planes."""

    bands: Annotated[tuple[str, ...], NonEmpty] = ("u", "g", "r", "i", "z", "y")
    classes: Annotated[tuple[str, ...], NonEmpty] = Field(("object",), description="one class for all, or galaxy and star")
    pixel_scale: PositiveFloat | None = Field(None, description="arcsec per pixel; taken from the training set when not given")
    input: InputSettings = InputSettings()
    backbone: BackboneSettings = BackboneSettings()
    weights: Path | None = Field(
        None,
        description="a member (folder or .safetensors) of the same shape that a new run starts from, heads and all: to tune one to "
        "another sky, or for one more cycle of the learning rate",
    )
    backbone_weights: Path | None = Field(
        None,
        description="what the backbone of a new run starts from: ImageNet weights (detectron2 .pkl, torchvision or timm .pth), "
        "a pretrained backbone, a member or a DeepDISC checkpoint",
    )
    first_convolution: Literal["reinitialise", "inflate"] = Field(
        "reinitialise",
        description="where these weights are of another number of bands: a fresh start (both papers), or their mean over the "
        "colours for every band, rescaled",
    )
    anchor_sizes: tuple[PositiveFloat | tuple[PositiveFloat, ...], ...] = Field(
        (9.0, 16.0, 36.0), description="of every pyramid level, px: one, or several"
    )
    proposals: ProposalSettings = ProposalSettings()
    proposals_training: PositiveInt = Field(400, description="proposals per image in training, after NMS")
    pooler: PoolerSettings = PoolerSettings()
    box_head: BoxHeadSettings = BoxHeadSettings()
    mask_head: bool = False
    mask: MaskHeadSettings = MaskHeadSettings()
    redshift_head: RedshiftHeadSettings = RedshiftHeadSettings()

    @model_validator(mode="after")
    def _consistent(self) -> ModelSettings:
        if len(set(self.bands)) != len(self.bands):
            raise ValueError(f"bands {self.bands} name a band twice")
        if len(self.classes) > 1 and sorted(self.classes) != ["galaxy", "star"]:
            raise ValueError(f"classes {self.classes} are not known; give one class, or galaxy and star")
        for name in ("noise_njy", "mean_njy", "std_njy"):
            values = getattr(self.input, name)
            if values is not None and len(values) != len(self.bands):
                raise ValueError(f"input.{name} has {len(values)} values for {len(self.bands)} bands {self.bands}")
        if self.weights and self.backbone_weights:
            raise ValueError("weights gives the whole network its start, and backbone_weights the backbone another; leave one out")
        levels = self.backbone.levels + self.backbone.top_level
        if len(self.anchor_sizes) != levels:
            raise ValueError(f"anchor_sizes has {len(self.anchor_sizes)} values for {levels} pyramid levels")
        if len(counts := {len(sizes) if isinstance(sizes, tuple) else 1 for sizes in self.anchor_sizes}) > 1:
            raise ValueError(f"anchor_sizes has {' and '.join(map(str, sorted(counts)))} sizes a level; give each level as many")
        return self


class TrainSettings(Settings):
    """The optimisation."""

    steps: PositiveInt = 2000
    epochs: PositiveFloat | None = Field(None, description="passes over the training images, in the place of steps")
    batch_size: PositiveInt = Field(6, description="images of an optimisation step, over all ranks")
    accumulate: PositiveInt = Field(
        1, description="parts in which a batch is computed where memory is short; losses of boxes are then means over a part"
    )
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    milestones: tuple[Fraction, ...] = Field((0.3, 0.5, 0.7), description="shares of the steps at which lr falls to a tenth")
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    clip_norm: PositiveFloat = 5.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay per step of averaged weights, which then are what is validated and kept; 0: no average"
    )
    precision: Literal["float32", "bf16", "fp16"] = Field("float32", description="of the products in training; fp16 on GPUs only")
    validate_every: PositiveInt = Field(500, description="steps between passes over the whole validation split")
    save_every: Annotated[int, Field(ge=0)] = Field(0, description="steps between saves of the state; 0: at validations only")
    monitor: Annotated[str, Field(pattern=r"^(train_loss|val_(nll|bias|sigma_iqr|outliers|completeness|loss\w*))$")] = Field(
        "val_nll", description="the metric that decides which checkpoint is best; completeness the higher, all others the lower"
    )
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="validations in a row without a better monitor that end training; 0: it goes through all steps"
    )
    device: str = Field("cpu", description="cpu or cuda; each rank takes a GPU of its own")
    ranks: PositiveInt = Field(1, description="processes on this machine that train together; torchrun and srun start their own")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads of a rank; 0 leaves torch's choice, which ranks share")

    def score(self, metrics: Mapping[str, float]) -> float:
        """The monitored metric as a number that is the lower the better."""
        if self.monitor not in metrics:
            raise ConfigError(f"train.monitor {self.monitor!r} is not measured; choose one of {', '.join(sorted(metrics))}")
        value = metrics[self.monitor]
        return {"val_completeness": -value, "val_bias": abs(value)}.get(self.monitor, value)


class InferenceSettings(Settings):
    """What a trained member does with an image. Values in brackets are those of detectron2 and of the published networks."""

    score_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.3
    nms_threshold: Fraction = 0.4
    proposals_per_megapixel: PositiveInt = Field(8000, description="cap on proposals; detections are capped at half of it")
    fixed_proposals: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="instead, the caps on proposals of a tile, per level before NMS and in all after it [1000, 1000]"
    )
    max_detections: PositiveInt | None = Field(None, description="instead, the cap on detections of a tile [100]")
    crowding: PositiveInt = Field(
        4, description="both caps grow up to so many times in a tile that needs it; caps that are set instead never do"
    )
    tile: PositiveInt = Field(512, description="side of the square the network sees at once")
    overlap: PositiveInt = Field(64, description="pixels that neighbouring tiles share")
    batch: PositiveInt = Field(1, description="tiles of one size that the network sees together; more than 1 pays on GPUs")
    preset: Literal["exact", "fast"] = Field(
        "exact", description="fast: proposals without hope are given up early, by least_objectness and least_score; see precision"
    )
    least_objectness: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.3, description="fast: probability below which a proposal does not reach the box heads"
    )
    least_score: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="fast: mean score below which a proposal leaves the cascade between its stages"
    )
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        "auto",
        description="of the products at inference; auto: bf16 in the fast preset where the processor computes in it, else "
        "float32; fp16 on GPUs only",
    )
    compile: bool = Field(False, description="torch.compile of the backbone: slow to start; on a CPU it needs a C++ compiler")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads of a process; 0 leaves torch's choice")

    @model_validator(mode="after")
    def _advances(self) -> InferenceSettings:
        if self.tile < self.overlap + 32:
            raise ValueError(f"tile {self.tile} does not advance with overlap {self.overlap}; make it at least 32 px larger")
        return self


class EnsembleSettings(Settings):
    """How the answers of several members become one; kept in ensemble.yaml."""

    match: Literal["intersection", "majority", "union"] = Field(
        "intersection", description="objects that all members found (JADES), more than half of them, or any of them"
    )
    min_iou: Fraction = Field(0.3, description="boxes of two members that are one object overlap by at least this (JADES)")
    weights: Literal["likelihood", "log_likelihood", "uniform"] | Annotated[tuple[PositiveFloat, ...], NonEmpty] = Field(
        "likelihood",
        description="of the members: exp(-mean validation NLL), which is the likelihood per object; its logarithm, where that is "
        "positive for all; equal; or a number for each",
    )
    components: PositiveInt | None = Field(
        None, description="Gaussians of a combined redshift mixture, merged until so many are left; none: all of all members"
    )
    max_divergence: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="nats by which merging may change a mixture; where it would be more, components beyond the number stay, and "
        "every mixture has as many columns as all members together",
    )

    calibrated: bool = Field(True, description="recalibrate mixtures, where `members calibrate` has learned how")

    @model_validator(mode="after")
    def _merges(self) -> EnsembleSettings:
        if self.max_divergence is not None and self.components is None:
            raise ValueError("max_divergence bounds the merging of components, which is off; set components too")
        return self


class TrainingConfig(Settings):
    """One training run, complete: with the same config and data it gives the same network."""

    seed: Annotated[int, Field(ge=0)] = 0
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    inference: InferenceSettings = InferenceSettings()


class PretrainSettings(Settings):
    """Pretraining of a backbone on single galaxies: two layers on its deepest features predict the redshift (JADES paper, 4.1)."""

    seed: Annotated[int, Field(ge=0)] = 0
    cutouts: Path = Field(Path("cutouts.h5"), description="HDF5 of GalaxiesML's form, or one that `data cutouts` has made")
    zero_point: float | None = Field(None, description="AB zero point of the pixels where the file does not tell it")
    model: ModelSettings = ModelSettings()
    augment: AugmentSettings = AugmentSettings()
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of the cutouts that validate")
    hidden: PositiveInt = Field(256, description="width of the layer between features and redshift")
    steps: PositiveInt = 2000
    epochs: PositiveFloat | None = Field(None, description="passes over the cutouts, in the place of steps")
    batch_size: PositiveInt = 64
    optimizer: Literal["adamw", "sgd"] = "sgd"
    lr: PositiveFloat = 1e-2
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    milestones: tuple[Fraction, ...] = Field((0.3, 0.5, 0.7), description="shares of the steps at which lr falls to a tenth")
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    clip_norm: PositiveFloat = 5.0
    validate_every: PositiveInt = 200
    workers: Annotated[int, Field(ge=0)] = 0
    device: str = "cpu"
    threads: Annotated[int, Field(ge=0)] = 0


class SkySettings(Settings):
    """What the simulator draws; the same settings and seed give the same sky, whatever ``years``."""

    survey: str = "lsst"
    years: PositiveFloat = Field(5.0, description="depth of the coadds in years of observation, where the survey's depends on it")
    density: Annotated[float, Field(ge=0)] = Field(1.0, description="number of galaxies and stars relative to the real sky")
    colours: Literal["templates", "dc2"] = Field("templates", description="from templates, or painted from cosmoDC2 photometry")
    dc2_part: Literal["all", "train", "test"] = Field("all", description="which galaxies of cosmoDC2 lend their colours")
    clustering: Annotated[float, Field(ge=0, le=1)] = Field(0.25, description="share of the galaxies that live in groups")
    knots: bool = Field(True, description="star-forming knots in late-type galaxies")
    source_noise: bool = Field(True, description="Poisson noise of the sources on top of the sky's")
    noise_correlation: Annotated[float, Field(ge=0, lt=0.5)] | None = Field(
        None, description="correlation of the noise of neighbouring pixels; the survey's when not given"
    )
    ebv: Annotated[float, Field(ge=0, lt=3)] | None = Field(None, description="E(B-V) mag; drawn scene by scene when not given")
    ebv_variation: Annotated[float, Field(ge=0)] = Field(0.1, description="relative change of E(B-V) from edge to edge")
    psf_variation: Annotated[float, Field(ge=0, lt=0.5)] = Field(0.02, description="relative change of the PSF from edge to edge")
    artifacts: tuple[Literal["saturation", "spikes", "trail", "missing_band"], ...] = Field(
        (), description="blemishes of real images; what they cover is flagged in the mask"
    )


S = TypeVar("S", bound=BaseModel)


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``a.b=c`` into its path and its value, the value read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"override {text!r} is not of the form a.b=value; example: --set train.lr=0.001")
    try:
        return key.split("."), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {text!r}: the value is not valid YAML; example: --set 'model.bands=[g, r, i]'") from None


def set_by_path(tree: dict[str, Any], path: Iterable[str], value: Any) -> None:
    """Set a nested value in place, making the mappings on the way."""
    *parents, last = path
    for name in parents:
        child = tree.get(name)
        if not isinstance(child, dict):
            child = tree[name] = {}
        tree = child
    tree[last] = value


def presets() -> list[str]:
    """Names of the settings that come with the package: those of the papers, and small ones."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def with_preset(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with what they leave open taken from the preset that their key ``preset`` names, if they have it."""
    rest = {key: value for key, value in tree.items() if key != "preset"}
    if "preset" not in tree:
        return rest
    if (name := tree["preset"]) not in presets():
        raise ConfigError(f"there is no preset {name!r}, {did_you_mean(str(name), presets())}")
    return _merged(read_yaml(PRESETS / f"{name}.yaml"), rest)


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with ``changes`` in place of its values, section by section."""
    merged = dict(tree)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping."""
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist; give a file, or a preset: {', '.join(presets())}") from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; expected a mapping of settings")
    return tree


def validate(schema: type[S], tree: Mapping[str, Any], source: str) -> S:
    """Build ``schema`` from a mapping; all faults are collected into one `ConfigError`."""
    try:
        return schema.model_validate(dict(tree))
    except ValidationError as error:
        faults = "; ".join(_describe(schema, fault) for fault in error.errors())
        raise ConfigError(f"{source}: {faults}") from None


def load(path: Path | None, overrides: Iterable[str] = (), schema: type[S] = TrainingConfig) -> S:  # type: ignore[assignment]
    """Read settings from YAML (or the defaults, without a path) and apply ``a.b=c`` overrides.

    Where no file is at ``path``, the preset of that name is taken; a file may name one by its key ``preset``.
    """
    if path and str(path) in presets() and not path.exists():
        tree = with_preset({"preset": str(path)})
    else:
        tree = with_preset(read_yaml(path) if path else {})
    for text in overrides:
        keys, value = parse_override(text)
        set_by_path(tree, keys, value)
    return validate(schema, tree, str(path) if path else "settings")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys; lists as JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, (list, tuple)) else str(value)
    return flat


def _describe(schema: type[BaseModel], fault: Any) -> str:
    keys = [str(part) for part in fault["loc"]]
    where = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        near = nearest(keys[-1], _fields_at(schema, keys[:-1]))
        return f"unknown key {where!r}" + (f", did you mean {'.'.join([*keys[:-1], near])!r}?" if near else "")
    message = fault["msg"].removeprefix("Value error, ")
    return (
        f"{where}: {message} (found {fault['input']!r})"
        if where and not isinstance(fault["input"], dict)
        else f"{where or 'settings'}: {message}"
    )


def _fields_at(schema: type[BaseModel], keys: Iterable[str]) -> list[str]:
    for key in keys:
        field = schema.model_fields.get(key)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        schema = annotation
    return list(schema.model_fields)

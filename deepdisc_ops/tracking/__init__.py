"""Records of training runs in MLflow; the only room that uses it.

One process writes: the driver of a sweep, or the ``train`` command. That keeps a sqlite store free of races (two processes
that open a fresh one both try to migrate it) and trials free of MLflow's start-up and latency. Runs are found again by a tag,
so that a resumed sweep continues them; steps a run already holds are skipped, so that they increase strictly.
"""

from deepdisc_ops.tracking.background import Background
from deepdisc_ops.tracking.registry import RegisteredMember
from deepdisc_ops.tracking.store import default_uri, store_uri, ui_command
from deepdisc_ops.tracking.sync import SOURCE_TAG, SyncReport, sync
from deepdisc_ops.tracking.tracker import (
    CHECKPOINT_FOLDER,
    EXPERIMENT,
    KIND_TAG,
    PARENT_TAG,
    STATE_TAG,
    STOPPED_TAG,
    SWEEP_NAME_TAG,
    SWEEP_TAG,
    TRIAL_TAG,
    Measurement,
    RunRecord,
    Status,
    Tracker,
    provenance,
)

__all__ = [
    "CHECKPOINT_FOLDER",
    "EXPERIMENT",
    "KIND_TAG",
    "PARENT_TAG",
    "SOURCE_TAG",
    "STATE_TAG",
    "STOPPED_TAG",
    "SWEEP_NAME_TAG",
    "SWEEP_TAG",
    "TRIAL_TAG",
    "Background",
    "Measurement",
    "RegisteredMember",
    "RunRecord",
    "Status",
    "SyncReport",
    "Tracker",
    "default_uri",
    "provenance",
    "store_uri",
    "sync",
    "ui_command",
]

"""Training what a plugin learns: the loop, its checkpoints, and the artefact with its provenance."""

from robustbench_x.fitting.artifact import Artifact, read_artifact, write_artifact
from robustbench_x.fitting.ground import Ground, Pool, make_pool
from robustbench_x.fitting.harden import HardenJob
from robustbench_x.fitting.job import FitJob
from robustbench_x.fitting.loop import run_training

__all__ = [
    "Artifact",
    "FitJob",
    "Ground",
    "HardenJob",
    "Pool",
    "make_pool",
    "read_artifact",
    "run_training",
    "write_artifact",
]

"""The stored result, `report.json`: the one thing that every table, gate and report reads."""

import json
from pathlib import Path
from typing import Any, Literal

import pydantic

from robustbench_x.errors import RunError, UsageError
from robustbench_x.provenance import FitInfo, InnerAttack, LayerMapInfo, Measure, Provenance, Stored, Threat
from robustbench_x.store import write_atomically

__all__ = [
    "SCHEMA_VERSION",
    "CellResult",
    "Collapse",
    "Decision",
    "DefenseInfo",
    "EncoderInfo",
    "Finding",
    "FitInfo",
    "GateVerdict",
    "HeadInfo",
    "InnerAttack",
    "Level",
    "Measure",
    "Provenance",
    "Report",
    "RunInfo",
    "StageProof",
    "Threat",
    "WorstCase",
    "json_schema",
    "read_report",
    "write_report",
]

SCHEMA_VERSION = "1"
Level = Literal["note", "warning", "error"]


class Finding(Stored):
    """A doubt about the evaluation: with level `error` its figures cannot be trusted.

    `cell` names the cell, or the victim as one attacker sees it, in which case `applies_to` lists its cells; no
    `cell` means the whole run. `figure` is what was measured, `threshold` where it becomes a finding (either may be
    null), `source` where the check is from, `advice` what to do.
    """

    id: str
    level: Level
    message: str
    cell: str | None = None
    applies_to: tuple[str, ...] = ()
    figure: float | None = None
    threshold: float | None = None
    source: str = ""
    advice: str = ""


class Flag(Stored):
    """A finding as its cell carries it."""

    id: str
    level: Level
    message: str


class Collapse(Stored):
    """The class that absorbs most adversarial images of a cell, and the share of the judged images it takes."""

    label: int
    name: str
    share: Measure


class CellResult(Stored):
    """One entry of the matrix, measured."""

    id: str
    encoder: str
    head: str
    task: str = "classification"
    data: str
    defense: str
    knowledge: str
    attack: str
    access: str
    control: bool = False
    threat: Threat
    params: dict[str, Any]
    n: int
    n_clean_correct: int
    n_errors: int
    metrics: dict[str, Measure]
    flags: tuple[Flag, ...] = ()
    fit: FitInfo | None = None
    collapse: Collapse | None = None


class WorstCase(Stored):
    """Per sample the minimum over every attack and knowledge level on one defended victim at one budget."""

    encoder: str
    head: str
    data: str
    defense: str
    threat: Threat
    n: int
    n_clean_correct: int
    n_errors: int
    robust_accuracy: Measure
    asr: Measure
    attacks: tuple[str, ...]


class HeadInfo(Stored):
    """How a head was made; `classes` names its logits in order."""

    encoder: str
    data: str
    head: str
    num_classes: int
    settings: dict[str, Any]
    task: str = "classification"
    classes: tuple[str, ...] = ()


class EncoderInfo(Stored):
    """Which weights were audited; `layer_vulnerability` holds the layer maps that attacks made of them."""

    source: str
    sha256: str
    parameters: int
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str
    notes: tuple[str, ...] = ()
    layer_vulnerability: tuple[LayerMapInfo, ...] = ()


class DefenseInfo(Stored):
    """A defence as it stood in front of one encoder on one data set.

    `seconds` is the time an image takes through defence and encoder together, `encoder_seconds` through the encoder
    alone, both on this machine and null where nobody could measure it. `refuse_above` is a detector's threshold, and
    `fit` what a defence had learned.
    """

    encoder: str
    data: str
    defense: str
    name: str
    params: dict[str, Any]
    gradient: str
    stochastic: bool
    detects: bool
    refuse_above: float | None = None
    seconds: float | None = None
    encoder_seconds: float | None = None
    fit: FitInfo | None = None


class DataInfo(Stored):
    """Which images were audited; `sha256` covers the ids and pixels of the evaluated samples."""

    source: str
    classes: int
    train: int
    test: int
    evaluated: int
    unreadable: tuple[str, ...] = ()
    license: str = ""
    notes: tuple[str, ...] = ()


class StageProof(Stored):
    """What one encoder on one data set was, beyond its names: enough to tell whether it changed since.

    `images` digests the ids, labels and pixels of the evaluated samples; `answers` holds, for each head, what the
    victim makes of two fixed images, which shows changed code or heads where a digest of weights does not. `tuned` has
    the digest of every head's own encoder: one that was tuned again may answer alike and still be another victim.
    `defenses` has the digest of what each defence had learned, `shields` what each makes of these images (null in a run
    from before that was asked), and `drawn` the kind of device that each random one drew on. `texts` has digests of the
    captions of all shards and of what reads them.
    """

    encoder: str
    data: str
    sha256: str
    images: str
    answers: dict[str, tuple[float, ...]]
    tuned: dict[str, str] = pydantic.Field({})
    defenses: dict[str, str] = pydantic.Field({})
    shields: dict[str, dict[str, tuple[float, ...]]] | None = None
    drawn: dict[str, str] = pydantic.Field({})
    texts: dict[str, str] = pydantic.Field({})


class RunInfo(Stored):
    """Where, when and with what."""

    id: str
    started: str
    finished: str | None
    command: str
    seed: int
    device: str
    precision: str
    packages: dict[str, str]
    robustbench_x: str
    fingerprint: str
    batch_size: int
    platform: str = ""


class GateVerdict(Stored):
    """One gate's judgement of one cell or worst case."""

    gate: str
    metric: str
    bound: str
    cell: str
    verdict: Literal["pass", "fail", "inconclusive", "error"]
    value: float | None
    low: float | None = None
    high: float | None = None
    message: str


class Decision(Stored):
    """What the run, its gates and its findings come to: the exit code, and the one sentence that says so."""

    exit_code: int
    answer: Literal["yes", "no", "unknown", "unjudged"]
    reason: str


class Report(Stored):
    """A whole run."""

    schema_version: Literal["1"] = "1"
    status: Literal["complete", "incomplete", "error"]
    run: RunInfo
    config: dict[str, Any]
    encoders: tuple[EncoderInfo, ...]
    heads: tuple[HeadInfo, ...] = ()
    data: tuple[DataInfo, ...] = ()
    defenses: tuple[DefenseInfo, ...] = ()
    cells: tuple[CellResult, ...]
    worst_case: tuple[WorstCase, ...]
    findings: tuple[Finding, ...] = ()
    proofs: tuple[StageProof, ...] = ()
    gates: tuple[GateVerdict, ...] = ()
    decision: Decision | None = None


def read_report(run: Path) -> Report:
    """The report of a run folder, or of a `report.json` itself.

    Raises:
        UsageError: There is no run.
        RunError: It is unfinished, damaged, or of another schema version; names the file and the field.
    """
    path = run / "report.json" if run.is_dir() else run
    if not path.exists():
        if run.is_dir() and (run / ".state").exists():
            raise RunError(f"{run} holds an interrupted audit; run the same rbx audit again with --out {run}")
        raise UsageError(f"there is no run at {run}: no {path.name} is there")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise RunError(f"{path}: schema_version is {version!r}, this version of rbx reads {SCHEMA_VERSION!r}")
    try:
        return Report.model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{path}: field {where}: {first['msg'].lower()}") from error


def write_report(report: Report, run: Path) -> None:
    """Writes `report.json` into `run`, atomically."""
    write_atomically(run / "report.json", report.model_dump_json(indent=2) + "\n")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `report.json`, as shipped in `robustbench_x/schema/report-1.json`."""
    return Report.model_json_schema(mode="serialization")

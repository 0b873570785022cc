"""The end of a run: rows and notes on disk become `report.json`, `report.md`, `samples.parquet`, `audit.toml`."""

import datetime
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from robustbench_x import __version__
from robustbench_x.config import AuditConfig
from robustbench_x.diagnose import CellRecord
from robustbench_x.engine.artifacts import note_of
from robustbench_x.engine.assemble import assemble_cells, cell_findings, cell_result, worst_cases
from robustbench_x.engine.layer_maps import with_layer_maps
from robustbench_x.findings import finding
from robustbench_x.gate import decide
from robustbench_x.numbers import format_eps
from robustbench_x.plan import Plan, with_noise
from robustbench_x.registry import Registry
from robustbench_x.report.markdown import render_markdown
from robustbench_x.result import (
    DataInfo,
    DefenseInfo,
    EncoderInfo,
    Finding,
    FitInfo,
    Flag,
    HeadInfo,
    Report,
    RunInfo,
    StageProof,
    write_report,
)
from robustbench_x.store import RunFolder, write_atomically
from robustbench_x.toml import dump_toml

__all__ = ["Evidence", "finish", "make_report", "now", "with_findings", "write_results", "write_texts"]

_PACKAGES = ("torch", "torchvision", "timm", "kornia", "torchattacks", "numpy", "pillow", "pyarrow")

_BARELY = 0.995
"""A cosine of tuned to public features above this is no tuning: rounding and a few dozen steps reach it."""


def finish(folder: RunFolder, plan: Plan, config: AuditConfig, registry: Registry) -> Report:
    """Assembles the report from what is on disk, writes every result file, then drops the working state.

    Raises:
        RunError: Rows or notes are missing or damaged.
    """
    stages = [_note(folder, f"stage-{n}") for n in range(len(plan.stages))]
    notes = [*(["strict"] if config.checks == "all" else []), "probes"]
    probes = [
        Finding(**f) for n in range(len(stages)) for name in notes for f in _note(folder, f"{name}-{n}")["findings"]
    ]
    evidence = Evidence(
        rows=folder.rows(),
        encoders=tuple({s["encoder"]["source"]: EncoderInfo(**s["encoder"]) for s in stages}.values()),
        heads=tuple(HeadInfo(**h) for s in stages for h in s["heads"]),
        data=tuple(DataInfo(**s["data"]) for s in stages),
        defenses=tuple(DefenseInfo(**d) for s in stages for d in s["defenses"]),
        evaluated={(s["encoder"]["source"], s["data"]["source"]): s["data"]["evaluated"] for s in stages},
        probes=tuple(probes),
        proofs=tuple(StageProof(**s["proof"]) for s in stages),
        fits=_fits(folder, plan),
    )
    report = make_report(evidence, _run_info(folder, plan, config), plan, config, registry)
    write_results(report, evidence.rows, folder.path)
    folder.finish()
    return report


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a report is made from: rows, and what they were measured on.

    `evaluated` is the number of samples of each (encoder, data); `probes` are findings about victims; `fits` holds
    what each cell's attack had learned, by cell.
    """

    rows: pa.Table
    encoders: tuple[EncoderInfo, ...]
    heads: tuple[HeadInfo, ...]
    data: tuple[DataInfo, ...]
    defenses: tuple[DefenseInfo, ...]
    evaluated: Mapping[tuple[str, str], int]
    probes: tuple[Finding, ...]
    proofs: tuple[StageProof, ...]
    fits: Mapping[str, FitInfo]


def make_report(evidence: Evidence, run: RunInfo, plan: Plan, config: AuditConfig, registry: Registry) -> Report:
    """The report that `evidence` makes; nothing is written.

    Raises:
        RunError: A cell lacks a sample, or has one twice.
    """
    heads = {(h.encoder, h.data, h.head): h for h in evidence.heads}
    records = assemble_cells(
        evidence.rows,
        plan,
        config,
        registry,
        heads=heads,
        evaluated=evidence.evaluated,
    )
    findings = _each_once(
        [
            *evidence.probes,
            *_training_findings(evidence.heads),
            *_fit_findings(evidence, records),
            *_cost_findings(evidence.defenses, records),
            *cell_findings(records, config, registry),
        ]
    )
    params = {e.title: registry.attacks[e.name].effective(e.params) for e in with_noise(config.attack)}
    cells = tuple(
        cell_result(
            record,
            [f for f in findings if f.cell == cell or cell in f.applies_to],
            params=params[record.cell.attack] | _learned(evidence.fits.get(cell)),
            fit=evidence.fits.get(cell),
            head=heads[record.cell.encoder, record.cell.data, record.cell.head],
        )
        for cell, record in records.items()
    )
    return Report(
        status="error" if any(cell.n_errors for cell in cells) else "complete",
        run=run,
        config=config.replay(),
        encoders=tuple(with_layer_maps(info, cells) for info in evidence.encoders),
        heads=evidence.heads,
        data=evidence.data,
        defenses=evidence.defenses,
        cells=cells,
        worst_case=worst_cases(records),
        findings=tuple(findings),
        proofs=evidence.proofs,
    )


def _each_once(findings: Sequence[Finding]) -> list[Finding]:
    """The findings without repetitions: what the shards of an audit say of a victim, the whole may say again."""
    return list({f.model_dump_json(): f for f in findings}.values())


def with_findings(report: Report, found: Sequence[Finding], config: AuditConfig) -> Report:
    """A finished `report` with what later checks, those of `config`, have found; it has to be judged anew."""
    cells = tuple(
        cell.model_copy(
            update={
                "flags": (
                    *cell.flags,
                    *(Flag(id=f.id, level=f.level, message=f.message) for f in found if cell.id in f.applies_to),
                )
            }
        )
        for cell in report.cells
    )
    checked = report.config | {"checks": config.checks}
    update = {"cells": cells, "findings": (*report.findings, *found), "config": checked}
    # What was decided before these doubts were known is decided no more.
    return report.model_copy(update=update | {"gates": (), "decision": None})


def _fits(folder: RunFolder, plan: Plan) -> dict[str, FitInfo]:
    """What each cell's attack had learned; a training that failed left none."""
    crafts = [craft for stage in plan.stages for craft in stage.crafts]
    notes = {craft.id: folder.notes(note_of(craft)) for craft in crafts}
    return {cell.id: FitInfo(**note) for craft in crafts if (note := notes[craft.id]) for cell in craft.cells}


def write_results(report: Report, rows: pa.Table, out: Path) -> None:
    """Writes `samples.parquet` and what `write_texts` does, each atomically."""
    partial = out / "samples.parquet.partial"
    pq.write_table(rows.sort_by([("cell", "ascending"), ("position", "ascending")]), partial)
    partial.replace(out / "samples.parquet")
    write_texts(report, out)


def write_texts(report: Report, out: Path) -> None:
    """Writes everything that follows from the report: `audit.toml`, `report.md`, and last `report.json`."""
    write_atomically(out / "audit.toml", dump_toml(report.config))
    decision = report.decision or decide(report, None, fail_on=())
    write_atomically(out / "report.md", render_markdown(report, decision))
    write_report(report, out)


def now() -> str:
    """The time in UTC, to the second, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _note(folder: RunFolder, name: str) -> dict[str, Any]:
    values = folder.notes(name)
    assert values is not None, f"the engine never wrote {name}"
    return values


def _run_info(folder: RunFolder, plan: Plan, config: AuditConfig) -> RunInfo:
    header = _note(folder, "run")
    return RunInfo(
        id=folder.path.resolve().name,
        started=header["started"],
        finished=now(),
        command=header["command"],
        seed=config.seed,
        device=header["device"],
        precision=config.precision,
        packages={name: found for name in _PACKAGES if (found := _version(name)) is not None},
        robustbench_x=__version__,
        fingerprint=plan.fingerprint,
        batch_size=header["batch_size"],
        platform=f"{platform.platform()}, Python {platform.python_version()}",
    )


def _training_findings(heads: Sequence[HeadInfo]) -> list[Finding]:
    """Training images that could not be read, once per head."""
    found = []
    for head in heads:
        found += _tuning_findings(head)
        count, names = head.settings.get("unreadable", 0), head.settings.get("unreadable_first", [])
        if count:
            text = f"{head.data}, head {head.head}: {count} training images left out: {'; '.join(names)}"
            found.append(finding("unreadable_images", text, figure=count))
    return found


def _tuning_findings(head: HeadInfo) -> list[Finding]:
    """A tuned victim that is none, or one that tuning made worse."""
    made, where = head.settings, f"{head.encoder}, head {head.head} on {head.data}"
    if "tuned_sha256" not in made:
        return []
    found = []
    if made["feature_cosine"] > _BARELY:
        text = f"{where}: its features have a cosine of {made['feature_cosine']:.4f} to the public ones"
        found.append(finding("barely_tuned", text, figure=made["feature_cosine"]))
    if made["held_out_loss"] > made["probe_held_out_loss"]:
        text = (
            f"{where}: held-out loss {made['held_out_loss']:.3g}, the probe's {made['probe_held_out_loss']:.3g}; "
            f"accuracy {made['held_out_accuracy']:.3f}, the probe's {made['probe_held_out_accuracy']:.3f}"
        )
        found.append(finding("tuned_below_probe", text))
    return found


def _cost_findings(defenses: Sequence[DefenseInfo], records: Mapping[str, CellRecord]) -> list[Finding]:
    """Defences that failed on the very images that they were to be timed on."""
    found = []
    for info in (info for info in defenses if info.seconds is None):
        where = (info.encoder, info.data, info.defense)
        about = tuple(i for i, r in records.items() if (r.cell.encoder, r.cell.data, r.cell.defense) == where)
        kind = finding("runtime_unmeasured", "its time could not be measured", " | ".join(where))
        found.append(kind.model_copy(update={"applies_to": about}))
    return found


def _learned(fit: FitInfo | None) -> dict[str, Any]:
    """The parameters that an artefact was really trained with."""
    return {} if fit is None else fit.params


def _fit_findings(evidence: Evidence, records: Mapping[str, CellRecord]) -> list[Finding]:
    """Artefacts used at another budget, place or size than they were fitted for, or fitted on the judged images."""
    found = []
    encoders = {info.source: info for info in evidence.encoders}
    for cell, fit in evidence.fits.items():
        threat, made = records[cell].cell.threat, fit.threat
        if fit.downstream_images:
            text = f"{fit.downstream_images} evaluated images are among the {fit.surrogate_samples} it was fitted on"
            found.append(finding("surrogate_overlap", text, cell, figure=fit.downstream_images))
        changes = []
        if threat.eps != made.eps:
            changes.append(f"eps {format_eps(made.eps)}, used at {format_eps(threat.eps)}")
        if threat.norm == "patch" and threat.placement != made.placement:
            changes.append(f"placement {made.placement}, used at {threat.placement}")
        victim = encoders[records[cell].cell.encoder]
        if fit.encoder_sha256 == victim.sha256 and fit.input_size != victim.input_size:
            changes.append(f"{fit.input_size[0]} pixels, used at {victim.input_size[0]}")
        if changes:
            stretched = finding("stretched_artifact", f"fitted for {'; '.join(changes)}", cell)
            # Scaled down, a pattern that spends its budget stays close to one fitted for the smaller one.
            smaller = len(changes) == 1 and threat.norm == "linf" and threat.eps < made.eps
            found.append(stretched.model_copy(update={"level": "note"}) if smaller else stretched)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

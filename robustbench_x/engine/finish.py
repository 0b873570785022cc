"""The end of a run: rows and notes on disk become `report.json`, `report.md`, `samples.parquet`, `audit.toml`."""

import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow.parquet as pq

from robustbench_x import __version__
from robustbench_x.config import AuditConfig
from robustbench_x.engine.assemble import assemble_cells, cell_findings, cell_result, worst_cases
from robustbench_x.findings import finding
from robustbench_x.plan import Plan, with_noise
from robustbench_x.registry import Registry
from robustbench_x.result import DataInfo, EncoderInfo, Finding, HeadInfo, Report, RunInfo, write_report
from robustbench_x.store import RunFolder, write_atomically

__all__ = ["finish", "now"]

_PACKAGES = ("torch", "torchvision", "timm", "kornia", "torchattacks", "numpy", "pillow", "pyarrow")


def finish(folder: RunFolder, plan: Plan, config: AuditConfig, registry: Registry) -> Report:
    """Assembles the report from what is on disk, writes every result file, then drops the working state.

    Raises:
        RunError: Rows or notes are missing or damaged.
    """
    stages = [_note(folder, f"stage-{n}") for n in range(len(plan.stages))]
    probes = [Finding(**f) for n in range(len(stages)) for f in _note(folder, f"probes-{n}")["findings"]]
    rows = folder.rows()
    classes = {(h["encoder"], h["data"], h["head"]): h["num_classes"] for s in stages for h in s["heads"]}
    evaluated = {(s["encoder"]["source"], s["data"]["source"]): s["data"]["evaluated"] for s in stages}
    records = assemble_cells(rows, plan, config, registry, num_classes=classes, evaluated=evaluated)
    findings = [*probes, *_training_findings(stages), *cell_findings(records)]
    params = {e.title: registry.attacks[e.name].effective(e.params) for e in with_noise(config.attack)}
    cells = tuple(
        cell_result(record, [f for f in findings if f.cell == cell], params=params[record.cell.attack])
        for cell, record in records.items()
    )
    report = Report(
        status="error" if any(cell.n_errors for cell in cells) else "complete",
        run=_run_info(folder, plan, config),
        config=config.replay(),
        encoders=tuple({s["encoder"]["source"]: EncoderInfo(**s["encoder"]) for s in stages}.values()),
        heads=tuple(HeadInfo(**h) for s in stages for h in s["heads"]),
        data=tuple(DataInfo(**s["data"]) for s in stages),
        cells=cells,
        worst_case=worst_cases(records),
        findings=tuple(findings),
    )
    partial = folder.path / "samples.parquet.partial"
    pq.write_table(rows.sort_by([("cell", "ascending"), ("position", "ascending")]), partial)
    partial.replace(folder.path / "samples.parquet")
    write_atomically(folder.path / "audit.toml", config.to_toml())
    write_report(report, folder.path)
    folder.finish()
    return report


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


def _training_findings(stages: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Training images that could not be read, once per head."""
    found = []
    for head in (h for s in stages for h in s["heads"]):
        count, names = head["settings"].get("unreadable", 0), head["settings"].get("unreadable_first", [])
        if count:
            text = f"{head['data']}, head {head['head']}: {count} training images left out: {'; '.join(names)}"
            found.append(finding("unreadable_images", text))
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""Shards of one audit joined into one run, as if it had never been split."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from robustbench_x.config import AuditConfig
from robustbench_x.engine.artifacts import artifact_path
from robustbench_x.engine.finish import Evidence, make_report, now, write_results
from robustbench_x.engine.proof import same_answers
from robustbench_x.errors import UsageError
from robustbench_x.plan import make_plan
from robustbench_x.registry import Registry
from robustbench_x.result import DataInfo, Report, StageProof, read_report
from robustbench_x.store import read_rows

__all__ = ["merge_runs"]


def merge_runs(runs: Sequence[Path], out: Path, registry: Registry, *, command: str = "") -> Report:
    """Joins every shard of one audit into the new folder `out`.

    Seconds and costs are those of the shards; gates are judged anew by `rbx gate`.

    Raises:
        UsageError: A shard is missing or given twice, the runs are of different audits, weights or heads, or
            `out` holds something.
        RunError: A run is damaged or incomplete.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: name an empty or a new folder")
    reports = [read_report(run) for run in runs]
    shards = [_shard(run, report) for run, report in zip(runs, reports, strict=True)]
    _check_complete(runs, shards)
    _check_alike(runs, reports)
    first = reports[0]
    config = AuditConfig.model_validate({k: v for k, v in first.config.items() if k != "shard"})
    plan = make_plan(config, registry)
    data = _joined_data(reports)
    cells = {cell.id for cell in plan.cells}
    probes = {f.model_dump_json(): f for r in reports for f in r.findings if f.cell and f.cell not in cells}
    evidence = Evidence(
        rows=pa.concat_tables(_rows(run, *shard) for run, shard in zip(runs, shards, strict=True)),
        encoders=first.encoders,
        heads=first.heads,
        data=data,
        defenses=first.defenses,
        evaluated=_evaluated(reports),
        probes=tuple(f for f in probes.values() if f.applies_to),
        proofs=_joined_proofs(reports),
        fits={cell.id: cell.fit for cell in first.cells if cell.fit is not None},
    )
    run = first.run.model_copy(
        update={
            "id": out.resolve().name,
            "started": min(report.run.started for report in reports),
            "finished": now(),
            "command": command,
            "fingerprint": plan.fingerprint,
        }
    )
    report = make_report(evidence, run, plan, config, registry)
    out.mkdir(parents=True, exist_ok=True)
    try:
        write_results(report, evidence.rows, out)
        for fit in {fit.sha256: fit for fit in evidence.fits.values()}.values():
            target = artifact_path(out, fit)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(artifact_path(runs[0], fit), target)
    except BaseException:
        shutil.rmtree(out)
        raise
    return report


def _shard(run: Path, report: Report) -> tuple[int, int]:
    text = report.config.get("shard")
    if not text:
        raise UsageError(f"{run} is a whole run, not a shard; shards are made by rbx audit --shard 1/4")
    index, _, count = str(text).partition("/")
    return int(index), int(count)


def _check_complete(runs: Sequence[Path], shards: Sequence[tuple[int, int]]) -> None:
    counts = {count for _, count in shards}
    if len(counts) != 1:
        raise UsageError(f"the runs split their audits into different numbers of shards: {sorted(counts)}")
    (count,) = counts
    indices = [index for index, _ in shards]
    twice = sorted({i for i in indices if indices.count(i) > 1})
    if twice:
        given = ", ".join(str(run) for run, (i, _) in zip(runs, shards, strict=True) if i == twice[0])
        raise UsageError(f"shard {twice[0]}/{count} is given twice: {given}")
    missing = [f"{i}/{count}" for i in range(1, count + 1) if i not in indices]
    if missing:
        raise UsageError(f"shard {', '.join(missing)} is missing; a run without it would evaluate fewer samples")


def _check_alike(runs: Sequence[Path], reports: Sequence[Report]) -> None:
    """Same audit, same version, same weights, heads fitted alike (their bits may differ between machines)."""
    machine = ("shard", "device", "batch_size", "allow_pickle")

    def essence(report: Report) -> dict[str, object]:
        return {
            "configuration": {k: v for k, v in report.config.items() if k not in machine},
            "version of robustbench_x": report.run.robustbench_x,
            "weights": [(e.source, e.sha256) for e in report.encoders],
            "data": [(d.source, d.classes, d.train, d.test) for d in report.data],
            "heads": [
                (h.encoder, h.data, h.head, h.num_classes, h.settings.get("train_samples")) for h in report.heads
            ],
            "tuned heads (share $RBX_CACHE, or save one and pass file:HEAD)": [
                (proof.encoder, proof.data, proof.tuned) for proof in report.proofs
            ],
            "trained defenses (share $RBX_CACHE, or fit once with rbx fit and pass the file)": [
                (proof.encoder, proof.data, proof.defenses) for proof in report.proofs
            ],
            "captions, or what reads them": [(proof.encoder, proof.data, proof.texts) for proof in report.proofs],
            "artefacts (fit once with rbx fit and pass the file)": [
                (cell.id, None if cell.fit is None else cell.fit.sha256) for cell in report.cells
            ],
        }

    wanted = essence(reports[0])
    for run, report in zip(runs[1:], reports[1:], strict=True):
        for what, value in essence(report).items():
            if value != wanted[what]:
                raise UsageError(f"{run} and {runs[0]} are no shards of one audit: their {what} differ")
        for mine, theirs in zip(report.proofs, reports[0].proofs, strict=True):
            if not same_answers(theirs, mine):
                raise UsageError(
                    f"{run} and {runs[0]} are no shards of one audit: the code, heads or defenses of {mine.encoder} "
                    "changed between them"
                )


def _rows(run: Path, index: int, count: int) -> pa.Table:
    """A shard's rows with their positions in the whole evaluation: shard i of n holds samples i-1, i-1+n, ..."""
    rows = read_rows(run / "samples.parquet")
    position = rows.schema.get_field_index("position")
    whole = pc.add(pc.multiply(rows.column("position"), count), index - 1)
    return rows.set_column(position, "position", whole)


def _joined_data(reports: Sequence[Report]) -> tuple[DataInfo, ...]:
    joined = []
    for parts in zip(*(report.data for report in reports), strict=True):
        unreadable = tuple(message for part in parts for message in part.unreadable)
        evaluated = sum(part.evaluated for part in parts)
        joined.append(parts[0].model_copy(update={"evaluated": evaluated, "unreadable": unreadable}))
    return tuple(joined)


def _joined_proofs(reports: Sequence[Report]) -> tuple[StageProof, ...]:
    """The whole run's proofs; its images are proven by the digests of the shards' images, which no audit can equal."""
    joined = []
    for parts in zip(*(report.proofs for report in reports), strict=True):
        digest = hashlib.sha256("\n".join(sorted(part.images for part in parts)).encode()).hexdigest()
        joined.append(parts[0].model_copy(update={"images": f"merged:{digest}"}))
    return tuple(joined)


def _evaluated(reports: Sequence[Report]) -> dict[tuple[str, str], int]:
    sizes: dict[tuple[str, str], int] = {}
    for report in reports:
        for pair, n in {(cell.encoder, cell.data): cell.n for cell in report.cells}.items():
            sizes[pair] = sizes.get(pair, 0) + n
    return sizes

"""Stored results made by hand, for tests of what reads them."""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from robustbench_x.metrics import METRICS
from robustbench_x.numbers import format_eps
from robustbench_x.result import (
    CellResult,
    DataInfo,
    EncoderInfo,
    Finding,
    FitInfo,
    Flag,
    Measure,
    Report,
    RunInfo,
    Threat,
    WorstCase,
    write_report,
)
from robustbench_x.stats import wilson
from robustbench_x.store import ROWS

__all__ = ["cell", "fit_info", "report", "row", "store", "worst"]

_STAMP = datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.UTC).isoformat()
Hits = Mapping[str, tuple[int, int]]
"""Metric to (hits, of)."""


def cell(
    attack: str = "pgd",
    *,
    encoder: str = "toy:one",
    head: str = "linear",
    task: str = "classification",
    data: str = "toy:data",
    defense: str = "none",
    knowledge: str = "none",
    eps: float = 4 / 255,
    n: int = 100,
    errors: int = 0,
    control: bool = False,
    hits: Hits | None = None,
    measures: Mapping[str, Measure] | None = None,
    flags: Sequence[Flag] = (),
    fit: FitInfo | None = None,
) -> CellResult:
    """A cell whose rates have Wilson intervals, and whose other rates are 0 of `n`; those of its task alone."""
    rates = {
        name: (0, n)
        for name, info in METRICS.items()
        if info.is_rate and name != "targeted_success" and info.task in ("any", task)
    }
    metrics = {name: _rate(*pair) for name, pair in {**rates, **(hits or {})}.items()}
    means = {name: Measure(value=1.5) for name, info in METRICS.items() if not info.is_rate and info.task == "any"}
    shield = defense if defense == "none" else f"{defense}:{knowledge}"
    return CellResult(
        id=f"{encoder} | {head} | {data} | {shield} | {attack} | linf {format_eps(eps)}",
        encoder=encoder,
        head=head,
        task=task,
        data=data,
        defense=defense,
        knowledge=knowledge,
        attack=attack,
        access="none" if control else "whitebox",
        control=control,
        threat=Threat(norm="linf", eps=eps),
        params={},
        n=n,
        n_clean_correct=(hits or {}).get("asr", (0, n))[1],
        n_errors=errors,
        metrics={**metrics, **means, **(measures or {})},
        flags=tuple(flags),
        fit=fit,
    )


def fit_info(
    encoder: str = "toy:one",
    *,
    plugin: str = "advencoder",
    eps: float = 4 / 255,
    params: Mapping[str, Any] | None = None,
    sha256: str = "c" * 64,
) -> FitInfo:
    """What an attack fitted on `encoder` says of its training."""
    return FitInfo(
        plugin=plugin,
        version="0",
        encoder=encoder,
        encoder_sha256=_weights(encoder),
        input_size=(16, 16),
        surrogate="toy:surrogate",
        surrogate_sha256="b" * 64,
        surrogate_samples=24,
        threat=Threat(norm="linf", eps=eps),
        params=dict(params or {}),
        seed=0,
        steps=40,
        precision="fp32",
        device="cpu (1 threads)",
        seconds=2.0,
        forwards=640,
        backwards=640,
        losses={"loss": 0.5},
        created=_STAMP,
        packages={"torch": "2.0"},
        sha256=sha256,
        origin="fitted for this run",
    )


def worst(asr: tuple[int, int] = (30, 100), *, like: CellResult | None = None, errors: int = 0) -> WorstCase:
    """The worst case over the attacks on the victim of `like`."""
    like = like or cell()
    return WorstCase(
        encoder=like.encoder,
        head=like.head,
        data=like.data,
        defense=like.defense,
        threat=like.threat,
        n=like.n,
        n_clean_correct=asr[1],
        n_errors=errors,
        robust_accuracy=_rate(asr[1] - asr[0], like.n),
        asr=_rate(*asr),
        attacks=("noise", "pgd"),
    )


def report(
    *cells: CellResult,
    worst_case: Sequence[WorstCase] = (),
    findings: Sequence[Finding] = (),
    status: Any = None,
    command: str = "rbx audit",
) -> Report:
    """A whole report around `cells`; its times and versions are fixed."""
    return Report(
        status=status or ("error" if any(c.n_errors for c in cells) else "complete"),
        run=RunInfo(
            id="made",
            started=_STAMP,
            finished=_STAMP,
            command=command,
            seed=0,
            device="cpu (1 threads)",
            precision="fp32",
            packages={"torch": "2.0"},
            robustbench_x="0",
            fingerprint="f" * 64,
            batch_size=32,
            platform="a machine",
        ),
        config={"seed": 0},
        encoders=tuple(
            EncoderInfo(
                source=source,
                sha256=_weights(source),
                parameters=10,
                input_size=(16, 16),
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
                license="mit",
            )
            for source in dict.fromkeys(c.encoder for c in cells)
        ),
        data=tuple(
            DataInfo(source=source, classes=2, train=10, test=100, evaluated=100)
            for source in dict.fromkeys(c.data for c in cells)
        ),
        cells=tuple(cells),
        worst_case=tuple(worst_case),
        findings=tuple(findings),
    )


def row(cell_id: str, sample: int, *, label: int = 0, clean: int = 0, adv: int = 0, **more: Any) -> dict[str, Any]:
    """One row of `samples.parquet`: a prediction for the clean and one for the adversarial image."""
    values: dict[str, Any] = dict.fromkeys(ROWS.names)
    values |= {
        "cell": cell_id,
        "position": sample,
        "sample": f"s{sample}",
        "sha256": f"{sample:064d}",
        "label": label,
        "clean_pred": clean,
        "adv_pred": adv,
        "adv8_pred": adv,
        "clean_correct": clean == label,
        "fooled": clean == label != adv,
        "flipped": adv != clean,
    }
    return {**values, **more}


def store(run: Path, made: Report, rows: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Writes a finished run folder."""
    run.mkdir(parents=True, exist_ok=True)
    write_report(made, run)
    pq.write_table(pa.Table.from_pylist([dict(r) for r in rows], schema=ROWS), run / "samples.parquet")
    return run


def _weights(encoder: str) -> str:
    """The digest of an encoder's weights: every source has its own; that of the default one is easy on the eye."""
    return "a" * 64 if encoder == "toy:one" else hashlib.sha256(encoder.encode()).hexdigest()


def _rate(hits: int, of: int) -> Measure:
    interval = wilson(hits, of)
    return Measure(value=interval.value, low=interval.low, high=interval.high)

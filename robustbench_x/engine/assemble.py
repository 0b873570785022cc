"""Rows on disk to the report: a pure function, so that a resumed run and an uninterrupted one agree."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from robustbench_x.config import AuditConfig
from robustbench_x.diagnose import (
    CellRecord,
    check_attackers,
    check_budgets,
    check_cell,
    check_control,
    check_draws,
    check_pair,
    check_refusals,
    check_transfer,
    error_messages,
)
from robustbench_x.errors import RunError
from robustbench_x.imagetext.metrics import Pairing, Spoken
from robustbench_x.metrics import Outcome, compute, most_frequent, worst_case
from robustbench_x.plan import UNDEFENDED, Cell, Plan, with_noise
from robustbench_x.registry import Registry
from robustbench_x.result import CellResult, Collapse, Finding, FitInfo, Flag, HeadInfo, Measure, Threat, WorstCase
from robustbench_x.stats import Interval, wilson
from robustbench_x.store import ACCEPTED, RANKED, SAID, SCORED

__all__ = ["Assembled", "assemble_cells", "cell_findings", "worst_cases"]

Assembled = Mapping[str, CellRecord]


def assemble_cells(
    rows: pa.Table,
    plan: Plan,
    config: AuditConfig,
    registry: Registry,
    *,
    heads: Mapping[tuple[str, str, str], HeadInfo],
    evaluated: Mapping[tuple[str, str], int],
) -> dict[str, CellRecord]:
    """Every cell's outcome and metrics, in plan order.

    Args:
        rows: All rows on disk, in any order.
        plan: What should be there.
        config: The audit.
        registry: Where attack specs are looked up.
        heads: The head of each (encoder, data, head).
        evaluated: Samples of each (encoder, data).

    Raises:
        RunError: A cell lacks a sample, or has one twice.
    """
    attacks = {entry.title: entry for entry in with_noise(config.attack)}
    columns = {name: rows.column(name).to_numpy(zero_copy_only=False) for name in rows.column_names}
    by_cell = {cell.id: np.flatnonzero(columns["cell"] == cell.id) for cell in plan.cells}
    records = {}
    for cell in plan.cells:
        index = by_cell[cell.id]
        index = index[np.argsort(columns["position"][index], kind="stable")]
        positions = columns["position"][index]
        wanted = evaluated[cell.encoder, cell.data]
        if not np.array_equal(positions, np.arange(wanted)):
            raise RunError(
                f"cell {cell.id}: the rows on disk cover {len(np.unique(positions))} of {wanted} samples, "
                f"{len(index)} rows in all; start over with --no-resume"
            )
        own = {name: values[index] for name, values in columns.items()}
        head = heads[cell.encoder, cell.data, cell.head]
        outcome = _outcome(own, head.task)
        records[cell.id] = CellRecord(
            cell=cell,
            spec=registry.attacks[attacks[cell.attack].name],
            outcome=outcome,
            overrun=own["overrun"].astype(float),
            margin=own["margin"].astype(float),
            seen_fooled=own["seen_fooled"].astype(float),
            late_gain=own["late_gain"].astype(float),
            messages=error_messages(list(own["error"])),
            num_classes=head.num_classes,
            metrics={name: measure(value) for name, value in compute(outcome).items()},
        )
    return records


def cell_findings(records: Assembled, config: AuditConfig, registry: Registry) -> list[Finding]:
    """What the rows reveal, cell by cell, cell against control, and all attacks on a victim together."""
    random = {e.title for e in config.defense if registry.defenses[e.name].stochastic}
    found = [f for record in records.values() for f in check_cell(record)]
    groups: dict[tuple[Any, ...], list[CellRecord]] = {}
    for record in records.values():
        groups.setdefault(_victim(record.cell), []).append(record)
    for group in groups.values():
        label = _label(group[0].cell)
        found += check_refusals(group[0], config.refuse_rate, label)
        found += check_attackers(group, label)
        found += check_draws(group, config.judge_draws, stochastic=group[0].cell.defense in random, where=label)
    found += _over_budgets(list(groups.values()))
    lookup: dict[tuple[Any, ...], CellRecord] = {
        (_victim(r.cell), r.cell.knowledge, r.cell.attack): r for r in records.values()
    }
    for record in records.values():
        cell = record.cell
        if record.spec.control:
            continue
        noise_level = "none" if cell.knowledge == "none" else "oblivious"
        noise = lookup.get((_victim(cell), noise_level, "noise"))
        if noise is not None:
            found += check_pair(record, noise, "noise")
        for level in ("bpda", "bpda_learned"):
            bpda = lookup.get((_victim(cell), level, cell.attack))
            if cell.knowledge == "full" and bpda is not None:
                found += check_pair(record, bpda, "bpda")
        control = lookup.get((_victim(dataclasses.replace(cell, defense=UNDEFENDED)), "none", cell.attack))
        if control is not None and cell.defense != UNDEFENDED:
            if cell.knowledge == "full" and record.spec.access == "whitebox":
                found += check_control(record, control)
            elif cell.knowledge == "oblivious":
                found += check_transfer(record, control)
    return found


def _over_budgets(groups: Sequence[Sequence[CellRecord]]) -> list[Finding]:
    """The worst case of each victim over its budgets."""
    victims: dict[tuple[Any, ...], list[Sequence[CellRecord]]] = {}
    for group in groups:
        cell = group[0].cell
        victims.setdefault((cell.encoder, cell.head, cell.data, cell.defense, cell.threat.norm), []).append(group)
    found = []
    for budgets in victims.values():
        ordered = sorted(budgets, key=lambda group: group[0].cell.threat.eps)
        cell = ordered[0][0].cell
        found += check_budgets(ordered, f"{cell.encoder} | {cell.head} | {cell.data} | {cell.defense} | worst_case")
    return found


def worst_cases(records: Assembled) -> tuple[WorstCase, ...]:
    """Per victim and budget, per sample, the best attack at any knowledge."""
    groups: dict[tuple[Any, ...], list[CellRecord]] = {}
    for record in records.values():
        groups.setdefault(_victim(record.cell), []).append(record)
    return tuple(_worst(group) for group in groups.values())


def _worst(group: Sequence[CellRecord]) -> WorstCase:
    cell = group[0].cell
    outcomes = [record.outcome for record in group]
    combined = worst_case(outcomes)
    errors = np.stack([o.error for o in outcomes]).any(axis=0)
    correct = np.stack([o.clean_correct for o in outcomes]).any(axis=0)
    names = [r.cell.attack if r.cell.knowledge == "none" else f"{r.cell.attack} ({r.cell.knowledge})" for r in group]
    return WorstCase(
        encoder=cell.encoder,
        head=cell.head,
        data=cell.data,
        defense=cell.defense,
        threat=stored_threat(cell),
        n=len(outcomes[0]),
        n_clean_correct=int(correct.sum()),
        n_errors=int(errors.sum()),
        robust_accuracy=measure(combined["robust_accuracy"]),
        asr=measure(combined["asr"]),
        attacks=tuple(names),
    )


def cell_result(
    record: CellRecord,
    flags: Sequence[Finding],
    *,
    params: Mapping[str, Any],
    fit: FitInfo | None,
    head: HeadInfo,
) -> CellResult:
    """A record as the report stores it."""
    cell, outcome = record.cell, record.outcome
    return CellResult(
        id=cell.id,
        encoder=cell.encoder,
        head=cell.head,
        task=head.task,
        data=cell.data,
        defense=cell.defense,
        knowledge=cell.knowledge,
        attack=cell.attack,
        access=record.spec.access,
        control=record.spec.control,
        threat=stored_threat(cell),
        params=dict(params),
        n=len(outcome),
        n_clean_correct=int(outcome.clean_correct.sum()),
        n_errors=int(outcome.error.sum()),
        metrics=record.metrics,
        flags=tuple(Flag(id=f.id, level=f.level, message=f.message) for f in flags),
        fit=fit,
        collapse=_collapse(outcome, head.classes),
    )


def _collapse(outcome: Outcome, names: Sequence[str]) -> Collapse | None:
    """The class that absorbs most adversarial images; of several the lowest, as for the collapse ceiling."""
    predictions = outcome.adv_pred[outcome.judged]
    if not len(predictions):
        return None
    label = most_frequent(predictions)
    share = measure(wilson(int((predictions == label).sum()), len(predictions)))
    return Collapse(label=label, name=names[label] if label < len(names) else str(label), share=share)


def stored_threat(cell: Cell) -> Threat:
    """A cell's budget as the report stores it."""
    threat = cell.threat
    return Threat(norm=threat.norm, eps=threat.eps, placement=threat.placement if threat.norm == "patch" else None)


def measure(interval: Interval) -> Measure:
    """An interval as the report stores it."""
    return Measure(value=interval.value, low=interval.low, high=interval.high)


def _label(cell: Cell) -> str:
    return f"{cell.encoder} | {cell.head} | {cell.data} | {cell.defense} | worst_case | {cell.threat}"


def _victim(cell: Cell) -> tuple[Any, ...]:
    return cell.encoder, cell.head, cell.data, cell.defense, cell.threat


def _outcome(own: Mapping[str, np.ndarray], task: str) -> Outcome:
    error = np.array([message is not None for message in own["error"]], dtype=bool)
    values: dict[str, Any] = {
        name: own[name].astype(float)
        for name in ("linf", "l2", "ssim", "feature_cosine", "forwards", "backwards", "seconds")
    }
    values |= {name: own[name].astype(np.int64) for name in ("label", "clean_pred", "adv_pred", "adv8_pred")}
    ranked = {name: own[name].astype(float) for name in RANKED}
    retrieval = ranked if np.isfinite(ranked["adv_ap"]).any() else None
    accepted = {name: own[name].astype(float) for name in ACCEPTED}
    acceptance = accepted if np.isfinite(accepted["adv_acceptance"]).any() else None
    target = np.nan_to_num(own["target"].astype(float), nan=-1).astype(np.int64)
    pairing = Pairing.from_rows(*(own[name] for name in SCORED), answers=task == "entailment")
    spoken = Spoken.from_rows(*(own[name] for name in SAID)) if task == "captioning" else None
    return Outcome(
        error=error,
        target=target,
        retrieval=retrieval,
        acceptance=acceptance,
        pairing=pairing,
        spoken=spoken,
        **values,
    )

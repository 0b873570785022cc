"""docs/results/anyattack.md from the runs of benchmarks/anyattack.py."""

import datetime
import json
from collections.abc import Mapping
from pathlib import Path

from robustbench_x.numbers import format_eps
from robustbench_x.report.markdown import table
from robustbench_x.report.words import figure, percent
from robustbench_x.result import CellResult, Measure, Report, read_report
from robustbench_x.stats import wilson

_TITLES = {
    "digits": "On its own surrogate: EfficientNet-Lite0 at 96 pixels, digits",
    "photos": "The same network at 224 pixels, its own classifier, ImageNet photographs",
    "conse": "An image-text encoder over that network: packaged:conse_minilm, photographs",
    "dinov2": "Another network: DINOv2 ViT-S/14 at 98 pixels, digits",
}
_UNMEASURED = Measure(value=None)


def write(page: Path, work: Path) -> None:
    """Writes the page from every run that is there."""
    reports = {name: read_report(work / name) for name in _TITLES if (work / name / "report.json").exists()}
    sections = [
        _head(reports),
        _answer(reports),
        _found(work / "found.json"),
        *(_victim(name, report) for name, report in reports.items()),
    ]
    missing = [text for name, text in _TITLES.items() if name not in reports]
    sections.append(_reading(missing))
    page.write_text("\n".join(sections), encoding="utf-8")


def _head(reports: Mapping[str, Report]) -> str:
    first = next(iter(reports.values()))
    versions = ", ".join(f"{name} {version}" for name, version in first.run.packages.items())
    devices = ", ".join(sorted({report.run.device for report in reports.values()}))
    counts = "; ".join(f"{name} {report.cells[0].n}" for name, report in reports.items())
    fits = {
        cell.fit.sha256[:12]: cell.fit
        for r in reports.values()
        for cell in r.cells
        if cell.attack == "anyattack" and cell.fit
    }
    decoders = "; ".join(
        f"{digest}: {fit.steps} steps on {fit.surrogate_samples} images of {fit.surrogate}, {fit.seconds:.0f} s on "
        f"{fit.device}"
        for digest, fit in fits.items()
    )
    return f"""# AnyAttack beside the iterative attacks that aim

- Command: `python benchmarks/anyattack.py --work DIR`; written {datetime.date.today().isoformat()}
- Device: {devices}; {first.run.platform}. No GPU was at hand: every GPU figure is not measured
- Versions: {versions}, robustbench-x {first.run.robustbench_x}
- Seed {first.run.seed}; images: {counts}. The intervals (95 %, Wilson) say what so few are worth
- Decoder ({decoders or "none"}); trained on `packaged:efficientnet_lite0?size=96`, and run on it everywhere
"""


def _find(report: Report, head: str, attack: str, eps: float) -> CellResult | None:
    found = [c for c in report.cells if (c.head, c.attack) == (head, attack) and abs(c.threat.eps - eps) < 1e-9]
    return found[0] if found else None


def _answer(reports: Mapping[str, Report]) -> str:
    lines = ["## What stands", ""]
    for name, report in reports.items():
        for head in dict.fromkeys(cell.head for cell in report.cells):
            for eps in (8 / 255, 16 / 255):
                mine = _find(report, head, "anyattack", eps)
                noise = _find(report, head, "noise", eps)
                if mine is None or noise is None:
                    continue
                hits = mine.metrics.get("targeted_success", _UNMEASURED)
                chance = 1 / max(_classes(report, head) - 1, 1)
                told = "not told from" if hits.low is None or hits.low <= chance else "above"
                lines.append(
                    f"- {name}, {head}, {format_eps(eps)}: anyattack hits its target {figure(hits)}, {told} chance "
                    f"({percent(chance)}); wrong at all {percent(mine.metrics['asr'].value)}, noise "
                    f"{percent(noise.metrics['asr'].value)}"
                )
    return "\n".join(lines) + "\n"


def _found(path: Path) -> str:
    """How often the target is found among all by the surrogate's own features."""
    if not path.is_file():
        return ""
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        share = wilson(row["hits"], row["n"])
        cost = row["forwards"] + 2 * row["backwards"]
        rows.append(
            (
                row["data"],
                format_eps(row["eps"]),
                row["attack"],
                figure(Measure(value=share.value, low=share.low, high=share.high)),
                percent(1 / row["n"]),
                f"{row['forwards']:.1f}",
                f"{row['backwards']:.1f}",
                "-" if row["seconds"] is None else f"{row['seconds']:.3f}",
                "-" if not cost else f"{100 * (share.value or 0) / cost:.2f}",
            )
        )
    header = (
        "images",
        "budget",
        "attack",
        "target found",
        "chance",
        "forwards",
        "backwards",
        "s/image",
        "per 100 passes",
    )
    return (
        "## What stage 1 trains: the target found among many\n\nBy the features of EfficientNet-Lite0 at 96 pixels the "
        "attacked image is nearest to its own target, of all targets. The crops are other ones of the photographs\n"
        "that the decoder was trained on; the photographs of packaged:photos it has never seen.\n\n"
        + table(header, rows)
    )


def _classes(report: Report, head: str) -> int:
    return next(h.num_classes for h in report.heads if h.head == head)


def _victim(name: str, report: Report) -> str:
    parts = [f"## {_TITLES[name]}", ""]
    for head in dict.fromkeys(cell.head for cell in report.cells):
        captioned = any(c.task == "image_text" for c in report.cells if c.head == head)
        header = [
            "attack",
            "budget",
            "hits the target",
            "wrong",
            *(("target TR@1", "target IR@1", "target R@Mean") if captioned else ()),
        ]
        rows = []
        for cell in (c for c in report.cells if c.head == head):
            texts = [percent(_value(cell, f"target_{m}")) for m in ("tr@1", "ir@1", "r@mean")] if captioned else []
            hits = cell.metrics.get("targeted_success")
            rows.append(
                (
                    cell.attack,
                    format_eps(cell.threat.eps),
                    "-" if hits is None else figure(hits),
                    figure(cell.metrics["asr"]),
                    *texts,
                    *(
                        _number(cell, metric, digits)
                        for metric, digits in (("forwards_per_sample", 1), ("backwards_per_sample", 1), ("seconds", 3))
                    ),
                    _per_gradient(cell),
                )
            )
        header += ["forwards", "backwards", "s/image", "hits per 100 passes"]
        parts += [
            f"Head {head}, clean accuracy {figure(report_clean(report, head))}:",
            "",
            table(tuple(header), rows),
            "",
        ]
    return "\n".join(parts)


def report_clean(report: Report, head: str) -> Measure:
    """The clean accuracy under one head."""
    return next(c.metrics["clean_accuracy"] for c in report.cells if c.head == head)


def _value(cell: CellResult, metric: str) -> float | None:
    return cell.metrics.get(metric, _UNMEASURED).value


def _number(cell: CellResult, metric: str, digits: int) -> str:
    value = _value(cell, metric)
    return "-" if value is None else f"{value:.{digits}f}"


def _per_gradient(cell: CellResult) -> str:
    """Share that hits the target over passes through an encoder, a backward counting as two forwards."""
    hits, forwards, backwards = (
        _value(cell, m) for m in ("targeted_success", "forwards_per_sample", "backwards_per_sample")
    )
    cost = (forwards or 0) + 2 * (backwards or 0)
    return "-" if hits is None or not cost else f"{100 * hits / cost:.2f}"


def _reading(missing: list[str]) -> str:
    lacking = "\n".join(f"- {text}" for text in missing) or "- every GPU figure"
    return f"""## How to read this

`hits the target` is `targeted_success`, `wrong` is `asr`. Rows of `anyattack` cost one pass of the decoder and one of
the encoder; its training is not in them, and is in the head of this page. `hits per 100 passes` divides the share
that hits by the passes through encoders, a backward pass counting as two forward ones. In the tables of the image-text
and of the other network, `attackvlm_ii`, `attackvlm_it`, `m_attack` and `ssa_cwa` have the victim's own encoder (white
box on the encoder), `anyattack`, `m_attack, transfer` and `xtransfer` have EfficientNet-Lite0 alone. ConSE is built on
that very network, so what reaches it from there is hardly a transfer. The captions are the names of the classes.
An attack that does not aim has no target: `-`; noise is measured against the same targets. Seconds were taken beside
other work; `-` where the machine was paused meanwhile.

## Not measured

{lacking}
"""

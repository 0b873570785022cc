"""report.md: the result for a pull request, a step summary, or a reader with no browser."""

from collections.abc import Iterable, Sequence

from robustbench_x.findings import FINDINGS
from robustbench_x.report.defenses import COLUMNS, DEFENSES_MEAN, defense_tables
from robustbench_x.report.inert import html_text, markdown_text
from robustbench_x.report.layers import MEANING, layer_tables
from robustbench_x.report.transfer import transfer_matrices
from robustbench_x.report.words import count, figure, headline, percent, shield, summary, threat_text, victim
from robustbench_x.result import CellResult, Decision, Finding, Measure, Report

__all__ = ["LIMIT", "render_markdown"]

LIMIT = 1_000_000
"""Bytes a GitHub step summary holds; a longer one is dropped whole, so the text cuts itself."""

_TAIL = 120
_UNMEASURED = Measure(value=None)
_Key = tuple[str, str, str]


def render_markdown(report: Report, decision: Decision, *, limit: int = LIMIT) -> str:
    """The report as Markdown of at most `limit` bytes; what had to go is said at its end."""
    sections = [
        _head(report, decision),
        _gates(report),
        _worst(report),
        *_defenses(report),
        _findings(report.findings),
        _retrieval(report),
        _image_text(report),
        _described(report),
        _targeted(report),
        *_layers(report),
        *_transfer(report),
        *_victims(report),
        _fits(report),
        _provenance(report),
    ]
    text, left = "", 0
    for section in filter(None, sections):
        longer = f"{text}\n{section}" if text else section
        if len(longer.encode()) > limit - _TAIL:
            left += 1
        else:
            text = longer
    if not left:
        return text
    return f"{text}\n_{count(left, 'section')} left out to stay within {limit} bytes; everything is in report.json._\n"


def _head(report: Report, decision: Decision) -> str:
    run = report.run
    n = f"{count(len(report.cells), 'cell')}, {count(sum(cell.n for cell in report.cells), 'judgement')}"
    return (
        f"### {markdown_text(headline(decision), 600)}\n\n{markdown_text(summary(report), 600)}\n\n"
        f"{n}; status {report.status}; seed {run.seed}; {markdown_text(run.device)}; "
        f"robustbench_x {markdown_text(run.robustbench_x)}\n"
    )


def _gates(report: Report) -> str:
    if not report.gates:
        return ""
    failed = [v for v in report.gates if v.verdict != "pass"]
    held = [v for v in report.gates if v.verdict == "pass"]
    rows = [(v.verdict.upper(), v.message, v.cell) for v in (*failed, *held)]
    title = f"### Gates: {len(failed)} failed, {len(held)} held\n\n"
    return title + table(("verdict", "what was seen", "where"), rows)


def _worst(report: Report) -> str:
    rows = [
        (
            victim(w),
            threat_text(w.threat),
            str(w.n),
            figure(w.robust_accuracy),
            figure(w.asr),
            str(w.n_errors) if w.n_errors else "",
        )
        for w in report.worst_case
    ]
    header = ("victim", "budget", "n", "robust accuracy", "attack success", "errors")
    return "### Worst case per sample, over all attacks\n\n" + table(header, rows)


def _defenses(report: Report) -> list[str]:
    return [
        f"### Defences of {markdown_text(found.victim)}\n\n{DEFENSES_MEAN}.\n\n{table(COLUMNS, found.rows)}"
        for found in defense_tables(report)
    ]


def _victims(report: Report) -> list[str]:
    groups: dict[_Key, list[CellResult]] = {}
    for cell in report.cells:
        groups.setdefault((cell.encoder, cell.head, cell.data), []).append(cell)
    return [_victim(key, cells) for key, cells in groups.items()]


def _victim(key: _Key, cells: Sequence[CellResult]) -> str:
    rows = [
        (
            shield(cell),
            cell.attack,
            threat_text(cell.threat),
            percent(_value(cell, "clean_accuracy")),
            figure(cell.metrics.get("robust_accuracy", _UNMEASURED)),
            figure(cell.metrics.get("asr", _UNMEASURED)),
            percent(_value(cell, "asr_8bit")),
            f"{percent(_value(cell, 'flip_rate'))} / {percent(_value(cell, 'collapse_ceiling'))}",
            _absorbed(cell),
            _number(cell, "feature_cosine", digits=2),
            _number(cell, "backwards_per_sample"),
            " ".join(dict.fromkeys(f.id for f in cell.flags if f.level != "note")),
        )
        for cell in cells
    ]
    header = (
        "defence (knowledge)", "attack", "budget", "clean", "robust accuracy", "ASR", "8-bit", "flips / ceiling",
        "absorbed by", "cosine", "backward", "flags",
    )  # fmt: skip
    encoder, head, data = key
    title = html_text(f"{encoder} + {head} head on {data}: {count(cells[0].n, 'image')}")
    return f"<details><summary>{title}</summary>\n\n{table(header, rows)}\n</details>\n"


def _findings(findings: Sequence[Finding]) -> str:
    serious = [f for f in findings if f.level != "note"]
    notes = len(findings) - len(serious)
    if not findings:
        return "### Findings\n\nNone.\n"
    order = {"error": 0, "warning": 1}
    rows = [
        (f.level, f.id, f.cell or "the run", f.message, FINDINGS[f.id].advice if f.id in FINDINGS else "")
        for f in sorted(serious, key=lambda f: order[f.level])
    ]
    tail = f"\n{count(notes, 'note')} in report.json.\n" if notes else ""
    body = table(("level", "finding", "where", "what", "advice"), rows) if rows else "No error, no warning.\n"
    return f"### Findings\n\n{body}{tail}"


def _absorbed(cell: CellResult) -> str:
    """The class that takes most adversarial images, with its share."""
    return "-" if cell.collapse is None else f"{cell.collapse.name} ({percent(cell.collapse.share.value)})"


def _retrieval(report: Report) -> str:
    """Ranking before and after, for every cell of a head that ranks a gallery."""
    rows = [
        (
            f"{cell.encoder} on {cell.data}",
            shield(cell),
            cell.attack,
            threat_text(cell.threat),
            *(_pair(cell, metric) for metric in ("map@10", "recall@1", "recall@10")),
        )
        for cell in report.cells
        if cell.task == "retrieval"
    ]
    header = ("encoder and data", "defence (knowledge)", "attack", "budget", "map@10", "recall@1", "recall@10")
    return f"### Retrieval, clean to attacked\n\n{table(header, rows)}" if rows else ""


def _image_text(report: Report) -> str:
    """Captions ranked by images and images by captions, before and after, and for the captions of the targets."""
    rows = [
        (
            f"{cell.encoder} on {cell.data}",
            shield(cell),
            cell.attack,
            threat_text(cell.threat),
            *(_pair(cell, metric) for metric in ("tr@1", "ir@1", "r@mean")),
            percent(_value(cell, "target_r@mean")),
        )
        for cell in report.cells
        if cell.task == "image_text"
    ]
    columns = ("TR@1", "IR@1", "R@Mean", "R@Mean of the targets")
    header = ("encoder and data", "defence (knowledge)", "attack", "budget", *columns)
    return f"### Image-text retrieval, clean to attacked\n\n{table(header, rows)}" if rows else ""


def _described(report: Report) -> str:
    """What vision-language models say, before and after, and how well it fits the target."""
    rows = [
        (
            f"{cell.head} on {cell.data}, attacked on {cell.encoder}",
            shield(cell),
            cell.attack,
            threat_text(cell.threat),
            *(_three(cell, metric, digits) for metric, digits in (("cider", 2), ("bleu4", 2), ("rouge_l", 2))),
        )
        for cell in report.cells
        if cell.task == "captioning"
    ]
    header = ("victim", "defence (knowledge)", "attack", "budget", "CIDEr", "BLEU-4", "ROUGE-L")
    note = "On clean images, on attacked ones against the captions of the original, and against those of the target."
    return f"### What the model says\n\n{note}\n\n{table(header, rows)}" if rows else ""


def _three(cell: CellResult, metric: str, digits: int) -> str:
    return " / ".join(_number(cell, f"{prefix}{metric}", digits=digits) for prefix in ("clean_", "", "target_"))


def _targeted(report: Report) -> str:
    """How often an attack that aims hits: the victim takes the image for the target's class."""
    rows = [
        (
            f"{cell.encoder} + {cell.head} head on {cell.data}",
            shield(cell),
            cell.attack,
            threat_text(cell.threat),
            figure(cell.metrics["targeted_success"]),
            figure(cell.metrics.get("asr", _UNMEASURED)),
        )
        for cell in report.cells
        if "targeted_success" in cell.metrics
    ]
    header = ("victim", "defence (knowledge)", "attack", "budget", "taken for the target", "attack success")
    return f"### Targeted attacks\n\n{table(header, rows)}" if rows else ""


def _pair(cell: CellResult, metric: str) -> str:
    attacked = cell.metrics.get(metric, _UNMEASURED)
    return f"{percent(_value(cell, f'clean_{metric}'))} to {figure(attacked)}"


def _layers(report: Report) -> list[str]:
    """Which layers are vulnerable, for every encoder that an attack searched."""
    return [
        f"### Layer vulnerability of {markdown_text(found.encoder)}\n\n{MEANING.replace('*', chr(92) + '*')}.\n\n"
        + table(("layer", *map(markdown_text, found.columns)), found.rows)
        for found in layer_tables(report)
    ]


def _transfer(report: Report) -> list[str]:
    """Surrogate x victim of every attack that met an encoder it was not fitted on."""
    sections = []
    for matrix in transfer_matrices(report):
        rows = [
            (surrogate, *(percent(matrix.flip_rate.get((surrogate, victim))) for victim in matrix.victims))
            for surrogate in matrix.fitted_on
        ]
        header = ("fitted on, against", *map(markdown_text, matrix.victims))
        note = "Mean flip rate over heads and data sets, undefended."
        title = f"### Transfer: {markdown_text(matrix.title)}"
        sections.append(f"{title}\n\n{note}\n\n{table(header, rows)}")
    return sections


def _fits(report: Report) -> str:
    """What each fitted attack was trained on, once per artefact."""
    fits = {cell.fit.sha256: (cell.attack, cell.fit) for cell in report.cells if cell.fit is not None}
    rows = [
        (
            attack,
            fit.encoder,
            f"{count(fit.surrogate_samples, 'image')} of {fit.surrogate}",
            threat_text(fit.threat) if fit.defense == "none" else f"{threat_text(fit.threat)} through {fit.defense}",
            f"{count(fit.steps, 'step')}, {fit.seconds:.0f} s, {fit.forwards} forward, {fit.backwards} backward",
            fit.origin,
            fit.sha256,
        )
        for attack, fit in fits.values()
    ]
    header = ("attack", "fitted on", "surrogate", "budget", "cost", "origin", "sha256")
    return f"<details><summary>What was fitted</summary>\n\n{table(header, rows)}\n</details>\n" if rows else ""


def _provenance(report: Report) -> str:
    run = report.run
    rows = [
        ("command", run.command or "-"),
        ("started, finished", f"{run.started}, {run.finished}"),
        ("device, precision, batch", f"{run.device}, {run.precision}, {run.batch_size}"),
        ("platform", run.platform),
        ("packages", ", ".join(f"{name} {version}" for name, version in run.packages.items())),
        *((e.source, f"sha256 {e.sha256}; {e.license or 'licence unknown'}") for e in report.encoders),
        *((d.source, f"{d.evaluated} of {d.test} test images, {d.train} training images") for d in report.data),
    ]
    return f"<details><summary>What was run</summary>\n\n{table(('', ''), rows)}\n</details>\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with every cell escaped."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(markdown_text(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _value(cell: CellResult, metric: str) -> float | None:
    return cell.metrics.get(metric, _UNMEASURED).value


def _number(cell: CellResult, metric: str, *, digits: int = 1) -> str:
    value = _value(cell, metric)
    return "-" if value is None else f"{value:.{digits}f}"

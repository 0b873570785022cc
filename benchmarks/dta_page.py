"""docs/results/dta.md from the runs of benchmarks/dta.py."""

import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from robustbench_x.numbers import format_eps
from robustbench_x.pairing import Rows, discordant, rows_by_cell
from robustbench_x.report.layers import MEANING, layer_tables
from robustbench_x.report.markdown import table
from robustbench_x.report.words import percent
from robustbench_x.result import CellResult, Report, read_report
from robustbench_x.stats import mcnemar_exact

TARGET = 0.90
GAIN = 10
CONTROLS = ("noise", "pgd")
SHORT = ("efficientnet", "dinov2")
DATA = ("digits", "fashion", "fractal")
HARDENED = ("before", "fare", "dta_training")
_MIDDLE, _HIGH = 4 / 255, 10 / 255


def write(page: Path, work: Path) -> None:
    """Writes the page from every run that is there."""
    runs = {
        path.name: read_report(path) for path in sorted((work / "runs").iterdir()) if (path / "report.json").exists()
    }
    grid = {name: report for name, report in runs.items() if name.startswith(("grid-", "low-"))}
    sections = [
        _head(runs, grid),
        _answer(grid, work),
        _victims(grid),
        *(_encoder(source, grid, work) for source in _encoders(grid)),
        _maps(grid),
        _variants(runs),
        _cost(work / "cost.json", grid),
        _hardening(runs),
        _missing(runs, work),
        _reading(),
    ]
    page.write_text("\n".join(filter(None, sections)), encoding="utf-8")


def _head(runs: dict[str, Report], grid: dict[str, Report]) -> str:
    first = next(iter(runs.values()))
    versions = ", ".join(f"{name} {version}" for name, version in first.run.packages.items())
    devices = ", ".join(sorted({report.run.device for report in runs.values()}))
    encoders = "; ".join(sorted({f"`{e.source}` ({e.sha256[:12]})" for r in grid.values() for e in r.encoders}))
    counts = "; ".join(f"{source}: {n}" for source, n in sorted({(c.encoder, c.n) for c in _cells(grid)}))
    return f"""# DTA against tuned victims

- Command: `python benchmarks/dta.py --work DIR`, then `--write`; written {datetime.date.today().isoformat()}
- Device: {devices}; {first.run.platform}. No GPU was at hand: every GPU figure is not measured
- Versions: {versions}, robustbench-x {first.run.robustbench_x}
- Seed {first.run.seed}; images a cell: {counts}. A rate of 64 images is known to 12 points either way, of 20 to 22; the
  means over cells and the paired tests are what the page rests on
- Encoders: {encoders}
- Data: digits (scikit-learn), Fashion-MNIST (300 training images), 50 classes of fractals; heads and tuned victims are
  trained on their training splits
- `dta` is our design under the idea of arXiv 2408.01705, whose loss, layer criterion and settings are not known to us:
  nothing here reproduces a figure of that paper
- Every attack but `pgd` has the public encoder only, and every one takes 10 steps; `pgd` sees the tuned victim and is
  the ceiling. Attack success counts wrong predictions among the clean-correct ones
"""


def _answer(grid: dict[str, Report], work: Path) -> str:
    """The two targets of the issue, and what was measured."""
    cells = _cells(grid)
    lines = []
    for source in _encoders(grid):
        own = [c for c in cells if c.encoder == source]
        for eps in _budgets(own):
            mean, ceiling = _asr(own, "dta", eps), _ceiling(own, eps)
            lines.append(
                (_short(source), format_eps(eps), percent(mean), percent(ceiling), percent(_asr(own, "pgd", eps)))
            )
    header = ("encoder", "eps", "dta, mean ASR", "constant prediction", "pgd on the victim")
    rows = []
    for source in _encoders(grid):
        own = [c for c in cells if c.encoder == source]
        for other in _others(own):
            row = [_short(source), other]
            for eps in _budgets(cells):
                if eps not in _budgets(own):
                    row.append("-")
                    continue
                won, lost, gain = _paired(own, other, eps, work, grid)
                row.append(f"{gain:+.0f} ({won} / {lost})")
            rows.append(tuple(row))
    budgets = [format_eps(eps) for eps in _budgets(cells)]
    paired = table(("encoder", "dta against", *budgets), rows)
    intro = (
        "Mean attack success over the victims and data sets below, beside what a victim that always gives one class "
        "would score:"
    )
    against = (
        "`dta` minus each baseline in points of mean ASR, and in how many cells it is significantly ahead / behind "
        "(McNemar, exact, 5 %, paired by image, uncorrected):"
    )
    means = table(header, lines)
    return f"{_targets(cells)}\n## The answer\n\n{intro}\n\n{means}\n{against}\n\n{paired}"


def _targets(cells: Sequence[CellResult]) -> str:
    """The issue's two targets against what was measured."""
    rows = []
    for source in dict.fromkeys(c.encoder for c in cells):
        own = [c for c in cells if c.encoder == source]
        if _HIGH in _budgets(own):
            mean, goal = _asr(own, "dta", _HIGH), min(TARGET, _ceiling(own, _HIGH))
            held = "reached" if mean >= goal else "not reached"
            rows.append((f"{_short(source)}, 10/255, mean ASR", percent(mean), f"at least {percent(goal)}", held))
        if _MIDDLE in _budgets(own):
            gains = {o: 100 * (_asr(own, "dta", _MIDDLE) - _asr(own, o, _MIDDLE)) for o in _others(own)}
            least = min(gains, key=gains.__getitem__)
            held = "reached" if gains[least] >= GAIN else "not reached"
            text = f"{gains[least]:+.0f} points (over {least})"
            rows.append((f"{_short(source)}, 4/255, least gain over a baseline", text, f"at least +{GAIN}", held))
    return "## Against the targets\n\n" + table(("what", "measured", "target", ""), rows)


def _victims(grid: dict[str, Report]) -> str:
    """What the heads are: how they were tuned, how far from the public encoder, how good."""
    rows: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for report in grid.values():
        clean = {(c.head, c.data): c.metrics["clean_accuracy"].value for c in report.cells}
        for head in report.heads:
            s = head.settings
            tuned = "tuned_sha256" in s
            figures = (
                f"{percent(s['probe_held_out_accuracy'])} to {percent(s['held_out_accuracy'])}" if tuned else "-",
                f"{s['feature_cosine']:.2f}" if tuned else "-",
                str(s["trainable_parameters"]) if tuned else "-",
                f"{s['best_epoch']} of {s['epochs_run']}" if tuned else "-",
                f"{s['seconds']:.0f} s" if tuned else "-",
            )
            names = (_short(head.encoder), _short(head.data), head.head)
            rows.setdefault(names, (*names, percent(clean[head.head, head.data]), *figures))
    header = (
        "encoder",
        "data",
        "head",
        "clean accuracy",
        "held out, probe to tuned",
        "cosine to public features",
        "trained weights",
        "best epoch",
        "took",
    )
    return f"## The victims\n\n{table(header, rows.values())}"


def _encoder(source: str, grid: dict[str, Report], work: Path) -> str:
    cells = [c for c in _cells(grid) if c.encoder == source]
    parts = [f"## Attack success on {_short(source)}\n"]
    for eps in _budgets(cells):
        rows = []
        at = [c for c in cells if c.threat.eps == eps]
        columns = list(dict.fromkeys((c.data, c.head) for c in at))
        by = {(c.attack, c.data, c.head): c for c in at}
        attacks = sorted(dict.fromkeys(c.attack for c in at), key=lambda a: -_asr(at, a, eps))
        for attack in attacks:
            values = [by[attack, *column].metrics["asr"].value for column in columns]
            rows.append((attack, percent(_asr(at, attack, eps)), *map(percent, values)))
        names = [f"{_short(data)} {head}" for data, head in columns]
        parts.append(f"### eps {format_eps(eps)}\n\n{table(('attack', 'mean', *names), rows)}")
    return "\n".join(parts)


def _maps(grid: dict[str, Report]) -> str:
    """The layer maps: one per encoder, since the search never sees the downstream data."""
    seen: dict[str, str] = {}
    for report in grid.values():
        for found in layer_tables(report):
            seen.setdefault(found.encoder, table(("layer", *found.columns), found.rows))
    body = "\n".join(f"### {_short(source)}\n\n{text}" for source, text in seen.items())
    return f"## Layer maps\n\n{MEANING.replace('*', chr(92) + '*')}.\n\n{body}" if seen else ""


def _variants(runs: dict[str, Report]) -> str:
    parts = []
    for name, report in runs.items():
        if not name.startswith("variants-"):
            continue
        budgets = _budgets(report.cells)
        attacks = sorted(
            dict.fromkeys(c.attack for c in report.cells),
            key=lambda a: -fmean(_asr(report.cells, a, e) for e in budgets),
        )
        columns = [(eps, head) for eps in budgets for head in dict.fromkeys(c.head for c in report.cells)]
        by = {(c.attack, c.threat.eps, c.head): c for c in report.cells}
        rows = [
            (
                attack,
                percent(fmean(_asr(report.cells, attack, eps) for eps in budgets)),
                *(percent(by[attack, *column].metrics["asr"].value) for column in columns),
                f"{by[attack, *columns[0]].metrics['seconds'].value or 0:.2f}",
            )
            for attack in attacks
        ]
        header = ("variant", "mean", *(f"{format_eps(eps)} {head}" for eps, head in columns), "s an image")
        parts.append(f"### {_short(report.encoders[0].source)}, digits\n\n{table(header, rows)}")
    return "\n".join(["## Variants tried\n", *parts]) if parts else ""


def _cost(path: Path, grid: dict[str, Report]) -> str:
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    parts = []
    for source, row in found["rows"].items():
        seconds, layers = row["seconds"], row["layers"]
        whole, pgd = seconds[f"pass to {layers[-1]}"], seconds["pgd"]
        rows = [
            (
                layer,
                f"{seconds[f'pass to {layer}'] / whole:.2f}",
                f"{(number + 1) / len(layers):.2f}",
                f"{seconds[f'dta at {layer}']:.2f}",
                f"{seconds[f'dta at {layer}'] / pgd:.2f}",
            )
            for number, layer in enumerate(layers)
        ]
        title = f"### {_short(source)}\n\n`pgd` {pgd:.2f} s an image, `embed` {seconds['embed'] / pgd:.2f} of that."
        header = ("attacked layer", "pass, share of the whole", "depth", "dta, s an image", "dta / pgd")
        parts.append(f"{title}\n\n{table(header, rows)}")
    note = (
        f"{found['steps']} steps on {found['images']} images, best of three rounds in turn, {found['device']}. Depth "
        "is the share of layers: those of a ViT cost the same, those of a CNN do not. "
    )
    took = {(c.encoder, c.threat.eps): c.fit.seconds for c in _cells(grid) if c.attack == "dta" and c.fit is not None}
    said = "; ".join(
        f"{_short(e)}: {fmean(v for (o, _), v in took.items() if o == e):.0f} s"
        for e in dict.fromkeys(e for e, _ in took)
    )
    tail = f"The layer search, once for each encoder and budget and cached for every data set and head: {said}.\n"
    return "\n".join([f"## Cost\n\n{note}\n", *parts, tail])


def _hardening(runs: dict[str, Report]) -> str:
    found = {name.removeprefix("hardening-"): r for name, r in runs.items() if name.startswith("hardening-")}
    if "before" not in found:
        return ""
    before = found["before"].cells
    rows = []
    for head in dict.fromkeys(c.head for c in before):
        row = ["clean accuracy", head, ""]
        for report in found.values():
            row.append(percent(next(c.metrics["clean_accuracy"].value for c in report.cells if c.head == head)))
        rows.append(tuple(row))
    for attack in dict.fromkeys(c.attack for c in before):
        for eps in _budgets(before):
            for head in dict.fromkeys(c.head for c in before):
                row = [attack, head, format_eps(eps)]
                for report in found.values():
                    cell = next(c for c in report.cells if (c.attack, c.head, c.threat.eps) == (attack, head, eps))
                    row.append(percent(cell.metrics["asr"].value))
                rows.append(tuple(row))
    note = (
        "EfficientNet-Lite0 on digits; ASR before and after training the encoder at 4/255 on 512 photographs (no digit "
        "among them). After it the hardened encoder is the public one: every attack is made on it, and heads "
        "are fitted anew on it."
    )
    table_ = table(("attack", "head", "eps", *found), rows)
    return f"## Does training on DTA examples harden?\n\n{note}\n\n{table_}"


def _missing(runs: dict[str, Report], work: Path) -> str:
    """What the command makes and this page has not."""
    grid = [f"grid-{encoder}-{data}" for encoder in SHORT for data in DATA]
    low = [f"low-{SHORT[0]}-{data}" for data in DATA]
    rest = [f"variants-{encoder}" for encoder in SHORT] + [f"hardening-{name}" for name in HARDENED]
    missing = [name for name in (*grid, *low, *rest) if name not in runs]
    missing += [] if (work / "cost.json").exists() else ["cost"]
    return (
        f"## Not run\n\nParts of the command that this page has no run of: {', '.join(missing)}.\n" if missing else ""
    )


def _reading() -> str:
    return """## How to read it

- The constant prediction is what a victim scores that answers every image with one class: an encoder-only attack that
  collapses the features cannot do more, except by luck.
- Noise of the same size is the control, `pgd` on the tuned victim the ceiling. Between the two lies what the public
  encoder gives away.
- Timings are of one shared machine, with other work beside; ratios within a table are sounder than seconds.
"""


def _cells(grid: dict[str, Report]) -> list[CellResult]:
    return [cell for report in grid.values() for cell in report.cells]


def _encoders(grid: dict[str, Report]) -> list[str]:
    return list(dict.fromkeys(cell.encoder for cell in _cells(grid)))


def _budgets(cells: Iterable[CellResult]) -> list[float]:
    return sorted({cell.threat.eps for cell in cells})


def _others(cells: Sequence[CellResult]) -> list[str]:
    return [a for a in dict.fromkeys(c.attack for c in cells) if a not in ("dta", *CONTROLS)]


def _asr(cells: Sequence[CellResult], attack: str, eps: float) -> float:
    values = (c.metrics["asr"].value for c in cells if c.attack == attack and c.threat.eps == eps)
    return fmean(value for value in values if value is not None)


def _ceiling(cells: Sequence[CellResult], eps: float) -> float:
    values = (c.metrics["collapse_ceiling"].value for c in cells if c.attack == "dta" and c.threat.eps == eps)
    return fmean(value for value in values if value is not None)


def _paired(
    cells: Sequence[CellResult], other: str, eps: float, work: Path, grid: dict[str, Report]
) -> tuple[int, int, float]:
    """Cells in which dta is significantly ahead and behind, and the difference of mean ASR in points."""
    rows: dict[str, Rows] = {}
    for name, report in grid.items():
        if any(cell.encoder == cells[0].encoder for cell in report.cells):
            rows |= rows_by_cell(work / "runs" / name)
    by = {(c.attack, c.data, c.head): c for c in cells if c.threat.eps == eps}
    won = lost = 0
    for (attack, data, head), cell in by.items():
        if attack == other:
            mine = by["dta", data, head]
            pair = discordant("asr", rows[mine.id], rows[cell.id], cell.id)
            if mcnemar_exact(pair.only_mine, pair.only_theirs) < 0.05:
                won += pair.only_mine > pair.only_theirs
                lost += pair.only_mine < pair.only_theirs
    return won, lost, 100 * (_asr(cells, "dta", eps) - _asr(cells, other, eps))


def _short(source: str) -> str:
    scheme, _, rest = source.partition(":")
    if scheme == "fractal":
        return "fractal"
    return Path(rest).name if scheme == "folder" else rest.partition("?")[0]

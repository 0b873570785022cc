"""docs/results/advencoder.md from the runs of benchmarks/advencoder.py."""

import datetime
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from robustbench_x.pairing import Rows, discordant, rows_by_cell
from robustbench_x.report.markdown import table
from robustbench_x.report.words import percent
from robustbench_x.result import CellResult, Report, read_report
from robustbench_x.stats import mcnemar_exact

HEADS = ("linear", "mlp", "knn", "retrieval")
TARGETS = {"per": 0.76, "pat": 0.90}


def write(page: Path, work: Path) -> None:
    """Writes the page from every run that is there."""
    runs = {
        path.name: read_report(path) for path in sorted((work / "runs").iterdir()) if (path / "report.json").exists()
    }
    sections = [
        _head(runs),
        _targets(runs),
        *(_grid(name, runs, work) for name in runs if name.startswith("grid")),
        _retrieval(runs),
        _patch(runs),
        _transfer(runs),
        _ablation(runs),
        _sizes(runs),
        _throughput(work / "throughput.json"),
        _reading(),
    ]
    page.write_text("\n".join(filter(None, sections)), encoding="utf-8")


def _head(runs: dict[str, Report]) -> str:
    first = next(iter(runs.values()))
    versions = ", ".join(f"{name} {version}" for name, version in first.run.packages.items())
    samples = sorted({cell.n for report in runs.values() for cell in report.cells})
    devices = ", ".join(sorted({report.run.device for report in runs.values()}))
    encoders = "; ".join(sorted({f"`{e.source}` ({e.sha256[:12]})" for r in runs.values() for e in r.encoders}))
    return f"""# AdvEncoder beside the universal baselines

- Command: `python benchmarks/advencoder.py --work DIR`, then `--write`; written {datetime.date.today().isoformat()}
- Device: {devices}; {first.run.platform}. No GPU was at hand: every GPU figure is not measured.
- Versions: {versions}, robustbench-x {first.run.robustbench_x}
- Seed {first.run.seed}; {" or ".join(map(str, samples))} test images a cell, so the 95 % interval of a rate is at most
  7 points either way; one training a cell, so the luck of a training is not in it
- Encoders: {encoders}
- Data: digits (scikit-learn), the first 1,000 training and a subset of the first 1,000 test images of Fashion-MNIST,
  50 classes of fractals; heads fitted on their training splits
- Every attack has the encoder and 256 unlabelled surrogate images (photographs: crops of eleven that ship with
  scikit-image and scikit-learn; fractals of other systems than the test set's), and spends 200 steps of 16 images
- `advencoder` is the setting `best`: two trainings of 200 steps, of which the one is kept that moves the surrogate
  images' features further; so it spends up to twice what the others do. `advencoder tokens` is one of the two
- `paper` and `code` keep the published losses, generator (1,024 channels) and Adam, but mix 16 noises where they have
  256, and take 200 batches of 16 where they take 20 epochs of batches of 256: what a CPU can do. Their rows say nothing
  about the full schedule
- A flip rate counts changed predictions over all images; with `retrieval`, of the first-ranked item's class
"""


def _targets(runs: dict[str, Report]) -> str:
    rows = []
    for kind, part, title in (("per", "best", "Adv-PER at 10/255"), ("pat", "patch", "Adv-PAT at 0.03 of the area")):
        for name, report in runs.items():
            if name.startswith(part):
                mean = _mean(_of(report.cells, "advencoder"))
                held = "reached" if mean >= TARGETS[kind] else "not reached"
                rows.append((f"{title}, {name.partition('-')[2]}", percent(mean), percent(TARGETS[kind]), held))
        means = [_mean(_of(r.cells, "advencoder")) for n, r in runs.items() if n.startswith(part)]
        if means:
            verdict = "reached" if fmean(means) >= TARGETS[kind] else "not reached"
            rows.append((f"{title}, mean", percent(fmean(means)), percent(TARGETS[kind]), verdict))
    header = ("setting best", "mean flip rate over heads and data", "the paper's grand mean", "")
    return f"## Against the paper's figures\n\n{table(header, rows)}"


def _grid(name: str, runs: dict[str, Report], work: Path) -> str:
    """The grid of one encoder and surrogate, with the setting `best` where its run is there."""
    title = name.partition("-")[2]
    best = f"best-{title}"
    cells = [*(runs[best].cells if best in runs else ()), *runs[name].cells]
    cells = list({(c.attack, c.data, c.head): c for c in cells}.values())
    rows = rows_by_cell(work / "runs" / name) | (rows_by_cell(work / "runs" / best) if best in runs else {})
    return f"## Adv-PER, {title.replace('-', ', surrogate ')}\n\n{_flips(cells)}\n{_ahead(cells, rows)}"


def _flips(found: Sequence[CellResult]) -> str:
    """Flip rates: an attack a row, a data set and head a column."""
    data = tuple(dict.fromkeys(cell.data for cell in found))
    columns = [(source, head) for source in data for head in HEADS]
    by = {(c.attack, c.data, c.head): c for c in found}
    attacks = tuple(dict.fromkeys(cell.attack for cell in found))
    order = sorted(attacks, key=lambda a: -_mean(_of(found, a)))
    rows = []
    for attack in order:
        cells = [by[attack, *column] for column in columns]
        fit = cells[0].fit
        cost = "" if fit is None else f"{fit.seconds:.0f} s, {fit.backwards}"
        rows.append(
            (
                attack,
                percent(_mean(cells)),
                percent(_mean(cells, "collapse_ceiling")),
                f"{_mean(cells, 'feature_cosine'):.2f}",
                *(percent(cell.metrics["flip_rate"].value) for cell in cells),
                cost,
            )
        )
    names = [f"{_short(source)} {head}" for source, head in columns]
    return table(("attack", "mean", "ceiling", "cosine", *names, "fit: time, backwards"), rows)


def _ahead(found: Sequence[CellResult], rows: dict[str, Rows]) -> str:
    """How often the setting `best` is ahead of every other attack, sample by sample."""
    cells = {(c.attack, c.data, c.head): c for c in found}
    others = [a for a in dict.fromkeys(c.attack for c in found) if a != "advencoder"]
    if not _of(found, "advencoder"):
        return ""
    lines = []
    for other in others:
        won = lost = 0
        for (attack, data, head), cell in cells.items():
            if attack != other:
                continue
            mine = cells["advencoder", data, head]
            pair = discordant("flip_rate", rows[mine.id], rows[cell.id], cell.id)
            if mcnemar_exact(pair.only_mine, pair.only_theirs) < 0.05:
                won += pair.only_mine > pair.only_theirs
                lost += pair.only_mine < pair.only_theirs
        gain = _mean(_of(found, "advencoder")) - _mean(_of(found, other))
        lines.append((other, f"{100 * gain:+.0f} points", str(won), str(lost)))
    header = ("against", "mean flip rate", "cells significantly ahead", "cells significantly behind")
    title = "`advencoder` against each, paired sample by sample (McNemar, exact, 5 %, uncorrected):"
    return f"{title}\n\n{table(header, lines)}"


def _retrieval(runs: dict[str, Report]) -> str:
    rows = []
    for name, report in runs.items():
        if name.startswith(("best", "grid", "patch")):
            for cell in report.cells:
                if cell.task == "retrieval" and cell.attack in ("advencoder", "pap base", "uap"):
                    pairs = ((f"clean_{m}", m) for m in ("map@10", "recall@1", "recall@10"))
                    figures = [" to ".join(percent(cell.metrics[m].value) for m in pair) for pair in pairs]
                    rows.append((name.replace("-", ", "), _short(cell.data), cell.attack, *figures))
    header = ("run", "data", "attack", "map@10", "recall@1", "recall@10")
    return f"## Retrieval, clean to attacked\n\n{table(header, rows)}" if rows else ""


def _patch(runs: dict[str, Report]) -> str:
    parts = [
        f"### {name.partition('-')[2].replace('-', ', placement ')}\n\n{_flips(report.cells)}"
        for name, report in runs.items()
        if name.startswith("patch")
    ]
    intro = (
        "A square of 0.03 of the area, every pixel of it in [0, 1]; bottom right, or at a place of its own in every "
        "image. `advencoder code` has the published losses and a generator of 256 channels and 16 noises, on the "
        "same steps."
    )
    return "\n".join(["## Adv-PAT\n", intro + "\n", *parts]) if parts else ""


def _transfer(runs: dict[str, Report]) -> str:
    values: dict[tuple[str, str], float] = {}
    for name, report in runs.items():
        if name.startswith("transfer") or (name.startswith("best") and name.endswith("-crops")):
            for cell in report.cells:
                if cell.attack == "advencoder" and cell.fit is not None:
                    values[cell.fit.encoder, cell.encoder] = _mean(_of(report.cells, "advencoder"))
                if cell.attack == "noise":
                    values.setdefault(("noise", cell.encoder), _mean(_of(report.cells, "noise")))
    victims = tuple(dict.fromkeys(victim for _, victim in values))
    rows = [
        (surrogate, *(percent(values.get((surrogate, victim))) for victim in victims))
        for surrogate in sorted({surrogate for surrogate, _ in values})
    ]
    if not any(name.startswith("transfer") for name in runs):
        return ""
    title = "## Transfer\n\nMean flip rate over heads and data, fitted on the row's encoder, judged on the column's."
    return f"{title}\n\n{table(('fitted on', *victims), rows)}"


def _ablation(runs: dict[str, Report]) -> str:
    report = runs.get("ablation-terms")
    if report is None:
        return ""
    intro = (
        "EfficientNet-Lite0, digits, 100 steps. Generators have 256 channels and 16 noises. `no hfc` and "
        "so on set that term's weight to zero; `direct` optimises the pattern itself by sign steps."
    )
    return f"## Ablation\n\n{intro}\n\n{_flips(report.cells)}"


def _sizes(runs: dict[str, Report]) -> str:
    rows = [
        (str(cell.fit.surrogate_samples), percent(_mean(_of(report.cells, "advencoder"))), f"{cell.fit.seconds:.0f} s")
        for name, report in runs.items()
        if name.startswith("ablation-size")
        for cell in [_of(report.cells, "advencoder")[0]]
        if cell.fit is not None
    ]
    rows.sort(key=lambda row: int(row[0]))
    header = ("surrogate images", "mean flip rate", "fit")
    note = (
        "EfficientNet-Lite0, digits, `contrast=tokens`, 100 steps of 16 images; with 10,000 most are never seen. "
        "The images are crops of eleven photographs, so more of them is not much more variety."
    )
    return f"## Size of the surrogate set\n\n{note}\n\n{table(header, rows)}" if rows else ""


def _throughput(path: Path) -> str:
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    rows = [
        (source, *(f"{values[name]:.1f}" for name in values), f"{values['code'] / values['published step']:.2f}",
         f"{values['best'] / values['published step']:.2f}")
        for source, values in found["rows"].items()
    ]  # fmt: skip
    names = next(iter(found["rows"].values()))
    header = ("encoder", *(f"{name}, samples/s" for name in names), "code / published", "best / published")
    note = (
        f"Best of three rounds in turn, batches of {found['batch']}, {found['noises']} noises, one process, "
        f"{found['device']}. `published step` is our plain re-statement of the released loop: the clean images pass "
        "the encoder anew every step. `code` runs the same losses and generator with clean features computed once; "
        "`best` has no generator and "
        "compares tokens of four layers. On a GPU: not measured."
    )
    return f"## Throughput of the fit loop\n\n{note}\n\n{table(header, rows)}"


def _reading() -> str:
    return """## How to read it

- The ceiling is what a constant prediction scores: where flip rate and ceiling agree the features have collapsed into
  one class, and no universal attack can do more.
- Noise of the same size is the control. EfficientNet-Lite0 at 96 pixels loses a third of its predictions to it.
- Timings are of one shared machine, with other work beside; ratios within a table are sounder than seconds.
"""


def _of(cells: Sequence[CellResult], attack: str) -> list[CellResult]:
    return [cell for cell in cells if cell.attack == attack]


def _mean(cells: Sequence[CellResult], metric: str = "flip_rate") -> float:
    values = [cell.metrics[metric].value for cell in cells]
    return _fmean(value for value in values if value is not None)


def _short(source: str) -> str:
    scheme, _, rest = source.partition(":")
    return "fractal" if scheme == "fractal" else Path(rest).name


_fmean: Callable[[Iterable[float]], float] = fmean

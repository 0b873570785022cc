"""docs/results/defenses.md from the runs of benchmarks/defenses.py."""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from robustbench_x.numbers import format_eps
from robustbench_x.report.markdown import table
from robustbench_x.report.words import figure, percent
from robustbench_x.result import DefenseInfo, Measure, Report, read_report
from robustbench_x.stats import mcnemar_exact, wilson

RUNGS = ("oblivious", "transfer", "bpda", "bpda_learned", "full", "universal", "black box")
VICTIMS = {
    "photos": "EfficientNet-Lite0, its own classifier, ImageNet photographs",
    "digits": "EfficientNet-Lite0 at 96 pixels, linear head, digits",
    "dinov2": "DINOv2 ViT-S/14 at 98 pixels, linear head, digits",
}
BLACK_BOX = ("square", "random_search")
MIDDLE = 4 / 255
POINTS = 0.03
ALPHA = 0.05
RIVALS = ("jpeg", "jpeg_random", "bit_depth", "tvm")
_Robust = np.ndarray


@dataclass
class Entry:
    """One defence on one victim at one budget: per rung, which samples stand against each attack, `(n,)` booleans."""

    clean: _Robust
    stands: dict[str, list[_Robust]] = field(default_factory=dict)

    def share(self, rung: str) -> Measure | None:
        """Robust accuracy against every attack of a rung together."""
        held = self.stands.get(rung)
        return None if held is None else _measure(np.logical_and.reduce(held))

    @property
    def worst(self) -> _Robust:
        """Which samples stand against everything."""
        whole: _Robust = np.logical_and.reduce([stand for held in self.stands.values() for stand in held])
        return whole


Victim = dict[tuple[str, float], Entry]


def write(page: Path, work: Path) -> None:
    """Writes the page from every run that is there."""
    folders = sorted(path for path in (work / "runs").iterdir() if (path / "report.json").exists())
    reports = {path.name: read_report(path) for path in folders}
    victims: dict[str, Victim] = {}
    infos: dict[tuple[str, str], DefenseInfo] = {}
    for path in folders:
        name = path.name.rpartition("-")[2]
        _add(victims.setdefault(name, {}), path)
        for info in reports[path.name].defenses:
            infos.setdefault((name, info.defense), info)
    sections = [
        _head(reports, victims),
        _answer(victims),
        *(_victim(name, victims[name], infos) for name in VICTIMS if name in victims),
        _omega(victims),
        _hardened(work / "hardened"),
        _throughput(work / "throughput.json"),
        _findings(reports),
        _reading(),
        _missing(victims, work),
    ]
    page.write_text("\n".join(filter(None, sections)), encoding="utf-8")


def _add(victim: Victim, run: Path) -> None:
    rows = pq.read_table(run / "samples.parquet").to_pydict()
    cells: dict[tuple[str, float, str, str], list[int]] = {}
    for i, key in enumerate(zip(rows["defense"], rows["eps"], rows["attack"], rows["knowledge"], strict=True)):
        cells.setdefault(key, []).append(i)
    for (defense, eps, attack, knowledge), index in cells.items():
        order = sorted(index, key=lambda i: rows["position"][i])
        clean = np.array([bool(rows["clean_correct"][i]) for i in order])
        # An error row is no robustness: its verdicts are null.
        stands = np.array([bool(rows["clean_correct"][i]) and not rows["fooled"][i] for i in order])
        entry = victim.setdefault((defense, eps), Entry(clean=clean))
        entry.stands.setdefault(_rung(defense, attack, knowledge), []).append(stands)


def _rung(defense: str, attack: str, knowledge: str) -> str:
    if attack == "noise":
        return "noise"
    if attack == "transfer":
        return "transfer"
    if attack in BLACK_BOX and knowledge in ("none", "full"):
        return "black box"
    if attack == "uap" and knowledge in ("none", "full"):
        return "universal"
    return "full" if knowledge == "none" else knowledge


def _measure(stands: _Robust) -> Measure:
    interval = wilson(int(stands.sum()), len(stands))
    return Measure(value=interval.value, low=interval.low, high=interval.high)


def _head(reports: Mapping[str, Report], victims: Mapping[str, Victim]) -> str:
    first = next(iter(reports.values()))
    versions = ", ".join(f"{name} {version}" for name, version in first.run.packages.items())
    devices = ", ".join(sorted({report.run.device for report in reports.values()}))
    counts = "; ".join(f"{VICTIMS[name]}: {len(next(iter(victim.values())).clean)}" for name, victim in victims.items())
    weights = sorted({i.fit.sha256[:12] for r in reports.values() for i in r.defenses if i.fit and i.name == "raw_isp"})
    return f"""# Defences against the whole ladder

- Command: `python benchmarks/defenses.py --work DIR`, then `--write`; written {datetime.date.today().isoformat()}
- Device: {devices}; {first.run.platform}. No GPU was at hand: every GPU figure is not measured
- Versions: {versions}, robustbench-x {first.run.robustbench_x}; weights of raw_isp: {", ".join(weights) or "none run"}
- Seed {first.run.seed}; images: {counts}. One image is 4 to 8 points: the intervals say what a figure is worth
- Attacks: noise, transfer (5 steps on the other encoder), PGD (10 steps), APGD-CE (10), EOT over 2 draws where the
  defence is random; where a table has the columns, also a universal perturbation fitted through the defence (30 steps
  of 8 images), Square (200 queries) and random search (50). Random defences are judged on 20 fresh draws
"""


def _answer(victims: Mapping[str, Victim]) -> str:
    lines = ["## What stands", ""]
    for name, victim in victims.items():
        at = {defense: entry for (defense, eps), entry in victim.items() if eps == MIDDLE}
        if "none" not in at:
            continue
        ranked = sorted(at, key=lambda d: -float(at[d].worst.mean()))
        best = ranked[0]
        oblivious = {d: s.value for d in at if d != "none" and (s := at[d].share("oblivious")) and s.value is not None}
        lead = max(oblivious, key=lambda d: oblivious[d], default=None)
        text = f"- {VICTIMS[name]}, 4/255: undefended {percent(float(at['none'].worst.mean()))}; best worst case "
        text += f"{percent(float(at[best].worst.mean()))} ({best})"
        if lead is not None:
            entry = at[lead]
            text += (
                f". The best against attackers who do not know the defence is {lead} with {percent(oblivious[lead])}; "
                f"attackers who do leave it {percent(float(entry.worst.mean()))}"
            )
        lines.append(text + ".")
    lines += ["", *_raw(victims)]
    return "\n".join(lines) + "\n"


def _raw(victims: Mapping[str, Victim]) -> list[str]:
    """Whether raw_isp does what the issue asks of it, victim by victim."""
    lines = []
    for name, victim in victims.items():
        raw, bare = victim.get(("raw_isp", MIDDLE)), victim.get(("none", MIDDLE))
        if raw is None or bare is None:
            continue
        lost = float(bare.clean.mean() - raw.clean.mean())
        kept = "within" if lost <= POINTS else "more than"
        own = raw.share("oblivious")
        text = f"- raw_isp on {name}: clean accuracy {percent(float(raw.clean.mean()))} against "
        text += f"{percent(float(bare.clean.mean()))} undefended ({kept} 3 points)"
        compared = []
        for rival in RIVALS:
            entry = victim.get((rival, MIDDLE))
            theirs = None if entry is None else entry.share("oblivious")
            if entry is None or theirs is None or own is None or theirs.value is None or own.value is None:
                continue
            mine = np.logical_and.reduce(raw.stands["oblivious"])
            other = np.logical_and.reduce(entry.stands["oblivious"])
            chance = mcnemar_exact(int((mine & ~other).sum()), int((other & ~mine).sum()))
            word = "level with" if chance >= ALPHA else "ahead of" if own.value > theirs.value else "behind"
            compared.append(f"{word} {rival} ({percent(theirs.value)}, {_chance(chance)})")
        absent = [rival for rival in RIVALS if (rival, MIDDLE) not in victim]
        if absent:
            compared.append(f"not compared with {', '.join(absent)}")
        full = raw.share("full")
        text += f"; oblivious {percent(None if own is None else own.value)}: {', '.join(compared) or 'no rival run'}"
        text += f"; full gradient {percent(None if full is None else full.value)}"
        lines.append(text)
    return lines


def _chance(p: float) -> str:
    """A p-value of the exact paired test; `level with` stands for no difference that chance does not explain."""
    return "p < 0.01" if p < 0.01 else f"p = {p:.2f}"


def _victim(name: str, victim: Victim, infos: Mapping[tuple[str, str], DefenseInfo]) -> str:
    parts = [f"## {VICTIMS[name]}", ""]
    for eps in sorted({eps for _, eps in victim}):
        rows = []
        entries = {d: e for (d, at), e in victim.items() if at == eps}
        used = [rung for rung in RUNGS if any(rung in e.stands for e in entries.values())]
        for defense, entry in sorted(
            entries.items(), key=lambda item: (item[0] != "none", "raw_isp" not in item[0], item[0])
        ):
            info = infos.get((name, defense))
            measured = info is not None and info.seconds is not None and info.encoder_seconds
            time = f"{info.seconds / info.encoder_seconds:.1f}" if measured else ""  # type: ignore[operator,union-attr]
            shares = [s.value if (s := entry.share(rung)) else None for rung in used]
            rows.append(
                (
                    defense,
                    percent(float(entry.clean.mean())),
                    *(percent(s) for s in shares),
                    figure(_measure(entry.worst)),
                    time,
                )
            )
        parts += [f"### linf {format_eps(eps)}", ""]
        header = ("defence", "clean", *used, "worst case", "time")
        parts += [table(header, rows)]
    return "\n".join(parts)


def _omega(victims: Mapping[str, Victim]) -> str:
    rows = []
    for name, victim in victims.items():
        for label, omega in (("raw_isp, S alone", "0"), ("raw_isp", "0.7"), ("raw_isp, G alone", "1")):
            for eps in sorted({eps for _, eps in victim}):
                entry = victim.get((label, eps))
                if entry is None or "oblivious" not in entry.stands:
                    continue
                cells = [s.value if (s := entry.share(r)) else None for r in ("oblivious", "full")]
                rows.append((name, omega, format_eps(eps), percent(float(entry.clean.mean())), *map(percent, cells)))
    if not rows:
        return ""
    return "## omega\n\n" + table(("victim", "omega", "budget", "clean", "oblivious", "full gradient"), rows)


def _hardened(folder: Path) -> str:
    if not folder.exists():
        return ""
    reports = {p.name: read_report(p) for p in sorted(folder.iterdir()) if (p / "report.json").exists()}
    rows = []
    for name, report in sorted(reports.items(), key=lambda item: item[0] != "original"):
        asr = {cell.attack: cell.metrics["robust_accuracy"].value for cell in report.cells}
        clean = report.cells[0].metrics["clean_accuracy"].value
        columns = ("noise", "transfer", "uap, original", "uap", "pgd")
        rows.append(
            (
                name,
                percent(clean),
                *(percent(asr.get(c)) for c in columns),
                figure(report.worst_case[0].robust_accuracy),
            )
        )
    if not rows:
        return ""
    header = (
        "encoder", "clean", "noise", "transfer", "universal, fitted on the original", "universal, fitted on it",
        "white-box PGD", "worst case",
    )  # fmt: skip
    return (
        "## Encoders that were changed instead\n\nEfficientNet-Lite0 at 96 pixels, a linear head fitted on each,\n"
        f"digits, 4/255; robust accuracy.\n\n{table(header, rows)}"
    )


def _throughput(path: Path) -> str:
    if not path.exists():
        return ""
    note = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        (
            row["source"],
            f"{row['size'][0]} x {row['size'][1]}",
            f"{1 / row['raw_isp']:.1f}",
            f"{1 / row['encoder']:.1f}",
            f"{row['raw_isp'] / row['encoder']:.1f}",
        )
        for row in note["rows"]
    ]
    header = ("encoder", "pixels", "raw_isp, images/s", "encoder, images/s", "raw_isp over encoder")
    return (
        f"## Throughput of raw_isp\n\nOn {note['device']}, {note['threads']} threads, both in turns; on a GPU: not "
        f"measured.\n\n{table(header, rows)}"
    )


def _findings(reports: Mapping[str, Report]) -> str:
    rows: dict[tuple[str, str], int] = {}
    for report in reports.values():
        for f in report.findings:
            if f.level != "note":
                rows[f.level, f.id] = rows.get((f.level, f.id), 0) + 1
    if not rows:
        return ""
    listed = [(level, kind, str(n)) for (level, kind), n in sorted(rows.items())]
    return "## What the checks say of these runs\n\n" + table(("level", "finding", "times"), listed)


def _reading() -> str:
    return """## How to read this

Every figure is robust accuracy (correct on the clean and on the adversarial image, of all images), against all attacks
of a rung together, sample by sample; `worst case` is over every rung that stands in the table, and noise. `ahead of`
and `behind` mean an exact paired test below 0.05, `level with` that chance explains the difference. `full` of the
undefended row is the white-box attack; `time` is defence and encoder over the encoder's own, measured beside other
work. A detector (`mvg`, `feature_squeezing`) refuses about 5 % of clean images, which its clean accuracy counts as
wrong; a refused adversarial image counts as robust. Attackers who know a detector evade it jointly; black-box and
universal ones do not know it, and `no_adaptive_attack` says so of the runs that hold these alone.
Where the data has no training images (photographs) a detector is fitted on crops of other photographs, and `mvg` then
refuses nearly everything: its row there is no robustness, and `over_refusal` now says so.
"""


def _missing(victims: Mapping[str, Victim], folder: Path) -> str:
    lacks: list[str] = []
    for name, text in VICTIMS.items():
        if name not in victims:
            lacks.append(f"{text}: nothing was run")
            continue
        defenses = {d for d, _ in victims[name]}
        missing = [d for d in ("raw_isp", "tvm", "jpeg", "resize_pad", "crop_ensemble", "mvg") if d not in defenses]
        if missing:
            lacks.append(f"{text}: {', '.join(missing)}")
        unclimbed = [d for d, eps in victims[name] if eps == MIDDLE and "black box" not in victims[name][d, eps].stands]
        if unclimbed:
            lacks.append(f"{text}: universal and black box of {', '.join(sorted(unclimbed))}")
        budgets = {eps for _, eps in victims[name]} | {2 / 255, 4 / 255, 8 / 255}
        partly = sorted(d for d in defenses if len({eps for e, eps in victims[name] if e == d}) < len(budgets))
        if partly:
            lacks.append(f"{text}: 2 and 8/255 of {', '.join(partly)}")
    if not any((folder / "hardened").glob("*/report.json")):
        lacks.append("encoders that were pruned or trained adversarially (`--part hardened`)")
    lacks += ["diffpure: needs a diffusion model, and none ships in a package", "every GPU figure"]
    return "## Not measured\n\n" + "\n".join(f"- {line}" for line in lacks) + "\n"

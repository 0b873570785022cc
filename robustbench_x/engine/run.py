"""Runs an audit from plan to stored report; killed anywhere, it continues where it stopped."""

import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

import pyarrow.parquet as pq
import torch
from torch import Tensor

from robustbench_x import __version__
from robustbench_x.config import AuditConfig
from robustbench_x.data.dataset import Dataset, draw_subset, open_dataset
from robustbench_x.diagnose import probe_gradient, probe_victim
from robustbench_x.encoders.encoder import LoadedEncoder
from robustbench_x.encoders.source import load_encoder
from robustbench_x.engine.assemble import assemble_cells, cell_findings, cell_result, worst_cases
from robustbench_x.engine.craft import AttackAtWork, attacker_sees, craft_rows, is_out_of_memory
from robustbench_x.engine.progress import Progress, Silent
from robustbench_x.engine.stage import StageAtWork
from robustbench_x.errors import DataError, RunError, UsageError
from robustbench_x.findings import finding
from robustbench_x.plan import UNDEFENDED, Craft, Plan, Stage, make_plan, with_noise
from robustbench_x.registry import Registry, load_registry
from robustbench_x.result import (
    DataInfo,
    EncoderInfo,
    Finding,
    HeadInfo,
    Report,
    RunInfo,
    write_report,
)
from robustbench_x.store import RunFolder, write_atomically
from robustbench_x.victim import Shield

__all__ = ["resolve_device", "run_audit"]

_PROBED = 8
_PACKAGES = ("torch", "torchvision", "timm", "kornia", "torchattacks", "numpy", "pillow", "pyarrow")


def run_audit(
    config: AuditConfig,
    out: Path,
    *,
    registry: Registry | None = None,
    resume: bool = True,
    command: str = "",
    progress: Progress | None = None,
) -> Report:
    """Runs `config` into the folder `out` and returns the stored report.

    Args:
        config: What to audit.
        out: The run folder; made when missing. One that holds this very audit is continued.
        registry: Plugins; by default everything installed.
        resume: Continue from what is on disk; else start over.
        command: How the run was started, for the report.
        progress: Told what happens; silent by default.

    Raises:
        UsageError: Something asked for cannot be.
        NothingEvaluatedError: There is no sample.
        RunError: What is on disk is damaged, or the weights or images changed since it was written.
    """
    registry = registry or load_registry()
    plan = make_plan(config, registry)
    folder = RunFolder(out, fingerprint=plan.fingerprint, resume=resume)
    if folder.finished:
        from robustbench_x.result import read_report

        return read_report(out)
    return _Run(config, plan, folder, registry, command, progress or Silent()).run()


def resolve_device(name: str) -> torch.device:
    """`auto` is the first of cuda, mps and cpu that is there; anything else must exist.

    Raises:
        UsageError: No such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: choose auto, cpu, cuda, cuda:1 or mps") from None
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise UsageError(f"--device {name}: this machine has no such device; --device auto takes what is there")
    return device


@final
class _Run:
    """One run in progress."""

    def __init__(
        self, config: AuditConfig, plan: Plan, folder: RunFolder, registry: Registry, command: str, progress: Progress
    ) -> None:
        self.config = config
        self.plan = plan
        self.folder = folder
        self.registry = registry
        self.progress = progress
        self.device = resolve_device(config.device)
        self.header = folder.notes("run") or {
            "started": _now(),
            "command": command,
            "device": _device_name(self.device),
            "batch_size": self._batch_size(),
        }
        folder.note("run", self.header)
        self.batch_size: int = self.header["batch_size"]
        self._part = self.batch_size
        self._loaded: tuple[str, LoadedEncoder] | None = None
        self._datasets: dict[str, Dataset] = {}
        self._infos: dict[str, dict[str, Any]] = {}

    def run(self) -> Report:
        totals = [self._stage_size(stage) for stage in self.plan.stages]
        self.progress.begin(sum(totals), 0)
        for number, stage in enumerate(self.plan.stages):
            self._run_stage(number, stage)
        return self._finish()

    def _batch_size(self) -> int:
        if isinstance(self.config.batch_size, int):
            return self.config.batch_size
        return 128 if self.device.type == "cuda" else 32

    def _stage_size(self, stage: Stage) -> int:
        """Samples times crafts, as far as it is known before the data set is opened."""
        from robustbench_x.engine.stage import select_items

        items = select_items(self._dataset(stage.data), stage.samples, self.config)
        return len(items) * len(stage.crafts)

    def _dataset(self, source: str) -> Dataset:
        if source not in self._datasets:
            self.progress.task(f"opening {source}")
            self._datasets[source] = open_dataset(source, self.registry, seed=self.config.seed)
        return self._datasets[source]

    def _encoder(self, source: str) -> LoadedEncoder:
        if self._loaded is None or self._loaded[0] != source:
            self.progress.task(f"loading {source}")
            loaded = load_encoder(source, self.registry, allow_pickle=self.config.allow_pickle)
            loaded.encoder.to(self.device)
            if loaded.classifier is not None:
                loaded.classifier.to(self.device)
            self.progress.say(f"{source}  sha256 {loaded.encoder.sha256}")
            for note in loaded.encoder.notes:
                self.progress.say(f"  {note}")
            self._loaded = source, loaded
        return self._loaded[1]

    def _run_stage(self, number: int, stage: Stage) -> None:
        shields = {
            entry.title: Shield(
                spec=self.registry.defenses[entry.name],
                defense=self.registry.defenses[entry.name].build(entry.params),
            )
            for entry in self.config.defense
        }
        loaded = self._encoder(stage.encoder)
        work = StageAtWork(
            stage,
            loaded=loaded,
            dataset=self._dataset(stage.data),
            shields=shields,
            config=self.config,
            registry=self.registry,
            device=self.device,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        self._check_unchanged(number, work)
        for message in work.unreadable():
            self.progress.say(f"unreadable: {message}")
        if self.folder.notes(f"probes-{number}") is None:
            self.folder.note(f"probes-{number}", {"findings": [f.model_dump() for f in self._probe(work)]})
        surrogate = self._surrogate(work) if any(c.head is None for c in stage.crafts) else None
        attacks = {entry.title: entry for entry in with_noise(self.config.attack)}
        for craft in stage.crafts:
            spec = self.registry.attacks[craft.attack.name]
            at_work = AttackAtWork(
                craft=craft,
                spec=spec,
                attack=spec.build(attacks[craft.attack.title].params),
                surrogate=surrogate if spec.access == "encoder" else None,
            )
            self._run_craft(work, at_work)

    def _run_craft(self, stage: StageAtWork, work: AttackAtWork) -> None:
        craft = work.craft
        seen = "" if craft.seen == UNDEFENDED else f" against {craft.seen} ({craft.knowledge})"
        for number in range(stage.num_batches):
            head = f", {craft.head} head" if craft.head else ""
            self.progress.task(f"{craft.attack.title}{seen} on {craft.cells[0].encoder}{head}, {craft.cells[0].data}")
            if not self.folder.has_batch(craft.id, number):
                self.folder.add_batch(craft.id, number, self._rows(stage, work, number))
            self.progress.advance(stage.batch_length(number))

    def _rows(self, stage: StageAtWork, work: AttackAtWork, number: int) -> list[dict[str, Any]]:
        """Rows of one batch, in parts that fit the memory: each shortage halves the part, for good."""
        batch = stage.batch(number)
        while True:
            try:
                starts = range(0, max(len(batch.images), 1), self._part)
                return [
                    row
                    for start in starts
                    for row in craft_rows(
                        stage, work, batch, self.config, slice(start, min(start + self._part, len(batch.images)))
                    )
                ]
            except Exception as error:
                if not is_out_of_memory(error) or self._part == 1:
                    raise
                self._part = max(self._part // 2, 1)
                self.progress.say(f"out of memory: going on with {self._part} images at a time")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _surrogate(self, stage: StageAtWork) -> Tensor | None:
        """Unlabelled surrogate images `(M, 3, H, W)`, or None when the audit names none."""
        if self.config.surrogate is None:
            return None
        dataset = self._dataset(self.config.surrogate)
        pool = dataset.train or dataset.test
        images = []
        for item in draw_subset(pool, self.config.surrogate_samples, seed=self.config.seed):
            try:
                images.append(stage.encoder.preprocessing(item.load()))
            except DataError as error:
                self.progress.say(f"surrogate image left out: {error}")
        return torch.stack(images).to(self.device)

    def _probe(self, stage: StageAtWork) -> list[Finding]:
        """Checks of every victim of a stage, with each attacker's view of it, on a few images."""
        self.progress.task(f"checking the victims of {stage.stage.encoder} on {stage.stage.data}")
        images = stage.batch(0).images[:_PROBED]
        found: list[Finding] = []
        if not len(images):
            return found
        for shield in stage.shields:
            for name, head in stage.heads.items():
                where = f"{stage.stage.encoder} | {name} | {stage.stage.data} | {shield}"
                found += _guarded(where, lambda s=shield, h=head: probe_victim(images, stage.defended(s), h))
        views: dict[tuple[str, str, str | None], Craft] = {}
        for craft in stage.stage.crafts:
            if self.registry.attacks[craft.attack.name].access in ("encoder", "whitebox"):
                views.setdefault((craft.seen, craft.knowledge, craft.head), craft)
        for (shield, knowledge, seen_head), craft in views.items():
            see = attacker_sees(stage, craft, seen_head)
            loss = "cosine" if seen_head is None else "margin"
            shown = shield if shield == UNDEFENDED else f"{shield}:{knowledge}"
            where = f"{stage.stage.encoder} | {seen_head or 'features'} | {stage.stage.data} | {shown}"
            found += _guarded(where, lambda s=see, t=craft.threat, c=loss: probe_gradient(images, s, t, clean_loss=c))
        return found

    def _check_unchanged(self, number: int, stage: StageAtWork) -> None:
        """Stores what this stage evaluates, or refuses to mix it with rows of other weights or images."""
        encoder, dataset = stage.encoder, stage.dataset
        info = {
            "encoder": EncoderInfo(
                source=stage.stage.encoder,
                sha256=encoder.sha256,
                parameters=encoder.num_parameters,
                input_size=encoder.input_size,
                mean=encoder.preprocessing.mean,
                std=encoder.preprocessing.std,
                license=encoder.license,
                notes=encoder.notes,
            ).model_dump(mode="json"),
            "heads": [
                HeadInfo(
                    encoder=stage.stage.encoder,
                    data=stage.stage.data,
                    head=name,
                    num_classes=head.num_classes,
                    settings=head.settings,
                ).model_dump(mode="json")
                for name, head in stage.heads.items()
            ],
            "data": DataInfo(
                source=stage.stage.data,
                classes=len(dataset.classes),
                train=len(dataset.train),
                test=len(dataset.test),
                evaluated=len(stage.items),
                unreadable=stage.unreadable(),
                license=dataset.license,
                notes=dataset.notes,
            ).model_dump(mode="json"),
            "images": stage.data_digest(),
        }
        stored = self.folder.notes(f"stage-{number}")
        if stored is None:
            self.folder.note(f"stage-{number}", info)
        elif (stored["encoder"]["sha256"], stored["images"]) != (encoder.sha256, info["images"]):
            raise RunError(
                f"{self.folder.path}: the weights of {stage.stage.encoder} or the images of {stage.stage.data} changed "
                "since this audit was interrupted; start over with --no-resume"
            )

    def _finish(self) -> Report:
        """Assembles and writes every result file, then drops the working state."""
        stages = [self.folder.notes(f"stage-{n}") or {} for n in range(len(self.plan.stages))]
        rows = self.folder.rows()
        classes = {(h["encoder"], h["data"], h["head"]): h["num_classes"] for s in stages for h in s["heads"]}
        records = assemble_cells(rows, self.plan, self.config, self.registry, num_classes=classes)
        findings = [
            *(Finding(**f) for n in range(len(stages)) for f in (self.folder.notes(f"probes-{n}") or {})["findings"]),
            *_training_findings(stages),
            *cell_findings(records),
        ]
        params = {
            entry.title: self.registry.attacks[entry.name].effective(entry.params)
            for entry in with_noise(self.config.attack)
        }
        cells = tuple(
            cell_result(r, [f for f in findings if f.cell == cell_id], params=params[r.cell.attack])
            for cell_id, r in records.items()
        )
        report = Report(
            status="error" if any(cell.n_errors for cell in cells) else "complete",
            run=self._run_info(),
            config=self.config.replay(),
            encoders=tuple({s["encoder"]["source"]: EncoderInfo(**s["encoder"]) for s in stages}.values()),
            heads=tuple(HeadInfo(**h) for s in stages for h in s["heads"]),
            data=tuple(DataInfo(**s["data"]) for s in stages),
            cells=cells,
            worst_case=worst_cases(records),
            findings=tuple(findings),
        )
        out = self.folder.path
        partial = out / "samples.parquet.partial"
        pq.write_table(rows, partial)
        partial.replace(out / "samples.parquet")
        write_atomically(out / "audit.toml", self.config.to_toml())
        write_report(report, out)
        self.folder.finish()
        return report

    def _run_info(self) -> RunInfo:
        return RunInfo(
            id=self.folder.path.resolve().name,
            started=self.header["started"],
            finished=_now(),
            command=self.header["command"],
            seed=self.config.seed,
            device=self.header["device"],
            precision=self.config.precision,
            packages={name: found for name in _PACKAGES if (found := _version(name)) is not None},
            robustbench_x=__version__,
            fingerprint=self.plan.fingerprint,
            batch_size=self.batch_size,
            platform=f"{platform.platform()}, Python {platform.python_version()}",
        )


def _guarded(where: str, probe: Any) -> list[Finding]:
    """A probe's findings about `where`; a probe that fails is itself a finding, never silence."""
    try:
        found = probe()
    except Exception as error:  # noqa: BLE001 - reported below as an error-level finding
        found = [finding("probe_failed", f"{type(error).__name__}: {error}")]
    return [f.model_copy(update={"cell": where}) for f in found]


def _training_findings(stages: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Training images that could not be read, once per head."""
    found = []
    for head in (h for s in stages for h in s["heads"]):
        unreadable = head["settings"].get("unreadable", [])
        if unreadable:
            text = f"{head['data']}: {len(unreadable)} training images left out: {'; '.join(unreadable[:5])}"
            found.append(finding("unreadable_images", text))
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

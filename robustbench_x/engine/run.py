"""Runs an audit from plan to stored report; killed anywhere, it continues where it stopped."""

import dataclasses
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from robustbench_x.config import AuditConfig
from robustbench_x.data.dataset import Dataset, draw_subset, open_dataset
from robustbench_x.encoders.encoder import Encoder, LoadedEncoder
from robustbench_x.encoders.source import load_encoder
from robustbench_x.engine.artifacts import Artifacts
from robustbench_x.engine.craft import craft_rows, failed_rows, is_out_of_memory
from robustbench_x.engine.finish import finish, now, with_findings, write_texts
from robustbench_x.engine.handout import AttackAtWork, run_partners
from robustbench_x.engine.probe import probe_stage
from robustbench_x.engine.progress import Progress, Silent
from robustbench_x.engine.proof import changed, proof_of, same_proof, stage_notes
from robustbench_x.engine.shields import arm_shields, with_imitations
from robustbench_x.engine.stage import Batch, StageAtWork, select_items
from robustbench_x.engine.strict import strict_findings
from robustbench_x.engine.supply import Supply
from robustbench_x.errors import DataError, RunError, SampleError, UsageError
from robustbench_x.fitting.ground import device_name
from robustbench_x.plan import UNDEFENDED, Craft, Plan, Stage, make_plan
from robustbench_x.plugin import AttackSpec
from robustbench_x.registry import Registry, load_registry
from robustbench_x.result import Finding, Report, StageProof, read_report
from robustbench_x.store import RunFolder

__all__ = ["resolve_device", "run_audit"]


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
        RunError: What is on disk is damaged, or the weights, code or images changed since it was written. That
            is checked for a finished run too: its result is never served for another model.
    """
    registry = registry or load_registry()
    plan = make_plan(config, registry)
    folder = RunFolder(out, fingerprint=plan.fingerprint, resume=resume)
    run = _Run(config, plan, folder, registry, command, progress or Silent())
    return run.verify(read_report(out)) if folder.finished else run.run()


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
        self.batch_size = self._batch_size()
        if not folder.finished:
            header = folder.notes("run") or {
                "started": now(),
                "command": command,
                "device": device_name(self.device),
                "batch_size": self.batch_size,
            }
            folder.note("run", header)
            self.batch_size = header["batch_size"]
        self._part = self.batch_size
        self._loaded: tuple[str, LoadedEncoder] | None = None
        self._datasets: dict[str, Dataset] = {}
        self._supply = Supply(
            registry=registry,
            open_dataset=self._dataset,
            surrogate=config.surrogate,
            samples=config.surrogate_samples,
            seed=config.seed,
            device=self.device,
            progress=self.progress,
            bf16=config.precision == "bf16",
            allow_pickle=config.allow_pickle,
        )
        self._artifacts = Artifacts(folder=folder, config=config, supply=self._supply)

    def verify(self, report: Report) -> Report:
        """The stored report of a finished run, once it is shown to be about what the sources hold today.

        Checks that attack again are made up for where they are asked for now and were not then.

        Raises:
            RunError: Weights, code, heads or images changed since.
        """
        unchecked = self.config.checks == "all" and report.config.get("checks") != "all"
        found: list[Finding] = []
        proofs = {(proof.encoder, proof.data): proof for proof in report.proofs}
        fits = {cell.id: cell.fit for cell in report.cells}
        for stage in self.plan.stages:
            stored = proofs.get((stage.encoder, stage.data))
            work = self._at_work(stage)
            if stored is None or not same_proof(stored, proof_of(work)):
                raise RunError(
                    f"{self.folder.path}: {changed(stage)} finished; name another --out, or start over with --no-resume"
                )
            for craft in stage.crafts:
                used = fits.get(craft.cells[0].id)
                if used is not None:
                    spec = self.registry.attacks[craft.attack.name]
                    self._artifacts.check(work, craft, spec, spec.build(craft.attack.params), used)
            if unchecked:
                found += strict_findings(work, self.registry, self.folder.rows(), self.progress.task)
        if unchecked:
            report = with_findings(report, found, self.config)
            write_texts(report, self.folder.path)
        self.progress.say(f"{self.folder.path} holds this very audit, finished {report.run.finished}: nothing was run")
        return report

    def run(self) -> Report:
        self.folder.check()
        totals = [self._stage_size(stage) for stage in self.plan.stages]
        self.progress.begin(sum(totals), 0)
        for number, stage in enumerate(self.plan.stages):
            self._run_stage(number, stage)
        return finish(self.folder, self.plan, self.config, self.registry)

    def _batch_size(self) -> int:
        if isinstance(self.config.batch_size, int):
            return self.config.batch_size
        return 128 if self.device.type == "cuda" else 32

    def _stage_size(self, stage: Stage) -> int:
        """Samples times crafts, as far as it is known before the data set is opened."""
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
            for part in (loaded.classifier, loaded.text):
                if part is not None:
                    part.to(self.device)
            self.progress.say(f"{source}  sha256 {loaded.encoder.sha256}")
            for note in loaded.encoder.notes:
                self.progress.say(f"  {note}")
            self._loaded = source, loaded
        return self._loaded[1]

    def _at_work(self, stage: Stage) -> StageAtWork:
        loaded, dataset = self._encoder(stage.encoder), self._dataset(stage.data)
        shields, learned = arm_shields(self.config, self.registry, self._supply, loaded.encoder, dataset)
        shields = with_imitations(shields, stage, self.config, self._supply, loaded.encoder)
        return StageAtWork(
            stage,
            loaded=loaded,
            dataset=dataset,
            shields=shields,
            learned=learned,
            config=self.config,
            registry=self.registry,
            device=self.device,
            batch_size=self.batch_size,
            progress=self.progress,
        )

    def _run_stage(self, number: int, stage: Stage) -> None:
        work = self._at_work(stage)
        self._check_unchanged(number, work)
        for message in work.unreadable():
            self.progress.say(f"unreadable: {message}")
        if self.folder.notes(f"probes-{number}") is None:
            self.progress.task(f"checking the victims of {stage.encoder} on {stage.data}")
            self.folder.note(
                f"probes-{number}", {"findings": [f.model_dump() for f in probe_stage(work, self.registry)]}
            )
        specs = {craft.id: self.registry.attacks[craft.attack.name] for craft in stage.crafts}
        asks = any(spec.access == "encoder" and not spec.fits for spec in specs.values())
        surrogate = self._surrogate(work) if asks else None
        at_work = [
            AttackAtWork(
                craft=craft,
                spec=specs[craft.id],
                attack=specs[craft.id].build(craft.attack.params),
                surrogate=surrogate if specs[craft.id].access == "encoder" and not specs[craft.id].fits else None,
                partners=self._partners(specs[craft.id], craft),
                failure=_barred(work, craft),
            )
            for craft in stage.crafts
        ]
        # What was asked for and cannot be had is known before hours are spent.
        for attack in at_work:
            if attack.spec.fits:
                self._artifacts.prepare(work, attack.craft, attack.spec, attack.attack)  # type: ignore[arg-type]
        for attack in at_work:
            stored = all(self.folder.has_batch(attack.craft.id, number) for number in range(work.num_batches))
            self._run_craft(work, attack if stored else self._with_artifact(work, attack))
        if self.config.checks == "all" and self.folder.notes(f"strict-{number}") is None:
            found = strict_findings(work, self.registry, self.folder.rows(), self.progress.task)
            self.folder.note(f"strict-{number}", {"findings": [f.model_dump() for f in found]})

    def _partners(self, spec: AttackSpec, craft: Craft) -> tuple[Encoder, ...]:
        """The further public encoders that an attack runs on; see `run_partners`."""
        sources = run_partners(spec, spec.build(craft.attack.params), craft.cells[0].encoder)
        return tuple(self._supply.load(source) for source in sources)

    def _with_artifact(self, stage: StageAtWork, work: AttackAtWork) -> AttackAtWork:
        """`work` with what it learned, or with why it learned nothing: its samples then become error rows."""
        if work.failure is not None or not work.spec.fits or work.craft.threat.radius == 0:
            return work
        try:
            artifact = self._artifacts.take(stage, work.craft, work.spec, work.attack)  # type: ignore[arg-type]
        except SampleError as error:
            self.progress.say(str(error))
            return dataclasses.replace(work, failure=str(error))
        return dataclasses.replace(work, artifact=artifact.tensors)

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
        if work.failure is not None:
            return failed_rows(stage, work, batch, slice(0, len(batch.images)), work.failure)
        usual = self._part
        while True:
            try:
                rows, failed = self._in_parts(stage, work, batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._part = max(self._part // 2, 1)
                self.progress.say(f"out of memory: going on with {self._part} images at a time")
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            if failed == len(batch.images):
                self._part = usual  # no size helps this attack, so the next one need not suffer for it
            return rows

    def _in_parts(self, stage: StageAtWork, work: AttackAtWork, batch: Batch) -> tuple[list[dict[str, Any]], int]:
        """Rows of the batch, and how many images do not even fit alone: those become error rows."""
        rows: list[dict[str, Any]] = []
        failed = 0
        for start in range(0, max(len(batch.images), 1), self._part):
            part = slice(start, min(start + self._part, len(batch.images)))
            try:
                rows += craft_rows(stage, work, batch, self.config, part)
            except Exception as error:
                if not is_out_of_memory(error) or self._part > 1:
                    raise
                rows += failed_rows(stage, work, batch, part, f"{type(error).__name__}: {error}")
                failed += 1
        return rows, failed

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

    def _check_unchanged(self, number: int, stage: StageAtWork) -> None:
        """Stores what this stage evaluates, or refuses to mix it with rows of other weights or images."""
        stored = self.folder.notes(f"stage-{number}")
        if stored is None:
            self.folder.note(f"stage-{number}", stage_notes(stage))
        elif not same_proof(StageProof(**stored["proof"]), proof_of(stage)):
            raise RunError(f"{self.folder.path}: {changed(stage.stage)} interrupted; start over with --no-resume")


def _barred(stage: StageAtWork, craft: Craft) -> str | None:
    """Why nobody can attack through the defence of `craft` as its attacker knows it; None where one can."""
    shield = stage.shields[craft.seen]
    return (shield.barred(craft.knowledge) if shield is not None else "") or None

"""The artefacts of one run: which one made which rows, kept beside them, so that no two are ever mixed."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from robustbench_x.config import AuditConfig
from robustbench_x.engine.stage import StageAtWork
from robustbench_x.engine.supply import Perceived, Supply
from robustbench_x.errors import RunError, SampleError, SourceError
from robustbench_x.fitting.artifact import Artifact, read_artifact, write_artifact
from robustbench_x.plan import Craft
from robustbench_x.plugin import AttackSpec, FittedAttack
from robustbench_x.result import FitInfo
from robustbench_x.store import RunFolder

__all__ = ["Artifacts"]


@final
@dataclass(frozen=True, kw_only=True)
class Artifacts:
    """Takes each artefact from the run folder where its rows already exist, else from `supply`."""

    folder: RunFolder
    config: AuditConfig
    supply: Supply

    def take(self, stage: StageAtWork, craft: Craft, spec: AttackSpec, attack: FittedAttack[Any]) -> Artifact:
        """The artefact of one craft.

        Raises:
            UsageError: What was asked for cannot be had or does not belong.
            RunError: The run folder holds another artefact than its rows were made with.
            SampleError: The training failed, or tampered with the victim.
        """
        note = f"fit-{craft.id}"
        stored = self.folder.notes(note)
        if stored is not None:
            return self._stored(FitInfo(**stored))
        shields = {entry.title: entry.params for entry in self.config.defense}
        aware = craft.knowledge in ("bpda", "full")
        seen = craft.seen
        perceived = Perceived(stage.shields[seen], seen, shields[seen], craft.knowledge) if aware else Perceived()
        try:
            found = self.supply.artifact(spec, attack, stage.encoder, craft.threat, perceived)
        finally:
            broken = stage.seal.broken()
            if broken is not None:
                stage.seal.restore()
        if broken is not None:
            raise SampleError(f"during the training of {craft.attack.title}: {broken}")
        info = found.artifact.info(found.origin)
        path = self._path(info)
        if not path.exists():
            write_artifact(path, found.artifact)
        self.folder.note(note, info.model_dump(mode="json"))
        return found.artifact

    def check(
        self, stage: StageAtWork, craft: Craft, spec: AttackSpec, attack: FittedAttack[Any], used: FitInfo
    ) -> None:
        """Whether a finished run's rows were made with the artefact that is asked for today.

        Raises:
            RunError: They were not.
        """
        if not attack.artifact:
            return
        today = self.supply.artifact(spec, attack, stage.encoder, craft.threat).artifact
        if today.sha256 != used.sha256:
            raise RunError(
                f"{self.folder.path}: {attack.artifact} changed since this audit was finished; name another --out, or "
                "start over with --no-resume"
            )

    def _stored(self, info: FitInfo) -> Artifact:
        path = self._path(info)
        try:
            artifact = read_artifact(path)
        except SourceError as error:
            raise RunError(f"{error}; start over with --no-resume") from error
        if artifact.sha256 != info.sha256:
            raise RunError(
                f"{path} is not what the rows were made with: sha256 {artifact.sha256}, expected {info.sha256}; "
                "start over with --no-resume"
            )
        return artifact

    def _path(self, info: FitInfo) -> Path:
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", info.plugin)
        return self.folder.path / "artifacts" / f"{name}-{info.sha256[:12]}.safetensors"

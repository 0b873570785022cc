"""The training of a defence as the harness sets it up: clean images, some held out, and a detector's threshold."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from robustbench_x.errors import SampleError, SourceError
from robustbench_x.fitting.artifact import Artifact
from robustbench_x.fitting.ground import Ground
from robustbench_x.fitting.loop import Show, run_training
from robustbench_x.plugin import DefenseSpec, FittedDefense
from robustbench_x.randomness import derive_seed
from robustbench_x.victim import fresh_draw
from robustbench_x.views import DefenseFitView, EncoderHandle, ImagePool, Meter

__all__ = ["CALIBRATION", "DefenseJob", "decisive"]

CALIBRATION = "rbx.calibration"
"""The artefact's tensor of sorted scores of held-out clean images, from which a detector's threshold is read."""
_HELD_OUT = 8
_CALIBRATED = 3
_BATCH = 32


def decisive(spec: DefenseSpec, defense: object) -> dict[str, Any]:
    """The parameters that decide what a defence learns."""
    names = [p.name for p in spec.params if p.name != "artifact"] if spec.fitted_by is None else spec.fitted_by
    return {name: getattr(defense, name) for name in names}


@final
@dataclass(frozen=True, kw_only=True)
class DefenseJob:
    """Everything the training of a defence depends on.

    An eighth of the pool is held out, a third of it for a detector, whose threshold is read from it. Whole images are
    drawn for that: a pool lies in the order of its classes, and a threshold of the last ones would not hold for the
    others. Patches come in a random order of their photographs already, and the last ones are held out.
    """

    spec: DefenseSpec
    defense: FittedDefense
    ground: Ground

    @property
    def name(self) -> str:
        """The defence's."""
        return self.spec.name

    @property
    def untouchable(self) -> tuple[nn.Module, ...]:
        """The encoder it is fitted for."""
        return self.ground.encoders

    def key(self) -> str:
        """See `Ground.key`; with the files it reads.

        Raises:
            SourceError: These are not what the defence needs.
        """
        try:
            files = [[path.name, _digest(path)] for path in self.spec.reads(self.defense)]
        except (ValueError, OSError) as error:
            raise SourceError(f"{self.name}: {error}") from error
        return self.ground.key(self.spec, decisive(self.spec, self.defense), files)

    def cache_key(self) -> str:
        """See `Ground.cache_key`."""
        return self.ground.cache_key(self.key())

    def run(self, checkpoint: Path | None, show: Show | None = None, *, every: float = 20.0) -> Artifact:
        """Trains, from the checkpoint where there is one, and scores the held-out images where it detects.

        Raises:
            SampleError: The training broke down, or a score is not finite.
        """
        ground, key, meter = self.ground, self.key(), Meter()
        view = self.view(meter)
        trained = run_training(
            lambda: self.defense.trainer(view),
            pool=len(view.images),
            seed=ground.plugin_seed(self.name),
            meter=meter,
            device=ground.device,
            checkpoint=checkpoint,
            key=key if checkpoint is None else ground.cache_key(key),
            every=every,
            show=show,
        )
        tensors = trained.tensors
        if self.spec.detects:
            tensors = tensors | {CALIBRATION: self._scores(tensors, view)}
        made = ground.provenance(self.spec, decisive(self.spec, self.defense), key, trained)
        return Artifact(tensors, made)

    def view(self, meter: Meter) -> DefenseFitView:
        """What the plugin is handed."""
        ground, levels = self.ground, self.ground.pool.levels
        if self.spec.per_encoder:
            generator = torch.Generator().manual_seed(derive_seed(ground.seed, "held out"))
            levels = levels[torch.randperm(len(levels), generator=generator)]
        share = _CALIBRATED if self.spec.detects else _HELD_OUT
        kept = len(levels) - max(len(levels) // share, 1)
        # At the start of a file, where there are several: no photograph is on both sides.
        kept = max((start for start in ground.pool.starts if 0 < start <= kept), default=kept)
        if kept < 1:
            raise SampleError(f"{self.name} needs two images or more to learn from, there is {len(levels)}")
        encoder = None if ground.public is None else EncoderHandle(ground.public, lambda images: images, meter)
        return DefenseFitView(
            images=ImagePool(levels[:kept], device=ground.device),
            held_out=ImagePool(levels[kept:], device=ground.device),
            seed=ground.plugin_seed(self.name),
            device=ground.device,
            encoder=encoder,
        )

    @torch.no_grad()
    def _scores(self, learned: Mapping[str, Tensor], view: DefenseFitView) -> Tensor:
        """Scores of the held-out clean images, sorted, float64 `(M,)`."""
        detector: Any = self.defense.armed({name: t.to(self.ground.device) for name, t in learned.items()})
        pool = view.held_out
        with fresh_draw(view.seed, self.ground.device):
            parts = [
                detector.score(pool.batch(torch.arange(start, min(start + _BATCH, len(pool)))), view.encoder)
                for start in range(0, len(pool), _BATCH)
            ]
        scores = torch.cat(parts).double().cpu()
        if not scores.isfinite().all():
            raise SampleError(f"{self.name} gives clean images scores that are not finite")
        return scores.sort().values


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

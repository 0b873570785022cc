"""AnyAttack: trained once, then one forward pass makes any image read as any target image."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.plugin import AttackSpec, Fitted, Trainer, param
from robustbench_x.randomness import derive_seed
from robustbench_x.views import EncoderHandle, EncoderView, FitView
from robustbench_x_attacks.aimed.targets import sources_in, targets_of
from robustbench_x_attacks.anyattack.checkpoint import read_decoder, read_released, unpack
from robustbench_x_attacks.anyattack.codebook import CompactDecoder
from robustbench_x_attacks.anyattack.decoder import (
    OFFICIAL_SIZE,
    Decoder,
    DecoderKind,
    Mode,
    OfficialDecoder,
    load_decoder,
    make_decoder,
    mismatch,
    noise_for,
)
from robustbench_x_attacks.anyattack.trainer import DecoderTrainer, LossName, Recipe, ReleasedTrainer, Stage

__all__ = ["SPEC", "AnyAttack"]

_RATES: dict[DecoderKind, float] = {"compact": 4e-3, "official": 1e-4}
_TEMPERATURE_STEPS = 10_000


@final
@dataclass(frozen=True, kw_only=True)
class AnyAttack(Fitted):
    """AnyAttack (Zhang et al., CVPR 2025, arXiv 2410.05346): targeted noise from the embedding of a target image.

    A decoder reads the encoder's embedding of the target, un-normalised as in the released code, and makes noise within
    eps (the paper's budget is 16/255) that is added to any clean image; no gradient is needed at the end. It is trained
    without labels. Stage `pretrain`: the noise of every image of a batch is put on `k` shuffles of that batch, and the
    embeddings of the sums must be told apart as the targets' are (InfoNCE), under a temperature that falls from 1 to
    0.07. Stage `finetune`: the noise is put on images drawn apart; the loss, contrastive both ways (`bicl`, temperature
    0.07) or the cosine, is added up over the encoder and the auxiliary ones. `weights` takes a released checkpoint in
    place of any training: its encoder is CLIP ViT-B/32 at 224 pixels.

    Modes:
        compat: the released code. The temperature follows the number of the batch in its epoch, so it jumps back to 1
            in every epoch; the `k` embeddings are averaged before they are normalised and scored; an image may meet its
            own noise; the clamp of the noise passes no gradient where it holds.
        fixed: ours. The temperature follows the step over the whole training and stays at its end; each of the `k`
            embeddings is scored by itself and the losses are averaged; no image meets its own noise; the clamp passes
            gradients that lead back inside. Neither the temperature's fall nor the learning rate's cosine is ever
            longer than the training.

    Both attack alike: only the training differs.

    Departures from both: images in memory, where the paper streams LAION-400M (pretrain) and pairs a downstream data
    set with ImageNet (finetune); here clean and target images come from one surrogate set. Single precision, where the
    code has mixed precision with gradient scaling. Auxiliary encoders see images normalised as they expect and give
    pooled features, where the code passes plain pixels and matches the logits of one of them. Epochs are passes over
    the surrogate images. The crop and the turn of the augmentation are one resampling. The default decoder is our small
    one, whose noise is tiled over images of any size; the official one's is resized (bilinear).
    """

    decoder: DecoderKind = param("compact", "compact (ours, any encoder) or official (width 512, 224 pixels)")
    mode: Mode = param("fixed", "fixed (ours) or compat (the released code's quirks), in training")
    weights: str = param("", "released checkpoint (.pt), used as it is in place of a training")
    init: str = param("", "artefact or released checkpoint to start the training from; empty: from scratch")
    stage: Stage = param("pretrain", "pretrain (self-supervised) or finetune")
    loss: LossName = param("bicl", "of finetune: bicl or cosine")
    auxiliary: str = param("", "of finetune: further public encoder sources, by comma")
    k: int = param(5, "of pretrain: shuffles of the batch that each noise is put on")
    temperature_start: float = param(1.0, "of pretrain: first temperature")
    temperature_end: float = param(0.07, "of pretrain: last temperature")
    temperature_steps: int = param(_TEMPERATURE_STEPS, "of pretrain: steps between the two")
    steps: int = param(1000, "optimisation steps")
    batch: int = param(32, "target images per step")
    rate: float | None = param(None, "AdamW's first learning rate; None: 4e-3 compact, 1e-4 official (the paper's)")
    weight_decay: float = param(0.01, "AdamW's")
    restart: int = param(5000, "steps after which the learning rate's cosine starts again")
    augment: bool = param(True, "crop, mirror and (pretrain) turn the images at random")
    chunk: int = param(0, "images at a time in the encoders, to save memory; the loss stays the batch's. 0: all")

    def __post_init__(self) -> None:
        for name, least in (
            ("k", 1),
            ("steps", 1),
            ("batch", 2),
            ("restart", 1),
            ("temperature_steps", 1),
            ("chunk", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("temperature_start", "temperature_end", "rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")
        if self.auxiliary and self.stage != "finetune":
            raise ValueError("auxiliary encoders belong to stage=finetune")
        if self.weights and self.init:
            raise ValueError("weights are used as they are; to train them further, name them in init")

    @property
    def sources(self) -> tuple[str, ...]:
        """The auxiliary encoders named."""
        return sources_in(self.auxiliary)

    @property
    def recipe(self) -> Recipe:
        """How the decoder is trained, with what the mode decides in place."""
        longest = self.steps if self.mode == "fixed" else math.inf
        return Recipe(
            stage=self.stage,
            mode=self.mode,
            loss=self.loss,
            k=self.k,
            temperature_start=self.temperature_start,
            temperature_end=self.temperature_end,
            temperature_steps=int(min(self.temperature_steps, longest)),
            steps=self.steps,
            batch=self.batch,
            rate=_RATES[self.decoder] if self.rate is None else self.rate,
            weight_decay=self.weight_decay,
            restart=int(min(self.restart, longest)),
            augment=self.augment,
            chunk=self.chunk,
        )

    def trainer(self, view: FitView) -> Trainer:
        """A training of the decoder, or none at all with `weights`; access `encoder`."""
        if self.weights:
            OfficialDecoder.check(view.encoder.feature_dim, (OFFICIAL_SIZE, OFFICIAL_SIZE))
            state = read_released(Path(self.weights).expanduser())
            return ReleasedTrainer(view, load_decoder(state, (OFFICIAL_SIZE, OFFICIAL_SIZE)))
        return DecoderTrainer(view, self._start(view), self.recipe)

    def run(self, view: EncoderView) -> Tensor:
        """Images with the noise of their targets on; one pass through the encoder and none back."""
        if view.threat.radius == 0:
            return view.inputs.clone()
        targets = targets_of(view)
        if view.artifact is None:
            raise AttackError("anyattack needs an artefact with a trained decoder, and it was handed none")
        decoder, digest = unpack(view.artifact)
        with torch.no_grad():
            features = _reader(view, digest).features(targets)
            size = (view.inputs.shape[-2], view.inputs.shape[-1])
            if isinstance(decoder, CompactDecoder):
                decoder = decoder.sized(size)
            noise = noise_for(decoder, features, view.threat.eps, self.mode)
        if noise.shape[-2:] != size:
            noise = F.interpolate(noise, size, mode="bilinear", antialias=True, align_corners=False)
        return (view.inputs + noise).clamp(0, 1)

    def _start(self, view: FitView) -> Decoder:
        encoder = view.encoder
        made = make_decoder(
            self.decoder, width=encoder.feature_dim, size=encoder.input_size, seed=derive_seed(view.seed, "decoder")
        )
        if self.init:
            state = read_decoder(Path(self.init).expanduser()).state_dict()
            if problems := mismatch(made, state):
                raise AttackError(
                    f"{self.init} holds no {self.decoder} decoder for embeddings of width {encoder.feature_dim} "
                    f"({problems})"
                )
            made.load_state_dict(state)
        return made


def _reader(view: EncoderView, digest: str) -> EncoderHandle:
    """The encoder whose embeddings the decoder was trained on: the audited one, or the one it was fitted on."""
    for encoder in (*view.partners, view.encoder):  # the partner runs at the size it was fitted at
        if encoder.sha256 == digest:
            return encoder
    raise AttackError(
        f"the decoder reads embeddings of the encoder with sha256 {digest}, which it was fitted on and which is not at "
        "hand here"
    )


SPEC = AttackSpec(
    name="anyattack",
    summary="targeted: a decoder turns the embedding of any target image into noise for any image",
    factory=AnyAttack,
    source="Zhang et al. 2025, AnyAttack, arXiv 2410.05346",
    access="encoder",
    goal="targeted",
    fits=True,
    partners=lambda attack: attack.sources,
    aims=True,
    shipped=Path(__file__).parents[1] / "weights",
    reads=lambda attack: tuple(Path(name).expanduser() for name in (attack.weights, attack.init) if name),
    ready=lambda attack: bool(attack.artifact or attack.weights),
    scales=True,
)

"""AttackVLM's transfer attacks: sign ascent on the cosine to the embedding of a target image, or of its caption."""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.plugin import AttackSpec, param
from robustbench_x.views import EncoderView
from robustbench_x_attacks.aimed.targets import captions_of, goals_of, targets_of
from robustbench_x_attacks.iterative import Evaluation, ascend
from robustbench_x_attacks.steps import steepest

__all__ = ["SPECS", "AttackVLMii", "AttackVLMit"]


@dataclass(frozen=True, kw_only=True)
class _Matching:
    """Sign ascent from the clean image on the cosine to a goal; a subclass says which goal."""

    steps: int = param(300, "gradient steps")
    step_size: float = param(1 / 255, "in [0, 1] units")
    eot: int = param(10, "passes averaged per step when the victim is random")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.eot < 1:
            raise ValueError("steps and eot must be at least 1")
        if not self.step_size > 0:
            raise ValueError(f"step_size={self.step_size} must be positive")

    def _pull(self, view: EncoderView, goals: Tensor) -> Tensor:
        def objective(images: Tensor, index: Tensor) -> Evaluation:
            return Evaluation(F.cosine_similarity(view.encoder.features(images), goals[index], dim=1), None)

        draws = self.eot if view.encoder.stochastic else 1
        rule = steepest(self.step_size)
        return ascend(view, objective, rule, steps=self.steps, random_start=False, draws=draws).images


@final
@dataclass(frozen=True, kw_only=True)
class AttackVLMii(_Matching):
    """MF-ii of AttackVLM (Zhao et al., NeurIPS 2023, arXiv 2305.16934): image features matched to a target image's.

    Sign steps of 1/255 from the clean image, projected; 300 as in the paper, whose budget is 8/255 (AnyAttack compares
    with it at 16/255). Departures: the target is a given image, where the paper draws it with Stable Diffusion from the
    caption; the images with the highest cosine on the way are kept, not the last.
    """

    def run(self, view: EncoderView) -> Tensor:
        """Adversarial images; access `encoder`. AttackError without target images."""
        if view.threat.radius == 0:
            return view.inputs.clone()
        (goals,) = goals_of((view.encoder,), targets_of(view))
        return self._pull(view, goals)


@final
@dataclass(frozen=True, kw_only=True)
class AttackVLMit(_Matching):
    """MF-it of AttackVLM (Zhao et al., NeurIPS 2023, arXiv 2305.16934): image features matched to a caption's.

    As `attackvlm_ii`, towards the text embedding of the target's caption; of the target image nothing is read.
    Departure: the images with the highest cosine on the way are kept, not the last.
    """

    def run(self, view: EncoderView) -> Tensor:
        """Adversarial images; access `encoder`. AttackError without captions, or where the encoder reads no text."""
        if view.threat.radius == 0:
            return view.inputs.clone()
        captions = captions_of(view)
        with torch.no_grad():
            goals = view.encoder.texts(captions).to(view.inputs.device)
        return self._pull(view, goals)


def _spec(name: str, summary: str, factory: type) -> AttackSpec:
    return AttackSpec(
        name=name,
        summary=summary,
        factory=factory,
        source="Zhao et al. 2023, On Evaluating Adversarial Robustness of Large VLMs, arXiv 2305.16934",
        access="encoder",
        goal="targeted",
        aims=True,
    )


SPECS = (
    _spec("attackvlm_ii", "targeted: features pulled to those of a target image (MF-ii)", AttackVLMii),
    _spec("attackvlm_it", "targeted: features pulled to the embedding of the target's caption (MF-it)", AttackVLMit),
)

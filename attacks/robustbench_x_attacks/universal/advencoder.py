"""AdvEncoder: one perturbation or patch against every image and every task downstream of an encoder."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.plugin import AttackSpec, Fitted, Trainer, param
from robustbench_x.randomness import derive_seed
from robustbench_x.views import EncoderView, FitView
from robustbench_x_attacks.universal import terms
from robustbench_x_attacks.universal.generator import Generator, GeneratorTrainer
from robustbench_x_attacks.universal.pattern import (
    BestOf,
    Loss,
    Objective,
    SignTrainer,
    apply_artifact,
    clean_features,
    clean_tokens,
    gradient_of,
    tokens_of,
)

__all__ = ["SPEC", "AdvEncoder", "Recipe"]


Contrast = Literal["paper", "code", "cosine", "tokens", "shallow"]
CANDIDATES: tuple[Contrast, ...] = ("tokens", "shallow")
"""What the setting best tries, deep and shallow; without layers, pooled features alone."""


class Recipe(NamedTuple):
    """What a setting stands for; parameters that are given override it.

    `epochs` counts passes over the surrogate where `steps` is None.
    """

    contrast: Contrast
    measure: terms.Measure
    alpha: float
    beta: float
    lam: float
    generator: bool
    batch: int
    rate: float
    steps: int | None
    epochs: int


RECIPES = {
    "paper": Recipe("paper", "norm", 1.0, 5.0, 1.0, True, 256, 2e-4, None, 20),
    "code": Recipe("code", "mse", 5.0, 1.0, 1.0, True, 256, 2e-4, None, 20),
    "best": Recipe("tokens", "norm", 1.0, 0.0, 0.0, False, 16, 0.2, 200, 0),
}


@final
@dataclass(frozen=True, kw_only=True)
class AdvEncoder(Fitted):
    """AdvEncoder (Zhou et al., "Downstream-agnostic Adversarial Examples", ICCV 2023, arXiv 2307.12280).

    Learns, from the encoder and unlabelled surrogate images alone, one perturbation (`linf`, Adv-PER; the paper's
    budget is 10/255) or one patch (`patch`, Adv-PAT; 0.03 of the area) for every image. The loss is
    alpha * L_adv + beta * L_hfc + lam * L_q: features pushed away from the clean ones, the high frequencies of the
    image changed, the change kept small.

    Settings:
        paper: L_adv with adversarial queries among clean keys, Euclidean norms, weights 1, 5, 1.
        code: the released code: clean queries among adversarial keys, mean squared errors, weights 5, 1, 1.
        best: what our own measurements found strongest (docs/results/advencoder.md). No generator: sign steps on the
            pattern itself. Two patterns are trained, one against the cosine of the tokens of four layers, one for the
            distance of the first layer's tokens, `steps` each; the one that turns the pooled features of the surrogate
            images further away is kept. Which it is differs from encoder to encoder: ViTs fall to the shallow one.
            Pooled features alone serve where an encoder names no layers, and a given `contrast` is trained alone.

    In `paper` and `code` a generator (fixed noise, DCGAN trunk, mixing convolution) makes the pattern; Adam with
    rate 2e-4, 20 epochs of batches of 256.

    Departures from both: the encoder stays in eval mode (the released code leaves it in train mode after the first
    epoch, so batch norm drifts); every image and patch is valid (the code clips neither, and clamps patches to the
    range of normalised pixels); the filter's radius is an eighth of the height, so 8 at 64 pixels; the pattern has
    the encoder's own size unless `resolution` says 64, as in the paper, which is then enlarged; a patch sits flush
    with its corner where the code leaves a margin of 14 pixels, and is the middle of what the generator makes, where
    the code masks the whole of it at the patch's place. The paper's temperature is not stated: 0.1, as in
    the code. A batch is never larger than the surrogate set.
    """

    setting: Literal["best", "paper", "code"] = param("best", "best, paper or code: what every None below stands for")
    generator: bool | None = param(None, "a generator makes the pattern; else it is optimised directly")
    contrast: Contrast | None = param(None, "paper, code, cosine (of pooled features), tokens or shallow")
    layers: int = param(4, "layers whose tokens the term tokens compares, spread evenly, the last included")
    measure: terms.Measure | None = param(None, "norm or mse, for the other two terms")
    alpha: float | None = param(None, "weight of the adversarial term")
    beta: float | None = param(None, "weight of the high-frequency term")
    lam: float | None = param(None, "weight of the quality term")
    temperature: float = param(0.1, "of the contrastive forms of the adversarial term")
    steps: int | None = param(None, "optimisation steps; paper and code: 20 epochs")
    batch: int | None = param(None, "surrogate images per step")
    rate: float | None = param(None, "Adam's rate with a generator; else first step as a share of the budget")
    noises: int = param(256, "images the generator mixes into one")
    width: int = param(1024, "channels of the generator's first block")
    resolution: int = param(0, "side of the generated pattern in pixels, then enlarged; 0: the encoder's own size")

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "noises", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width={self.width} must be a positive multiple of 8")
        if self.resolution < 0 or (self.resolution and not self.recipe.generator):
            raise ValueError(f"resolution={self.resolution} needs a generator and must not be negative")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")

    @property
    def recipe(self) -> Recipe:
        """The setting with the given parameters in place."""
        base = RECIPES[self.setting]
        given = {name: getattr(self, name) for name in Recipe._fields if name != "epochs"}
        if self.generator is not None and self.generator != base.generator and self.rate is None:
            given["rate"] = RECIPES["paper" if self.generator else "best"].rate
        return base._replace(**{name: value for name, value in given.items() if value is not None})

    def trainer(self, view: FitView) -> Trainer:
        """A training of the pattern; access `encoder`."""
        recipe = self.recipe
        batch = min(recipe.batch, len(view.surrogate))
        if recipe.alpha and recipe.contrast in ("paper", "code") and batch < 2:
            raise AttackError(
                f"the {recipe.contrast} contrast compares the images of a batch: it needs two, not {batch}"
            )
        steps = recipe.steps or max(1, math.ceil(recipe.epochs * len(view.surrogate) / batch))
        tried = self._tried(recipe, view)
        objectives = [
            _objective(view, recipe._replace(contrast=contrast), temperature=self.temperature, layers=self.layers)
            for contrast in tried
        ]
        if not recipe.generator:
            trainers = [
                SignTrainer(view, gradient_of(view, objective), steps=steps, batch=batch, rate=recipe.rate)
                for objective in objectives
            ]
            return trainers[0] if len(trainers) == 1 else BestOf(view, dict(zip(tried, trainers, strict=True)))
        objective = objectives[0]
        size = (self.resolution, self.resolution) if self.resolution else view.encoder.input_size
        seed = derive_seed(view.seed, "generator")
        made = Generator(size=size, noises=self.noises, width=self.width, seed=seed)
        return GeneratorTrainer(view, objective, made, steps=steps, batch=batch, rate=recipe.rate)

    def _tried(self, recipe: Recipe, view: FitView) -> tuple[Contrast, ...]:
        """The adversarial terms that are trained one after another."""
        if self.contrast is not None or recipe.contrast != "tokens":
            return (recipe.contrast,)
        if not view.encoder.layers:
            return ("cosine",)
        return ("tokens",) if recipe.generator else CANDIDATES

    def run(self, view: EncoderView) -> Tensor:
        """Images with the learned pattern on; no pass through the encoder."""
        return apply_artifact(view)


def _objective(view: FitView, recipe: Recipe, *, temperature: float, layers: int) -> Objective:
    radius = view.encoder.input_size[0] / 8
    push = _push(view, recipe.contrast, temperature, layers) if recipe.alpha else None

    def objective(adversarial: Tensor, clean: Tensor, index: Tensor, number: int) -> Loss:
        del number
        found = {}
        if push is not None:
            found["adv"] = push(adversarial, clean, index)
        if recipe.beta:
            high = terms.high_pass(adversarial, radius), terms.high_pass(clean, radius)
            found["hfc"] = -terms.distance(high[0], high[1], recipe.measure)
        if recipe.lam:
            found["quality"] = terms.distance(adversarial, clean, recipe.measure)
        weights = {"adv": recipe.alpha, "hfc": recipe.beta, "quality": recipe.lam}
        total = torch.stack([weights[name] * term for name, term in found.items()]).sum()
        return Loss(total, found)

    return objective


def _push(view: FitView, contrast: Contrast, temperature: float, layers: int) -> Callable[..., Tensor]:
    """The adversarial term of adversarial and clean images with the clean ones' index."""
    if contrast == "tokens":
        names = _spread(view, layers)
        stored = clean_tokens(view, names)

        def compare(adversarial: Tensor, clean: Tensor, index: Tensor) -> Tensor:
            kept = tokens_of(view, clean, names) if stored is None else [layer[index] for layer in stored]
            pushed = view.encoder.tokens(adversarial, names)
            pairs = zip(names, kept, strict=True)
            return torch.stack([terms.cosine(pushed[name].spatial, k.to(view.device)) for name, k in pairs]).mean()

        return compare
    if contrast == "shallow":
        first = _spread(view, len(view.encoder.layers))[:1]

        def lift(adversarial: Tensor, clean: Tensor, index: Tensor) -> Tensor:
            del index
            (kept,) = tokens_of(view, clean, first)
            moved = (view.encoder.tokens(adversarial, first)[first[0]].spatial - kept).square()
            return -moved.flatten(1).mean(dim=1).clamp(min=1e-12).log().mean()

        return lift
    features = clean_features(view)
    forms = {"paper": terms.contrast_paper, "code": terms.contrast_code}

    def push(adversarial: Tensor, clean: Tensor, index: Tensor) -> Tensor:
        del clean
        pushed, kept = view.encoder.features(adversarial), features[index.to(features.device)]
        return terms.cosine(pushed, kept) if contrast == "cosine" else forms[contrast](pushed, kept, temperature)

    return push


def _spread(view: FitView, count: int) -> tuple[str, ...]:
    """`count` layers spread evenly over the depth, the last included; all where there are fewer."""
    known = view.encoder.layers
    if not known or not count:
        raise AttackError("this encoder names no layers, so their tokens cannot be compared; use contrast=cosine")
    return tuple(dict.fromkeys(known[math.ceil(len(known) * k / count) - 1] for k in range(1, count + 1)))


SPEC = AttackSpec(
    name="advencoder",
    summary="one perturbation (linf) or patch for every image and task, learned from the encoder alone",
    factory=AdvEncoder,
    source="Zhou et al. 2023, Downstream-agnostic Adversarial Examples, arXiv 2307.12280",
    access="encoder",
    norms=("linf", "patch"),
    fits=True,
    shipped=Path(__file__).parent.parent / "weights",
)

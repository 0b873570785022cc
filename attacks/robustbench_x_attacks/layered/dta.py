"""dta: finds the layers whose damage propagates furthest, and attacks those."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.fitting.layer_map import unpack_layers
from robustbench_x.plugin import AttackSpec, Fitted, Trainer, param
from robustbench_x.views import EncoderHandle, EncoderView, FitView
from robustbench_x_attacks.iterative import Evaluation, StepRule, ascend
from robustbench_x_attacks.layered.search import TOKENS, SearchTrainer, candidates_of, damage_of, strongest
from robustbench_x_attacks.layered.tokens import POOLED, Which, layer_tokens, token_distance
from robustbench_x_attacks.steps import apgd, momentum, steepest

__all__ = ["DTA", "SPEC"]

_SEARCH_BATCH = 16


@final
@dataclass(frozen=True, kw_only=True)
class DTA(Fitted):
    """A downstream transfer attack after the idea of Zheng et al. 2024 (arXiv 2408.01705); the design is ours.

    What is documented of theirs: sample-wise examples made on the pre-trained encoder alone, a cosine similarity of
    tokens that guides both finding and attacking the most vulnerable layers. Their loss, layer criterion and settings
    are not known to us, so nothing here reproduces a figure of theirs.

    The search attacks every layer alone for a few steps on unlabelled surrogate images, by the average cosine
    similarity of its clean and adversarial tokens, and ranks the layers by how far that turns the tokens of all layers
    on average. A layer near the end turns the features most and little before them, which tuning can take back; an
    early one moves little at all; the layers that score best do damage that spreads. The search runs once per encoder
    and budget and is cached. `search=image` ranks the layers anew for every image instead. The attack then ascends the
    mean over the chosen layers of 1 - average token cosine similarity, from a random start: at the clean image its
    gradient is exactly zero. A shallow layer costs a shallow pass. With `diversity` or `noise` the loss draws anew at
    every step, so the last images are kept; else those with the highest loss.

    Reading the layer map (`encoders[].layer_vulnerability` in report.json, a table in every report): a row per layer,
    shallow to deep. `vulnerability` is the figure that ranks, `own` the layer's own damage, `features` what of it
    reaches the pooled features, all cosine distances from 0 (nothing moved) to 2. A high figure early in the network
    is damage that is done before any later layer, tuned or not, is asked.
    """

    steps: int = param(10, "gradient steps")
    step_size: float | None = param(None, "in [0, 1] units; default 2.5 * eps / steps, with momentum 2 * eps / steps")
    rule: Literal["pgd", "mi", "apgd"] = param("pgd", "step rule: pgd, mi (momentum) or apgd")
    decay: float = param(1.0, "share of the momentum kept per step, for mi")
    layers: str = param("", "layers by name, separated by commas, pooled for the features; empty: search")
    top: int = param(3, "how many of the searched layers are attacked at once")
    search: Literal["model", "image"] = param("model", "rank the layers once per encoder, or for every image")
    search_images: int = param(32, "surrogate images that the search looks at")
    search_steps: int = param(5, "gradient steps per layer in the search")
    tokens: Which = param("all", "tokens that are compared: all, spatial or class")
    output: Literal["block", "attn", "mlp"] = param("block", "a layer's output, or its attention or MLP alone")
    pooled: float = param(0.0, "weight of the pooled features' own distance beside the layers'")
    diversity: float = param(0.0, "probability with which a step sees the image shrunk and padded")
    noise: float = param(0.0, "noise on the clean tokens, in standard deviations, that imitates tuned weights")
    average: int = param(1, "passes averaged per step, each with its own diversity and noise")
    eot: int = param(10, "passes averaged per step when the victim is random")

    def __post_init__(self) -> None:
        counts = (self.steps, self.top, self.search_images, self.search_steps, self.average, self.eot)
        if min(counts) < 1:
            raise ValueError("steps, top, search_images, search_steps, average and eot must be at least 1")
        if not 0 <= self.diversity <= 1:
            raise ValueError(f"diversity={self.diversity} must lie in [0, 1]")
        if self.noise < 0 or self.pooled < 0:
            raise ValueError("noise and pooled must not be negative")
        if self.fit_encoder:
            raise ValueError("fit_encoder: the layers of another encoder say nothing about this one's; leave it empty")

    def trainer(self, view: FitView) -> Trainer:
        """The layer search; access `encoder`. It looks at nothing where the layers are given."""
        given = self._given()
        _check_known(view.encoder, given)
        names = () if given else candidates_of(view.encoder, self.output)
        return SearchTrainer(
            view,
            layers=names,
            which=self.tokens,
            top=self.top,
            images=0 if given or self.search == "image" else self.search_images,
            batch=_SEARCH_BATCH,
            steps=self.search_steps,
            draws=self.eot,
        )

    def run(self, view: EncoderView) -> Tensor:
        """Adversarial images; access `encoder`.

        Raises:
            AttackError: A layer is unknown, or there is no layer map of this encoder and these tokens.
        """
        if view.threat.radius == 0:
            return view.inputs.clone()
        names, weights = self._chosen(view)
        which = self._which(view)
        if self.pooled:
            names = [*names, POOLED]
            weights = torch.cat([weights, weights.new_full((len(weights), 1), self.pooled)], dim=1)
        with torch.no_grad():
            clean = layer_tokens(view.encoder, view.inputs, names, which)
            spread = {name: value.std(dim=(1, 2), keepdim=True) for name, value in clean.items()}

        def objective(images: Tensor, index: Tensor) -> Evaluation:
            if self.diversity:
                images = _diverse(view, images, index, self.diversity)
            tokens = layer_tokens(view.encoder, images, names, which)
            kept = {name: value[index] for name, value in clean.items()}
            if self.noise:
                kept = {
                    name: _jitter(view, value, self.noise * spread[name][index], index) for name, value in kept.items()
                }
            return Evaluation((token_distance(tokens, kept) * weights[index]).sum(dim=1), None)

        draws = max(self.average, self.eot if view.encoder.stochastic else 1)
        return ascend(
            view,
            objective,
            self._rule(view),
            steps=self.steps,
            random_start=True,
            draws=draws,
            random_loss=bool(self.diversity or self.noise),
        ).images

    def _given(self) -> list[str]:
        return list(dict.fromkeys(name for part in self.layers.split(",") if (name := part.strip())))

    def _chosen(self, view: EncoderView) -> tuple[list[str], Tensor]:
        """The layers that any image is attacked at, and each image's weight on each, `(N, L)`."""
        given = self._given()
        if given:
            return given, view.inputs.new_full((len(view.inputs), len(given)), 1 / len(given))
        if self.search == "image":
            names = candidates_of(view.encoder, self.output)
            draws = self.eot if view.encoder.stochastic else 1
            chosen = strongest(damage_of(view, names, self.tokens, self.search_steps, draws).spread, self.top)
        else:
            found = unpack_layers(view.artifact or {})
            if found is None or not set(found.names) <= {*view.encoder.layers, *view.encoder.parts}:
                raise AttackError(
                    "dta has no layer map of this encoder: let rbx audit make one, name layers=..., or use search=image"
                )
            names = found.names
            chosen = found.chosen.to(view.inputs.device).expand(len(view.inputs), -1)
        used = chosen.any(dim=0)
        weights = chosen[:, used].float() / chosen.sum(dim=1, keepdim=True)
        return [name for name, kept in zip(names, used.tolist(), strict=True) if kept], weights

    def _which(self, view: EncoderView) -> Which:
        """The tokens that are compared: those that the layer map is of, where there is one."""
        if view.artifact is None or TOKENS not in view.artifact:
            return self.tokens
        choices: tuple[Which, ...] = get_args(Which)
        return choices[int(view.artifact[TOKENS])]

    def _rule(self, view: EncoderView) -> StepRule:
        radius = view.threat.radius
        usual = (2.0 if self.rule == "mi" else 2.5) * radius / self.steps
        size = usual if self.step_size is None else self.step_size
        rules: Mapping[str, StepRule] = {
            "pgd": steepest(size),
            "mi": momentum(size, self.decay),
            "apgd": apgd(self.steps),
        }
        return rules[self.rule]


def _check_known(encoder: EncoderHandle, layers: Sequence[str]) -> None:
    """Refuses a layer that the encoder does not have, before anything is attacked."""
    known = (*encoder.layers, *encoder.parts, POOLED)
    unknown = [name for name in layers if name not in known]
    if unknown:
        raise AttackError(f"the encoder has no layer '{unknown[0]}'; it has {', '.join(known)}")


def _diverse(view: EncoderView, images: Tensor, index: Tensor, probability: float) -> Tensor:
    """Input diversity (Xie et al., CVPR 2019): an image shrunk to 0.9 to 1 of its side, put anywhere on black."""
    draws = view.random.uniform((4,), index)
    shrunk = draws[:, 0] < probability
    scale = torch.where(shrunk, 0.9 + 0.1 * draws[:, 1], torch.ones_like(draws[:, 1]))
    room = (1 - scale) / scale
    matrix = torch.zeros(len(images), 2, 3, device=images.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / scale
    matrix[:, 0, 2], matrix[:, 1, 2] = room * (2 * draws[:, 2] - 1), room * (2 * draws[:, 3] - 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp(0, 1)


def _jitter(view: EncoderView, tokens: Tensor, size: Tensor, index: Tensor) -> Tensor:
    """`tokens` with Gaussian noise of `size` on every value."""
    shape: Sequence[int] = tokens.shape[1:]
    return tokens + size * view.random.normal(shape, index)


SPEC = AttackSpec(
    name="dta",
    summary="downstream transfer: searches the layers whose damage propagates, and attacks their tokens",
    factory=DTA,
    source="after Zheng et al. 2024, arXiv 2408.01705 (our design)",
    access="encoder",
    norms=("linf", "l2", "patch"),
    fits=True,
    fitted_by=("layers", "top", "search", "search_images", "search_steps", "tokens", "output"),
)

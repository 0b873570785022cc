"""The layer search: attack every layer alone and see how far the damage done there spreads over all layers."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.fitting.layer_map import LayerMap, pack_layers
from robustbench_x.randomness import SampleRandom, derive_seed
from robustbench_x.views import EncoderHandle, EncoderView, FitView
from robustbench_x_attacks.iterative import Evaluation, Objective, ascend
from robustbench_x_attacks.layered.tokens import Which, layer_tokens, token_distance
from robustbench_x_attacks.steps import steepest

__all__ = ["TOKENS", "Damage", "SearchTrainer", "candidates_of", "damage_of", "strongest"]

TOKENS = "tokens"
"""The artefact's tensor that says which tokens the map is of, as a place in the choices of `Which`."""


class Damage(NamedTuple):
    """What attacking each layer alone does, `(N, L)` each, as cosine distances in [0, 2].

    `spread` is the mean over the tokens of all layers, shallower ones included, `own` that of the layer that was
    attacked, `features` that of the pooled features.
    """

    spread: Tensor
    own: Tensor
    features: Tensor


def candidates_of(encoder: EncoderHandle, part: str) -> tuple[str, ...]:
    """What the search chooses from: the layers, or the attention or MLP inside each.

    Raises:
        AttackError: The encoder names none.
    """
    names = encoder.layers if part == "block" else tuple(n for n in encoder.parts if n.endswith(f".{part}"))
    if not names:
        what = "layers" if part == "block" else f"'{part}' inside its layers"
        raise AttackError(f"this attack searches the layers, and the encoder names no {what}: use embed")
    return names


def damage_of(view: EncoderView, layers: Sequence[str], which: Which, steps: int, draws: int = 1) -> Damage:
    """Attacks each of `layers` alone for `steps` sign steps and measures what becomes of the tokens and the features.

    Args:
        view: Images, budget, randomness and encoder.
        layers: Names of layers or parts.
        which: The tokens that are compared.
        steps: Gradient steps per layer, each of 2.5 * eps / steps.
        draws: Passes averaged per step, for a defence that draws anew each time.
    """
    encoder = view.encoder
    names = list(dict.fromkeys([*encoder.layers, *layers]))
    with torch.no_grad():
        clean = layer_tokens(encoder, view.inputs, names, which)
        features = encoder.features(view.inputs)
    rule = steepest(2.5 * view.threat.radius / steps)
    damages = []
    for layer in layers:
        objective = _away(view, {layer: clean[layer]}, which)
        images = ascend(view, objective, rule, steps=steps, random_start=True, draws=draws).images
        with torch.no_grad():
            tokens = layer_tokens(encoder, images, names, which)
            everywhere = {name: tokens[name] for name in encoder.layers}
            damages.append(
                (
                    token_distance(everywhere, clean).mean(dim=1),
                    token_distance({layer: tokens[layer]}, clean)[:, 0],
                    1 - F.cosine_similarity(encoder.features(images), features, dim=1),
                )
            )
    return Damage(*(torch.stack(column, dim=1) for column in zip(*damages, strict=True)))


def strongest(spread: Tensor, top: int) -> Tensor:
    """Which layers are attacked, as booleans of the shape of `spread` `(..., L)`: the `top` with most damage.

    Of equal ones the deeper.
    """
    order = spread.flip(-1).argsort(dim=-1, descending=True, stable=True)
    order = spread.shape[-1] - 1 - order
    chosen = torch.zeros_like(spread, dtype=torch.bool)
    return chosen.scatter(-1, order[..., : min(top, spread.shape[-1])], True)


@final
class SearchTrainer:
    """The search over a model: each step attacks every layer on one batch of surrogate images.

    Args:
        view: What the training is handed.
        layers: The candidates, one per layer of the encoder.
        which: The tokens that are compared.
        top: How many layers are chosen.
        images: Surrogate images looked at; 0 searches nothing.
        batch: Images per step.
        steps: Gradient steps per layer.
        draws: Passes averaged per step where the defence is random.
    """

    def __init__(
        self,
        view: FitView,
        *,
        layers: Sequence[str],
        which: Which,
        top: int,
        images: int,
        batch: int,
        steps: int,
        draws: int,
    ) -> None:
        self._images = min(images, len(view.surrogate))
        self.batch = min(batch, self._images)
        self.steps = math.ceil(self._images / self.batch) if images else 0
        self._draws = draws if view.encoder.stochastic else 1
        self._view = view
        self._layers = tuple(layers)
        self._which = which
        self._top = top
        self._inner = steps
        self._sums = torch.zeros(3, len(layers), dtype=torch.float64)
        self._count = torch.zeros((), dtype=torch.float64)

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """See `Trainer`; the terms are the damage that the strongest and the weakest layer have done so far."""
        view = self._view
        inputs = view.surrogate.batch(index[: self._images - number * self.batch])
        seeds = [derive_seed(view.seed, "search", number, place) for place in range(len(inputs))]
        handed = EncoderView(
            inputs=inputs,
            threat=view.threat,
            random=SampleRandom(seeds, device=view.device),
            exhaustive=True,
            encoder=view.encoder,
        )
        damage = damage_of(handed, self._layers, self._which, self._inner, self._draws)
        self._sums += torch.stack([part.double().sum(dim=0).cpu() for part in damage])
        self._count += len(inputs)
        mean = self._sums[0] / self._count
        return {"strongest": mean.max(), "weakest": mean.min()}

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return {"sums": self._sums, "count": self._count}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        self._sums, self._count = state["sums"].clone(), state["count"].clone()

    def result(self) -> dict[str, Tensor]:
        """See `Trainer`: the layer map; nothing where nothing was searched."""
        if not self.steps:
            return {}
        spread, own, features = self._sums / self._count
        found = LayerMap(self._layers, spread, own, features, strongest(spread, self._top))
        return {**pack_layers(found), TOKENS: torch.tensor(get_args(Which).index(self._which))}


def _away(view: EncoderView, clean: Mapping[str, Tensor], which: Which) -> Objective:
    layers = list(clean)

    def objective(images: Tensor, index: Tensor) -> Evaluation:
        tokens = layer_tokens(view.encoder, images, layers, which)
        kept = {name: value[index] for name, value in clean.items()}
        return Evaluation(token_distance(tokens, kept).mean(dim=1), None)

    return objective

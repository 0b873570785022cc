"""AnyAttack's training inside the harness: both stages, by one process or several, resumed exactly."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.fitting.adam import optimizer_state, restore_optimizer
from robustbench_x.randomness import derive_seed
from robustbench_x.victim import fresh_draw
from robustbench_x.views import EncoderHandle, FitView
from robustbench_x_attacks.anyattack.augment import deranged, others, random_views
from robustbench_x_attacks.anyattack.checkpoint import pack
from robustbench_x_attacks.anyattack.codebook import CompactDecoder, place_codes
from robustbench_x_attacks.anyattack.decoder import Decoder, Mode, noise_for
from robustbench_x_attacks.anyattack.losses import (
    alignment,
    bidirectional,
    info_nce,
    learning_rate_at,
    temperature_at,
)
from robustbench_x_attacks.anyattack.norm import share_batch_norm
from robustbench_x_attacks.universal.pattern import check_moved

__all__ = ["DecoderTrainer", "LossName", "Recipe", "ReleasedTrainer", "Stage"]

Stage = Literal["pretrain", "finetune"]
LossName = Literal["bicl", "cosine"]

_DEGREES = 15.0
_PLACED_BY, _PART = 2048, 64


class Recipe(NamedTuple):
    """How a decoder is trained; see the parameters of `AnyAttack`."""

    stage: Stage
    mode: Mode
    loss: LossName
    k: int
    temperature_start: float
    temperature_end: float
    temperature_steps: int
    steps: int
    batch: int
    rate: float
    weight_decay: float
    restart: int
    augment: bool
    chunk: int = 0


class _Meeting(NamedTuple):
    """Noise put on images that one encoder looks at; `clean` gives these for a part of this process's rows."""

    encoder: EncoderHandle
    clean: Callable[[slice], Tensor]


class _Goal(NamedTuple):
    """What the rows of a step must lead to."""

    wanted: list[Tensor]
    """Embeddings of this process's targets, by encoder."""
    meetings: list[_Meeting]


@final
class DecoderTrainer:
    """AdamW on a decoder's weights, under a cosine that restarts; batch norm stays in train mode.

    Of several processes each takes its rows of the batch, and all take the same step, the one that a single process
    would take: every draw is made for the whole batch, the embeddings are gathered before the loss, so that everybody's
    are everybody's negatives, batch norm counts the rows of all, and the images of other processes' rows that a noise
    is put on are gathered as bytes. A random defence alone draws by process.

    With a `chunk` the encoders see so many images at a time, and the loss is that of the whole batch all the same: the
    embeddings come first, without a graph, then the loss and its gradient in them, then each chunk again, forwards and
    back (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). The decoder stays
    whole, so its batch norm sees the whole batch, and chunks change the gradient by rounding alone; they cost one more
    forward pass per noisy image. A random defence draws by chunk, and the same both times.

    Args:
        view: What the training is handed; its partners are the auxiliary encoders of the second stage.
        decoder: At its start.
        recipe: How.

    Raises:
        AttackError: There are fewer than two surrogate images: no target would have another image to be put on.
    """

    def __init__(self, view: FitView, decoder: Decoder, recipe: Recipe) -> None:
        if len(view.surrogate) < 2:
            raise AttackError(f"anyattack needs two surrogate images at least, there are {len(view.surrogate)}")
        self.steps = recipe.steps
        self.batch = min(recipe.batch, len(view.surrogate))
        self._view = view
        self._recipe = recipe
        self._encoders = (view.encoder, *view.partners)
        if view.world.size > 1:
            share_batch_norm(decoder, view.world)
        # The layout that convolutions like best: a fifth off the decoder's time on two CPU cores.
        decoder.to(view.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._decoder = decoder.train().requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            self._decoder.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay
        )
        self._moved = torch.tensor(False, device=view.device)
        if isinstance(decoder, CompactDecoder) and not decoder.placed:
            self._place(decoder)

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """See `Trainer`."""
        recipe, world, view = self._recipe, self._view.world, self._view
        alone = world.size == 1
        with nullcontext() if alone else fresh_draw(derive_seed(view.seed, number, world.rank), view.device):
            goal = self._pretrain(number, index) if recipe.stage == "pretrain" else self._finetune(number, index)
            with torch.enable_grad():
                with torch.autocast(view.device.type, torch.bfloat16, enabled=view.bf16):
                    noise = noise_for(self._decoder, goal.wanted[0], view.threat.eps, recipe.mode)
                self._optimizer.zero_grad(set_to_none=True)
                backward = self._backward_in_chunks if 0 < recipe.chunk < len(noise) else self._backward
                terms = backward(goal, noise.float(), number)
        world.average_(self._gradients())
        self._check_gradients(number)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate_at(number, rate=recipe.rate, restart=recipe.restart)
        self._optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        moments = optimizer_state(self._optimizer, list(self._decoder.parameters()), "adam.")
        state = {f"decoder.{name}": tensor for name, tensor in self._decoder.state_dict().items()}
        return {**state, **moments, "moved": self._moved}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        self._decoder.load_state_dict({name: state[f"decoder.{name}"] for name in self._decoder.state_dict()})
        restore_optimizer(self._optimizer, list(self._decoder.parameters()), "adam.", state)
        self._moved = state["moved"].to(self._view.device, copy=True)

    def result(self) -> dict[str, Tensor]:
        """See `Trainer`; AttackError when no step had a gradient."""
        check_moved(self._moved)
        decoder = self._decoder
        state = {name: tensor.contiguous() for name, tensor in decoder.state_dict().items()}
        return pack(state, size=decoder.size, encoder_sha256=self._view.encoder.sha256)

    def _pretrain(self, number: int, index: Tensor) -> _Goal:
        """Each noise on K other images of its batch (K-augmentation)."""
        view, world = self._view, self._view.world
        mine = torch.arange(len(index))[world.rows(len(index))]
        pixels = view.surrogate.batch(index[mine])
        targets = self._shown(pixels, number, "targets", mine, len(index))
        levels = None if world.size == 1 else world.gather(pixels.mul(255).round().to(torch.uint8))

        def shuffled(order: Tensor, part: slice) -> Tensor:
            """The images at a part of these rows of the whole batch, as their own process sees them."""
            rows = order[part]
            if levels is None:
                return targets[rows.to(targets.device)]
            return self._shown(levels[rows.to(levels.device)].float().div(255), number, "targets", rows, len(index))

        generator = self._generator("shuffle", number)
        shuffle = torch.randperm if self._recipe.mode == "compat" else deranged
        orders = [shuffle(len(index), generator=generator)[mine] for _ in range(self._recipe.k)]
        meetings = [_Meeting(view.encoder, functools.partial(shuffled, order)) for order in orders]
        return _Goal(self._wanted([view.encoder], targets), meetings)

    def _finetune(self, number: int, index: Tensor) -> _Goal:
        """Each noise on one image drawn apart, for every encoder."""
        surrogate, recipe = self._view.surrogate, self._recipe
        mine = torch.arange(len(index))[self._view.world.rows(len(index))]
        generator = self._generator("clean", number)
        drawn = others(index, len(surrogate), generator, distinct=recipe.mode == "fixed")[mine]
        surrogate.expect(drawn)  # read while the targets are embedded
        targets = self._shown(surrogate.batch(index[mine]), number, "targets", mine, len(index))
        wanted = self._wanted(self._encoders, targets)
        clean = self._shown(surrogate.batch(drawn), number, "clean views", mine, len(index))
        return _Goal(wanted, [_Meeting(encoder, lambda part: clean[part]) for encoder in self._encoders])

    def _backward(self, goal: _Goal, noise: Tensor, number: int) -> dict[str, Tensor]:
        """The loss terms, their gradient in the decoder's weights."""
        seen = [m.encoder.features((m.clean(slice(None)) + noise).clamp(0, 1)) for m in goal.meetings]
        loss, terms = self._loss(goal.wanted, seen, number)
        loss.backward()  # type: ignore[no-untyped-call]
        return terms

    def _backward_in_chunks(self, goal: _Goal, noise: Tensor, number: int) -> dict[str, Tensor]:
        """The same, with `chunk` images at a time in the encoders."""
        parts = list(_parts(len(noise), self._recipe.chunk))
        still = noise.detach()

        def look(which: int, meeting: _Meeting, part: slice, noisy: Tensor) -> Tensor:
            seed = derive_seed(self._view.seed, "chunk", number, which, part.start, self._view.world.rank)
            with fresh_draw(seed, noise.device) if meeting.encoder.stochastic else nullcontext():
                return meeting.encoder.features((meeting.clean(part) + noisy).clamp(0, 1))

        with torch.no_grad():
            seen = [torch.cat([look(i, m, part, still[part]) for part in parts]) for i, m in enumerate(goal.meetings)]
        leaves = [features.requires_grad_() for features in seen]
        loss, terms = self._loss(goal.wanted, leaves, number)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = []
        for part in parts:
            piece = still[part].requires_grad_()
            for i, (meeting, leaf) in enumerate(zip(goal.meetings, leaves, strict=True)):
                assert leaf.grad is not None, "every embedding is in the loss"
                look(i, meeting, part, piece).backward(leaf.grad[part])  # type: ignore[no-untyped-call]
            gradients.append(piece.grad)
        noise.backward(torch.cat([gradient for gradient in gradients if gradient is not None]))  # type: ignore[no-untyped-call]
        return terms

    def _loss(self, wanted: list[Tensor], seen: list[Tensor], number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the whole batch, from every process's rows, and its terms."""
        recipe, gather = self._recipe, self._view.world.gather
        goals, found = [gather(features) for features in wanted], [gather(features) for features in seen]
        if recipe.stage == "finetune":
            measure = bidirectional if recipe.loss == "bicl" else alignment
            names = (recipe.loss, *(f"{recipe.loss}_aux{i}" for i in range(1, len(goals))))
            terms = {name: measure(met, goal) for name, met, goal in zip(names, found, goals, strict=True)}
            return torch.stack(list(terms.values())).sum(), terms
        compat = recipe.mode == "compat"
        temperature = temperature_at(
            number,
            start=recipe.temperature_start,
            end=recipe.temperature_end,
            steps=recipe.temperature_steps,
            epoch=max(1, len(self._view.surrogate) // self.batch) if compat else None,
        )
        keys = [torch.stack(found).mean(dim=0)] if compat else found
        loss = torch.stack([info_nce(goals[0], key, temperature) for key in keys]).mean()
        closeness = torch.stack([F.cosine_similarity(goals[0], met.detach(), dim=1).mean() for met in found])
        return loss, {"info_nce": loss, "cosine": closeness.mean()}

    @torch.no_grad()
    def _wanted(self, encoders: Sequence[EncoderHandle], targets: Tensor) -> list[Tensor]:
        parts = list(_parts(len(targets), self._recipe.chunk or len(targets)))
        return [torch.cat([encoder.features(targets[part]) for part in parts]) for encoder in encoders]

    def _shown(self, images: Tensor, number: int, what: str, rows: Tensor, batch: int) -> Tensor:
        """`images` at these rows of a batch, augmented by the draws of the batch."""
        if not self._recipe.augment:
            return images
        degrees = _DEGREES if self._recipe.stage == "pretrain" else 0.0
        return random_views(images, self._generator(what, number), degrees=degrees, rows=rows, batch=batch)

    def _generator(self, what: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self._view.seed, what, number))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._decoder.parameters() if p.grad is not None]

    def _place(self, decoder: CompactDecoder) -> None:
        """The first process places the codes, for all of them."""
        world, device = self._view.world, self._view.device
        if world.rank == 0:
            place_codes(decoder, self._embeddings(), self._generator("codes", 0))
        if world.size > 1:
            mean, places = world.told((decoder.mean.cpu(), decoder.places.cpu()))
            decoder.mean, decoder.places = mean.to(device), places.to(device)

    @torch.no_grad()
    def _embeddings(self) -> Tensor:
        """Embeddings of up to 2,048 surrogate images, evenly spaced."""
        count = min(len(self._view.surrogate), _PLACED_BY)
        index = torch.arange(count) * (len(self._view.surrogate) // count)
        parts = torch.split(index, _PART)
        return torch.cat([self._view.encoder.features(self._view.surrogate.batch(part)) for part in parts])

    def _check_gradients(self, number: int) -> None:
        largest = torch.stack([gradient.abs().amax() for gradient in self._gradients()]).amax()
        if not largest.isfinite():
            raise AttackError(f"the gradient of step {number} holds NaN or infinity, so nothing can be learned from it")
        self._moved |= largest > 0


@final
class ReleasedTrainer:
    """No training at all: the artefact is a released decoder as it is.

    Args:
        view: Its encoder is the one whose embeddings the decoder reads.
        decoder: As read from its file.
    """

    steps = 0
    batch = 0

    def __init__(self, view: FitView, decoder: Decoder) -> None:
        self._view = view
        self._decoder = decoder

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """Never called."""
        raise AssertionError("a released decoder takes no steps")

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def result(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        decoder = self._decoder
        return pack(decoder.state_dict(), size=decoder.size, encoder_sha256=self._view.encoder.sha256)


def _parts(count: int, each: int) -> Iterator[slice]:
    return (slice(start, min(start + each, count)) for start in range(0, count, each))

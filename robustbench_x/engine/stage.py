"""A stage at work: one encoder and one data set loaded, heads built, clean features computed once."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustbench_x.config import AuditConfig
from robustbench_x.data.dataset import Dataset, Item, draw_subset
from robustbench_x.encoders.encoder import LoadedEncoder
from robustbench_x.engine.progress import Progress
from robustbench_x.errors import DataError, NothingEvaluatedError
from robustbench_x.heads.base import FittedHead
from robustbench_x.heads.build import build_head
from robustbench_x.integrity import Seal, modules_within
from robustbench_x.judge import Reading, read_features
from robustbench_x.plan import UNDEFENDED, Stage
from robustbench_x.randomness import derive_seed
from robustbench_x.registry import Registry
from robustbench_x.victim import DefendedEncoder, Shield

__all__ = ["Batch", "StageAtWork", "select_items"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive samples of the evaluation split, decoded.

    `images` `(N, 3, H, W)` in [0, 1] holds the readable ones, in the order of `items`; `unreadable` the error
    of every other by id, with the position of each sample in the whole evaluation.
    """

    number: int
    images: Tensor
    items: tuple[Item, ...]
    positions: tuple[int, ...]
    digests: tuple[str, ...]
    unreadable: Mapping[int, tuple[Item, str]]


@final
class StageAtWork:
    """What every craft of a stage shares.

    Args:
        stage: The plan's part.
        loaded: The encoder, on its device.
        dataset: The data set.
        shields: Built defences by title.
        config: The audit.
        registry: Where heads are looked up.
        device: Where to compute.
        batch_size: Samples per stored batch.
        progress: Told what takes time.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        loaded: LoadedEncoder,
        dataset: Dataset,
        shields: Mapping[str, Shield],
        config: AuditConfig,
        registry: Registry,
        device: torch.device,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self.stage = stage
        self.encoder = loaded.encoder
        self.dataset = dataset
        self.device = device
        self.seed = config.seed
        self.judge_draws = config.judge_draws
        self.shields: dict[str, Shield | None] = {UNDEFENDED: None, **shields}
        self.items = select_items(dataset, stage.samples, config)
        self.heads: dict[str, FittedHead] = {}
        self.labels: dict[str, Tensor] = {}
        for name in stage.heads:
            doing = f"{stage.encoder}: head {name} on {stage.data}"
            progress.task(doing)
            self.heads[name] = build_head(
                name,
                loaded=loaded,
                dataset=dataset,
                registry=registry,
                seed=config.seed,
                device=device,
                batch_size=batch_size,
                progress=_counting(progress, doing),
            ).to(device)
            self.labels[name] = self.heads[name].match(dataset.classes)[[item.label for item in self.items]].to(device)
        behind = modules_within(*(shield.defense for shield in shields.values()))
        self.seal = Seal(self.encoder, *self.heads.values(), *behind)
        self._groups = [range(i, min(i + batch_size, len(self.items))) for i in range(0, len(self.items), batch_size)]
        self._pixels: dict[int, tuple[Tensor, tuple[int, ...], dict[int, tuple[Item, str]]]] = {}
        self._clean: dict[tuple[str, int], Reading] = {}

    @property
    def num_batches(self) -> int:
        """How many batches the evaluation split has."""
        return len(self._groups)

    def batch_length(self, number: int) -> int:
        """Samples in batch `number`, readable or not."""
        return len(self._groups[number])

    def batch(self, number: int) -> Batch:
        """Batch `number`, decoded once and kept as bytes."""
        if number not in self._pixels:
            self._pixels[number] = self._decode(self._groups[number])
        levels, positions, unreadable = self._pixels[number]
        return Batch(
            number=number,
            images=levels.to(self.device).float().div(255),
            items=tuple(self.items[p] for p in positions),
            positions=positions,
            digests=tuple(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in levels),
            unreadable=unreadable,
        )

    def defended(self, shield: str) -> DefendedEncoder:
        """The encoder as deployed behind `shield`."""
        return DefendedEncoder(encoder=self.encoder, shield=self.shields[shield])

    def clean(self, shield: str, batch: Batch, *, part: slice) -> Reading:
        """Clean features of part of a batch behind `shield`, computed once for all heads and attacks."""
        key = (shield, batch.number)
        if key not in self._clean:
            size = max(1, min(_CLEAN_PART, part.stop - part.start))  # a halved part has to fit too
            parts = [
                read_features(
                    batch.images[start : start + size],
                    self.defended(shield),
                    draws=self.judge_draws,
                    seed=derive_seed(self.seed, "clean", batch.number, start),
                ).features
                for start in range(0, len(batch.images), size)
            ]
            self._clean[key] = Reading(features=torch.cat(parts, dim=1))
        return Reading(features=self._clean[key].features[:, part])

    @torch.no_grad()
    def answers(self) -> dict[str, list[float]]:
        """What every head makes of two fixed images, as four fixed projections of the logits of each.

        Changed code or heads show here, where no digest of weights looks.
        """
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, *self.encoder.input_size, generator=generator).to(self.device)
        features = self.defended(UNDEFENDED).features(images)
        answers = {}
        for name, head in self.heads.items():
            logits = head(features).nan_to_num().cpu()
            directions = torch.randn(head.num_classes, 4, generator=torch.Generator().manual_seed(1))
            answers[name] = (logits @ directions).flatten().tolist()
        return answers

    def data_digest(self) -> str:
        """A digest of the ids and pixels of every evaluated sample."""
        digest = hashlib.sha256()
        for number in range(self.num_batches):
            batch = self.batch(number)
            for item, pixels in zip(batch.items, batch.digests, strict=True):
                digest.update(f"{item.id}:{item.label}:{pixels};".encode())
            for item, _ in batch.unreadable.values():
                digest.update(f"{item.id}:unreadable;".encode())
        return digest.hexdigest()

    def unreadable(self) -> tuple[str, ...]:
        """Why each evaluated image that could not be read could not be."""
        return tuple(
            message for number in range(self.num_batches) for _, message in self.batch(number).unreadable.values()
        )

    def _decode(self, group: Sequence[int]) -> tuple[Tensor, tuple[int, ...], dict[int, tuple[Item, str]]]:
        levels, positions = [], []
        unreadable: dict[int, tuple[Item, str]] = {}
        for position in group:
            item = self.items[position]
            try:
                pixels = self.encoder.preprocessing(item.load())
            except DataError as error:
                unreadable[position] = (item, str(error))
                continue
            levels.append(pixels.mul(255).round().to(torch.uint8))
            positions.append(position)
        size = (0, 3, *self.encoder.input_size)
        stacked = torch.stack(levels) if levels else torch.empty(size, dtype=torch.uint8)
        return stacked, tuple(positions), unreadable


_CLEAN_PART = 32


def _counting(progress: Progress, doing: str) -> Callable[[int, int], None]:
    return lambda done, total: progress.task(f"{doing}: {done} of {total} images")


def select_items(dataset: Dataset, samples: int | None, config: AuditConfig) -> tuple[Item, ...]:
    """The evaluated samples: a seeded subset of the test split, or one shard of it.

    Raises:
        NothingEvaluatedError: The shard is empty.
    """
    items = draw_subset(dataset.test, samples, seed=config.seed)
    if config.shard:
        index, count = map(int, config.shard.split("/"))
        items = items[index - 1 :: count]
    if not items:
        raise NothingEvaluatedError(f"{dataset.source}: nothing to evaluate (shard {config.shard})")
    return items

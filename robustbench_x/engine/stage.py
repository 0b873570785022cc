"""A stage at work: one encoder and one data set loaded, heads built, clean features computed once."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustbench_x.config import AuditConfig
from robustbench_x.data.dataset import Dataset, Item, draw_subset
from robustbench_x.encoders.encoder import Encoder, LoadedEncoder
from robustbench_x.engine.progress import Progress
from robustbench_x.engine.shields import describe_shields
from robustbench_x.engine.targets import Targets
from robustbench_x.errors import DataError, NothingEvaluatedError
from robustbench_x.heads.base import CAPTIONED, FittedHead
from robustbench_x.heads.build import build_head
from robustbench_x.integrity import Seal, modules_within
from robustbench_x.judge import Reading, read_features
from robustbench_x.plan import UNDEFENDED, Stage
from robustbench_x.randomness import derive_seed
from robustbench_x.registry import Registry
from robustbench_x.result import DefenseInfo, FitInfo
from robustbench_x.victim import DefendedEncoder, Shield

__all__ = ["Batch", "StageAtWork", "select_items"]

PUBLIC = ""
"""Reads every head that has no tuned encoder of its own."""


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
        loaded: The public encoder, on its device.
        dataset: The data set.
        shields: Built defences by title.
        learned: What those that are fitted have learned.
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
        learned: Mapping[str, FitInfo],
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
        self.config = config
        self.learned = learned
        self.seed = config.seed
        self.judge_draws = config.judge_draws
        self.shields: dict[str, Shield | None] = {UNDEFENDED: None, **shields}
        self.text = loaded.text
        self.items = select_items(dataset, stage.samples, config)
        everyone = draw_subset(dataset.test, stage.samples, seed=config.seed)
        self.aims = any(registry.attacks[craft.attack.name].aims for craft in stage.crafts)
        self._everyone = everyone
        self.targets = Targets(everyone, self.encoder.preprocessing, seed=config.seed)
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
                gallery=everyone,
                allow_pickle=config.allow_pickle,
                progress=_following(progress, doing),
            ).to(device)
            if "tuned_sha256" in self.heads[name].settings:
                progress.say(f"{doing}: {_tuning_words(self.heads[name])}")
            self.labels[name] = self.heads[name].labels(dataset.classes, self.items).to(device)
        behind = modules_within(*(shield.defense for shield in shields.values()))
        self.seal = Seal(self.encoder, *self.heads.values(), *behind)
        self._groups = [range(i, min(i + batch_size, len(self.items))) for i in range(0, len(self.items), batch_size)]
        self._pixels: dict[int, tuple[Tensor, tuple[int, ...], dict[int, tuple[Item, str]]]] = {}
        self._clean: dict[tuple[str, str, int], Reading] = {}

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

    def body(self, head: str | None) -> Encoder:
        """The encoder that `head` reads: its tuned one where it has one, else the public one; the latter for None."""
        tuned = None if head is None else self.heads[head].encoder
        return self.encoder if tuned is None else tuned

    def reader(self, head: str) -> str:
        """What heads share a reading: the name of a tuned head, for itself alone, or nothing for every public one."""
        return PUBLIC if self.heads[head].encoder is None else head

    def defended(self, shield: str, head: str) -> DefendedEncoder:
        """The encoder that `head` reads, as deployed behind `shield`."""
        return DefendedEncoder(encoder=self.body(head), shield=self.shields[shield], watcher=self.encoder)

    def clean(self, shield: str, head: str, batch: Batch, *, part: slice) -> Reading:
        """Clean features of part of a batch behind `shield` as `head` reads them.

        Computed once for all attacks, and for all heads that read the public encoder.
        """
        key = (shield, self.reader(head), batch.number)
        if key not in self._clean:
            size = max(1, min(_CLEAN_PART, part.stop - part.start))  # a halved part has to fit too
            parts = [
                read_features(
                    batch.images[start : start + size],
                    self.defended(shield, head),
                    draws=self.judge_draws,
                    seed=derive_seed(self.seed, "clean", batch.number, start),
                )
                for start in range(0, len(batch.images), size)
            ]
            scores = [reading.acceptance for reading in parts if reading.acceptance is not None]
            self._clean[key] = Reading(
                features=torch.cat([reading.features for reading in parts], dim=1),
                acceptance=torch.cat(scores) if scores else None,
            )
        held = self._clean[key]
        return Reading(
            features=held.features[:, part], acceptance=None if held.acceptance is None else held.acceptance[part]
        )

    def forget(self, batch: Batch) -> None:
        """Drops the clean features of `batch`, so that they are read again."""
        self._clean = {key: held for key, held in self._clean.items() if key[2] != batch.number}

    def defenses(self) -> list[DefenseInfo]:
        """What the report says of each defence of this stage."""
        shields = {title: shield for title, shield in self.shields.items() if shield is not None}
        return describe_shields(
            shields,
            self.learned,
            stage=self.stage,
            config=self.config,
            encoder=self.encoder,
            images=self.batch(0).images,
        )

    def probe_images(self) -> Tensor:
        """Two fixed images `(2, 3, H, W)`, the same in every run: what the proofs ask about."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(2, 3, *self.encoder.input_size, generator=generator).to(self.device)

    @torch.no_grad()
    def answers(self) -> dict[str, list[float]]:
        """What every head makes of two fixed images, as four fixed projections of the logits of each.

        Changed code or heads show here, where no digest of weights looks.
        """
        images = self.probe_images()
        features: dict[str, Tensor] = {}
        answers = {}
        for name, head in self.heads.items():
            reader = self.reader(name)
            if reader not in features:
                features[reader] = self.defended(UNDEFENDED, name).features(images)
            logits = head(features[reader]).nan_to_num().cpu()
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

    def texts(self) -> dict[str, str]:
        """Digests of what the samples of all shards are said to show, and of what reads it; empty where nobody reads.

        Where an attack aims, the targets hang on all of them too.
        """
        readers = {name: head for name, head in self.heads.items() if "text_sha256" in head.settings}
        readers |= {name: head for name, head in self.heads.items() if head.task in CAPTIONED}
        found = {
            name: str(head.settings.get("text_sha256") or head.settings.get("reader_sha256"))
            for name, head in readers.items()
        }
        if self.aims or any(head.task in CAPTIONED for head in readers.values()):
            digest = hashlib.sha256()
            for item in self._everyone:
                digest.update(repr((item.id, item.label, item.captions)).encode())
            found["gallery of all shards"] = digest.hexdigest()
        return found

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


def _following(progress: Progress, doing: str) -> Callable[[str], None]:
    return lambda text: progress.task(f"{doing}: {text}")


def _tuning_words(head: FittedHead) -> str:
    """What became of a tuned head, in a line: accuracies and losses on the held-out images, drift, digest."""
    made = head.settings
    return (
        f"held-out accuracy {made['probe_held_out_accuracy']:.3f} (probe) to {made['held_out_accuracy']:.3f}, loss "
        f"{made['probe_held_out_loss']:.3g} to {made['held_out_loss']:.3g}; feature cosine to the public encoder "
        f"{made['feature_cosine']:.3f}; sha256 {made['tuned_sha256']}"
    )


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

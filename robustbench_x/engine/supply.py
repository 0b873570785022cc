"""How an artefact is come by: a file, a shipped one, the cache, or a training now; and hardened encoders likewise."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from robustbench_x import cache
from robustbench_x.data.dataset import Dataset, draw_subset
from robustbench_x.encoders.encoder import Encoder
from robustbench_x.encoders.source import load_encoder
from robustbench_x.engine.isolation import isolated
from robustbench_x.engine.progress import Progress
from robustbench_x.errors import SampleError, SourceError
from robustbench_x.fitting.artifact import Artifact, check_artifact, read_artifact, write_artifact
from robustbench_x.fitting.defense_job import DefenseJob, decisive
from robustbench_x.fitting.ground import Ground, Job, Pool, make_pool, stream_pool
from robustbench_x.fitting.harden import HardenJob, Inner
from robustbench_x.fitting.imitation import ImitationJob
from robustbench_x.fitting.job import FitJob
from robustbench_x.fitting.patches import make_patches
from robustbench_x.fitting.stream import stream_digest
from robustbench_x.hardening import Hardening, HardeningSpec
from robustbench_x.integrity import Seal
from robustbench_x.plan import UNDEFENDED
from robustbench_x.plugin import AttackSpec, DefenseSpec, FittedAttack, FittedDefense, Spec
from robustbench_x.registry import Registry
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import Shield
from robustbench_x.views import Knowledge
from robustbench_x.world import SINGLE, World

__all__ = ["DEFAULT_SURROGATE", "SHIPPED", "Perceived", "Supplied", "Supply", "find_defense"]

DEFAULT_SURROGATE = "packaged:crops"
"""What an attacker trains on when no surrogate data is named."""
SHIPPED = "shipped"


class Supplied(NamedTuple):
    """An artefact, and where it came from in words."""

    artifact: Artifact
    origin: str


class Perceived(NamedTuple):
    """The defence as the attacker has it: what a training runs through."""

    shield: Shield | None = None
    title: str = UNDEFENDED
    params: Mapping[str, Any] | None = None
    knowledge: Knowledge = "none"


UNSEEN = Perceived()


@final
@dataclass(frozen=True, kw_only=True)
class Supply:
    """What every training of one command shares. `open_dataset` opens a data source; `fresh` ignores the cache.

    `samples` is None for every surrogate image there is, which only `stream`, which leaves them in their files, takes.
    `world` has the processes that train together, `losses` is a file for those of every step, and `every` the seconds
    between two checkpoints.
    """

    registry: Registry
    open_dataset: Callable[[str], Dataset]
    surrogate: str | None
    samples: int | None
    seed: int
    device: torch.device
    progress: Progress
    bf16: bool = False
    allow_pickle: bool = False
    fresh: bool = False
    stream: bool = False
    world: World = SINGLE
    losses: Path | None = None
    every: float = 20.0
    _pools: dict[tuple[str, tuple[int, int], str], Pool] = field(default_factory=dict, init=False, repr=False)
    """Decoded images by encoder, size and source: every attack on an encoder trains on the same."""
    _loaded: dict[str, Encoder] = field(default_factory=dict, init=False, repr=False)
    """Further encoders by source."""

    def artifact(
        self,
        spec: AttackSpec,
        attack: FittedAttack[Any],
        victim: Encoder,
        threat: ThreatModel,
        perceived: Perceived = UNSEEN,
        *,
        seal: Seal | None = None,
    ) -> Supplied:
        """The artefact that `attack` asks for, or one trained for `threat` on its encoder.

        `seal` covers what a training must leave alone beside the encoders and the defence: the heads of an audit.

        Raises:
            UsageError: What was asked for cannot be had, or does not belong to this encoder, attack or norm.
            SampleError: The training failed.
        """
        encoder = self.fitted_on(attack, victim)
        if not attack.artifact:
            return self._fitted(self.job(spec, attack, encoder, threat, perceived), seal)
        found = _find(spec, attack.artifact, encoder, threat)
        check_artifact(
            found.artifact,
            where=found.origin,
            spec=spec,
            attack=attack,
            source=encoder.source,
            sha256=encoder.sha256,
            norm=threat.norm,
        )
        return found

    def job(
        self, spec: AttackSpec, attack: FittedAttack[Any], encoder: Encoder, threat: ThreatModel, perceived: Perceived
    ) -> FitJob:
        """The training of `attack` on `encoder`."""
        return FitJob(
            spec=spec,
            attack=attack,
            ground=self._ground(encoder, threat, spec.partners(attack)),
            shield=perceived.shield,
            shield_title=perceived.title,
            shield_params=perceived.params,
            knowledge=perceived.knowledge,
        )

    def hardened(
        self, spec: HardeningSpec, hardening: Hardening, inner: Inner | None, encoder: Encoder, threat: ThreatModel
    ) -> Supplied:
        """The weights of `encoder`, hardened for `threat` on the images of `inner`, or by no image where it is None.

        An inner attack that is trained first gets its artefact here, once, for the original encoder.

        Raises:
            UsageError: What the inner attack asks for cannot be had, or does not belong to this encoder or norm.
            SampleError: A training failed.
        """
        if inner is not None and inner.spec.fits and threat.radius > 0:
            learned = self.artifact(inner.spec, inner.attack, encoder, threat).artifact
            inner = dataclasses.replace(inner, artifact=learned)
        ground = self._ground(encoder, threat, pool=None if spec.attacked else Pool.empty(encoder.input_size))
        return self._fitted(HardenJob(spec=spec, hardening=hardening, inner=inner, ground=ground), None)

    def defense(
        self, spec: DefenseSpec, defense: FittedDefense, encoder: Encoder | None, dataset: Dataset | None = None
    ) -> Supplied:
        """What `defense` learned: a file, the shipped artefact, or trained on clean images now; for `encoder` where it
        is fitted for one, and then on the training images of `dataset`, where there are any.

        Raises:
            UsageError: What was asked for cannot be had, or does not belong.
            SampleError: The training failed.
        """
        if not defense.artifact:
            return self._fitted(self.defense_job(spec, defense, encoder, dataset), None)
        found = find_defense(spec, defense, encoder)
        made = found.artifact.provenance
        wanted = decisive(spec, defense)
        for p in spec.params:
            asked, held = wanted.get(p.name), made.params.get(p.name)
            if p.name in wanted and asked != p.default and asked != held:
                raise SourceError(
                    f"{found.origin} was trained with {p.name}={held}, not {asked}; leave {spec.name}.{p.name} out, "
                    f"or set {spec.name}.artifact= to train it"
                )
        return found

    def defense_job(
        self, spec: DefenseSpec, defense: FittedDefense, encoder: Encoder | None, dataset: Dataset | None = None
    ) -> DefenseJob:
        """The training of `defense`, on patches of the clean images or on these at the size of its encoder."""
        if spec.per_encoder:
            assert encoder is not None, f"{spec.name} is fitted for an encoder"
            pool = self._pool(encoder, dataset if dataset is not None and dataset.train else None)
        else:
            encoder, pool = None, self._patches(spec.patch(defense))
        ground = Ground(
            public=encoder, pool=pool, threat=ThreatModel(eps=0), seed=self.seed, device=self.device, bf16=False
        )
        return DefenseJob(spec=spec, defense=defense, ground=ground)

    def imitation(self, shield: Shield, params: Mapping[str, Any], encoder: Encoder) -> Supplied:
        """A network that was trained to do what `shield` does to the surrogate images at the size of `encoder`.

        Raises:
            SampleError: The training failed.
        """
        ground = self._ground(encoder, ThreatModel(eps=0))
        return self._fitted(ImitationJob(ground=ground, shield=shield, shield_params=params), None)

    def fitted_on(self, attack: FittedAttack[Any], victim: Encoder) -> Encoder:
        """The encoder that `attack` is trained on."""
        return victim if attack.fit_encoder in ("", victim.source) else self.load(attack.fit_encoder)

    def load(self, source: str) -> Encoder:
        """A further encoder, on the device."""
        if source not in self._loaded:
            self.progress.task(f"loading {source}")
            loaded = load_encoder(source, self.registry, allow_pickle=self.allow_pickle)
            self._loaded[source] = loaded.encoder.to(self.device)
        return self._loaded[source]

    def check_surrogate(self) -> None:
        """Opens the surrogate data, so that a wrong name is known at once.

        Raises:
            UsageError: It cannot be opened.
        """
        self.open_dataset(self.surrogate or DEFAULT_SURROGATE)

    def image_digests(self, encoder: Encoder) -> set[str]:
        """Digests of the surrogate images at this encoder's size, as an audit digests the evaluated ones."""
        return {hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in self._pool(encoder).levels}

    def _ground(
        self, encoder: Encoder, threat: ThreatModel, partners: Sequence[str] = (), *, pool: Pool | None = None
    ) -> Ground:
        return Ground(
            public=encoder,
            partners=tuple(self.load(source) for source in partners),
            pool=self._pool(encoder) if pool is None else pool,
            threat=threat,
            seed=self.seed,
            device=self.device,
            bf16=self.bf16,
            world=self.world,
            losses=self.losses,
        )

    def _pool(self, encoder: Encoder, dataset: Dataset | None = None) -> Pool:
        """The surrogate images at this encoder's size, or the training images of `dataset`."""
        source = self.surrogate or DEFAULT_SURROGATE if dataset is None else f"{dataset.source} (training images)"
        key = encoder.source, encoder.input_size, source
        if key not in self._pools:
            self._pools[key] = self._decoded(encoder, dataset or self.open_dataset(source), source)
        return self._pools[key]

    def _decoded(self, encoder: Encoder, dataset: Dataset, source: str) -> Pool:
        items = draw_subset(dataset.train or dataset.test, self.samples, seed=self.seed)
        if self.stream:
            self.progress.task(f"taking the digest of {len(items)} images of {source}")
            sha256 = self.world.told(stream_digest(items) if self.world.rank == 0 else "")
            return stream_pool(source, items, encoder.preprocessing, sha256)
        self.progress.task(f"reading {len(items)} images of {source}")
        pool = make_pool(source, items, encoder.preprocessing)
        for message in pool.unreadable:
            self.progress.say(f"left out: {message}")
        return pool

    def _patches(self, side: int) -> Pool:
        assert self.samples is not None, "only a stream is of every image"
        source = self.surrogate or DEFAULT_SURROGATE
        key = "", (side, side), source
        if key not in self._pools:
            dataset = self.open_dataset(source)
            self.progress.task(f"cutting {self.samples} patches of {source}")
            items = dataset.train or dataset.test
            # Of a long list a part, each image for several patches: decoding is what takes the time.
            items = draw_subset(items, min(len(items), max(self.samples // 4, 1)), seed=self.seed)
            pool = make_patches(source, items, side=side, count=self.samples, seed=self.seed)
            for message in pool.unreadable:
                self.progress.say(f"left out: {message}")
            self._pools[key] = pool
        return self._pools[key]

    def _fitted(self, job: Job, outer: Seal | None) -> Supplied:
        """Trained now or earlier; an interrupted training goes on. One that tampered with a model is thrown away."""
        path = cache.cache_dir() / "fits" / f"{job.cache_key()}.safetensors"
        checkpoint = path.with_suffix(".partial.safetensors")
        leads = self.world.rank == 0
        if earlier := self.world.told(self._earlier(path, checkpoint) if leads else None):
            if self.losses is not None:
                self.progress.say(f"{self.losses} is left as it is: nothing is trained, as this was fitted earlier")
            return earlier
        name, public = job.name, job.ground.public
        source = job.ground.pool.source if public is None else public.source
        self.progress.task(f"fitting {name} on {source}")

        def show(done: int, total: int, losses: Mapping[str, float]) -> None:
            terms = ", ".join(f"{term} {value:.3g}" for term, value in losses.items())
            self.progress.task(f"fitting {name} on {source}: step {done} of {total}, {terms}")

        seals = [Seal(*job.untouchable), *([] if outer is None else [outer])]
        try:
            with isolated(self.seed, self.device):
                artifact = job.run(checkpoint, show, every=self.every)
        except (Exception, SystemExit) as error:  # a plugin that leaves must not end an audit with its own code
            raise SampleError(f"the training of {name} failed: {type(error).__name__}: {error}") from error
        finally:
            broken = [problem for seal in seals if (problem := _restored(seal)) is not None]
            if broken and leads:
                checkpoint.unlink(missing_ok=True)
        if broken:
            raise SampleError(f"during the training of {name}: {broken[0]}")
        if leads:
            write_artifact(path, artifact)
            checkpoint.unlink(missing_ok=True)
        made = artifact.provenance
        if made.streamed and (lost := made.surrogate_unreadable):
            self.progress.say(f"{lost} of the images could not be read; others took their place")
        images = f" with {made.surrogate}: {made.steps} steps" if made.surrogate_samples else ""
        self.progress.say(f"{name} fitted on {made.encoder}{images}, {made.seconds:.0f} s")
        return Supplied(artifact, "fitted for this run")

    def _earlier(self, path: Path, checkpoint: Path) -> Supplied | None:
        """What the cache holds under `path`; where it is not wanted, or damaged, it goes."""
        if self.fresh:
            path.unlink(missing_ok=True)
            checkpoint.unlink(missing_ok=True)
        if not path.exists():
            return None
        try:
            return Supplied(read_artifact(path), "fitted earlier with these settings")
        except SourceError:
            self.progress.say(f"{path} is damaged: it is made again")
            return None


def _restored(seal: Seal) -> str | None:
    """What was broken, put back; None where nothing was."""
    broken = seal.broken()
    if broken is not None:
        seal.restore()
    return broken


def _find(spec: AttackSpec, asked: str, encoder: Encoder, threat: ThreatModel) -> Supplied:
    """The artefact that `asked` names: a file, or the shipped one of this encoder."""
    if asked != SHIPPED:
        return Supplied(read_artifact(Path(asked).expanduser()), f"artefact {asked}")
    known = []
    for path in sorted(spec.shipped.glob("*.safetensors")) if spec.shipped else []:
        artifact = read_artifact(path)
        made = artifact.provenance
        if (made.plugin, made.encoder_sha256, made.threat.norm) == (spec.name, encoder.sha256, threat.norm):
            return Supplied(artifact, f"shipped artefact {path.name}")
        known.append(f"{made.encoder} (norm {made.threat.norm}, sha256 {made.encoder_sha256})")
    raise SourceError(
        f"{spec.name} ships no artefact for {encoder.source} (norm {threat.norm}, sha256 {encoder.sha256}); it ships "
        f"{', '.join(known) or 'no encoder'}; leave artifact empty to fit one"
    )


def find_defense(spec: DefenseSpec, defense: FittedDefense, encoder: Encoder | None) -> Supplied:
    """The artefact that a defence names: a file, or a shipped one of the same parameters."""
    wanted = "" if encoder is None or not spec.per_encoder else encoder.sha256
    if defense.artifact != SHIPPED:
        found = Supplied(read_artifact(Path(defense.artifact).expanduser()), f"artefact {defense.artifact}")
        made = found.artifact.provenance
        if made.plugin != spec.name:
            raise SourceError(f"{found.origin} was fitted by {made.plugin}, not by {spec.name}")
        if made.encoder_sha256 != wanted:
            raise SourceError(
                f"{found.origin} was fitted on {made.encoder} with sha256 {made.encoder_sha256 or 'none'}"
            )
        return found
    params = {name: value for name, value in decisive(spec, defense).items() if value != _default(spec, name)}
    for path in sorted(spec.shipped.glob("*.safetensors")) if spec.shipped else []:
        artifact = read_artifact(path)
        made = artifact.provenance
        same = all(made.params.get(name) == value for name, value in params.items())
        if (made.plugin, made.encoder_sha256) == (spec.name, wanted) and same:
            return Supplied(artifact, f"shipped artefact {path.name}")
    asked = ", ".join(f"{name}={value}" for name, value in params.items()) or "its defaults"
    raise SourceError(f"{spec.name} ships no artefact for {asked}; set {spec.name}.artifact= (empty) to train one")


def _default(spec: Spec, name: str) -> object:
    return next(p.default for p in spec.params if p.name == name)

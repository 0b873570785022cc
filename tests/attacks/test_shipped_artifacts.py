"""The artefacts that come with the package: small, documented, whole, and of the encoders they name."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import robustbench_x_attacks
from robustbench_x.data.dataset import draw_subset, open_dataset
from robustbench_x.encoders.source import load_encoder
from robustbench_x.fitting import read_artifact
from robustbench_x.randomness import SampleRandom
from robustbench_x.registry import load_registry
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderHandle, EncoderView, Meter
from robustbench_x_attacks.anyattack.attack import AnyAttack
from robustbench_x_attacks.anyattack.checkpoint import unpack
from robustbench_x_attacks.anyattack.codebook import CompactDecoder
from robustbench_x_attacks.universal.advencoder import SPEC

FOLDER = Path(robustbench_x_attacks.__file__).parent / "weights"
SHIPPED = sorted(FOLDER.glob("advencoder-*.safetensors"))
DECODER = FOLDER / "anyattack-efficientnet_lite0.safetensors"
ENCODERS = ("packaged:dinov2_vits14?size=98", "packaged:efficientnet_lite0")


def test_there_is_one_for_each_packaged_encoder() -> None:
    assert SPEC.shipped == FOLDER
    assert sorted(read_artifact(path).provenance.encoder for path in SHIPPED) == sorted(ENCODERS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_it_is_small_and_has_a_card_with_its_digest(path: Path) -> None:
    artifact = read_artifact(path)
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert path.stat().st_size < 1_000_000
    assert artifact.sha256 in card
    assert artifact.provenance.encoder_sha256 in card
    assert artifact.provenance.surrogate in card
    assert "rbx fit advencoder" in card
    assert artifact.provenance.threat.norm == "linf"
    assert float(artifact.tensors["delta"].abs().max()) <= artifact.provenance.threat.eps + 1e-7


@pytest.mark.parametrize("source", ENCODERS)
def test_its_encoder_is_the_packaged_one(source: str) -> None:
    encoder = load_encoder(source, load_registry()).encoder
    (artifact,) = [a for path in SHIPPED if (a := read_artifact(path)).provenance.encoder == source]
    assert artifact.provenance.encoder_sha256 == encoder.sha256
    assert artifact.provenance.input_size == encoder.input_size


def test_the_decoder_is_small_and_has_a_card_with_its_digest() -> None:
    artifact, card = read_artifact(DECODER), DECODER.with_suffix(".md").read_text(encoding="utf-8")
    assert DECODER.stat().st_size < 10_000_000
    assert artifact.sha256 in card
    assert artifact.provenance.encoder_sha256 in card
    assert "rbx fit anyattack" in card
    learned = unpack(artifact.tensors)
    assert isinstance(learned.decoder, CompactDecoder)
    assert learned.encoder_sha256 == artifact.provenance.encoder_sha256


@pytest.mark.slow
def test_the_decoder_finds_targets_that_noise_does_not() -> None:
    """Crops that the training did not draw, of the photographs that it did: 1 of 40 targets is found by chance.

    Photographs that it never saw are beyond it: see docs/results/anyattack.md.
    """
    registry = load_registry()
    encoder = load_encoder("packaged:efficientnet_lite0?size=96", registry).encoder
    pool = open_dataset("packaged:crops", registry).test
    made = read_artifact(DECODER).provenance
    drawn = {item.id for item in draw_subset(pool, made.surrogate_samples, seed=made.seed)}
    others = draw_subset([item for item in pool if item.id not in drawn], 40, seed=1)
    images = torch.stack([encoder.preprocessing(item.load()) for item in others])
    targets, threat = images.roll(1, dims=0), ThreatModel(eps=16 / 255)
    random = SampleRandom(range(len(images)))
    view = EncoderView(
        inputs=images,
        threat=threat,
        random=random,
        encoder=EncoderHandle(encoder, lambda pixels: pixels, Meter()),
        targets=targets,
        artifact=read_artifact(DECODER).tensors,
    )
    with torch.no_grad():
        wanted = F.normalize(encoder(targets), dim=1)
        found = [
            int(((F.normalize(encoder(x), dim=1) @ wanted.T).argmax(dim=1) == torch.arange(len(images))).sum())
            for x in (AnyAttack().run(view), threat.noise(images, random))
        ]
    # By chance, 5 of 40 or more come with a probability of 0.003.
    assert found[0] >= 5
    assert found[1] <= 3

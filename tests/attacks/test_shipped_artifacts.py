"""The artefacts that come with the package: small, documented, whole, and of the encoders they name."""

from pathlib import Path

import pytest

import robustbench_x_attacks
from robustbench_x.encoders.source import load_encoder
from robustbench_x.fitting import read_artifact
from robustbench_x.registry import load_registry
from robustbench_x_attacks.universal.advencoder import SPEC

FOLDER = Path(robustbench_x_attacks.__file__).parent / "weights"
SHIPPED = sorted(FOLDER.glob("*.safetensors"))
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

"""Artefacts: whole or refused, for their own encoder or refused with both digests."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from robustbench_x.errors import SourceError
from robustbench_x.fitting import Artifact, read_artifact, write_artifact
from robustbench_x.fitting.artifact import check_artifact
from robustbench_x.registry import load_registry
from robustbench_x.testing import fit_toy, toy_victim
from robustbench_x.threat import ThreatModel

SPEC = load_registry().attacks["advencoder"]
THREAT = ThreatModel(eps=16 / 255)


@pytest.fixture(scope="module")
def made() -> Artifact:
    return fit_toy(SPEC, {"steps": 3, "contrast": "tokens"}, toy_victim(), THREAT)


def test_what_is_written_is_read(made: Artifact, tmp_path: Path) -> None:
    write_artifact(tmp_path / "a.safetensors", made)
    found = read_artifact(tmp_path / "a.safetensors")
    assert found.provenance == made.provenance
    assert found.sha256 == made.sha256
    assert found.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(found.tensors[name], made.tensors[name]) for name in made.tensors)


def test_it_says_what_it_was_trained_on(made: Artifact) -> None:
    said = made.provenance
    assert (said.plugin, said.encoder, said.surrogate, said.surrogate_samples) == (
        "advencoder",
        "toy",
        "toy:surrogate",
        24,
    )
    assert said.encoder_sha256 == toy_victim().encoder.sha256
    assert (said.threat.norm, said.threat.eps, said.steps, said.seed) == ("linf", 16 / 255, 3, 0)
    assert said.params["setting"] == "best"
    assert not {"artifact", "fit_encoder"} & set(said.params)
    assert set(said.losses) == {"adv"}
    # 24 clean images for their tokens, then three batches of 16, forward and backward.
    assert (said.forwards, said.backwards) == (24 + 3 * 16, 3 * 16)


def test_a_flipped_bit_is_refused_with_both_digests(made: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_artifact(path, made)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"damaged: it carries the digest [0-9a-f]{64}, its content has [0-9a-f]{64}"):
        read_artifact(path)


def test_an_edited_provenance_is_refused(made: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_artifact(path, made)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    metadata["provenance"] = metadata["provenance"].replace(made.provenance.encoder_sha256, "0" * 64)
    path.write_bytes(safetensors.torch.save(made.tensors, metadata))
    with pytest.raises(SourceError, match="its content has"):
        read_artifact(path)


def test_a_truncated_file_a_foreign_one_and_none_are_refused(made: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_artifact(path, made)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError, match="damaged or no safetensors file"):
        read_artifact(path)
    path.write_bytes(safetensors.torch.save(made.tensors))
    with pytest.raises(SourceError, match="not written by this version of rbx fit"):
        read_artifact(path)
    with pytest.raises(SourceError, match="there is no such file; rbx fit writes one"):
        read_artifact(tmp_path / "b.safetensors")
    with pytest.raises(SourceError, match=r"saved as .safetensors, not as a.pt"):
        write_artifact(tmp_path / "a.pt", made)


def test_what_does_not_belong_is_refused(made: Artifact) -> None:
    own = made.provenance.encoder_sha256
    uap = load_registry().attacks["uap"]

    def check(
        artifact: Artifact = made, *, source: str = "toy", sha256: str = own, norm: str = "linf", **params: Any
    ) -> None:
        check_artifact(
            artifact, where="x", spec=SPEC, attack=SPEC.build(params), source=source, sha256=sha256, norm=norm
        )

    check()
    check(steps=3)
    with pytest.raises(SourceError, match=rf"fitted on toy with sha256 {own}, but toy:b has {'1' * 64}"):
        check(source="toy:b", sha256="1" * 64)
    with pytest.raises(SourceError, match="fitted for norm linf, but the budget here is patch"):
        check(norm="patch")
    with pytest.raises(SourceError, match=r"fitted with setting=best, not paper; leave advencoder.setting out"):
        check(setting="paper")
    with pytest.raises(SourceError, match="fitted by advencoder, not by uap"):
        check_artifact(made, where="x", spec=uap, attack=uap.build(), source="toy", sha256=own, norm="linf")
    aware = Artifact(made.tensors, made.provenance.model_copy(update={"defense": "jpeg", "knowledge": "full"}))
    with pytest.raises(SourceError, match="fitted through the defence jpeg; an artefact that is handed in"):
        check(aware)


def test_nobody_else_is_locked_out_of_the_file(made: Artifact, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    write_artifact(tmp_path / "a.safetensors", made)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []

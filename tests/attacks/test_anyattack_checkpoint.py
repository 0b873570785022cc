"""Files with AnyAttack's decoder: the released layout, read as tensors alone, and artefacts of ours."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustbench_x.errors import AttackError, SourceError
from robustbench_x.fitting import write_artifact
from robustbench_x.registry import load_registry
from robustbench_x.testing import fit_toy, toy_victim
from robustbench_x.threat import ThreatModel
from robustbench_x_attacks.anyattack.checkpoint import pack, read_decoder, read_released, unpack
from robustbench_x_attacks.anyattack.codebook import CompactDecoder
from robustbench_x_attacks.anyattack.decoder import OfficialDecoder, make_decoder

SPEC = load_registry().attacks["anyattack"]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A released decoder's entries, all zero but the biases of the last layer: 100 MB that nobody has to draw."""
    with torch.device("meta"):
        wanted = OfficialDecoder().state_dict()
    made = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in wanted.items()}
    made["final_conv.bias"] = torch.tensor([0.01, -0.02, 0.5])
    return made


def _save(path: Path, state: Mapping[str, object], prefix: str = "") -> Path:
    saved = {
        "decoder_state_dict": {f"{prefix}{name}": tensor for name, tensor in state.items()},
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]},
        "scheduler_state_dict": {"T_0": 5000, "last_epoch": 3},
        "global_step": 17,
        "epoch": 2,
    }
    torch.save(saved, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_released_layout_round_trips(state: dict[str, Tensor], tmp_path: Path, prefix: str) -> None:
    path = _save(tmp_path / "coco_cos.pt", state, prefix)
    read = read_released(path)
    assert list(read) == list(state)
    assert all(torch.equal(read[name], state[name]) for name in state)
    decoder = read_decoder(path)
    assert isinstance(decoder, OfficialDecoder)
    noise = decoder(torch.ones(1, 512))
    assert noise.shape == (1, 3, 224, 224)
    assert torch.equal(noise[0, :, 100, 100], state["final_conv.bias"])


def test_missing_and_unexpected_entries_are_listed(state: dict[str, Tensor], tmp_path: Path) -> None:
    wrong = {**state, "extra.weight": torch.zeros(1)}
    del wrong["upsample_blocks.8.attention.keys.weight"]
    path = _save(tmp_path / "wrong.pt", wrong)
    message = r"missing: upsample_blocks.8.attention.keys.weight; unexpected: extra.weight"
    with pytest.raises(SourceError, match=message):
        read_released(path)
    with pytest.raises(SourceError, match=r"no tensors: fc\.0\.bias"):
        read_released(_save(path, {**state, "fc.0.bias": 3}))


class _Bomb:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("plain", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, plain: bool) -> None:
    witness, path = tmp_path / "ran", tmp_path / "bomb.pt"
    saved = {"decoder_state_dict": {}, "global_step": _Bomb(witness)}
    if plain:
        path.write_bytes(pickle.dumps(saved, protocol=2))
    else:
        torch.save(saved, path)
    with pytest.raises(SourceError, match="cannot be read as tensors alone"):
        read_released(path)
    assert not witness.exists()
    pickle.loads(pickle.dumps(saved))
    assert witness.exists(), "it would have run"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "has no decoder_state_dict; it holds state_dict"),
        ([1, 2], "has no decoder_state_dict; it holds list"),
        ({"decoder_state_dict": {}}, "missing: fc.0.weight, fc.0.bias"),
    ],
)
def test_another_layout_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(SourceError, match=message):
        read_released(path)


def test_no_file_and_a_broken_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere.pt: there is no such file"):
        read_released(tmp_path / "nowhere.pt")
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(SourceError, match=r"broken.pt cannot be read as tensors alone"):
        read_released(tmp_path / "broken.pt")


def test_an_artefact_s_tensors_round_trip() -> None:
    made = make_decoder("compact", width=8, size=(20, 24), seed=0)
    learned = unpack(pack(made.state_dict(), size=(20, 24), encoder_sha256="ab12"))
    assert isinstance(learned.decoder, CompactDecoder)
    assert learned.encoder_sha256 == "ab12"
    assert learned.decoder.size == (20, 24)
    features = torch.randn(3, 8)
    assert torch.equal(learned.decoder(features), made.eval()(features))


def test_an_artefact_file_of_ours_is_read_and_another_s_refused(tmp_path: Path) -> None:
    threat = ThreatModel(eps=16 / 255)
    artifact = fit_toy(SPEC, {"steps": 1, "k": 1}, toy_victim(), threat)
    write_artifact(tmp_path / "own.safetensors", artifact)
    assert isinstance(read_decoder(tmp_path / "own.safetensors"), CompactDecoder)
    write_artifact(tmp_path / "other.safetensors", artifact._replace(tensors={"delta": torch.zeros(1)}))
    with pytest.raises(SourceError, match=r"other.safetensors: this artefact holds no decoder of anyattack: it lacks"):
        read_decoder(tmp_path / "other.safetensors")
    with pytest.raises(AttackError, match="it lacks size, encoder_sha256"):
        unpack({"delta": torch.zeros(1)})

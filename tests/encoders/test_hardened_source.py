"""`hardened:FILE`: the hardened weights in the encoder they were made from, or a refusal that says what is wrong."""

import os
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from robustbench_x.builtin import register_builtins
from robustbench_x.encoders.encoder import LoadedEncoder
from robustbench_x.encoders.hardened import files_behind, make_source
from robustbench_x.encoders.source import load_encoder
from robustbench_x.errors import ConfigError, SourceError
from robustbench_x.fitting import Artifact, Ground, HardenJob, Pool, read_artifact, write_artifact
from robustbench_x.fitting.harden import find_inner
from robustbench_x.registry import Registry, load_registry
from robustbench_x.testing import fit_toy, toy_victim
from robustbench_x.threat import ThreatModel

REGISTRY = load_registry()
FARE = REGISTRY.hardenings["fare"]
BASE = "python:hardened_user_code:make"
CODE = """
import torch
from torch import nn

torch.manual_seed({seed})
net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
net.input_size = 16
net.classes = [f"class {{i}}" for i in range(32)]

def make():
    return net
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's encoder, whose function hands out one and the same module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_code(monkeypatch, seed=0)
    return tmp_path


def write_code(monkeypatch: pytest.MonkeyPatch, *, seed: int) -> None:
    Path("hardened_user_code.py").write_text(CODE.format(seed=seed))
    os.utime("hardened_user_code.py", (seed, seed))  # another time, so that Python reads it again
    monkeypatch.delitem(sys.modules, "hardened_user_code", raising=False)


def base(source: str = BASE) -> LoadedEncoder:
    return load_encoder(source, REGISTRY)


def harden(out: str, source: str = BASE) -> Artifact:
    """Hardens the encoder `source` in two steps, into `out`."""
    encoder, threat = base(source).encoder, ThreatModel(eps=8 / 255)
    levels = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    hardening = FARE.build({"steps": 2, "batch": 4, "rate": 1e-2})
    pool = Pool(source="random", levels=levels, sha256="r")
    ground = Ground(public=encoder, pool=pool, threat=threat, seed=0, device=torch.device("cpu"))
    job = HardenJob(spec=FARE, hardening=hardening, inner=find_inner(REGISTRY, hardening, threat), ground=ground)
    made = job.run(None)
    write_artifact(Path(out), made)
    return made


def test_it_is_the_base_with_the_hardened_weights(here: Path) -> None:
    made, before = harden("h.safetensors"), base()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        published = before.encoder(images)
    loaded = base("hardened:h.safetensors")
    encoder = loaded.encoder
    assert encoder.source == "hardened:h.safetensors"
    assert encoder.sha256 == made.sha256 != before.encoder.sha256
    assert encoder.preprocessing == before.encoder.preprocessing
    assert encoder.notes[: len(before.encoder.notes)] == before.encoder.notes
    assert encoder.notes[-1] == (
        f"hardened by fare on images of embed (linf 8/255, 2 steps) from {BASE} with sha256 {before.encoder.sha256}"
    )
    assert loaded.classifier is not None
    assert loaded.classifier.aliases["class 3"] == 3
    assert not encoder.training
    assert not any(weight.requires_grad for weight in encoder.parameters())
    with torch.no_grad():
        assert not torch.allclose(encoder(images), published)
        # The user's function returns one and the same module, which must not become the hardened one.
        assert torch.equal(base().encoder(images), published)
    state = nn.Module.state_dict(encoder.backbone)
    assert all(torch.equal(state[name], tensor) for name, tensor in made.tensors.items())


def test_options_of_the_base_are_kept_and_its_own_size_is_refused(here: Path) -> None:
    source = "python:hardened_user_code:make?size=24"
    harden("h.safetensors", source)
    assert base("hardened:h.safetensors").encoder.input_size == (24, 24)
    with pytest.raises(ConfigError, match=r"the weights were made for python:.*size=24; drop \?size=32"):
        base("hardened:h.safetensors?size=32")


def test_another_base_is_refused_with_both_digests(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harden("h.safetensors")
    before = base().encoder.sha256
    write_code(monkeypatch, seed=1)
    after = base().encoder.sha256
    assert before != after
    with pytest.raises(SourceError, match=rf"was made from {BASE} with sha256 {before}, but that has {after} here"):
        base("hardened:h.safetensors")


def test_a_base_that_is_gone_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harden("h.safetensors")
    Path("hardened_user_code.py").unlink()
    monkeypatch.delitem(sys.modules, "hardened_user_code")
    message = "hardened:h.safetensors: the encoder it was made from cannot be loaded: .*no module hardened_user_code"
    with pytest.raises(SourceError, match=message):
        base("hardened:h.safetensors")


def test_a_tampered_file_is_refused(here: Path) -> None:
    harden("h.safetensors")
    content = bytearray(Path("h.safetensors").read_bytes())
    content[-5] ^= 1
    Path("h.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=r"hardened:h\.safetensors: artefact h\.safetensors is damaged: it carries"):
        base("hardened:h.safetensors")
    Path("h.safetensors").write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    with pytest.raises(SourceError, match="was not written by this version of rbx fit"):
        base("hardened:h.safetensors")
    with pytest.raises(SourceError, match="there is no such file; rbx fit writes one"):
        base("hardened:none.safetensors")


def test_missing_and_unexpected_keys_are_listed(here: Path) -> None:
    made = harden("h.safetensors")
    tensors = dict(made.tensors)
    tensors["module.9.weight"] = tensors.pop("module.0.weight")
    write_artifact(Path("h.safetensors"), made._replace(tensors=tensors))
    with pytest.raises(SourceError, match=r"1 missing: module\.0\.weight; 1 unexpected: module\.9\.weight"):
        base("hardened:h.safetensors")


def test_what_an_attack_learned_is_no_encoder(here: Path) -> None:
    learned = fit_toy(REGISTRY.attacks["uap"], {"steps": 2}, toy_victim(), ThreatModel(eps=8 / 255))
    write_artifact(Path("uap.safetensors"), learned)
    with pytest.raises(SourceError, match=r"uap.safetensors is what the attack uap learned, not a hardened encoder"):
        base("hardened:uap.safetensors")


def test_a_hardened_encoder_can_be_hardened_again(here: Path) -> None:
    first = harden("one.safetensors")
    second = harden("two.safetensors", "hardened:one.safetensors")
    assert second.provenance.encoder_sha256 == first.sha256
    encoder = base("hardened:two.safetensors").encoder
    assert encoder.sha256 == second.sha256
    assert [note.partition(" (")[0] for note in encoder.notes[-2:]] == ["hardened by fare on images of embed"] * 2
    assert files_behind("hardened:two.safetensors") == (Path("two.safetensors"), Path("one.safetensors"))
    assert files_behind(BASE) == ()
    harden("one.safetensors", "hardened:two.safetensors")  # now each is the other's base
    for name in ("one", "two"):
        with pytest.raises(SourceError, match="the file is its own base"):
            base(f"hardened:{name}.safetensors")


def test_the_base_is_looked_up_in_the_registry_at_hand(here: Path) -> None:
    harden("h.safetensors")
    registry = Registry()
    register_builtins(registry)
    other = registry.encoders["hardened"]
    assert other.load is not REGISTRY.encoders["hardened"].load
    assert (
        load_encoder("hardened:h.safetensors", registry).encoder.sha256 == read_artifact(Path("h.safetensors")).sha256
    )
    lone = Registry()
    lone.add_encoder(make_source(lone))
    with pytest.raises(SourceError, match="unknown encoder source 'python'"):
        load_encoder("hardened:h.safetensors", lone)

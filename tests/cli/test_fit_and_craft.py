"""`rbx fit` and `rbx craft` as a user types them: what they print, write, and how they end."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from command import Command
from robustbench_x.fitting import read_artifact

ENCODER = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GELU(), nn.Flatten())
    net.input_size = 16
    return net
"""


@pytest.fixture
def rbx(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    run = Command(capsys, monkeypatch, tmp_path, code=ENCODER, module="fit_user_code")
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for index in range(6):
        path = Path("photos", f"album{index % 2}", f"{index}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return run


FIT = ("fit", "advencoder", "-e", "python:fit_user_code:make", "--surrogate", "images:photos", "--device", "cpu")


def test_fit_writes_an_artefact_and_says_what_it_is(rbx: Command) -> None:
    ended = rbx(*FIT, "--out", "a.safetensors", "-p", "steps=4", "--eps", "8/255")
    assert ended.code == 0, ended.err
    made = read_artifact(Path("a.safetensors"))
    assert f"a.safetensors sha256 {made.sha256}" in ended.out
    assert "linf 8/255: 4 steps on 6 images of images:photos" in ended.out
    assert "adv " in ended.out
    assert made.provenance.params["steps"] == 4


def test_fit_again_reuses_and_no_resume_trains_again(rbx: Command) -> None:
    first = rbx(*FIT, "--out", "a.safetensors", "-p", "advencoder.steps=4")
    again = rbx(*FIT, "--out", "b.safetensors", "-p", "steps=4")
    fresh = rbx(*FIT, "--out", "c.safetensors", "-p", "steps=4", "--no-resume")
    assert "fitted for this run" in first.out
    assert "fitted earlier with these settings" in again.out
    assert "fitted for this run" in fresh.out
    assert len({read_artifact(Path(f"{name}.safetensors")).sha256 for name in "abc"}) == 1


def test_craft_applies_an_artefact_to_a_folder(rbx: Command) -> None:
    rbx(*FIT, "--out", "a.safetensors", "-p", "steps=4")
    craft = ("craft", "advencoder", "-e", "python:fit_user_code:make", "--images", "photos", "--device", "cpu")
    ended = rbx(*craft, "--out", "made", "--artifact", "a.safetensors")
    assert ended.code == 0, ended.err
    assert "6 images in made, 0 failed" in ended.out
    manifest = json.loads(Path("made", "manifest.json").read_text())
    assert manifest["images"][0]["file"] == "album0/0.png.png"
    assert all(Path("made", entry["file"]).is_file() for entry in manifest["images"])
    Path("photos", "album0", "bad.png").write_bytes(b"")
    partly = rbx(*craft, "--out", "partly", "--artifact", "a.safetensors")
    assert partly.code == 3
    assert "6 images in partly, 1 failed" in partly.out
    assert "bad.png" in partly.err


def test_craft_takes_attacks_that_learn_nothing_too(rbx: Command) -> None:
    for attack, params in (("noise", ()), ("embed", ("-p", "steps=3"))):
        command = ("craft", attack, "-e", "python:fit_user_code:make", "--images", "photos", "--device", "cpu")
        ended = rbx(*command, "--out", attack, *params)
        assert ended.code == 0, ended.err
        assert json.loads(Path(attack, "manifest.json").read_text())["artifact"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("fit", "pgd", "-e", "x:y", "--out", "a.safetensors"), "pgd has nothing to train; rbx fit takes"),
        (("fit", "advencodr", "-e", "x:y", "--out", "a.safetensors"), "did you mean advencoder?"),
        ((*FIT, "--out", "a.pt"), "--out a.pt: an artefact is a .safetensors file"),
        ((*FIT, "--out", "a.safetensors", "--norm", "l2"), "norm l2 has no default budget; give --eps"),
        ((*FIT, "--out", "a.safetensors", "--norm", "l2", "--eps", "1"), "advencoder has no norm 'l2'"),
        ((*FIT, "--out", "a.safetensors", "--eps", "0"), "eps is 0: there is nothing to train"),
        ((*FIT, "--out", "a.safetensors", "--eps", "8"), "eps=8 exceeds 1"),
        ((*FIT, "--out", "a.safetensors", "-p", "stepps=3"), "no parameter 'stepps'; did you mean steps?"),
        ((*FIT, "--out", "a.safetensors", "-p", "artifact=b"), "advencoder.artifact is for an audit"),
        ((*FIT, "--out", "a.safetensors", "--placement", "middle"), "unknown patch placement 'middle'"),
        ((*FIT, "--out", "a.safetensors", "--precision", "fp8"), "--precision fp8: choose fp32 or bf16"),
        ((*FIT[:5], "images:nothing", "--out", "a.safetensors"), "there is no folder"),
        (("craft", "pgd", "-e", "x:y", "--images", "photos", "--out", "o"), "pgd needs access whitebox"),
    ],
)  # fmt: skip
def test_what_a_user_can_get_wrong_is_one_sentence(rbx: Command, args: tuple[str, ...], message: str) -> None:
    ended = rbx(*args)
    assert ended.code == 2, ended.out + ended.err
    assert message in ended.err
    assert not ended.out
    assert not Path("a.safetensors").exists()

"""`rbx fit` on a hardening as a user types it, and the audit of what comes of it."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from command import Command
from robustbench_x.encoders.source import load_encoder
from robustbench_x.fitting import read_artifact
from robustbench_x.registry import load_registry
from robustbench_x.result import read_report

ENCODER = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten())
    net.input_size = 16
    net.layers = ["2"]
    return net
"""
BASE = "python:harden_user_code:make"


@pytest.fixture
def rbx(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    run = Command(capsys, monkeypatch, tmp_path, code=ENCODER, module="harden_user_code")
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for split, number in (("train", 8), ("test", 4)):
        for channel, name in enumerate(("red", "green")):
            for index in range(number):
                pixels = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                path = Path("data", split, name, f"{index}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                PIL.Image.fromarray(pixels).save(path)
    return run


SHARED = ("--surrogate", "images:data", "--device", "cpu", "-p", "steps=4", "-p", "batch=8", "-p", "rate=1e-2")
FIT = ("fit", "fare", "-e", BASE, *SHARED)


def test_fit_hardens_an_encoder_and_the_audit_attacks_the_hardened_one(rbx: Command) -> None:
    ended = rbx(*FIT, "--out", "h.safetensors")
    assert ended.code == 0, ended.err
    made = read_artifact(Path("h.safetensors"))
    assert f"h.safetensors sha256 {made.sha256}" in ended.out
    assert f"fare on {BASE}, linf 4/255: 4 steps on 24 images of images:data" in ended.out
    assert "(fitted for this run); adv " in ended.out
    assert ended.out.splitlines()[-1] == "audit it: rbx audit -e hardened:h.safetensors"
    audit = ("audit", "-d", "folder:data", "-a", "embed", "-p", "embed.steps=3", "--eps", "4/255", "--device", "cpu")
    ended = rbx(*audit, "-e", "hardened:h.safetensors", "--out", "run")
    assert ended.code == 0, ended.out + ended.err
    report = read_report(Path("run"))
    (encoder,) = report.encoders
    assert (encoder.source, encoder.sha256) == ("hardened:h.safetensors", made.sha256)
    assert encoder.notes[-1].startswith("hardened by fare on images of embed (linf 4/255, 4 steps)")
    assert {cell.encoder for cell in report.cells} == {"hardened:h.safetensors"}
    assert {cell.attack for cell in report.cells} == {"noise", "embed"}
    assert rbx("craft", "embed", "-e", "hardened:h.safetensors", "--images", "data", "--out", "made").code == 0


def test_fit_again_reuses_and_another_inner_attack_does_not(rbx: Command) -> None:
    rbx(*FIT, "--out", "a.safetensors")
    again = rbx(*FIT, "--out", "b.safetensors")
    fresh = rbx(*FIT, "--out", "c.safetensors", "--no-resume")
    other = rbx(*FIT, "--out", "d.safetensors", "-p", "inner=embed?steps=2", "--eps", "8/255")
    assert "fitted earlier with these settings" in again.out
    assert "fitted for this run" in fresh.out
    assert "fitted for this run" in other.out
    digests = {name: read_artifact(Path(f"{name}.safetensors")).sha256 for name in "abcd"}
    assert digests["a"] == digests["b"] == digests["c"] != digests["d"]


def test_an_inner_attack_that_is_trained_first_is_trained_once_or_handed_in(rbx: Command) -> None:
    """A universal attack, whose artefact is of the original encoder."""
    inner = "inner=uap?steps=3&batch=8"
    ended = rbx(*FIT, "--out", "a.safetensors", "-p", inner)
    assert ended.code == 0, ended.err
    assert f"uap fitted on {BASE}" in ended.err
    told = read_artifact(Path("a.safetensors")).provenance.inner
    assert told is not None
    rbx("fit", "uap", "-e", BASE, "--surrogate", "images:data", "--eps", "4/255", "--device", "cpu", "-p", "steps=3",
        "-p", "batch=8", "--out", "uap.safetensors")  # fmt: skip
    assert told.artifact_sha256 == read_artifact(Path("uap.safetensors")).sha256
    handed = rbx(*FIT, "--out", "b.safetensors", "-p", "inner=uap?artifact=uap.safetensors&steps=3&batch=8")
    assert handed.code == 0, handed.err
    one, two = (read_artifact(Path(f"{name}.safetensors")) for name in "ab")
    assert one.sha256 == two.sha256
    hardened = load_encoder("hardened:a.safetensors", load_registry()).encoder.sha256
    foreign = rbx("fit", "fare", "-e", "hardened:a.safetensors", *SHARED, "--out", "c.safetensors",
                  "-p", "inner=uap?artifact=uap.safetensors")  # fmt: skip
    assert foreign.code == 2
    assert f"hardened:a.safetensors has {hardened}" in foreign.err


def test_the_catalogue_has_hardenings(rbx: Command) -> None:
    told = json.loads(rbx("list", "hardenings", "--json").out)["hardenings"]
    assert [entry["name"] for entry in told] == list(load_registry().hardenings)
    assert all(entry["from"] == "robustbench-x" and entry["summary"] and entry["inner"] for entry in told)
    ended = rbx("describe", "fare")
    assert ended.out.startswith("kind: hardening\n")
    assert "inner = 'embed?loss=l2&steps=3' (str): " in ended.out
    assert "Departures:" in ended.out
    assert json.loads(rbx("describe", "fare", "--json").out)["eps"] == "4/255"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-p", "inner=pgd"), "inner=pgd: pgd needs access whitebox"),
        (("-p", "inner=embd"), "unknown attack 'embd'; did you mean embed"),
        (("-p", "inner=embed?stepps=3"), "embed has no parameter 'stepps'; did you mean steps?"),
        (("-p", "inner=embed?steps"), "write an attack and its parameters as embed?loss=l2&steps=10"),
        (("-p", "rat=1"), "fare has no parameter 'rat'; did you mean rate?"),
        (("--norm", "l2", "--eps", "1", "-p", "inner=uap"), "inner=uap: uap has no norm 'l2'; it has linf, patch"),
        (("--norm", "l2"), "norm l2 has no default budget; give --eps"),
        (("--eps", "0"), "eps is 0: there is nothing to train"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_sentence(rbx: Command, args: tuple[str, ...], message: str) -> None:
    ended = rbx(*FIT, "--out", "h.safetensors", *args)
    assert ended.code == 2, ended.out + ended.err
    assert message in ended.err
    assert not ended.out
    assert not Path("h.safetensors").exists()


def test_names_that_cannot_be_fitted_are_told_what_can(rbx: Command) -> None:
    ended = rbx("fit", "faree", "-e", BASE, "--out", "h.safetensors")
    assert (ended.code, ended.out) == (2, "")
    assert "unknown attack, hardening or defense 'faree'; did you mean fare" in ended.err
    ended = rbx("fit", "pgd", "-e", BASE, "--out", "h.safetensors")
    assert "pgd has nothing to train; rbx fit takes" in ended.err
    assert "fare" in ended.err


def test_a_file_is_never_made_its_own_base(rbx: Command) -> None:
    rbx(*FIT, "--out", "h.safetensors")
    again = ("fit", "fare", "-e", "hardened:h.safetensors", *SHARED)
    refused = rbx(*again, "--out", "./h.safetensors")
    assert refused.code == 2
    assert "hardened:h.safetensors is read from this file" in refused.err
    assert rbx(*again, "--out", "two.safetensors").code == 0
    assert read_artifact(Path("two.safetensors")).provenance.encoder == "hardened:h.safetensors"


def test_an_attack_refuses_a_hardened_encoder_as_its_artefact(rbx: Command) -> None:
    rbx(*FIT, "--out", "h.safetensors")
    ended = rbx("audit", "-e", BASE, "-d", "folder:data", "-a", "uap", "-p", "uap.artifact=h.safetensors", "--out", "r")
    assert ended.code == 2
    assert "was fitted by fare, not by uap" in ended.err

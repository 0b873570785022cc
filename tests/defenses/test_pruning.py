"""pruning: an exact share of the smallest weights, as torch prunes them, and an encoder that an audit takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as reference

from command import Command
from robustbench_x.errors import ConfigError, PluginError, SampleError
from robustbench_x.fitting import read_artifact
from robustbench_x.hardening import HardeningSpec, HardenView
from robustbench_x.plugin import Trainer, param
from robustbench_x.registry import Registry, load_registry
from robustbench_x.result import read_report
from robustbench_x.testing import toy_hardening, toy_victim
from robustbench_x.views import Meter
from robustbench_x_defenses.hardening.pruning import prunable, prune

PRUNING = load_registry().hardenings["pruning"]
ENCODER = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(128, 16))
    net.input_size = 16
    net.layers = ["2"]
    return net
"""
BASE = "python:prune_user_code:make"


def pruned(amount: float) -> dict[str, Tensor]:
    return toy_hardening(PRUNING, {"amount": amount}, toy_victim()).run(None).tensors


@pytest.mark.parametrize("amount", [0.1, 0.3, 0.55, 0.7])
def test_it_is_what_torch_prunes_globally(amount: float) -> None:
    net = toy_victim().encoder.backbone
    assert isinstance(net, nn.Module)
    layers = [(module, "weight") for module in net.modules() if isinstance(module, nn.Conv2d)]
    reference.global_unstructured(layers, pruning_method=reference.L1Unstructured, amount=amount)
    for module, name in layers:
        reference.remove(module, name)  # type: ignore[no-untyped-call]
    found = pruned(amount)
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


def test_the_share_is_exact_and_the_largest_weights_stay() -> None:
    before, after = toy_victim().encoder.backbone.state_dict(), pruned(0.37)
    names = ["early.0.weight", "late.0.weight"]
    old, new = (np.concatenate([state[name].numpy().ravel() for name in names]) for state in (before, after))
    gone = round(0.37 * old.size)
    assert int((new == 0).sum()) == gone
    assert np.array_equal(new[new != 0], old[new != 0])
    assert np.abs(old[new == 0]).max() <= np.abs(old[new != 0]).min()
    shares = [float((after[name] == 0).float().mean()) for name in names]
    assert abs(shares[0] - shares[1]) > 0.05, "one threshold for all, not one per layer"
    assert all(torch.equal(before[name], after[name]) for name in before if name not in names)


def test_ties_are_cut_at_the_share_and_zeros_have_no_sign() -> None:
    weights = [nn.Parameter(torch.tensor([-1.0, 1.0, -1.0])), nn.Parameter(torch.tensor([[1.0], [-2.0]]))]
    assert prune(weights, 0.4) == 0.4
    assert weights[1].tolist()[1] == [-2]
    assert not any(torch.signbit(weight.detach()[weight.detach() == 0]).any() for weight in weights)
    assert prune(weights, 0.2) == 0.4, "what is zero already counts first"


def test_attention_is_pruned_and_shared_weights_count_once() -> None:
    net = nn.ModuleList(
        [nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=4, vdim=4), nn.Linear(4, 4), nn.LayerNorm(8)]
    )
    twin = nn.Linear(4, 4)
    twin.weight = net[2].weight  # type: ignore[assignment]
    net.extend([twin, nn.ConvTranspose2d(2, 3, 3), nn.Embedding(5, 8)])
    shapes = [tuple(weight.shape) for weight in prunable(net)]
    assert sorted(shapes) == sorted([(24, 8), (8, 8), (8, 8), (8, 4), (8, 4), (8, 8), (4, 4), (2, 3, 3, 3)])


def test_an_encoder_without_such_weights_is_named() -> None:
    with pytest.raises(ValueError, match="the encoder has no convolution and no linear weight to prune"):
        prune(prunable(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4))), 0.5)


def test_it_needs_no_image_no_attack_and_no_budget() -> None:
    job = toy_hardening(PRUNING, {"amount": 0.5}, toy_victim())
    assert len(job.view(Meter()).surrogate) == 0
    with pytest.raises(SampleError, match="pruning is registered with attacked=False, so there is no attack"):
        job.view(Meter()).examples(toy_victim().images, 0)
    made = job.run(None).provenance
    assert (made.plugin, made.surrogate, made.surrogate_samples, made.threat.eps) == ("pruning", "none", 0, 0)
    assert (made.steps, made.forwards, made.backwards, made.params) == (1, 0, 0, {"amount": 0.5})
    assert made.inner is not None, "this is what tells it from what an attack learned"
    assert (made.inner.name, made.inner.params) == ("none", {})
    assert made.losses == {"pruned": pytest.approx(0.5, abs=1e-3)}


def test_the_key_is_the_amount_s() -> None:
    keys = [toy_hardening(PRUNING, {"amount": amount}, toy_victim()).key() for amount in (0.3, 0.4, 0.3)]
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("amount", [0.0, 1.0, -0.1, 1.5])
def test_an_amount_out_of_range_is_refused(amount: float) -> None:
    with pytest.raises(ConfigError, match=rf"pruning: amount={amount} must lie above 0 and below 1"):
        PRUNING.build({"amount": amount})


def test_the_default_and_the_published_rates_can_be_set() -> None:
    assert PRUNING.effective() == {"amount": 0.3}
    for tenths in range(1, 8):
        assert PRUNING.build({"amount": tenths / 10}).amount == tenths / 10


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Has an attack that would never run."""

    inner: str = param("embed", "attack")

    def trainer(self, view: HardenView) -> Trainer:
        raise NotImplementedError


def test_an_inner_attack_that_would_not_run_is_refused() -> None:
    spec = HardeningSpec(name="idle", summary="s", factory=Idle, source="s", attacked=False)
    with pytest.raises(PluginError, match="it has a parameter 'inner', but says attacked=False"):
        Registry().add_hardening(spec)


@pytest.fixture
def rbx(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    run = Command(capsys, monkeypatch, tmp_path, code=ENCODER, module="prune_user_code")
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))
    return run


def fit(rbx: Command, *args: str) -> Any:
    return rbx("fit", "pruning", "-e", BASE, "--device", "cpu", "-p", "amount=0.5", *args)


def test_fit_prunes_and_the_audit_takes_what_comes_of_it(rbx: Command) -> None:
    ended = fit(rbx, "--out", "p.safetensors")
    assert ended.code == 0, ended.err
    assert f"pruning on {BASE}: no image in " in ended.out
    assert "(fitted for this run); pruned 0.5" in ended.out
    assert ended.out.splitlines()[-1] == "audit it: rbx audit -e hardened:p.safetensors"
    made = read_artifact(Path("p.safetensors"))
    random = np.random.default_rng(0)
    for split, number in (("train", 6), ("test", 3)):
        for channel, name in enumerate(("red", "green")):
            for index in range(number):
                pixels = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                path = Path("data", split, name, f"{index}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                PIL.Image.fromarray(pixels).save(path)
    audit = ("audit", "-d", "folder:data", "-a", "embed", "-p", "embed.steps=2", "--eps", "4/255", "--device", "cpu")
    ended = rbx(*audit, "-e", "hardened:p.safetensors", "--out", "run")
    assert ended.code == 0, ended.out + ended.err
    (encoder,) = read_report(Path("run")).encoders
    assert (encoder.source, encoder.sha256) == ("hardened:p.safetensors", made.sha256)
    assert encoder.notes[-1].startswith(f"hardened by pruning (amount=0.5) from {BASE} with sha256 ")
    again = fit(rbx, "--out", "again.safetensors", "--seed", "5")
    assert again.code == 0
    assert read_artifact(Path("again.safetensors")).sha256 == made.sha256
    assert "fitted earlier with these settings" in fit(rbx, "--out", "more.safetensors").out


def test_pruning_what_was_hardened_works_and_pruning_it_again_changes_nothing(rbx: Command) -> None:
    assert fit(rbx, "--out", "a.safetensors").code == 0
    ended = rbx("fit", "pruning", "-e", "hardened:a.safetensors", "-p", "amount=0.7", "--out", "b.safetensors")
    assert ended.code == 0, ended.err
    assert read_artifact(Path("b.safetensors")).provenance.losses["pruned"] == pytest.approx(0.7, abs=1e-3)
    ended = rbx("fit", "pruning", "-e", "hardened:a.safetensors", "-p", "amount=0.3", "--out", "c.safetensors")
    assert ended.code != 0
    assert "every weight is what it was before" in ended.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--eps", "4/255"), "pruning makes no adversarial image, so it has no budget; leave --eps out"),
        (("--surrogate", "packaged:crops"), "pruning looks at no image; leave --surrogate out"),
        (("-p", "amuont=0.4"), "pruning has no parameter 'amuont'; did you mean amount?"),
        (("-p", "amount=2"), "pruning: amount=2.0 must lie above 0 and below 1"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_sentence(rbx: Command, args: tuple[str, ...], message: str) -> None:
    ended = fit(rbx, "--out", "p.safetensors", *args)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert not Path("p.safetensors").exists()


def test_the_catalogue_says_that_there_is_no_attack(rbx: Command) -> None:
    told = rbx("describe", "pruning").out
    assert "inner: none\n" in told
    assert "eps: none\n" in told

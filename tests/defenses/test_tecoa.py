"""TeCoA: the loss against numpy, anchors by k-means and from a file, and what training does to the loss attacked."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.encoders.encoder import Encoder
from robustbench_x.encoders.source import load_encoder
from robustbench_x.errors import ConfigError
from robustbench_x.fitting import Ground, HardenJob, Pool, write_artifact
from robustbench_x.fitting.harden import find_inner
from robustbench_x.randomness import derive_seed
from robustbench_x.registry import load_registry
from robustbench_x.testing import HARDENING_CHECKS, toy_hardening, toy_victim
from robustbench_x.threat import ThreatModel
from robustbench_x.views import Meter
from robustbench_x_defenses.hardening.tecoa import AnchorLoss, make_anchors

REGISTRY = load_registry()
TECOA = REGISTRY.hardenings["tecoa"]
THREAT = ThreatModel(eps=8 / 255)
SHORT: dict[str, Any] = {"steps": 3, "batch": 6, "classes": 4, "inner": "embed?loss=l2&steps=2"}
ENCODER = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GELU(), nn.Flatten())
    net.input_size = 16
    return net
"""


def anchor_file(path: Path, anchors: Tensor, name: str = "anchors") -> str:
    safetensors.torch.save_file({name: anchors}, path)
    return str(path)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_is_the_one_numpy_finds() -> None:
    student, teacher, anchors = draw(7, 5, seed=1), draw(7, 5, seed=2), draw(3, 5, seed=3)
    s, t, a = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (student, teacher, anchors))
    labels = np.argmax(t @ a.T, axis=1)
    assert len(set(labels.tolist())) == 3
    logits = 100.0 * s @ a.T
    top = logits.max(axis=1)
    reference = np.mean(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - logits[np.arange(7), labels])
    assert float(AnchorLoss(anchors, 100.0)(student, teacher)) == pytest.approx(float(reference), rel=1e-12)
    assert float(AnchorLoss(7 * anchors, 100.0)(3 * student, 0.1 * teacher)) == pytest.approx(float(reference))


def test_the_first_step_s_loss_is_the_loss_of_the_harness_s_images() -> None:
    victim = toy_victim()
    job = toy_hardening(TECOA, {**SHORT, "scale": 20.0}, victim)
    view = job.view(Meter())
    trainer = job.hardening.trainer(view)
    index = torch.arange(6)
    clean = view.surrogate.batch(index)
    attacked = view.examples(clean, 0)
    with torch.no_grad():
        teacher, student = victim.encoder(clean), victim.encoder(attacked)
        made = make_anchors(
            victim.encoder(view.surrogate.batch(torch.arange(24))), 4, seed=derive_seed(view.seed, "anchors")
        )
        expected = AnchorLoss(made.float(), 20.0)(student, teacher)
    assert float(trainer.step(0, index)["adv"]) == pytest.approx(float(expected), rel=1e-4)


def test_anchors_by_k_means_find_the_bundles_of_directions() -> None:
    centres = F.normalize(draw(4, 12, seed=7), dim=1)
    members = (centres.repeat_interleave(20, dim=0) + 0.05 * draw(80, 12, seed=8)) * draw(80, 1, seed=9).abs()
    found = make_anchors(members, 4, seed=0)
    assert torch.allclose(found.norm(dim=1), torch.ones(4, dtype=torch.float64))
    nearest = (found @ centres.t()).max(dim=1)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
    assert float(nearest.values.min()) > 0.99
    # A fixed point: each anchor is the normalised sum of the unit vectors that are nearest to it.
    units = members.numpy() / np.linalg.norm(members.numpy(), axis=1, keepdims=True)
    of = np.argmax(units @ found.numpy().T, axis=1)
    sums = np.stack([units[of == k].sum(axis=0) for k in range(4)])
    assert np.allclose(found.numpy(), sums / np.linalg.norm(sums, axis=1, keepdims=True))
    assert torch.equal(found, make_anchors(members, 4, seed=0))
    assert not torch.equal(found, make_anchors(members, 4, seed=1))


def test_anchors_are_no_more_than_the_directions_there_are() -> None:
    two = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    found = make_anchors(two, 16, seed=3)
    assert sorted(found.tolist()) == [[0.0, 1.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match="the surrogate images have one and the same embedding"):
        make_anchors(two[:2], 16, seed=3)
    with pytest.raises(ValueError, match="the embedding of every surrogate image is zero"):
        make_anchors(two[3:], 16, seed=3)


@pytest.mark.parametrize("check", HARDENING_CHECKS, ids=lambda c: c.__name__)
def test_the_contract_holds_with_anchors_from_a_file(check: Any, tmp_path: Path) -> None:
    check(TECOA, {**SHORT, "anchors": anchor_file(tmp_path / "a.safetensors", draw(5, 16, seed=5).float())})


def test_the_key_covers_what_the_file_holds(tmp_path: Path) -> None:
    def key(seed: int) -> str:
        path = anchor_file(tmp_path / "a.safetensors", draw(5, 16, seed=seed))
        return toy_hardening(TECOA, {**SHORT, "anchors": path}, toy_victim()).key()

    assert key(1) == key(1) != key(2)


def test_the_published_settings_can_be_set(tmp_path: Path) -> None:
    path = anchor_file(tmp_path / "prompts.safetensors", draw(1000, 8, seed=1).half())
    built = TECOA.build(
        {"steps": 20000, "batch": 128, "rate": 1e-5, "inner": "embed?loss=l2&steps=10", "anchors": path}
    )
    assert (built.scale, built.decay, built.clean, built.warmup) == (100.0, 1e-4, 0.0, 0.07)
    assert find_inner(REGISTRY, built, ThreatModel(eps=1 / 255)).attack.steps == 10


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"classes": 1}, "classes=1 must be at least 2"),
        ({"scale": 0.0}, r"scale=0\.0 must be positive"),
        ({"scale": float("inf")}, "scale=inf must be positive"),
        ({"anchors": "nowhere.safetensors"}, "anchors=nowhere.safetensors: there is no such file"),
        ({"anchors": "text.safetensors"}, "it is damaged or no safetensors file"),
        ({"anchors": "other.safetensors"}, "it has no tensor 'anchors'; it has prompts"),
        ({"anchors": "flat.safetensors"}, r"shape \(4,\), expected \(K, D\) with K of at least 2"),
        ({"anchors": "one.safetensors"}, r"shape \(1, 4\), expected \(K, D\) with K of at least 2"),
        ({"anchors": "zero.safetensors"}, "an anchor is zero or not finite"),
        ({"anchors": "nan.safetensors"}, "an anchor is zero or not finite"),
    ],
)
def test_wrong_parameters_are_named(
    params: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.safetensors").write_text("no tensors")
    anchor_file(Path("other.safetensors"), torch.ones(3, 4), "prompts")
    anchor_file(Path("flat.safetensors"), torch.ones(4))
    anchor_file(Path("one.safetensors"), torch.ones(1, 4))
    anchor_file(Path("zero.safetensors"), torch.eye(4) * torch.tensor([[1.0], [0.0], [1.0], [1.0]]))
    anchor_file(Path("nan.safetensors"), torch.full((3, 4), torch.nan))
    with pytest.raises(ConfigError, match=f"tecoa: .*{message}"):
        TECOA.build(params)


def test_anchors_of_another_width_are_refused_when_the_encoder_is_known(tmp_path: Path) -> None:
    path = anchor_file(tmp_path / "a.safetensors", draw(5, 9, seed=1))
    with pytest.raises(ValueError, match="anchors have 9 dimensions, but this encoder's features have 16"):
        toy_hardening(TECOA, {**SHORT, "anchors": path}, toy_victim()).run(None)


def _with(tensors: dict[str, Tensor]) -> Encoder:
    original = toy_victim().encoder
    backbone = copy.deepcopy(original.backbone)
    backbone.load_state_dict(tensors)
    return Encoder(source="hardened", backbone=backbone, preprocessing=original.preprocessing)


def _attacked(encoder: Encoder, images: Tensor, loss: AnchorLoss, eps: float) -> float:
    """The loss after 20 steps that maximise it, which is the published attack and none that a training here runs."""
    with torch.no_grad():
        wanted = toy_victim().encoder(images)
    made = images
    for _ in range(20):
        made = made.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(encoder(made), wanted), made)
        made = (images + (made.detach() + eps / 5 * gradient.sign() - images).clamp(-eps, eps)).clamp(0, 1)
    with torch.no_grad():
        return float(loss(encoder(made), wanted))


def test_training_keeps_attacked_images_at_their_anchors_and_mere_training_does_not() -> None:
    base, threat = toy_victim(), ThreatModel(eps=24 / 255)
    params = {"steps": 40, "batch": 24, "rate": 3e-3, "classes": 4}
    job = toy_hardening(TECOA, params, base, threat)
    view = job.view(Meter())
    surrogate = view.surrogate.batch(torch.arange(24))
    with torch.no_grad():
        made = make_anchors(base.encoder(surrogate), 4, seed=derive_seed(view.seed, "anchors"))
    loss = AnchorLoss(made.float(), 100.0)
    hardened = _with(job.run(None).tensors)
    control = _with(toy_hardening(TECOA, params, base, ThreatModel(eps=0.0)).run(None).tensors)
    for images in (surrogate, base.images):
        before, after, untaught = (
            _attacked(encoder, images, loss, threat.eps) for encoder in (base.encoder, hardened, control)
        )
        assert after < 0.8 * before
        assert after < 0.6 * untaught


def test_a_hardened_source_loads_and_names_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("tecoa_user_code.py").write_text(ENCODER)
    encoder = load_encoder("python:tecoa_user_code:make", REGISTRY).encoder
    levels = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pool = Pool(source="random", levels=levels, sha256="r")
    ground = Ground(public=encoder, pool=pool, threat=THREAT, seed=0, device=torch.device("cpu"))
    hardening = TECOA.build(SHORT)
    made = HardenJob(spec=TECOA, hardening=hardening, inner=find_inner(REGISTRY, hardening, THREAT), ground=ground).run(
        None
    )
    write_artifact(tmp_path / "t.safetensors", made)
    loaded = load_encoder("hardened:t.safetensors", REGISTRY).encoder
    assert loaded.sha256 == made.sha256
    assert loaded.notes[-1].startswith("hardened by tecoa on images of embed (linf 8/255, 3 steps) from python:")

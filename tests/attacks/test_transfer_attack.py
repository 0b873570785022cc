"""transfer: features of other public encoders, never the victim's own; what it costs and what it moves."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from project import TINY, audit, audit_config, value
from robustbench_x.encoders.encoder import Encoder, Preprocessing
from robustbench_x.engine.handout import partner_handle
from robustbench_x.errors import AttackError, ConfigError, UsageError
from robustbench_x.registry import load_registry
from robustbench_x.testing import make_view, toy_victim
from robustbench_x.threat import Norm, ThreatModel
from robustbench_x.views import EncoderHandle, EncoderView, Meter

SPEC = load_registry().attacks["transfer"]
VICTIM = toy_victim()
FRIEND, STRANGER = toy_victim(seed=1).encoder, toy_victim(seed=2).encoder
THREAT = ThreatModel(eps=8 / 255)
OTHER = "python:project:other"


def _view(partners: Sequence[Encoder], *, threat: ThreatModel = THREAT, meter: Meter | None = None) -> EncoderView:
    view = make_view("encoder", VICTIM, threat)
    assert isinstance(view, EncoderView)
    counted = meter or Meter()
    return replace(view, partners=tuple(partner_handle(encoder, counted) for encoder in partners))


def _run(view: EncoderView, **params: object) -> Tensor:
    images: Tensor = SPEC.build(params).run(view)
    return images


@torch.no_grad()
def _damage(encoder: Encoder, images: Tensor) -> float:
    """Mean cosine distance of the features to the clean ones."""
    return float((1 - F.cosine_similarity(encoder(images), encoder(VICTIM.images), dim=1)).mean())


@pytest.mark.parametrize("norm", ["linf", "l2", "patch"])
def test_damage_on_a_partner_rises_inside_the_budget(norm: Norm) -> None:
    threat = ThreatModel(norm=norm, eps={"linf": 8 / 255, "l2": 1.0, "patch": 0.1}[norm])
    view = _view([FRIEND], threat=threat)
    images = _run(view)
    assert float(threat.overrun(images, view.inputs).max()) < 1e-5
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    noise = threat.noise(view.inputs, make_view("encoder", VICTIM, threat).random)
    assert _damage(FRIEND, images) > 2 * _damage(FRIEND, noise)
    assert _damage(FRIEND, _run(view, steps=20)) >= 0.9 * _damage(FRIEND, images)


def test_every_partner_is_moved() -> None:
    both = _run(_view([FRIEND, STRANGER]))
    alone = _run(_view([FRIEND]))
    assert _damage(STRANGER, both) > _damage(STRANGER, alone)
    assert _damage(FRIEND, both) > 0.3 * _damage(FRIEND, alone)


def test_the_victim_s_own_encoder_is_left_out_by_its_digest() -> None:
    meter = Meter()
    twin = Encoder(source="another name", backbone=VICTIM.encoder.backbone, preprocessing=VICTIM.encoder.preprocessing)
    assert twin.sha256 == VICTIM.encoder.sha256
    with_twin = _run(_view([twin, FRIEND], meter=meter))
    assert torch.equal(with_twin, _run(_view([FRIEND])))
    steps, count = SPEC.build().steps, len(VICTIM.images)
    assert (meter.forwards, meter.backwards) == ((steps + 2) * count, steps * count), "clean, steps, last look"


def test_nobody_but_the_victim_is_an_error() -> None:
    for partners in ([VICTIM.encoder], []):
        with pytest.raises(AttackError, match=r"transfer has no encoder but the victim's own \(a,b\); name another"):
            _run(_view(partners), encoders="a,b")


def test_the_victim_is_never_asked() -> None:
    def never(images: Tensor) -> Tensor:
        raise AssertionError("the victim was asked")

    meter = Meter()
    view = replace(_view([FRIEND]), encoder=EncoderHandle(VICTIM.encoder, never, meter))
    _run(view)
    assert (meter.forwards, meter.backwards) == (0, 0)


def test_a_partner_of_another_size_sees_the_images_resized() -> None:
    encoder = Encoder(source="big", backbone=FRIEND.backbone, preprocessing=Preprocessing(input_size=(24, 20)))
    seen = F.interpolate(VICTIM.images, (24, 20), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    features = partner_handle(encoder, Meter()).features(VICTIM.images)
    assert torch.allclose(features, encoder(seen), atol=1e-6)
    same = partner_handle(FRIEND, Meter()).features(VICTIM.images)
    assert torch.equal(same, FRIEND(VICTIM.images)), "its own size is left alone"
    images = _run(_view([encoder]))
    assert images.shape == VICTIM.images.shape
    noise = THREAT.noise(VICTIM.images, make_view("encoder", VICTIM, THREAT).random)
    with torch.no_grad():
        moved, shaken = (
            F.cosine_similarity(partner_handle(encoder, Meter()).features(made), features, dim=1).mean()
            for made in (images, noise)
        )
    assert 1 - float(moved) > 2 * (1 - float(shaken))


def test_no_budget_no_change() -> None:
    view = _view([FRIEND], threat=ThreatModel(eps=0))
    assert torch.equal(_run(view), view.inputs)


def test_a_constant_image_moves_too() -> None:
    """At the clean image the gradient is exactly zero; the random start leaves it."""
    view = replace(_view([FRIEND]), inputs=torch.full_like(VICTIM.images, 0.5))
    assert ((_run(view) - 0.5).abs().amax(dim=(1, 2, 3)) > 0.5 * THREAT.eps).all()


@pytest.mark.parametrize(
    ("params", "message"),
    [({"steps": 0}, "steps=0 must be at least 1"), ({"encoders": " , "}, "encoders names no source")],
)
def test_parameters_out_of_range_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^transfer: {message}"):
        SPEC.build(params)


def test_the_sources_are_its_partners() -> None:
    assert SPEC.partners(SPEC.build({"encoders": " a:b?x=1 ,c:d"})) == ("a:b?x=1", "c:d")


def test_an_audit_runs_it_oblivious_on_another_encoder(images: Path, tmp_path: Path) -> None:
    attacks = [{"name": "transfer", "encoders": f"{OTHER},{TINY}"}]
    config = audit_config(images, attacks=attacks, defenses=["jpeg"], samples=12, eps="16/255")
    done = audit(config, tmp_path / "out")
    cells = [cell for cell in done.report.cells if cell.attack == "transfer"]
    assert {(cell.defense, cell.knowledge) for cell in cells} == {("none", "none"), ("jpeg", "oblivious")}
    assert all(cell.n_errors == 0 for cell in cells)
    assert value(done.cell("transfer"), "linf_max") <= 16 / 255 + 1e-6
    assert value(done.cell("transfer"), "backwards_per_sample") == 10


def test_an_audit_of_the_only_partner_has_error_rows(images: Path, tmp_path: Path) -> None:
    config = audit_config(images, attacks=[{"name": "transfer", "encoders": TINY}], samples=4)
    done = audit(config, tmp_path / "out")
    rows = done.of(done.cell("transfer"))
    assert all("transfer has no encoder but the victim's own" in row["error"] for row in rows)


def test_a_partner_that_cannot_be_had_ends_the_audit(images: Path, tmp_path: Path) -> None:
    attacks = [{"name": "transfer", "encoders": "python:project:nobody"}]
    with pytest.raises(UsageError, match="nobody"):
        audit(audit_config(images, attacks=attacks, samples=4), tmp_path / "out")

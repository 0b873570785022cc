"""Detectors: statistics against scikit-learn and SciPy, thresholds, and audits in which images are refused."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from torch import Tensor

from project import PGD, TINY, Audited, audit, audit_config, defense, registry, value
from robustbench_x.engine.fit import FitRequest, fit_plugin
from robustbench_x.engine.shields import set_threshold
from robustbench_x.errors import ConfigError
from robustbench_x.fitting import Artifact, read_artifact
from robustbench_x.fitting.defense_job import CALIBRATION, DefenseJob
from robustbench_x.metrics import _auroc
from robustbench_x.plugin import Defense, DefenseSpec, Trainer, param
from robustbench_x.registry import load_registry
from robustbench_x.testing import make_view, toy_victim
from robustbench_x.testing.toys import toy_ground
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import DefendedEncoder, Shield, Threshold
from robustbench_x.views import DefenseFitView, EncoderHandle, Meter, WhiteboxView
from robustbench_x_defenses.detectors import specs
from robustbench_x_defenses.detectors.gaussian import Gaussian, ledoit_wolf

SPECS = {spec.name: spec for spec in specs()}
TOY = toy_victim()
ATTACKS = load_registry().attacks


@pytest.fixture(autouse=True)
def _no_earlier_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))


def _features(count: int, width: int, seed: int = 0) -> Tensor:
    """Correlated, of one distribution for all seeds."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) * torch.linspace(0.1, 2, width)
    return 3 + torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) @ mixing.T


# -- the Gaussian


@pytest.mark.parametrize(("count", "width"), [(200, 5), (12, 30), (2, 4), (500, 40)])
def test_the_covariance_is_scikit_learn_s(count: int, width: int) -> None:
    features = _features(count, width)
    theirs = LedoitWolf().fit(features.double().numpy())
    covariance, shrinkage = ledoit_wolf(features)
    assert shrinkage == pytest.approx(theirs.shrinkage_, abs=1e-5)
    scale = float(np.abs(theirs.covariance_).max())
    assert np.allclose(covariance.numpy(), theirs.covariance_, atol=1e-5 * scale)


def test_features_that_are_all_alike_are_shrunk_away() -> None:
    covariance, shrinkage = ledoit_wolf(torch.full((5, 3), 0.25))
    assert shrinkage == 1
    assert float(covariance.abs().max()) == 0
    made = Gaussian.fit(torch.full((5, 3), 0.25), keep="all", variance=0.9)
    assert made.distance(torch.full((1, 3), 0.25)).isfinite().all()


@pytest.mark.parametrize(("count", "width"), [(300, 6), (15, 25)])
def test_the_distance_is_mahalanobis_s_over_its_degrees_of_freedom(count: int, width: int) -> None:
    features, queries = _features(count, width), _features(9, width, seed=1)
    made = Gaussian.fit(features, keep="all", variance=0.99)
    inverse = np.linalg.inv(ledoit_wolf(features)[0].numpy())
    mean = features.double().mean(dim=0).numpy()
    expected = [mahalanobis(query, mean, inverse) ** 2 / width for query in queries.double().numpy()]
    assert np.allclose(made.distance(queries).numpy(), expected, rtol=2e-3)


def test_clean_features_are_at_distance_one_on_average() -> None:
    """Where shrinking changes little: it moves small variances towards the mean one."""
    features = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 2, 6)
    made = Gaussian.fit(features, keep="all", variance=0.99)
    assert float(made.distance(features).mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("variance", "leading"), [(0.5, 1), (0.9, 2), (0.985, 3), (0.9999, 4)])
def test_leading_and_trailing_components_share_them_all(variance: float, leading: int) -> None:
    """Independent features of variances 70, 25, 4, 1: shares 0.7, 0.95, 0.99, 1."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(20000, 4, generator=generator)
    centred = plain - plain.mean(dim=0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / len(centred))).T
    features = white * torch.tensor([70.0, 25.0, 4.0, 1.0]).sqrt()
    made = {keep: Gaussian.fit(features, keep=keep, variance=variance) for keep in ("all", "leading", "trailing")}
    ranks = {keep: len(gaussian.whitening) for keep, gaussian in made.items()}
    assert ranks["all"] == 4
    assert ranks["leading"] == leading
    assert ranks["trailing"] == max(4 - leading, 1)
    queries = 5 * torch.randn(7, 4, generator=generator)
    if leading < 4:
        parts = sum(ranks[keep] * made[keep].distance(queries) for keep in ("leading", "trailing"))
        assert torch.allclose(torch.as_tensor(parts), 4 * made["all"].distance(queries), rtol=1e-3)
    axes = made["leading"].whitening.abs() > 1e-2
    assert not axes[:, leading:].any(), "the largest ones"


def test_what_no_covariance_can_be_of_is_refused() -> None:
    with pytest.raises(ValueError, match="a covariance needs two images, there is 1"):
        Gaussian.fit(torch.zeros(1, 3), keep="all", variance=0.9)
    with pytest.raises(ValueError, match="components=most: choose from all, leading, trailing"):
        Gaussian.fit(torch.zeros(3, 3), keep="most", variance=0.9)


@pytest.mark.parametrize("shift", [0.0, 1.0, 6.0])
def test_planted_shifts_are_told_as_often_as_scikit_learn_counts(shift: float) -> None:
    made = Gaussian.fit(_features(400, 8), keep="all", variance=0.99)
    clean, moved = _features(150, 8, seed=1), _features(150, 8, seed=2)
    moved = moved + shift * torch.linalg.pinv(made.whitening)[:, -1]
    scores = made.distance(torch.cat([clean, moved])).numpy().astype(np.float64).round(2)  # with ties
    theirs = roc_auc_score([0] * 150 + [1] * 150, scores)
    assert _auroc(scores[150:], scores[:150]) == pytest.approx(theirs, abs=1e-9)
    low, high = {0.0: (0.4, 0.6), 1.0: (0.52, 0.8), 6.0: (0.99, 1.0)}[shift]
    assert low <= theirs <= high


# -- thresholds


@pytest.mark.parametrize(
    ("count", "rate", "place"),
    [
        (19, 0.05, 18),  # 19 of 20 places: the largest of 19, so that 1 of 20 new ones is refused
        (39, 0.05, 37),
        (99, 0.05, 94),
        (9, 0.1, 8),
        (9, 0.5, 4),
        (4, 0.2, 3),
        (99, 0.41, 58),  # (1 - 0.41) * 100 is a little above 59 in floating point
        (99, 0.07, 92),
        (3, 0.9, 0),
    ],
)
def test_the_threshold_is_the_order_statistic(count: int, rate: float, place: int) -> None:
    scores = torch.arange(count, dtype=torch.float64)
    made = set_threshold(scores, rate)
    assert made.refuse_above == place
    assert made.spread == pytest.approx(float(np.arange(count).std()))


def test_with_too_few_images_none_of_them_is_refused() -> None:
    for count in (1, 2, 5, 18):
        scores = torch.arange(count, dtype=torch.float64)
        assert not (scores > set_threshold(scores, 0.05).refuse_above).any()


def test_a_spread_of_nothing_is_one() -> None:
    assert set_threshold(torch.tensor([2.0]), 0.1) == Threshold(refuse_above=2.0, spread=1.0)
    assert set_threshold(torch.full((30,), 2.0), 0.1) == Threshold(refuse_above=2.0, spread=1.0)


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (30, 0.1), (45, 0.3)])
def test_new_clean_images_are_refused_at_most_at_the_rate(count: int, rate: float) -> None:
    random = np.random.default_rng(0)
    shares = []
    for _ in range(4000):
        held = torch.from_numpy(np.sort(random.exponential(size=count)))
        shares.append((random.exponential(size=20) > set_threshold(held, rate).refuse_above).mean())
    mean, error = float(np.mean(shares)), float(np.std(shares)) / 4000**0.5
    assert mean < rate + 3 * error
    assert mean > rate - 1 / (count + 1) - 3 * error, "and no fewer than need be"


def test_acceptance_is_in_spreads_and_refuses_below_zero() -> None:
    class Bright:
        def apply(self, images: Tensor) -> Tensor:
            return images

        def score(self, images: Tensor, encoder: EncoderHandle) -> Tensor:
            return images.mean(dim=(1, 2, 3))

    shield = Shield(spec=SPECS["mvg"], defense=Bright(), threshold=Threshold(refuse_above=0.5, spread=0.2))
    images = torch.tensor([0.3, 0.5, 0.9]).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    found = DefendedEncoder(encoder=TOY.encoder, shield=shield).acceptance(images)
    assert torch.allclose(found, torch.tensor([1.0, 0.0, -2.0]), atol=1e-5)


# -- the detectors on a toy encoder


def _job(name: str, **params: Any) -> DefenseJob:
    spec = SPECS[name]
    return DefenseJob(spec=spec, defense=spec.build(params), ground=toy_ground(TOY, ThreatModel(eps=0)))


def _armed(name: str, **params: Any) -> tuple[Any, Artifact]:
    job = _job(name, **params)
    made = job.run(None)
    return job.defense.armed({k: t for k, t in made.tensors.items() if k != CALIBRATION}), made


HANDLE = EncoderHandle(TOY.encoder, lambda images: images, Meter())


def test_feature_squeezing_is_the_largest_cosine_distance_to_a_squeezed_copy() -> None:
    detector, _ = _armed("feature_squeezing", bits=3, kernel=3)
    images = TOY.images.numpy()
    squeezed = [
        np.rint(images * np.float32(7)) / np.float32(7),
        scipy.ndimage.median_filter(images, size=(1, 1, 3, 3), mode="reflect"),
    ]
    with torch.no_grad():
        plain = TOY.encoder(TOY.images).double().numpy()
        others = [TOY.encoder(torch.from_numpy(s)).double().numpy() for s in squeezed]
    norms = np.linalg.norm
    distances = [1 - (plain * o).sum(axis=1) / norms(plain, axis=1) / norms(o, axis=1) for o in others]
    assert np.allclose(detector.score(TOY.images, HANDLE).detach().numpy(), np.max(distances, axis=0), atol=2e-6)


def test_mvg_is_the_sum_over_layers_of_the_distance_to_their_means_over_positions() -> None:
    job = _job("mvg", layers="early, pooled")
    detector, made = _armed("mvg", layers="early, pooled")
    view = job.view(Meter())
    images = view.images.batch(torch.arange(len(view.images)))
    with torch.no_grad():
        expected = torch.zeros(len(TOY.images))
        for name in ("early", "pooled"):

            def of(pixels: Tensor, layer: str = name) -> Tensor:
                if layer == "pooled":
                    return torch.as_tensor(TOY.encoder(pixels))
                return TOY.encoder.tokens(pixels, [layer])[layer].spatial.mean(dim=1)

            gaussian = Gaussian.fit(of(images), keep="all", variance=0.99)
            expected += gaussian.distance(of(TOY.images))
        assert torch.allclose(detector.score(TOY.images, HANDLE), expected, rtol=1e-3)
    assert {k for k in made.tensors if k != CALIBRATION} == {
        "mean.early", "whitening.early", "mean.pooled", "whitening.pooled",
    }  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_the_calibration_is_of_held_out_images_only(name: str) -> None:
    job = _job(name)
    detector, made = _armed(name)
    held = job.view(Meter()).held_out
    assert len(held) == 8
    with torch.no_grad():
        scores = detector.score(held.batch(torch.arange(8)), HANDLE).double().sort().values
    assert torch.allclose(made.tensors[CALIBRATION], scores, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "params"),
    [("mvg", {}), ("mvg", {"layers": "all", "components": "trailing", "variance": 0.9}), ("feature_squeezing", {})],
    ids=str,
)
def test_every_image_s_score_has_a_gradient_and_is_its_own(name: str, params: dict[str, Any]) -> None:
    detector, _ = _armed(name, **params)
    pixels = TOY.images.clone().requires_grad_(True)
    scores = detector.score(pixels, HANDLE)
    assert scores.shape == (len(pixels),)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert gradient.isfinite().all()
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    with torch.no_grad():
        alone = torch.cat([detector.score(image[None], HANDLE) for image in TOY.images])
    assert torch.allclose(alone, scores.detach(), rtol=1e-3, atol=1e-6)
    assert torch.equal(detector.apply(TOY.images), TOY.images)


def test_the_gradient_of_mvg_is_that_of_finite_differences() -> None:
    detector, _ = _armed("mvg")
    direction = torch.randn(TOY.images.shape, generator=torch.Generator().manual_seed(0))
    pixels = (0.2 + 0.6 * TOY.images).requires_grad_(True)
    (gradient,) = torch.autograd.grad(detector.score(pixels, HANDLE).sum(), pixels)
    with torch.no_grad():
        up, down = (detector.score(pixels + s * 2e-3 * direction, HANDLE) for s in (1, -1))
    slope = ((up - down) / 4e-3).numpy()
    assert np.allclose(slope, (gradient * direction).sum(dim=(1, 2, 3)).numpy(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("mvg", {"layers": " "}, "layers names no layer"),
        ("mvg", {"variance": 1.0}, "variance=1.0 must lie between 0 and 1"),
        ("mvg", {"components": "most"}, "components='most'"),
        ("feature_squeezing", {"bits": 0}, "bits=0 must lie between 1 and 8"),
        ("feature_squeezing", {"kernel": 1}, "kernel=1 must lie between 2 and 15"),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SPECS[name].build(params)


def test_a_layer_that_the_encoder_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="layers=deep: the encoder has no layer deep; it has early, late, pooled"):
        _job("mvg", layers="deep").run(None)


@pytest.mark.parametrize("name", SPECS)
def test_tensors_of_another_plugin_are_refused(name: str) -> None:
    for learned in ({}, {"delta": torch.zeros(3)}):
        with pytest.raises((ValueError, KeyError), match=r"these are no|mean\."):
            SPECS[name].build().armed(learned)


def test_rbx_fit_takes_a_detector_for_an_audit(images: Path, tmp_path: Path) -> None:
    request = FitRequest(
        plugin="mvg",
        encoder=TINY,
        threat=ThreatModel(eps=0),
        out=tmp_path / "a.safetensors",
        params={"components": "leading"},
        surrogate=f"folder:{images}",
        samples=40,
        device="cpu",
    )
    fit_plugin(request, registry())
    made = read_artifact(tmp_path / "a.safetensors")
    assert (made.provenance.plugin, made.provenance.encoder) == ("mvg", TINY)
    assert len(made.tensors[CALIBRATION]) == 13, "a third of 40"
    shields = [{"name": "mvg", "artifact": str(tmp_path / "a.safetensors")}]
    done = audit(audit_config(images, attacks=["noise"], defenses=shields, samples=8), tmp_path / "out")
    (info,) = done.report.defenses
    assert info.detects
    assert info.refuse_above == set_threshold(made.tensors[CALIBRATION], 0.05).refuse_above
    assert info.params["components"] == "leading", "as it was fitted, not this audit's default"


# -- audits


def _check_rows(done: Audited, title: str) -> None:
    """What every cell behind a detector must keep, row by row."""
    for cell in done.report.cells:
        rows = done.of(cell)
        if cell.defense != title:
            assert all(math.isnan(row["adv_acceptance"] or math.nan) for row in rows)
            continue
        for row in rows:
            right, let_in = row["clean_pred"] == row["label"], row["clean_acceptance"] >= 0
            assert row["clean_correct"] == (right and let_in)
            wrong, accepted = row["adv_pred"] != row["label"], row["adv_acceptance"] >= 0
            assert row["fooled"] == (row["clean_correct"] and wrong and accepted), "a refused image fools nobody"
            assert math.isfinite(row["adv8_acceptance"])
        assert value(cell, "clean_accuracy") == pytest.approx(np.mean([row["clean_correct"] for row in rows]))
        assert value(cell, "refused") == pytest.approx(np.mean([row["adv_acceptance"] < 0 for row in rows]))
        assert value(cell, "refused_clean") == pytest.approx(np.mean([row["clean_acceptance"] < 0 for row in rows]))
        scores = [-row[f"{side}_acceptance"] for side in ("clean", "adv") for row in rows]
        truth = [0] * len(rows) + [1] * len(rows)
        assert value(cell, "detector_auroc") == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
        robust = [row["clean_correct"] and not row["fooled"] for row in rows]
        assert value(cell, "robust_accuracy") == pytest.approx(np.mean(robust))


@pytest.mark.parametrize("name", SPECS)
def test_an_audit_behind_a_detector(name: str, images: Path, tmp_path: Path) -> None:
    attacks = [PGD, {"name": "embed", "steps": 3}]
    config = audit_config(images, attacks=attacks, defenses=[name], refuse_rate=0.3, eps="8/255")
    done = audit(config, tmp_path / "out")
    assert done.report.status == "complete"
    found = {(cell.attack, cell.knowledge) for cell in done.report.cells if cell.defense == name}
    assert found == {("noise", "oblivious"), ("embed", "oblivious"), ("pgd", "oblivious"), ("pgd", "full")}
    assert sum(cell.n_errors for cell in done.report.cells) == 0
    _check_rows(done, name)
    blind, knowing = (done.cell("pgd", defense=name, knowledge=level) for level in ("oblivious", "full"))
    assert 0 < value(blind, "refused_clean") < 0.7
    assert value(blind, "clean_accuracy") < value(done.cell("pgd"), "clean_accuracy")
    assert value(knowing, "robust_accuracy") <= value(blind, "robust_accuracy")
    assert value(knowing, "refused") < value(blind, "refused")


def test_the_rate_holds_on_images_that_lie_in_the_order_of_their_classes(images: Path, tmp_path: Path) -> None:
    """A threshold from the last classes alone refused 16 of these 40 at a rate of one in ten."""
    shields = list(SPECS)
    done = audit(audit_config(images, attacks=["noise"], defenses=shields, refuse_rate=0.1), tmp_path / "out")
    for name in shields:
        assert value(done.cell("noise", defense=name), "refused_clean") <= 0.2


@dataclass(frozen=True, kw_only=True)
class Rough:
    """Refuses what is rougher than clean images are; without a number above a limit, where one is set."""

    artifact: str = param("", "file")
    limit: float = param(1e9, "of the roughness, beyond which the score is NaN")

    def trainer(self, view: DefenseFitView) -> Trainer:
        return _Nothing()

    def armed(self, learned: Mapping[str, Tensor]) -> Defense:
        return _Roughness(self.limit)


@dataclass(frozen=True)
class _Roughness:
    limit: float

    def apply(self, images: Tensor) -> Tensor:
        return images

    def score(self, images: Tensor, encoder: EncoderHandle) -> Tensor:
        down, right = images.diff(dim=2).square().mean(dim=(1, 2, 3)), images.diff(dim=3).square().mean(dim=(1, 2, 3))
        rough = (down + right).add(1e-12).sqrt()
        return torch.where(rough > self.limit, torch.full_like(rough, torch.nan), rough)


class _Nothing:
    steps, batch = 0, 0

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        raise AssertionError("there is none")

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        del state

    def result(self) -> dict[str, Tensor]:
        return {"nothing": torch.zeros(1)}


ROUGH = defense(Rough, fits=True, per_encoder=True, detects=True, knowledge=("oblivious", "full"))


def test_an_attacker_who_knows_the_detector_evades_it(images: Path, tmp_path: Path) -> None:
    """White noise is rough, so every oblivious image is caught; the classes differ by smooth patterns."""
    attacks = [{"name": "pgd", "steps": 40}, {"name": "apgd_t", "steps": 20, "targets": 3}]
    config = audit_config(images, attacks=attacks, defenses=["rough"], eps="24/255", samples=16, refuse_rate=0.05)
    done = audit(config, tmp_path / "out", ROUGH)
    _check_rows(done, "rough")
    for name in ("pgd", "apgd_t"):
        blind, knowing = (done.cell(name, defense="rough", knowledge=level) for level in ("oblivious", "full"))
        assert value(done.cell(name), "asr") == 1, "undefended everything falls"
        assert value(blind, "refused") == 1
        assert value(blind, "robust_accuracy") == value(blind, "clean_accuracy")
        assert value(blind, "detector_auroc") == 1
        assert value(knowing, "robust_accuracy") < 0.5 * value(blind, "robust_accuracy"), name


def test_a_score_that_is_not_a_number_is_never_robust(images: Path, tmp_path: Path) -> None:
    shields = [{"name": "rough", "limit": 0.12}]
    config = audit_config(images, attacks=[PGD], defenses=shields, eps="24/255", samples=8)
    done = audit(config, tmp_path / "out", ROUGH)
    cell = done.cell("pgd", defense="rough", knowledge="oblivious")
    rows = done.of(cell)
    assert cell.n_errors == len(rows) == 8
    assert {row["error"] for row in rows} == {"the detector's score is NaN or infinite"}
    assert all(not row["fooled"] and row["clean_correct"] is None for row in rows)
    assert cell.metrics["robust_accuracy"].value is None
    assert done.decide().exit_code != 0
    knowing = done.of(done.cell("pgd", defense="rough", knowledge="full"))
    assert all(row["error"] is None or "NaN" in row["error"] for row in knowing)


def test_clean_images_without_a_score_cannot_set_a_threshold(images: Path, tmp_path: Path) -> None:
    shields = [{"name": "rough", "limit": 0.0}]
    done = audit(audit_config(images, attacks=[PGD], defenses=shields, samples=4), tmp_path / "out", ROUGH)
    behind = [cell for cell in done.report.cells if cell.defense == "rough"]
    assert {cell.knowledge for cell in behind} == {"oblivious", "full"}
    for cell in behind:
        assert cell.n_errors == 4
        assert all("rough gives clean images scores that are not finite" in row["error"] for row in done.of(cell))
    assert all(cell.n_errors == 0 for cell in done.report.cells if cell.defense == "none")
    assert done.decide().exit_code == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_encoder": False}, "a detector is fitted, for one encoder"),
        ({"stochastic": True}, "a detector is deterministic and has knowledge oblivious and full"),
        ({"knowledge": ("oblivious", "bpda", "full")}, "a detector is deterministic and has knowledge"),
    ],
    ids=str,
)
def test_what_no_detector_can_be_is_refused_at_registration(changes: dict[str, Any], message: str) -> None:
    from robustbench_x.errors import PluginError

    spec: DefenseSpec = replace(ROUGH, **changes)
    with pytest.raises(PluginError, match=message):
        registry(spec)


# -- the joint objective


def _joint_view(*, limit: float, threat: ThreatModel) -> WhiteboxView:
    """A detector that knows the clean images, and refuses who moves their upper half by more than `limit`."""
    view = make_view("whitebox", TOY, threat, exhaustive=True)
    assert isinstance(view, WhiteboxView)

    def acceptance(images: Tensor) -> Tensor:
        known = TOY.images if len(images) == len(TOY.images) else TOY.images[:0]
        moved = (images - known)[:, :, :8].square().mean(dim=(1, 2, 3)).add(1e-12).sqrt()
        return (limit - moved) / limit

    return replace(view, detector=acceptance)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("pgd", {"steps": 40}),
        ("pgd", {"steps": 40, "loss": "margin"}),
        ("mifgsm", {"steps": 40, "decay": 0.5}),
        ("apgd_ce", {"steps": 40}),
        ("apgd_t", {"steps": 40, "targets": 4}),
    ],
    ids=str,
)
def test_every_joint_attack_fools_and_is_accepted(name: str, params: dict[str, Any]) -> None:
    threat = ThreatModel(eps=40 / 255)
    view = _joint_view(limit=0.5 * threat.eps, threat=threat)
    assert view.detector is not None
    attack = ATTACKS[name].build(params)
    with torch.no_grad():
        blind = attack.run(replace(view, detector=None))
        knowing = threat.project(attack.run(view), TOY.images)
        wrong = [TOY.logits(images).argmax(dim=1) != TOY.labels for images in (blind, knowing)]
        accepted = [view.detector(images) >= 0 for images in (blind, knowing)]
    succeed = [(w & a).float().mean() for w, a in zip(wrong, accepted, strict=True)]
    assert float(wrong[0].float().mean()) > 0.9
    assert float(succeed[0]) < 0.3, "the oblivious one is caught"
    assert float(succeed[1]) > float(succeed[0]) + 0.4


def test_where_everything_is_accepted_the_joint_attack_is_the_plain_one_on_the_margin() -> None:
    view = make_view("whitebox", TOY, ThreatModel(eps=8 / 255), exhaustive=True)
    assert isinstance(view, WhiteboxView)
    open_ = replace(view, detector=lambda images: torch.full((len(images),), 1e6) + 0 * images.sum(dim=(1, 2, 3)))
    attack = ATTACKS["pgd"].build({"steps": 5, "loss": "margin"})
    fresh = make_view("whitebox", TOY, ThreatModel(eps=8 / 255), exhaustive=True)
    assert torch.equal(attack.run(open_), attack.run(fresh))


def test_a_detector_without_a_number_spoils_the_images() -> None:
    view = make_view("whitebox", TOY, ThreatModel(eps=8 / 255))
    assert isinstance(view, WhiteboxView)
    broken = replace(view, detector=lambda images: images.mean(dim=(1, 2, 3)) * torch.nan)
    images = ATTACKS["pgd"].build({"steps": 3}).run(broken)
    assert images.isnan().flatten(1).any(dim=1).all()

"""The judge against slow references: admission, majority votes, distances, structural similarity."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder, Preprocessing
from robustbench_x.errors import SampleError
from robustbench_x.heads.base import FittedHead
from robustbench_x.judge import UNJUDGED, Reading, admit, feature_cosine, first_errors, measure, predict, read_features
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import DefendedEncoder, Shield

THREAT = ThreatModel(eps=8 / 255)


def _images(count: int = 4, side: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, side, side, generator=generator) * 255).round() / 255


def _head(classes: int, features: int | None = None) -> FittedHead:
    if features is None:
        layer: nn.Module = nn.Identity()
    else:
        layer = nn.Linear(features, classes)
        generator = torch.Generator().manual_seed(3)
        layer.load_state_dict(
            {"weight": torch.randn(classes, features, generator=generator), "bias": torch.zeros(classes)}
        )
    return FittedHead(name="h", layer=layer, num_classes=classes, aliases={})


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (None, "returned a NoneType, not a tensor"),
        (np.zeros((4, 3, 16, 16)), "returned a ndarray, not a tensor"),
        (torch.zeros(3, 3, 16, 16), r"shape \(3, 3, 16, 16\), expected \(4, 3, 16, 16\)"),
        (torch.zeros(4, 3, 16, 15), r"shape \(4, 3, 16, 15\), expected"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(candidates: Any, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        admit(candidates, _images(), THREAT)


def test_admitted_images_are_finite_and_inside_the_budget() -> None:
    inputs = _images()
    candidates = inputs.double() + torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1))
    candidates[1, 0, 0, 0], candidates[2, 1, 3, 3] = torch.nan, torch.inf
    admitted = admit(candidates.clone().requires_grad_(True), inputs, THREAT)
    assert admitted.images.dtype == torch.float32
    assert not admitted.images.requires_grad
    assert [error is None for error in admitted.errors] == [True, False, False, True]
    assert torch.equal(admitted.images[1], inputs[1])
    assert float((admitted.images - inputs).abs().max()) <= THREAT.eps + 1e-6
    assert admitted.images.min() >= 0
    assert admitted.images.max() <= 1
    expected = (candidates[0].float() - admitted.images[0]).abs().max()
    assert float(admitted.overrun[0]) == pytest.approx(float(expected), abs=1e-6)
    assert float(admitted.overrun[1]) == 0


def test_admission_is_safe_from_later_writes() -> None:
    inputs = _images()
    candidates = inputs.clone()
    admitted = admit(candidates, inputs, THREAT)
    candidates.fill_(0)
    assert torch.equal(admitted.images, inputs)


def test_predictions_follow_the_majority_rule() -> None:
    """Against a loop over samples and draws; votes are drawn so that ties and exact halves occur."""
    generator = torch.Generator().manual_seed(0)
    draws, samples, classes = 6, 200, 4
    logits = torch.randn(draws, samples, classes, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits[:3, :60] = 0.0
    for i in range(60):
        logits[:3, i, labels[i]] = 9.0
    found = predict(Reading(features=logits), _head(classes), labels)
    halves = 0
    for i in range(samples):
        votes = [int(logits[d, i].argmax()) for d in range(draws)]
        own = int(labels[i])
        right = votes.count(own)
        halves += right * 2 == draws
        if right * 2 > draws:
            expected = {own}
        else:
            wrong = [v for v in votes if v != own]
            most = max(wrong.count(v) for v in wrong)
            expected = {v for v in wrong if wrong.count(v) == most}
        assert int(found.classes[i]) in expected, (votes, own)
        margins = [float(logits[d, i, own] - max(logits[d, i, k] for k in range(classes) if k != own))
                   for d in range(draws)]  # fmt: skip
        assert float(found.margin[i]) == pytest.approx(sum(margins) / draws, abs=1e-5)
    assert halves > 5, "the rule's edge was met"
    assert found.errors == [None] * samples


def test_a_draw_that_is_not_finite_is_an_error() -> None:
    logits = torch.zeros(3, 4, 2)
    logits[1, 0, 1], logits[2, 3, 0], logits[0, 2, 0] = torch.nan, torch.inf, -torch.inf
    found = predict(Reading(features=logits), _head(2), torch.zeros(4, dtype=torch.long))
    assert found.classes.tolist() == [UNJUDGED, 0, UNJUDGED, UNJUDGED]
    assert [error is not None for error in found.errors] == [True, False, True, True]


def _window() -> np.ndarray:
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    line /= line.sum()
    return np.outer(line, line)


def _slow_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SSIM of one channel with an 11 x 11 Gaussian window of 1.5 (Wang et al. 2004), edges reflected."""
    window, side = _window(), 5
    a, b = (np.pad(x, side, mode="reflect") for x in (a, b))
    out = np.zeros((a.shape[0] - 2 * side, a.shape[1] - 2 * side))
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * p * p).sum() - mp**2, (window * q * q).sum() - mq**2
            cov = (window * p * q).sum() - mp * mq
            out[y, x] = (2 * mp * mq + 0.01**2) * (2 * cov + 0.03**2)
            out[y, x] /= (mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2)
    return out


def test_structural_similarity_matches_a_slow_reference() -> None:
    inputs = _images(2, 20)
    noisy = (inputs + 0.1 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    found = measure(noisy, inputs).ssim
    for i in range(2):
        channels = [_slow_ssim(noisy[i, c].double().numpy(), inputs[i, c].double().numpy()) for c in range(3)]
        assert float(found[i]) == pytest.approx(float(np.mean(channels)), abs=1e-4)


def test_structural_similarity_of_known_images() -> None:
    grey, light = torch.full((1, 3, 16, 16), 0.25), torch.full((1, 3, 16, 16), 0.75)
    assert float(measure(grey, grey).ssim) == pytest.approx(1, abs=1e-6)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert float(measure(light, grey).ssim) == pytest.approx(expected, abs=1e-3)
    tiny = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert measure(tiny, tiny).ssim.tolist() == pytest.approx([1, 1], abs=1e-5)


def test_norms_match_numpy() -> None:
    inputs, other = _images(), _images(seed=9)
    found = measure(other, inputs)
    change = (other - inputs).double().numpy().reshape(4, -1)
    assert found.linf.tolist() == pytest.approx(np.abs(change).max(axis=1).tolist())
    assert found.l2.tolist() == pytest.approx(np.sqrt((change**2).sum(axis=1)).tolist(), rel=1e-5)


def test_cosine_is_averaged_over_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    found = feature_cosine(Reading(features=one), Reading(features=two))
    a, b = one.numpy(), two.numpy()
    expected = [
        np.mean([a[d, i] @ b[d, i] / np.linalg.norm(a[d, i]) / np.linalg.norm(b[d, i]) for d in range(3)])
        for i in range(5)
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_first_error_of_a_sample_is_kept() -> None:
    assert first_errors([None, "a", None], [None, "b", "c"]) == [None, "a", "c"]


class _Flat(nn.Module):
    layers: tuple[str, ...] = ()

    def pooled(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_only_random_victims_are_drawn_many_times_and_every_draw_is_fresh_and_seeded() -> None:
    from robustbench_x.plugin import DefenseSpec

    class Jitter:
        """Noise."""

        def apply(self, images: Tensor) -> Tensor:
            return (images + 0.1 * torch.randn_like(images)).clamp(0, 1)

    encoder = Encoder(source="flat", backbone=_Flat(), preprocessing=Preprocessing(input_size=(8, 8)))  # type: ignore[arg-type]
    images = _images(3, 8)
    plain = read_features(images, DefendedEncoder(encoder=encoder), draws=5, seed=0)
    assert plain.features.shape == (1, 3, 192)
    assert torch.equal(plain.features[0], images.flatten(1))
    spec = DefenseSpec(name="jitter", summary="s", factory=Jitter, source="s", stochastic=True)
    victim = DefendedEncoder(encoder=encoder, shield=Shield(spec=spec, defense=Jitter()))
    state = torch.get_rng_state()
    one, two, three = (read_features(images, victim, draws=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is untouched"
    assert one.features.shape == (5, 3, 192)
    assert torch.equal(one.features, two.features)
    assert not torch.equal(one.features, three.features)
    assert not torch.equal(one.features[0], one.features[1])

"""Universal attacks: the generator, the loss terms, the pattern, and whether a training learns anything."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.plugin import AttackSpec
from robustbench_x.registry import load_registry
from robustbench_x.stats import mcnemar_exact
from robustbench_x.testing import ToyVictim, fit_toy, make_view, toy_victim
from robustbench_x.testing.toys import toy_job
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderView, Meter
from robustbench_x_attacks.universal import terms
from robustbench_x_attacks.universal.generator import Generator, bounded
from robustbench_x_attacks.universal.pattern import put_on, step_places

REGISTRY = load_registry()
ADVENCODER = REGISTRY.attacks["advencoder"]
UNIVERSAL = [spec for spec in REGISTRY.attacks.values() if spec.fits]
LINF = ThreatModel(eps=16 / 255)
PATCH = ThreatModel(norm="patch", eps=0.1)
SMALL = {"noises": 4, "width": 32, "steps": 6, "batch": 8}


def _images(count: int = 4, size: tuple[int, int] = (16, 16), seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def _candidates(spec: AttackSpec, victim: ToyVictim, threat: ThreatModel, learned: dict[str, Tensor]) -> Tensor:
    images: Tensor = spec.build().run(make_view("encoder", victim, threat, artifact=learned))
    return images


# -- the generator


def test_the_published_generator_has_the_published_size() -> None:
    made = Generator(size=(64, 64), noises=256, width=1024, seed=0)
    up = [(100, 1024), (1024, 512), (512, 256), (256, 128)]
    convolutions = sum(i * o * 16 + o for i, o in (*up, (128, 3))) + 256 * 9 + 1
    norms = sum(2 * o for _, o in up)
    assert sum(p.numel() for p in made.parameters()) == convolutions + norms
    assert made.noise.shape == (256, 100, 1, 1)


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (98, 98), (33, 47), (224, 224)])
def test_the_generator_makes_one_pattern_of_any_size_with_the_same_weights(size: tuple[int, int]) -> None:
    made = Generator(size=size, noises=3, width=16, seed=0)
    assert made().shape == (1, 3, *size)
    small = Generator(size=(64, 64), noises=3, width=16, seed=0)
    assert [p.shape for p in made.parameters()] == [p.shape for p in small.parameters()]


def test_the_generator_mixes_its_images_as_a_written_out_network_does() -> None:
    made = Generator(size=(64, 64), noises=3, width=16, seed=1)
    x = made.noise
    for number in range(4):
        up, norm = made.trunk[3 * number], made.trunk[3 * number + 1]
        assert isinstance(up, torch.nn.ConvTranspose2d)
        assert isinstance(norm, torch.nn.BatchNorm2d)
        stride, padding = (1, 0) if number == 0 else (2, 1)
        x = F.conv_transpose2d(x, up.weight, up.bias, stride=stride, padding=padding)
        mean, var = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), keepdim=True, correction=0)
        x = (x - mean) / (var + norm.eps).sqrt() * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
        x = x.clamp(min=0)
        assert x.shape[-1] == 4 * 2**number
    images = torch.tanh(F.conv_transpose2d(x, made.last.weight, made.last.bias, stride=2, padding=1))
    kernel, bias = made.mix.weight[0], made.mix.bias
    assert bias is not None
    padded = F.pad(images, (1, 1, 1, 1))
    mixed = torch.zeros(3, 64, 64)
    for n in range(3):
        for dy in range(3):
            for dx in range(3):
                mixed += kernel[n, dy, dx] * padded[n, :, dy : dy + 64, dx : dx + 64]
    torch.testing.assert_close(made()[0], mixed + bias, rtol=1e-4, atol=1e-5)


def test_the_generator_is_decided_by_its_seed_and_leaves_the_global_one_alone() -> None:
    state = torch.get_rng_state()
    made, again, another = (Generator(size=(64, 64), noises=2, width=8, seed=s) for s in (3, 3, 4))
    assert torch.equal(made(), again())
    assert not torch.equal(made(), another())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("threat", [LINF, PATCH], ids=str)
def test_a_generated_pattern_is_inside_the_budget(threat: ThreatModel) -> None:
    pattern = bounded(5 * torch.randn(1, 3, 64, 64), threat, (16, 16))
    low, high = (0.0, 1.0) if threat.norm == "patch" else (-threat.eps, threat.eps)
    assert low - 1e-7 <= float(pattern.min()) <= float(pattern.max()) <= high + 1e-7
    assert pattern.shape[-1] == (16 if threat.norm == "linf" else threat.side(16, 16))


# -- the terms of the loss


def _features(seed: int) -> Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum()) / math.sqrt(float((a * a).sum()) * float((b * b).sum()))


def test_the_papers_contrast_is_the_written_out_loop() -> None:
    adversarial, clean = _features(0), _features(1)
    total = 0.0
    for i in range(5):
        own = math.exp(_cosine(adversarial[i], clean[i]) / 0.1)
        others = sum(math.exp(_cosine(adversarial[i], clean[j]) / 0.1) for j in range(5) if j != i)
        total += math.log(own / others) / 5
    assert float(terms.contrast_paper(adversarial, clean, 0.1)) == pytest.approx(total)


def test_the_codes_contrast_is_the_written_out_loop() -> None:
    adversarial, clean = _features(0), _features(1)
    total = 0.0
    for i in range(5):
        logits = [_cosine(clean[i], adversarial[j]) / 0.1 for j in range(5)]
        total += math.log(math.exp(logits[i]) / sum(map(math.exp, logits))) / 5
    assert float(terms.contrast_code(adversarial, clean, 0.1)) == pytest.approx(total)


def test_both_contrasts_fall_as_the_features_leave_the_clean_ones() -> None:
    clean = _features(1)
    near, far = clean + 0.01 * _features(2), -clean
    for contrast in (terms.contrast_paper, terms.contrast_code):
        assert float(contrast(far, clean, 0.1)) < float(contrast(near, clean, 0.1))


def test_distances_are_the_written_out_loops() -> None:
    a, b = _images(3, seed=1), _images(3, seed=2)
    norms = [math.sqrt(sum(float(d) ** 2 for d in (a[i] - b[i]).flatten())) for i in range(3)]
    squares = [float(d) ** 2 for d in (a - b).flatten()]
    assert float(terms.distance(a, b, "norm")) == pytest.approx(sum(norms) / 3, rel=1e-5)
    assert float(terms.distance(a, b, "mse")) == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_the_published_disc_drops_193_of_4096_bins() -> None:
    impulse = torch.zeros(1, 1, 64, 64)
    impulse[..., 0, 0] = 1.0  # its spectrum is one everywhere
    passed = torch.fft.fft2(terms.high_pass(impulse, 8)).abs()
    assert int((passed < 0.5).sum()) == 193
    assert int((passed > 0.5).sum()) == 4096 - 193


def test_the_filter_drops_what_lies_in_the_disc_and_keeps_the_rest() -> None:
    grid = torch.arange(64) / 64
    for cycles, kept in ((0, False), (3, False), (7, False), (8, True), (20, True)):
        wave = torch.cos(2 * math.pi * cycles * grid).view(1, 1, 1, 64).expand(1, 1, 64, 64)
        expected = wave if kept else torch.zeros_like(wave)
        torch.testing.assert_close(terms.high_pass(wave, 8), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_the_filter_is_linear_and_a_projection(size: tuple[int, int]) -> None:
    a, b = _images(2, size, 1), _images(2, size, 2)
    mixed = terms.high_pass(2 * a - 3 * b, 5)
    torch.testing.assert_close(mixed, 2 * terms.high_pass(a, 5) - 3 * terms.high_pass(b, 5), rtol=0, atol=1e-4)
    torch.testing.assert_close(terms.high_pass(mixed, 5), mixed, rtol=0, atol=1e-4)


# -- the pattern on the images


@pytest.mark.parametrize("placement", ["bottom-right", "center", "random"])
def test_a_patch_changes_its_square_and_nothing_else(placement: str) -> None:
    threat = ThreatModel(norm="patch", eps=0.1, placement=placement)  # type: ignore[arg-type]
    images, side = _images(6), threat.side(16, 16)
    patch = torch.rand(1, 3, side, side)
    worn = put_on(images, patch, threat)
    for image, result, (top, left) in zip(images, worn, threat.corners(images).tolist(), strict=True):
        expected = image.clone()
        expected[:, top : top + side, left : left + side] = patch[0]
        assert torch.equal(result, expected)


def test_the_gradient_of_a_patch_is_the_sum_over_the_images() -> None:
    threat = ThreatModel(norm="patch", eps=0.1, placement="random")
    images, side = _images(5), threat.side(16, 16)
    patch = torch.rand(1, 3, side, side, requires_grad=True)
    weight = torch.rand(5, 3, 16, 16)
    (gradient,) = torch.autograd.grad((weight * put_on(images, patch, threat)).sum(), patch)
    expected = sum(
        weight[i, :, top : top + side, left : left + side]
        for i, (top, left) in enumerate(threat.corners(images).tolist())
    )
    torch.testing.assert_close(gradient[0], expected)


def test_a_pattern_of_another_size_or_budget_is_fitted_to_this_one() -> None:
    victim = toy_victim()
    learned = {"delta": (8 / 255) * torch.ones(1, 3, 8, 8), "eps": torch.tensor(8 / 255, dtype=torch.float64)}
    images = _candidates(ADVENCODER, victim, LINF, learned)
    torch.testing.assert_close(images, (victim.images + 16 / 255).clamp(0, 1))


def test_without_an_artefact_of_its_norm_nothing_is_made() -> None:
    victim = toy_victim()
    learned = {"patch": torch.rand(1, 3, 5, 5)}
    with pytest.raises(AttackError, match="norm linf needs an artefact with a delta; got patch"):
        _candidates(ADVENCODER, victim, LINF, learned)
    with pytest.raises(AttackError, match="got none"):
        ADVENCODER.build().run(make_view("encoder", victim, LINF))


# -- the training


@pytest.mark.parametrize("params", [{}, {"setting": "paper", **SMALL}, {"setting": "code", **SMALL}], ids=str)
@pytest.mark.parametrize("threat", [LINF, PATCH, ThreatModel(norm="patch", eps=0.1, placement="random")], ids=str)
def test_every_image_of_every_setting_is_valid(params: dict[str, object], threat: ThreatModel) -> None:
    victim = toy_victim()
    learned = fit_toy(ADVENCODER, {"steps": 6, **params}, victim, threat).tensors
    images = _candidates(ADVENCODER, victim, threat, learned)
    assert torch.equal(threat.project(images, victim.images), images)
    outside = ~threat.mask(victim.images).expand_as(images)
    assert torch.equal(images[outside], victim.images[outside])


def _terms(params: dict[str, object]) -> list[float]:
    """The adversarial term, step by step."""
    job = toy_job(ADVENCODER, params, toy_victim(), LINF)
    trainer = job.attack.trainer(job.view(Meter()))
    index = torch.arange(trainer.batch)
    return [float(trainer.step(number, index)["adv"]) for number in range(trainer.steps)]


def test_training_drives_the_cosine_of_the_tokens_down() -> None:
    seen = _terms({"steps": 60, "contrast": "tokens"})
    assert 1 - seen[-1] > 3 * (1 - seen[0])


def test_training_drives_the_distance_of_the_first_layer_up() -> None:
    seen = _terms({"steps": 60, "contrast": "shallow"})
    assert seen[-1] < seen[0] - 0.3


@pytest.mark.parametrize("threat", [LINF, PATCH], ids=str)
def test_the_setting_best_keeps_the_training_that_moves_the_features_most(threat: ThreatModel) -> None:
    victim = toy_victim()
    tokens = fit_toy(ADVENCODER, {"steps": 20, "contrast": "tokens"}, victim, threat).tensors
    best = fit_toy(ADVENCODER, {"steps": 20}, victim, threat).tensors
    pool = toy_job(ADVENCODER, {}, victim, threat).view(Meter()).surrogate
    images = pool.batch(torch.arange(len(pool)))
    name = "patch" if threat.norm == "patch" else "delta"

    def similarity(pattern: Tensor) -> float:
        with torch.no_grad():
            worn, clean = victim.encoder(put_on(images, pattern, threat)), victim.encoder(images)
        return float(F.cosine_similarity(worn, clean, dim=1).mean())

    assert best["similarity"].shape == (2,)
    assert float(best["similarity"][0]) == pytest.approx(similarity(tokens[name]), abs=1e-6)
    assert float(best["similarity"].min()) == pytest.approx(similarity(best[name]), abs=1e-6)
    assert best["similarity"][0] != best["similarity"][1]


def test_training_the_generator_drives_the_contrast_down() -> None:
    seen = _terms({"setting": "code", "noises": 4, "width": 32, "steps": 60, "rate": 0.01, "temperature": 0.01})
    assert seen[-1] < seen[0] - 0.3


def test_a_trained_perturbation_beats_noise_of_the_same_size_significantly() -> None:
    victim = toy_victim(num_images=200)
    learned = fit_toy(ADVENCODER, {"steps": 100}, victim, LINF).tensors
    view = make_view("encoder", victim, LINF, artifact=learned)
    assert isinstance(view, EncoderView)
    with torch.no_grad():
        by_attack = victim.logits(ADVENCODER.build().run(view)).argmax(dim=1) != victim.labels
        by_noise = victim.logits(LINF.noise(view.inputs, view.random)).argmax(dim=1) != victim.labels
    won, lost = int((by_attack & ~by_noise).sum()), int((by_noise & ~by_attack).sum())
    assert won > lost
    assert mcnemar_exact(won, lost) < 0.01


def test_the_encoder_stays_in_eval_mode_throughout() -> None:
    victim = toy_victim()
    modes: list[bool] = []
    victim.encoder.backbone.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    for part in victim.encoder.backbone.modules():
        part.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    fit_toy(ADVENCODER, {"setting": "code", **SMALL}, victim, LINF)
    assert modes
    assert not any(modes)


@pytest.mark.parametrize("spec", UNIVERSAL, ids=lambda spec: spec.name)
def test_no_training_touches_the_head(spec: AttackSpec) -> None:
    victim = toy_victim()

    def explode(*_: object) -> None:
        raise AssertionError("the head was touched")

    victim.head.register_forward_pre_hook(explode)
    artifact = fit_toy(spec, {"steps": 3}, victim, LINF)
    view = make_view("encoder", victim, LINF, artifact=artifact.tensors)
    assert spec.build().run(view).shape == victim.images.shape


def test_fast_feature_fool_looks_at_no_image() -> None:
    job = toy_job(REGISTRY.attacks["fff"], {"steps": 5}, toy_victim(), LINF)
    assert job.attack.trainer(job.view(Meter())).batch == 0


def test_the_bandit_turns_to_the_encoder_that_resists() -> None:
    """Of two encoders, one's features never move: its cosine stays 1, so it earns more pulls than an even share."""
    spec, victim = REGISTRY.attacks["xtransfer"], toy_victim()
    job = toy_job(spec, {"steps": 200, "partners": ["x"], "rho": 0.1}, victim, LINF)
    view = job.view(Meter())

    class Stubborn:
        def features(self, images: Tensor) -> Tensor:
            return torch.ones(len(images), 3) + 0 * images.sum()

    object.__setattr__(view, "partners", (Stubborn(),))
    trainer = job.attack.trainer(view)
    for number in range(trainer.steps):
        trainer.step(number, torch.arange(trainer.batch))
    pulls = trainer.state()["pulls"]
    assert pulls[1] > 2 * pulls[0] > 0


class _Answers:
    """An encoder as a training sees it, with features of our making."""

    layers: tuple[str, ...] = ()
    input_size = (16, 16)  # names no layers, so the setting best has the pooled features alone

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        self.features = answer


@pytest.mark.parametrize("params", [{}, {"setting": "code", **SMALL}], ids=["direct", "generator"])
def test_a_gradient_that_is_nan_or_never_there_is_an_error_and_no_artefact(params: dict[str, object]) -> None:
    job = toy_job(ADVENCODER, {"steps": 3, **params}, toy_victim(), LINF)

    def train(answer: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        view = job.view(Meter())
        object.__setattr__(view, "encoder", _Answers(answer))
        trainer = job.attack.trainer(view)
        for number in range(trainer.steps):
            trainer.step(number, torch.arange(trainer.batch))
        return trainer.result()

    def dead(images: Tensor) -> Tensor:
        means = images.mean(dim=(2, 3))
        return torch.cat([means, (0 * means[:, :1]).square().sqrt()], dim=1)  # its derivative at zero is NaN

    def flat(images: Tensor) -> Tensor:
        return torch.ones(len(images), 4) + 0 * images.mean(dim=(1, 2, 3))[:, None]

    with pytest.raises(AttackError, match="the gradient of step 0 holds NaN or infinity"):
        train(dead)
    if not params:
        with pytest.raises(AttackError, match="every gradient of the training was exactly zero"):
            train(flat)


def test_a_contrast_needs_two_images() -> None:
    job = toy_job(ADVENCODER, {"contrast": "code", "batch": 1}, toy_victim(), LINF)
    with pytest.raises(AttackError, match="it needs two, not 1"):
        job.attack.trainer(job.view(Meter()))


@pytest.mark.parametrize("name", ["fff", "pap"])
def test_patches_of_random_place_are_trained_at_many_places(name: str) -> None:
    places = {tuple(c) for n in range(8) for c in _places_of(n).tolist()}
    assert len(places) > 4
    threat = ThreatModel(norm="patch", eps=0.1, placement="random")
    params: dict[str, object] = {"steps": 2, **({"variant": "ugs"} if name == "pap" else {})}
    fixed = fit_toy(REGISTRY.attacks[name], params, toy_victim(), PATCH).tensors["patch"]
    anywhere = fit_toy(REGISTRY.attacks[name], params, toy_victim(), threat).tensors["patch"]
    assert not torch.equal(fixed, anywhere)


def _places_of(number: int) -> Tensor:
    """Where the patches of one step sit, seen by what they cover."""
    threat = ThreatModel(norm="patch", eps=0.1, placement="random")
    view = toy_job(ADVENCODER, {}, toy_victim(), threat).view(Meter())
    side = threat.side(16, 16)
    worn = put_on(torch.zeros(4, 3, 16, 16), torch.ones(1, 3, side, side), threat, places=step_places(view, number))
    return torch.stack([image[0].nonzero()[0] for image in worn])

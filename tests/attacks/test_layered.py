"""DTA and the layer attacks: similarity, search, truncation, and whether they break a victim nobody showed them."""

from collections.abc import Callable, Sequence
from typing import final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder, Preprocessing, Tokens
from robustbench_x.errors import AttackError
from robustbench_x.fitting.layer_map import unpack_layers
from robustbench_x.fitting.loop import batch_index, run_training
from robustbench_x.heads import linear
from robustbench_x.heads.base import FittedHead
from robustbench_x.plugin import AttackSpec
from robustbench_x.randomness import SampleRandom, derive_seed
from robustbench_x.registry import load_registry
from robustbench_x.stats import mcnemar_exact
from robustbench_x.testing import ToyVictim, fit_toy, make_view, toy_victim
from robustbench_x.testing.toys import toy_job
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderHandle, EncoderView, Meter
from robustbench_x_attacks.iterative import Evaluation, ascend
from robustbench_x_attacks.layered.search import damage_of, strongest
from robustbench_x_attacks.layered.tokens import chosen_tokens, layer_tokens, token_distance
from robustbench_x_attacks.layered.umi_grat import robust_norm
from robustbench_x_attacks.steps import momentum, steepest

REGISTRY = load_registry()
DTA = REGISTRY.attacks["dta"]
LINF = ThreatModel(eps=8 / 255)
Pixels = Callable[[Tensor], Tensor]


def _view(encoder: Encoder, images: Tensor, threat: ThreatModel, *, meter: Meter | None = None) -> EncoderView:
    seeds = [derive_seed("sample", i) for i in range(len(images))]
    handle = EncoderHandle(encoder, lambda pixels: pixels, meter or Meter())
    return EncoderView(inputs=images.clone(), threat=threat, random=SampleRandom(seeds), encoder=handle)


def _run(spec: AttackSpec, victim: ToyVictim, threat: ThreatModel = LINF, **params: object) -> Tensor:
    learned = fit_toy(spec, params, victim, threat).tensors if spec.fits else None
    images: Tensor = spec.build(params).run(make_view(spec.access, victim, threat, artifact=learned))
    return threat.project(images, victim.images)


def _beats_noise(victim: ToyVictim, images: Tensor) -> bool:
    """Whether the pooled features turn at least three times as far as by noise of the same size."""
    return _turn(victim, images) > 3 * _turn(victim, _run(REGISTRY.attacks["noise"], victim))


def _turn(victim: ToyVictim, images: Tensor) -> float:
    """Mean cosine distance of the pooled features from the clean ones."""
    with torch.no_grad():
        similarity = F.cosine_similarity(victim.encoder(images), victim.encoder(victim.images), dim=1)
    return float(1 - similarity.mean())


# -- the similarity


def test_the_token_distance_and_its_gradient_are_those_of_a_loop_in_double_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = {name: torch.randn(3, 4, 5, generator=generator).double() for name in "ab"}
    tokens = {name: torch.randn(3, 4, 5, generator=generator).double().requires_grad_(True) for name in "ab"}
    found = token_distance(tokens, clean)
    gradients = torch.autograd.grad(found.sum(), list(tokens.values()))
    assert found.shape == (3, 2)
    for column, name in enumerate("ab"):
        for i in range(3):
            total, a, c = 0.0, tokens[name].detach()[i], clean[name][i]
            for t in range(4):
                dot = sum(float(a[t, d] * c[t, d]) for d in range(5))
                sizes = [sum(float(v) ** 2 for v in row) ** 0.5 for row in (a[t], c[t])]
                total += dot / (sizes[0] * sizes[1])
                for d in range(5):
                    # d cos / d a_d = c_d / (|a| |c|) - cos a_d / |a|^2, averaged over 4 tokens.
                    slope = float(c[t, d]) / (sizes[0] * sizes[1])
                    slope -= dot / (sizes[0] * sizes[1]) * float(a[t, d]) / sizes[0] ** 2
                    assert float(gradients[column][i, t, d]) == pytest.approx(-slope / 4, abs=1e-12)
            assert float(found.detach()[i, column]) == pytest.approx(1 - total / 4, abs=1e-12)


def test_the_gradient_at_the_clean_image_is_zero_which_is_why_the_start_is_random() -> None:
    victim = toy_victim()
    view = _view(victim.encoder, victim.images, LINF)
    images = victim.images.clone().requires_grad_(True)
    layers = ["early", "late"]
    clean = {name: value.detach() for name, value in layer_tokens(view.encoder, victim.images, layers).items()}
    distance = token_distance(layer_tokens(view.encoder, images, layers), clean)
    (gradient,) = torch.autograd.grad(distance.sum(), images)
    assert float(gradient.abs().max()) < 1e-6
    assert _beats_noise(victim, _run(DTA, victim))


def test_centred_tokens_lose_what_all_have_in_common() -> None:
    centre = torch.full((5,), 100.0)
    tokens, clean = torch.eye(5)[None, :2], torch.eye(5)[None, 2:4]
    raw = token_distance({"a": tokens + centre}, {"a": clean + centre})
    centred = token_distance({"a": tokens + centre}, {"a": clean + centre}, {"a": centre})
    assert float(raw) < 0.01
    assert float(centred) == pytest.approx(1.0, abs=1e-4)


def test_tokens_that_are_zero_before_and_after_have_not_moved() -> None:
    tokens, clean = torch.ones(2, 4, 3), torch.ones(2, 4, 3)
    tokens[:, 0] = clean[:, 0] = 0
    assert float(token_distance({"a": tokens}, {"a": clean}).abs().max()) < 1e-6
    tokens[:, 0] = 1.0
    assert token_distance({"a": tokens}, {"a": clean}).flatten().tolist() == pytest.approx([0.25, 0.25])


def test_tokens_are_all_spatial_or_class_tokens() -> None:
    spatial, prefix = torch.zeros(2, 6, 3), torch.ones(2, 2, 3)
    both = Tokens(spatial, prefix)
    assert torch.equal(chosen_tokens(both, "all", "x"), torch.cat([prefix, spatial], dim=1))
    assert chosen_tokens(both, "spatial", "x") is spatial
    assert chosen_tokens(both, "class", "x") is prefix
    assert chosen_tokens(Tokens(spatial, None), "all", "x") is spatial
    with pytest.raises(AttackError, match="layer x has no class token: use tokens=all or tokens=spatial"):
        chosen_tokens(Tokens(spatial, None), "class", "x")


def test_an_unknown_layer_is_named_with_the_known_ones() -> None:
    victim = toy_victim()
    with pytest.raises(AttackError, match="no layer 'middle'; it has early, late, pooled"):
        _run(DTA, victim, layers="middle")


# -- the search


@final
class _Fragile(nn.Module):
    """Four layers in a row, of which `two` is fragile: it keeps only small contrasts, whose signs feed the rest.

    Before it the tokens are dominated by what they have in common, so little can be done there; after it no gradient
    comes back, so an attack there stays where it started.
    """

    layers = ("one", "two", "three", "four")

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.lift = nn.Parameter(torch.randn(3, 8, generator=generator))
        self.turn = nn.Parameter(torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q)

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        one = F.avg_pool2d(images, 4).flatten(2).transpose(1, 2) @ self.lift + 5
        two = one - one.mean(dim=(1, 2), keepdim=True)
        three = two.sign()
        return {"one": one, "two": two, "three": three, "four": three @ self.turn}

    def pooled(self, images: Tensor) -> Tensor:
        return self._maps(images)["four"].relu().mean(dim=1)

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        maps = self._maps(images)
        return [Tokens(maps[name], None) for name in layers]


def _fragile() -> ToyVictim:
    victim = toy_victim()
    encoder = Encoder(source="fragile", backbone=_Fragile(), preprocessing=Preprocessing(input_size=(16, 16)))
    return ToyVictim(encoder=encoder, head=victim.head, images=victim.images, labels=victim.labels)


def test_the_search_finds_the_fragile_layer() -> None:
    found = unpack_layers(fit_toy(DTA, {"top": 1}, _fragile(), LINF).tensors)
    assert found is not None
    assert found.names == _Fragile.layers
    assert found.chosen.tolist() == [False, True, False, False]
    others = found.vulnerability[[0, 2, 3]]
    assert float(found.vulnerability[1]) > 1.2 * float(others.max())


def test_the_map_is_the_mean_over_images_of_what_each_layer_alone_does() -> None:
    victim = _fragile()
    damage = damage_of(_view(victim.encoder, victim.images, LINF), _Fragile.layers, "all", 5)
    assert [part.shape for part in damage] == [(12, 4)] * 3
    kept = {"two": layer_tokens(_view(victim.encoder, victim.images, LINF).encoder, victim.images, ["two"])["two"]}
    view = _view(victim.encoder, victim.images, LINF)
    DTA.build({"layers": "one", "steps": 5}).run(view)  # the streams of randomness move on as in the search
    images = DTA.build({"layers": "two", "steps": 5}).run(view)
    with torch.no_grad():
        tokens = victim.encoder.tokens(images, list(_Fragile.layers))
        clean = victim.encoder.tokens(victim.images, list(_Fragile.layers))
        own = 1 - F.cosine_similarity(tokens["two"].spatial, kept["two"], dim=2).mean(dim=1)
        each = [1 - F.cosine_similarity(tokens[n].spatial, clean[n].spatial, dim=2).mean(dim=1) for n in tokens]
        features = 1 - F.cosine_similarity(victim.encoder(images), victim.encoder(victim.images), dim=1)
    assert torch.allclose(damage.own[:, 1], own, atol=1e-5)
    assert torch.allclose(damage.spread[:, 1], torch.stack(each).mean(dim=0), atol=1e-5)
    assert torch.allclose(damage.features[:, 1], features, atol=1e-5)


def test_the_strongest_layers_are_those_with_most_damage_and_of_equal_ones_the_deeper() -> None:
    spread = torch.tensor([[0.1, 0.5, 0.5, 0.2], [0.9, 0.0, 0.1, 0.2]])
    assert strongest(spread, 1).tolist() == [[False, False, True, False], [True, False, False, False]]
    assert strongest(spread, 2).tolist() == [[False, True, True, False], [True, False, False, True]]
    assert strongest(spread[0], 9).tolist() == [True] * 4


def test_a_search_that_was_killed_ends_with_the_same_map() -> None:
    job = toy_job(DTA, {"search_images": 24}, toy_victim(), LINF)
    view = job.view(Meter())

    def trained() -> dict[str, Tensor]:
        done = run_training(lambda: job.attack.trainer(view), pool=24, seed=view.seed, meter=Meter())
        return done.tensors

    whole = trained()
    first = job.attack.trainer(view)
    assert (first.steps, first.batch) == (2, 16), "24 images are a batch of 16 and one of 8"
    again = job.attack.trainer(view)
    order = [batch_index(number, batch=16, pool=24, seed=view.seed) for number in range(2)]
    first.step(0, order[0])
    again.restore(first.state())
    again.step(1, order[1])
    assert all(torch.equal(whole[name], again.result()[name]) for name in whole)
    assert int(again.state()["count"]) == 24
    few = DTA.build({"search_images": 5}).trainer(view)
    assert (few.steps, few.batch) == (1, 5)


def test_one_search_serves_every_setting_that_does_not_decide_it() -> None:
    victim = toy_victim()
    settings: dict[str, dict[str, object]] = {
        "plain": {},
        "steps": {"steps": 3, "noise": 0.5},
        "top": {"top": 1},
    }
    keys = {name: toy_job(DTA, params, victim, LINF).key() for name, params in settings.items()}
    assert keys["plain"] == keys["steps"] != keys["top"]
    assert fit_toy(DTA, {}, victim, LINF).provenance.params.keys() == set(DTA.fitted_by or ())


def test_given_layers_need_no_search_and_no_surrogate() -> None:
    victim = toy_victim()
    job = toy_job(DTA, {"layers": "late"}, victim, LINF)
    artifact = job.run(None)
    assert artifact.tensors == {}
    assert artifact.provenance.steps == artifact.provenance.forwards == 0
    images = DTA.build({"layers": "late"}).run(make_view("encoder", victim, LINF))
    assert _beats_noise(victim, images)


def test_a_map_decides_layers_and_tokens_whatever_the_parameters_say() -> None:
    encoder = _vit()
    images = _pictures(4)[0]
    toy = ToyVictim(encoder=encoder, head=toy_victim().head, images=images, labels=torch.zeros(4, dtype=torch.long))
    made = fit_toy(DTA, {"tokens": "class", "top": 4, "search_images": 4}, toy, LINF).tensors
    by_map = DTA.build({"top": 1}).run(make_view("encoder", toy, LINF, artifact=made))
    given: dict[str, object] = {"tokens": "class", "layers": ",".join(encoder.layers)}
    assert torch.allclose(by_map, DTA.build(given).run(make_view("encoder", toy, LINF)), atol=1e-6)


def test_a_loss_that_draws_anew_keeps_the_last_images_not_the_luckiest() -> None:
    victim = toy_victim(num_images=4)
    view = _view(victim.encoder, victim.images, LINF)
    seen: list[Tensor] = []

    def objective(images: Tensor, index: Tensor) -> Evaluation:
        seen.append(images.detach().clone())
        # The first draw is the luckiest by far.
        return Evaluation(images.flatten(1).mean(dim=1) + (100.0 if len(seen) == 1 else 0.0), None)

    rule = steepest(2 / 255)
    lucky = ascend(view, objective, rule, steps=4, random_start=False).images
    assert torch.equal(lucky, seen[0])
    seen.clear()
    last = ascend(view, objective, rule, steps=4, random_start=False, random_loss=True).images
    assert len(seen) == 4, "nothing is evaluated that decides nothing"
    assert torch.allclose(last, view.threat.project(victim.images + 8 / 255, victim.images), atol=1e-6)


def test_a_gradient_that_is_nan_does_not_pass_for_standing_still() -> None:
    victim = toy_victim(num_images=2)
    view = _view(victim.encoder, victim.images, LINF)

    def objective(images: Tensor, index: Tensor) -> Evaluation:
        scale = torch.where(index == 0, torch.nan, 1.0).view(-1, 1, 1, 1)
        return Evaluation((images * scale).flatten(1).mean(dim=1), None)

    for rule in (momentum(2 / 255, 1.0), steepest(2 / 255)):
        for random_loss in (True, False):
            images = ascend(view, objective, rule, steps=2, random_start=True, random_loss=random_loss).images
            assert not images[0].isfinite().any(), "an error row, not a robust image"
            assert images[1].isfinite().all()


def test_without_a_map_the_attack_says_how_to_get_one() -> None:
    victim = toy_victim()
    with pytest.raises(AttackError, match="dta has no layer map of this encoder: let rbx audit make one"):
        DTA.build().run(make_view("encoder", victim, LINF))
    other = fit_toy(DTA, {}, victim, LINF).tensors
    toy = _fragile()
    with pytest.raises(AttackError, match="dta has no layer map of this encoder"):
        DTA.build().run(make_view("encoder", toy, LINF, artifact=other))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"steps": 0}, "must be at least 1"),
        ({"diversity": 1.5}, "must lie in"),
        ({"noise": -1.0}, "must not be negative"),
        ({"fit_encoder": "toy"}, "say nothing about this one's"),
    ],
)
def test_wrong_parameters_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        DTA.build(params)


# -- cost and independence


@pytest.mark.parametrize("which", ["all", "class", "spatial"])
def test_every_pass_is_counted_once_whatever_tokens_the_loss_reads(which: str) -> None:
    encoder = _vit()
    meter = Meter()
    view = _view(encoder, _pictures(4)[0], LINF, meter=meter)
    DTA.build({"layers": "blocks.1,blocks.3", "tokens": which, "steps": 3}).run(view)
    # One clean pass, three steps, and one more that judges the last iterate by its loss.
    assert (meter.forwards, meter.backwards) == (5 * 4, 3 * 4)


def test_a_shallow_layer_costs_a_shallow_pass() -> None:
    encoder = _vit()
    ran: list[str] = []
    for number in range(4):
        block = encoder.backbone.get_submodule(f"model.blocks.{number}")
        block.register_forward_hook(lambda _module, _args, _out, number=number: ran.append(str(number)))
    DTA.build({"layers": "blocks.1", "steps": 2}).run(_view(encoder, _pictures(2)[0], LINF))
    assert set(ran) == {"0", "1"}


@pytest.mark.parametrize(
    "params", [{"search": "image"}, {"layers": "late", "diversity": 1.0, "noise": 0.5, "average": 2}]
)
def test_an_image_is_attacked_the_same_whatever_batch_it_is_in(params: dict[str, object]) -> None:
    victim = toy_victim(num_images=5)
    whole = DTA.build(params).run(make_view("encoder", victim, LINF))
    one = ToyVictim(encoder=victim.encoder, head=victim.head, images=victim.images[:1], labels=victim.labels[:1])
    alone = DTA.build(params).run(make_view("encoder", one, LINF))
    # Convolutions of one image and of five round differently, which a sign can turn into a whole step.
    assert float(((whole[:1] - alone).abs() > 1e-6).float().mean()) < 0.02


def test_each_variant_is_another_attack() -> None:
    victim = toy_victim()
    base = {"layers": "late"}
    variants: list[dict[str, object]] = [
        {},
        {"layers": "early,late"},
        {"rule": "mi"},
        {"rule": "apgd"},
        {"pooled": 1.0},
        {"diversity": 1.0},
        {"noise": 0.1},
        {"search": "image", "layers": ""},
        {"tokens": "spatial", "steps": 5},
    ]
    made = [DTA.build({**base, **extra}).run(make_view("encoder", victim, LINF)) for extra in variants]
    assert all(_beats_noise(victim, images) for images in made)
    assert all(not torch.equal(made[0], other) for other in made[1:])


# -- a victim that was really trained


def _pictures(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bars and discs of five kinds and faint tints at random places, 32 x 32, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 5
    grid = torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")).float()
    place = 13 + 6 * torch.rand(count, 2, 1, 1, generator=generator)
    away = grid[None] - place
    shapes = [
        (away.abs()[:, 0] < 3).float(),
        (away.abs()[:, 1] < 3).float(),
        (away.norm(dim=1) < 7).float(),
        ((away.norm(dim=1) - 8).abs() < 2).float(),
        ((away[:, 0] - away[:, 1]).abs() < 3).float(),
    ]
    drawn = torch.stack(shapes)[labels, torch.arange(count)]
    tints = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])[labels]
    images = 0.3 + drawn[:, None] * (0.25 + 0.25 * tints[:, :, None, None])
    return (images + 0.1 * torch.rand(images.shape, generator=generator)).clamp(0, 1), labels


def _vit() -> Encoder:
    import timm

    from robustbench_x.encoders.timm_backbone import TimmBackbone

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=0
        )
    backbone = TimmBackbone(model, (32, 32))
    return Encoder(source="tiny-vit", backbone=backbone, preprocessing=Preprocessing(input_size=(32, 32)))


@pytest.fixture(scope="module")
def trained() -> ToyVictim:
    """A tiny ViT trained to tell the five kinds apart, under a probe fitted on other pictures."""
    encoder = _vit()
    images, labels = _pictures(400, seed=1)
    with torch.random.fork_rng(devices=[]):
        # The seed of a fresh process: the bias must not follow from whatever test ran before.
        torch.manual_seed(67280421310721)
        top = nn.Linear(encoder.feature_dim, 5)
        torch.manual_seed(0)
        nn.init.normal_(top.weight, std=0.02)
        encoder.backbone.requires_grad_(True)
        optimizer = torch.optim.AdamW([*encoder.backbone.parameters(), *top.parameters()], lr=1e-3)
        low = 0
        for step in range(400):
            batch = torch.arange(step * 40, step * 40 + 40) % len(images)
            optimizer.zero_grad()
            loss = F.cross_entropy(top(encoder(images[batch])), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            low = low + 1 if float(loss.detach()) < 0.05 else 0
            if low == 10:
                break
        encoder.backbone.requires_grad_(False)
    encoder = Encoder(source="trained-vit", backbone=encoder.backbone, preprocessing=encoder.preprocessing)
    fresh, marks = _pictures(200, seed=2)
    with torch.no_grad():
        layer = linear.fit(encoder(fresh), marks, 5, 0)
    head = FittedHead(name="linear", layer=layer, num_classes=5, aliases={str(k): k for k in range(5)})
    test, truth = _pictures(60, seed=3)
    victim = ToyVictim(encoder=encoder, head=head, images=test, labels=truth)
    with torch.no_grad():
        assert float((victim.logits(test).argmax(dim=1) == truth).float().mean()) > 0.9, "the toy ViT must have learned"
    return victim


def _fooled(victim: ToyVictim, images: Tensor) -> Tensor:
    """Of the images that are classified right when clean, which are not any more."""
    with torch.no_grad():
        clean = victim.logits(victim.images).argmax(dim=1) == victim.labels
        return (victim.logits(images).argmax(dim=1) != victim.labels)[clean]


def _success(victim: ToyVictim, images: Tensor) -> float:
    return float(_fooled(victim, images).float().mean())


def test_dta_beats_noise_and_is_no_weaker_than_embed_on_a_trained_vit(trained: ToyVictim) -> None:
    threat = ThreatModel(eps=16 / 255)
    noise = _fooled(trained, _run(REGISTRY.attacks["noise"], trained, threat))
    embed = _fooled(trained, _run(REGISTRY.attacks["embed"], trained, threat, steps=10))
    dta = _fooled(trained, _run(DTA, trained, threat, top=1))  # the default, three, is most of four layers
    assert float(dta.float().mean()) > float(noise.float().mean()) + 0.3
    lost, gained = int((embed & ~dta).sum()), int((dta & ~embed).sum())
    assert gained >= lost or mcnemar_exact(lost, gained) > 0.05, (lost, gained)


@pytest.mark.parametrize("name", ["nrdm", "ssp_image", "umi_grat", "instance:PGD"])
def test_every_baseline_beats_noise_on_a_trained_vit(name: str, trained: ToyVictim) -> None:
    threat = ThreatModel(eps=16 / 255)
    params: dict[str, object] = {"steps": 10}
    noise = _success(trained, _run(REGISTRY.attacks["noise"], trained, threat))
    assert _success(trained, _run(REGISTRY.attacks[name], trained, threat, **params)) > noise + 0.1


def test_dispersion_reduction_reduces_dispersion(trained: ToyVictim) -> None:
    images = _run(REGISTRY.attacks["dr_image"], trained, ThreatModel(eps=16 / 255), layer="blocks.1")
    with torch.no_grad():
        spread = [
            trained.encoder.tokens(x, ["blocks.1"])["blocks.1"].spatial.flatten(1).std(dim=1)
            for x in (trained.images, images)
        ]
    assert float((spread[1] < spread[0]).float().mean()) > 0.9


# -- UMI-GRAT


def test_without_earlier_layers_the_robust_norm_is_the_norm_of_the_change() -> None:
    change = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    view = _view(toy_victim().encoder, toy_victim(num_images=3).images, LINF)
    found = robust_norm(view, {"last": change}, torch.arange(3))
    assert torch.allclose(found, change.flatten(1).norm(dim=1))


def test_earlier_changes_are_weighted_by_fresh_noise_of_their_own() -> None:
    victim = toy_victim(num_images=3)
    generator = torch.Generator().manual_seed(0)
    early, last = (torch.randn(3, 4, 5, generator=generator) for _ in range(2))
    index = torch.arange(3)
    found = robust_norm(_view(victim.encoder, victim.images, LINF), {"e": early, "l": last}, index)
    noise = _view(victim.encoder, victim.images, LINF).random.normal((4, 5), index)
    assert torch.allclose(found, (last + noise * early).flatten(1).norm(dim=1))
    # Of another shape: averaged to 4 tokens, then mapped by a random matrix of variance 1 / width.
    wide = torch.randn(3, 8, 2, generator=generator)
    found = robust_norm(_view(victim.encoder, victim.images, LINF), {"e": wide, "l": last}, index)
    matrix = _view(victim.encoder, victim.images, LINF).random.normal((2, 5), index) / 2**0.5
    pooled = wide.view(3, 4, 2, 2).mean(dim=2)
    assert torch.allclose(found, (last + pooled @ matrix).flatten(1).norm(dim=1), atol=1e-6)


def test_the_first_step_goes_toward_the_natural_mean() -> None:
    victim = toy_victim()
    spec = REGISTRY.attacks["umi_grat"]
    learned = fit_toy(spec, {}, victim, LINF).tensors
    view = make_view("encoder", victim, LINF, artifact=learned)
    start = spec.build({"first": 0.4})._start(view)
    mean = learned["bank"].mean(dim=0)
    with torch.no_grad():
        before, after = ((victim.encoder(x) - mean).square().sum(dim=1) for x in (victim.images, start))
    assert float((after < before).float().mean()) > 0.9
    assert float((start - victim.images).abs().max()) <= 0.4 * 8 / 255 + 1e-6


def test_without_a_first_step_it_still_leaves_the_clean_image() -> None:
    victim = toy_victim()
    assert _beats_noise(victim, _run(REGISTRY.attacks["umi_grat"], victim, first=0.0))
    robust, plain = (_run(REGISTRY.attacks["umi_grat"], victim, robust=on) for on in (True, False))
    assert not torch.equal(robust, plain)


@pytest.mark.parametrize("name", ["umi_grat", "instance:PGD"])
def test_an_attack_that_needs_natural_features_says_so(name: str) -> None:
    with pytest.raises(AttackError, match=f"{name} needs a bank of this encoder's features"):
        REGISTRY.attacks[name].build().run(make_view("encoder", toy_victim(), LINF))


def test_instance_logits_are_cosines_to_itself_and_to_natural_images() -> None:
    from robustbench_x_attacks.torchattacks_bridge.instance import InstanceHead

    victim = toy_victim(num_images=3)
    view = _view(victim.encoder, victim.images, LINF)
    bank = torch.randn(7, victim.encoder.feature_dim, generator=torch.Generator().manual_seed(0))
    head = InstanceHead(view, bank, 0.1)
    other = victim.images.flip(3)
    with torch.no_grad():
        logits, features, own = head(other), victim.encoder(other), victim.encoder(victim.images)
    assert logits.shape == (3, 8)
    assert torch.allclose(logits[:, 0], F.cosine_similarity(features, own) / 0.1, atol=1e-4)
    expected = F.cosine_similarity(features[:, None], bank[None], dim=2) / 0.1
    assert torch.allclose(logits[:, 1:], expected, atol=1e-4)
    with pytest.raises(AttackError, match="the attack sent 2 of 3 images at once"):
        head(other[:2])

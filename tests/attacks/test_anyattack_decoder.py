"""AnyAttack's networks: the released one entry by entry, ours by size and shape, and the bound on the noise."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x_attacks.anyattack.codebook import CompactDecoder, place_codes
from robustbench_x_attacks.anyattack.decoder import (
    OfficialDecoder,
    kind_of,
    load_decoder,
    make_decoder,
    mismatch,
    noise_for,
)

EPS = 16 / 255


def _released_entries() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a released checkpoint, from the published description."""
    yield "fc.0.weight", (50_176, 512)
    yield "fc.0.bias", (50_176,)

    def conv(name: str, after: int, before: int, side: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (after, before, side, side)
        yield f"{name}.bias", (after,)

    def norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for entry in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.{entry}", (channels,)
        yield f"{name}.num_batches_tracked", ()

    for i, channels, keys in ((0, 256, 64), (2, 128, 32), (4, 64, 16), (6, 32, 8), (8, 16, 4)):
        block = f"upsample_blocks.{i}"
        for number in "12":
            yield from conv(f"{block}.conv{number}", channels, channels, 3)
            yield from norm(f"{block}.bn{number}", channels)
        yield from conv(f"{block}.attention.keys", keys, channels, 1)
        yield from conv(f"{block}.attention.queries", keys, channels, 1)
        yield from conv(f"{block}.attention.values", channels, channels, 1)
        yield from conv(f"{block}.attention.reprojection", channels, channels, 1)
    for i, before, after in ((1, 256, 128), (3, 128, 64), (5, 64, 32), (7, 32, 16)):
        yield from conv(f"upsample_blocks.{i}.conv", after, before, 3)
        yield from norm(f"upsample_blocks.{i}.bn", after)
    yield from conv("final_conv", 3, 16, 3)


@pytest.fixture(scope="module")
def official() -> OfficialDecoder:
    made = make_decoder("official", width=512, size=(224, 224), seed=0)
    assert isinstance(made, OfficialDecoder)
    return made


def test_the_official_decoder_has_the_released_entries_and_no_other(official: OfficialDecoder) -> None:
    expected = dict(_released_entries())
    assert len(expected) == 142
    assert {name: tuple(tensor.shape) for name, tensor in official.state_dict().items()} == expected
    assert sum(p.numel() for p in official.parameters()) == 27_926_907


def test_only_a_tenth_of_a_fresh_official_decoder_s_noise_lies_within_the_budget(official: OfficialDecoder) -> None:
    features = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    raw = official(10 * features / features.norm(dim=1, keepdim=True))
    assert raw.shape == (2, 3, 224, 224)
    assert 0.05 < float((raw.abs() < EPS).float().mean()) < 0.2


def test_the_last_attention_is_inert(official: OfficialDecoder) -> None:
    attention: Any = official.upsample_blocks[8].attention
    images = torch.randn(2, 16, 8, 8)
    added = attention(images)
    torch.testing.assert_close(added, images + attention.reprojection.bias.view(1, -1, 1, 1))
    parts = (attention.keys, attention.queries, attention.values)
    weights = [parameter for part in parts for parameter in part.parameters()] + [attention.reprojection.weight]
    gradients = torch.autograd.grad(added.square().sum(), [*weights, attention.reprojection.bias], allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients[:-1])
    assert gradients[-1] is not None
    assert gradients[-1].all()


def test_the_attention_is_the_written_out_loop(official: OfficialDecoder) -> None:
    """Block 4: 64 channels, 16 key channels, 8 heads: 2 keys and 8 values a head."""
    attention: Any = official.upsample_blocks[4].attention
    images = torch.randn(1, 64, 3, 4, generator=torch.Generator().manual_seed(1))
    pixels = images[0].flatten(1)

    def through(name: str) -> Tensor:
        layer = getattr(attention, name)
        made: Tensor = layer.weight[:, :, 0, 0] @ pixels + layer.bias[:, None]
        return made

    keys, queries, values = through("keys"), through("queries"), through("values")
    heads = []
    for head in range(8):
        key, query = keys[2 * head : 2 * head + 2].exp(), queries[2 * head : 2 * head + 2].exp()
        key, query = key / key.sum(dim=1, keepdim=True), query / query.sum(dim=0, keepdim=True)
        value = values[8 * head : 8 * head + 8]
        heads.append(torch.einsum("kp,vp,kq->vq", key, value, query))
    merged = attention.reprojection.weight[:, :, 0, 0] @ torch.cat(heads) + attention.reprojection.bias[:, None]
    expected = (merged + pixels).view(1, 64, 3, 4)
    torch.testing.assert_close(attention(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "size", "message"),
    [
        (768, (224, 224), "width 512 .*this encoder's have width 768; use decoder=compact"),
        (512, (98, 98), "224x224 pixels, not 98x98"),
    ],
)
def test_the_official_decoder_names_what_it_does_not_fit(width: int, size: tuple[int, int], message: str) -> None:
    with pytest.raises(AttackError, match=message):
        make_decoder("official", width=width, size=size, seed=0)


@pytest.mark.parametrize("width", [384, 512, 1280, 2048])
def test_the_compact_decoder_is_small_for_any_width(width: int) -> None:
    made = CompactDecoder(width, (224, 224))
    assert sum(p.numel() for p in made.parameters()) < 3_000_000


@pytest.mark.parametrize("size", [(16, 16), (33, 47), (64, 64), (98, 98), (112, 160)])
def test_the_compact_decoder_makes_noise_of_any_size(size: tuple[int, int]) -> None:
    made = make_decoder("compact", width=24, size=size, seed=0)
    features = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    assert made(features).shape == (3, 3, *size)
    assert not made(features).any()


def test_the_compact_decoder_s_size_moves_no_weight_from_96_pixels_on() -> None:
    states = [CompactDecoder(24, size).state_dict() for size in ((96, 96), (224, 224), (100, 333))]
    assert len({tuple((name, tensor.shape) for name, tensor in state.items()) for state in states}) == 1


def _book(width: int, size: tuple[int, int], *, codes: int = 6, side: tuple[int, int] | None = None) -> CompactDecoder:
    """A decoder with random patterns."""
    made = CompactDecoder(width, size, codes=codes, side=side)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.patterns.copy_(0.1 * torch.randn(made.patterns.shape, generator=generator))
    return made


def test_places_are_the_middles_of_clusters() -> None:
    """Three clusters about a large common mean: each has a place, and its members get that place's pattern."""
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0]]) + 50
    features = middles.repeat_interleave(20, dim=0) + 0.1 * torch.randn(60, 3, generator=generator)
    made = _book(3, (8, 8), codes=3)
    assert not made.placed
    for seed in range(8):  # k-means may start in one cluster twice
        place_codes(made, features, torch.Generator().manual_seed(seed))
        cosines = F.normalize(middles - features.mean(dim=0), dim=1) @ made.places.T
        if bool((cosines.amax(dim=1) > 0.99).all()):
            break
    else:
        pytest.fail("no start finds the three clusters")
    assert made.placed
    noise = made(features)
    picked = [made.patterns[int(k)] for k in cosines.argmax(dim=1)]
    for number, pattern in enumerate(picked):
        assert torch.allclose(noise[20 * number], pattern, atol=1e-3)


def test_with_few_embeddings_the_other_places_stay() -> None:
    made = _book(4, (8, 8), codes=5)
    before = made.places.clone()
    place_codes(made, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0))
    assert torch.equal(made.places[3:], before[3:])
    assert not torch.equal(made.places[:3], before[:3])


def test_patterns_are_tiled_over_larger_images() -> None:
    made = _book(4, (8, 8))
    features = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    small, large = made(features), made.sized((20, 13))(features)
    assert large.shape == (2, 3, 20, 13)
    assert torch.equal(large[..., :8, :8], small)
    assert torch.equal(large[..., 8:16, :8], small)
    assert torch.equal(large[..., 16:, 8:], small[..., :4, :5])
    assert made.size == (8, 8)


def test_a_decoder_is_decided_by_its_seed_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    made, again, another = (make_decoder("compact", width=8, size=(16, 16), seed=s) for s in (3, 3, 4))
    weights = [decoder.state_dict()["places"] for decoder in (made, again, another)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    load_decoder(made.state_dict(), (16, 16))
    assert torch.equal(state, torch.get_rng_state())


def test_a_loaded_decoder_answers_as_the_stored_one() -> None:
    made = _book(8, (20, 20), side=(5, 7))
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    loaded = load_decoder(made.state_dict(), (20, 20))
    assert torch.equal(loaded(features), made.eval()(features))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert kind_of(made.state_dict()) == "compact"


def test_what_does_not_match_is_listed() -> None:
    made = make_decoder("compact", width=8, size=(16, 16), seed=0)
    state = made.state_dict()
    assert mismatch(made, state) == ""
    state["stranger"] = state.pop("patterns")
    state["mean"] = torch.zeros(3)
    with pytest.raises(
        AttackError, match=r"missing: patterns; unexpected: stranger; of another shape: mean \(3,\) for \(8,\)"
    ):
        load_decoder(state, (16, 16))
    with pytest.raises(AttackError, match="this is no decoder of anyattack: it holds delta"):
        load_decoder({"delta": torch.zeros(1)}, (16, 16))


def test_the_clamp_is_the_same_in_both_modes_and_fixed_passes_gradients_that_lead_inside() -> None:
    raw = torch.tensor([[-3.0, -1.0, -0.01, 0.0, 0.01, 1.0, 3.0]])
    passed = {}
    modes: tuple[Literal["fixed", "compat"], ...] = ("fixed", "compat")
    for mode in modes:
        for push in (1.0, -1.0):
            leaf = raw.clone().requires_grad_(True)
            noise = noise_for(torch.nn.Identity(), leaf, 0.5, mode)
            assert torch.equal(noise, raw.clamp(-0.5, 0.5))
            (gradient,) = torch.autograd.grad((push * noise).sum(), leaf)
            passed[mode, push] = (gradient != 0).int().tolist()[0]
    assert passed["compat", 1.0] == passed["compat", -1.0] == [0, 0, 1, 1, 1, 0, 0]
    # A step goes against the gradient: with a positive one the values fall, back inside for those that are too large.
    assert passed["fixed", 1.0] == [0, 0, 1, 1, 1, 1, 1]
    assert passed["fixed", -1.0] == [1, 1, 1, 1, 1, 0, 0]

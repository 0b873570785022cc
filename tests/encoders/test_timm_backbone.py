"""timm models as encoders, with random weights: every family's features, tokens and classifier."""

import pytest
import timm
import torch
from torch import Tensor, nn

from robustbench_x.encoders.encoder import LoadedEncoder
from robustbench_x.encoders.timm_backbone import imagenet_aliases
from robustbench_x.encoders.timm_source import encoder_from_timm
from robustbench_x.errors import ConfigError

_FAMILIES = (
    "resnet18",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "tf_efficientnet_lite0",
)


def _model(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    for module in model.modules():  # fresh batch statistics and zero biases would hide mistakes
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def _loaded(name: str, **options: object) -> LoadedEncoder:
    return encoder_from_timm(f"timm:{name}", _model(name, **options))


def _images(loaded: LoadedEncoder, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand((count, 3, *loaded.encoder.input_size), generator=generator)


def _normalised(loaded: LoadedEncoder, images: Tensor) -> Tensor:
    return (images - loaded.encoder.mean) / loaded.encoder.std


@pytest.mark.parametrize("name", _FAMILIES)
@torch.no_grad()
def test_encoder_then_classifier_is_the_untouched_model(name: str) -> None:
    loaded = _loaded(name)
    assert loaded.classifier is not None
    images = _images(loaded)
    expected = _model(name)(_normalised(loaded, images))
    logits = loaded.classifier(loaded.encoder(images))
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert loaded.classifier.num_classes == 1000
    assert loaded.encoder.feature_dim == loaded.encoder(images).shape[1]


@pytest.mark.parametrize("name", [*_FAMILIES, "deit_tiny_distilled_patch16_224"])
def test_no_classifier_weight_can_be_reached_through_the_encoder(name: str) -> None:
    model = _model(name)
    head = model.get_classifier()  # type: ignore[operator]
    heads = head if isinstance(head, tuple) else (head,)
    weights = {parameter.data_ptr() for part in heads for parameter in part.parameters()}
    encoder = encoder_from_timm("timm:x", model).encoder
    seen: set[int] = set()
    stack: list[object] = [encoder]
    while stack:
        thing = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            assert thing.data_ptr() not in weights
        elif isinstance(thing, dict):
            stack.extend(thing.values())
        elif isinstance(thing, list | tuple | set):
            stack.extend(thing)
        elif isinstance(thing, nn.Module):
            stack.append(vars(thing))
    assert weights


@pytest.mark.parametrize("name", _FAMILIES)
@torch.no_grad()
def test_tokens_of_a_layer_are_those_of_a_full_pass(name: str) -> None:
    loaded = _loaded(name)
    encoder, images = loaded.encoder, _images(loaded)
    modules = dict(_model(name).named_modules())
    assert set(encoder.layers) <= set(modules)
    untouched = _model(name)
    outputs: dict[str, Tensor] = {}
    for layer in encoder.layers:
        untouched.get_submodule(layer).register_forward_hook(
            lambda _module, _args, output, layer=layer: outputs.update({layer: output})
        )
    untouched(_normalised(loaded, images))
    for layer in encoder.layers:
        tokens = encoder.tokens(images, [layer])[layer]
        output = outputs[layer]
        found = tokens.spatial
        if name.startswith("vit"):
            assert tokens.prefix is not None
            found = torch.cat([tokens.prefix, tokens.spatial], dim=1)
        elif name.startswith("swin"):
            output = output.flatten(1, 2)
        else:
            output = output.flatten(2).transpose(1, 2)
        # The encoder runs channels-last, the untouched model does not: sums are taken in another order.
        torch.testing.assert_close(found, output, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_layers_come_in_the_order_asked_for() -> None:
    loaded = _loaded("resnet18")
    encoder, images = loaded.encoder, _images(loaded)
    assert encoder.layers == ("act1", "layer1", "layer2", "layer3", "layer4")
    both = encoder.tokens(images, ["layer3", "layer1", "layer3"])
    assert list(both) == ["layer3", "layer1"]
    assert both["layer3"].spatial.shape == (2, 14 * 14, 256)
    assert both["layer1"].spatial.shape == (2, 56 * 56, 64)


def test_a_shallow_request_is_a_shallow_pass() -> None:
    model = _model("vit_tiny_patch16_224")
    ran: list[str] = []
    model.get_submodule("blocks.2").register_forward_hook(lambda *_: ran.append("blocks.2"))
    model.get_submodule("blocks.3").register_forward_hook(lambda *_: ran.append("blocks.3"))
    loaded = encoder_from_timm("timm:x", model)
    ran.clear()
    loaded.encoder.tokens(_images(loaded), ["blocks.2"])
    assert ran == ["blocks.2"]


def test_a_family_without_prefix_tokens_has_tokens_all_the_same() -> None:
    loaded = _loaded("vit_relpos_small_patch16_224", depth=2)
    tokens = loaded.encoder.tokens(_images(loaded, 1), ["blocks.1"])["blocks.1"]
    assert (tokens.spatial.shape, tokens.prefix) == ((1, 196, 384), None)


def test_a_distilled_head_is_dropped_with_the_reason() -> None:
    loaded = _loaded("deit_tiny_distilled_patch16_224")
    assert loaded.classifier is None
    assert "not one linear map" in loaded.encoder.notes[-1]


def test_a_clip_projection_is_no_classifier() -> None:
    loaded = _loaded("vit_base_patch32_clip_224.openai", depth=1)
    assert loaded.classifier is None
    assert "projection into an image-text space" in loaded.encoder.notes[-1]


def test_a_model_without_a_classifier_has_none_and_says_nothing() -> None:
    loaded = _loaded("vit_tiny_patch16_224", num_classes=0)
    assert loaded.classifier is None
    assert loaded.encoder.notes == ()


def test_another_number_of_classes_is_matched_by_index_only() -> None:
    loaded = _loaded("resnet18", num_classes=10)
    assert loaded.classifier is not None
    assert loaded.classifier.aliases == {str(i): i for i in range(10)}


def test_imagenet_aliases_never_mean_two_classes() -> None:
    aliases = imagenet_aliases(1000)
    assert aliases["0"] == aliases["n01440764"] == aliases["tench"] == aliases["tench, Tinca tinca"] == 0
    assert aliases["n02012849"] == 134
    assert aliases["n03126707"] == 517
    assert aliases["maillot, tank suit"] == 639
    assert not {"crane", "maillot"} & set(aliases)
    assert set(aliases.values()) == set(range(1000))


def test_size_resamples_position_embeddings_and_changes_the_features() -> None:
    small = encoder_from_timm("timm:x", _model("vit_tiny_patch16_224"), size=96).encoder
    assert small.input_size == (96, 96)
    tokens = small.tokens(torch.rand(1, 3, 96, 96), ["blocks.0"])["blocks.0"]
    assert tokens.spatial.shape == (1, 36, 192)


def test_a_convolutional_net_takes_any_size() -> None:
    assert encoder_from_timm("timm:x", _model("resnet18"), size=75).encoder.input_size == (75, 75)


def test_a_vit_takes_multiples_of_its_patch_only() -> None:
    with pytest.raises(ConfigError, match="size 100 is no multiple of the patch size 16; use 96 or 112"):
        encoder_from_timm("timm:x", _model("vit_tiny_patch16_224"), size=100)
    with pytest.raises(ConfigError, match="size 7 is no multiple of the patch size 16; use 16"):
        encoder_from_timm("timm:x", _model("vit_tiny_patch16_224"), size=7)


def test_a_model_built_at_another_size_runs_at_that_size() -> None:
    # timm's data config still says 224.
    assert _loaded("vit_tiny_patch16_224", img_size=64).encoder.input_size == (64, 64)


@torch.no_grad()
def test_the_attention_and_the_mlp_of_a_block_are_what_they_add_to_the_tokens() -> None:
    loaded = _loaded("vit_tiny_patch16_224", img_size=32, depth=3)
    encoder, images = loaded.encoder, _images(loaded)
    assert encoder.layers == ("blocks.0", "blocks.1", "blocks.2")
    assert encoder.parts == tuple(f"blocks.{i}.{part}" for i in range(3) for part in ("attn", "mlp"))
    found = encoder.tokens(images, ["blocks.0", "blocks.1.mlp", "blocks.1.attn", "blocks.1"])
    assert list(found) == ["blocks.0", "blocks.1.mlp", "blocks.1.attn", "blocks.1"]
    for before, attention, mlp, after in zip(
        *(found[name] for name in ("blocks.0", "blocks.1.attn", "blocks.1.mlp", "blocks.1")), strict=True
    ):
        assert before is not None
        assert attention is not None
        assert torch.allclose(before + attention + mlp, after, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "tf_efficientnet_lite0"])
def test_where_a_layer_is_no_transformer_block_it_has_no_parts(name: str) -> None:
    assert _loaded(name).encoder.parts == ()


@torch.no_grad()
def test_a_part_of_a_shallow_block_costs_a_shallow_pass_and_leaves_no_hook() -> None:
    loaded = _loaded("vit_tiny_patch16_224", img_size=32, depth=3)
    ran: list[int] = []
    for number in range(3):
        block = loaded.encoder.backbone.get_submodule(f"model.blocks.{number}")
        block.register_forward_hook(lambda _module, _args, _out, number=number: ran.append(number))
    loaded.encoder.tokens(_images(loaded), ["blocks.1.attn"])
    assert ran == [0, 1]
    attention = loaded.encoder.backbone.get_submodule("model.blocks.1.attn")
    assert not attention._forward_hooks

"""timm models as backbones: pooled features, tokens of any stage, and the published classifier taken out."""

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Classifier, Tokens
from robustbench_x.errors import SourceError

__all__ = ["SplitClassifier", "TimmBackbone", "imagenet_aliases", "split_classifier"]

_PARTS = ("attn", "mlp")


@final
class TimmBackbone(nn.Module):
    """A timm model behind the `Backbone` protocol.

    A layer carries the name of the module that computes it (`blocks.3`, `stages.1`), checked once on a
    random image; a stage whose output is no module's is called `stage.K`. `parts` are the attention and the MLP
    inside a transformer block (`blocks.3.attn`, `blocks.3.mlp`): their own outputs, before any layer scale.

    Args:
        model: Without its classifier, see `split_classifier`.
        size: (height, width) it runs at.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        # Convolutions run 1.4 times faster in this layout on a CPU (EfficientNet-Lite0, measured). Only here: timm's
        # code is known to cope, a user's own `view` may not.
        self._layout = torch.contiguous_format if _has_3d_weights(model) else torch.channels_last
        self.model = model.eval().to(memory_format=self._layout)
        self._prefix: dict[str, bool] = {}
        self.layers: tuple[str, ...] = ()
        self.parts: tuple[str, ...] = ()
        intermediates: Any = getattr(model, "forward_intermediates", None)
        if intermediates is not None:
            takes = inspect.signature(intermediates).parameters
            # Some families take the argument and then fail over it when they have no such tokens.
            asks = "return_prefix_tokens" in takes and getattr(model, "num_prefix_tokens", 1) > 0
            self._prefix = {"return_prefix_tokens": True} if asks else {}
            self.layers = self._named_layers(size)
            self.parts = self._named_parts(size)

    def forward(self, images: Tensor) -> Tensor:
        """Same as `pooled`."""
        return self.pooled(images)

    def pooled(self, images: Tensor) -> Tensor:
        """What the published classifier reads, `(N, D)`."""
        return _pooled(self.model, images.contiguous(memory_format=self._layout))

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        """Tokens of `layers` or `parts` before any final norm; stages deeper than the deepest are not run."""
        owners = {name: name.rpartition(".")[0] if name in self.parts else name for name in layers}
        wanted = sorted({self.layers.index(owner) for owner in owners.values()})  # timm returns them by depth
        with self._caught([name for name in layers if name in self.parts]) as caught:
            found = dict(zip(wanted, self._intermediates(images, wanted), strict=True))
        stages = {name: found[self.layers.index(owner)] for name, owner in owners.items()}
        return [_like(caught[name], stages[name]) if name in self.parts else stages[name] for name in layers]

    @contextmanager
    def _caught(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """What the modules called `names` return while this is open."""
        outputs: dict[str, Tensor] = {}
        hooks = [
            self.model.get_submodule(name).register_forward_hook(
                lambda _module, _args, out, name=name: outputs.update({name: out})
            )
            for name in names
        ]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def _intermediates(self, images: Tensor, indices: list[int] | None) -> list[Tokens]:
        net: Any = self.model
        outputs = net.forward_intermediates(
            images.contiguous(memory_format=self._layout),
            indices=indices,
            norm=False,
            stop_early=True,
            intermediates_only=True,
            **self._prefix,
        )
        pairs = [output if isinstance(output, tuple) else (output, None) for output in outputs]
        return [Tokens(spatial.flatten(2).transpose(1, 2), prefix) for spatial, prefix in pairs]

    @torch.no_grad()
    def _named_layers(self, size: tuple[int, int]) -> tuple[str, ...]:
        modules = dict(self.model.named_modules())
        info: Any = getattr(self.model, "feature_info", [])
        names = [str(entry["module"]) for entry in getattr(info, "info", info)]
        with self._caught([name for name in names if name in modules]) as outputs:
            stages = self._intermediates(_probe(size), None)
        names += [""] * (len(stages) - len(names))
        agreed = [
            name if _agrees(outputs.get(name), stage.spatial) else f"stage.{i}"
            for i, (name, stage) in enumerate(zip(names, stages, strict=False))
        ]
        return tuple(agreed) if len(set(agreed)) == len(agreed) else tuple(f"stage.{i}" for i in range(len(stages)))

    @torch.no_grad()
    def _named_parts(self, size: tuple[int, int]) -> tuple[str, ...]:
        """Children of layers called `attn` and `mlp` whose output is tokens in the layer's own arrangement."""
        modules = dict(self.model.named_modules())
        names = [f"{layer}.{part}" for layer in self.layers for part in _PARTS if f"{layer}.{part}" in modules]
        if not names:
            return ()
        with self._caught(names) as caught:
            stages = dict(zip(self.layers, self._intermediates(_probe(size), None), strict=True))
        return tuple(name for name in names if _fits(caught.get(name), stages[name.rpartition(".")[0]]))


class SplitClassifier(NamedTuple):
    """The published classifier, or None and the reason in `notes`."""

    classifier: Classifier | None
    notes: tuple[str, ...] = ()


@torch.no_grad()
def split_classifier(model: nn.Module, size: tuple[int, int]) -> SplitClassifier:
    """Takes the published classifier out of a timm model, which holds no classifier weights afterwards.

    The two halves are compared with the whole on a random image; a head that is not one linear map of the
    pooled features (distilled DeiT, attention heads) is dropped rather than imitated.

    Args:
        model: A timm model; changed in place.
        size: (height, width) it runs at.

    Raises:
        SourceError: Without its classifier the model computes other features, or still holds the weights.
    """
    net: Any = model.eval()
    name = str(net.pretrained_cfg.get("architecture") or type(model).__name__)
    head: Any = net.get_classifier()
    if not net.num_classes or isinstance(head, nn.Identity):
        return SplitClassifier(None)
    images = _probe(size)
    logits, features = net(images), _pooled(model, images)
    heads = [part for part in (head if isinstance(head, tuple | list) else [head]) if isinstance(part, nn.Module)]
    weights = {id(p) for part in heads for p in part.parameters()}
    net.reset_classifier(0)
    if any(id(p) in weights for p in model.parameters()):
        raise SourceError(f"{name} still holds its classifier after timm's reset_classifier(0)")
    if not _close(_pooled(model, images), features):
        raise SourceError(f"{name} computes other features once timm's reset_classifier(0) took its classifier out")
    if _is_projection(net.pretrained_cfg, len(logits[0])):
        note = f"the {logits.shape[1]} published outputs are a projection into an image-text space, not classes"
        return SplitClassifier(None, (f"no native classifier: {note}",))
    layer = _as_linear(head)
    if layer is None or not _close(layer(features), logits):
        note = f"{name}'s published head is not one linear map of its pooled features"
        return SplitClassifier(None, (f"no native classifier: {note}",))
    return SplitClassifier(
        Classifier(layer, num_classes=logits.shape[1], aliases=imagenet_aliases(logits.shape[1])),
    )


def imagenet_aliases(num_classes: int) -> dict[str, int]:
    """Index, WordNet id, full name and every unambiguous lemma of each class, to its logit.

    Only the index where `num_classes` is no ImageNet's. 'crane', a bird and a machine, is no alias; 'crane'
    stays reachable by index, WordNet id and, where the whole differs, full name.
    """
    aliases = {str(i): i for i in range(num_classes)}
    subset = infer_imagenet_subset({"num_classes": num_classes})
    info = ImageNetInfo(subset) if subset else None
    if info is None or info.num_classes() != num_classes:
        return aliases
    aliases |= {wordnet_id: i for i, wordnet_id in enumerate(info.label_names())}
    names = [[name, *{lemma.strip() for lemma in name.split(",")} - {name}] for name in info.label_descriptions()]
    meanings = Counter(alias for group in names for alias in group)
    for i, group in enumerate(names):
        aliases.update({alias: i for alias in group if meanings[alias] == 1 and alias not in aliases})
    return aliases


def _pooled(model: nn.Module, images: Tensor) -> Tensor:
    net: Any = model
    features: Tensor = net.forward_head(net.forward_features(images), pre_logits=True)
    # BiT and friends classify with a 1x1 convolution and leave its spatial axes on.
    return features.flatten(1) if features.ndim == 4 and features.shape[2:] == (1, 1) else features


def _probe(size: tuple[int, int]) -> Tensor:
    return torch.randn((1, 3, *size), generator=torch.Generator().manual_seed(0))


def _fits(output: object, stage: Tokens) -> bool:
    """Whether a part's output is a token for each of the layer's, prefix first."""
    prefix = 0 if stage.prefix is None else stage.prefix.shape[1]
    return isinstance(output, Tensor) and output.ndim == 3 and output.shape[1] == prefix + stage.spatial.shape[1]


def _like(output: Tensor, stage: Tokens) -> Tokens:
    """A part's output, split as the layer's tokens are."""
    if stage.prefix is None:
        return Tokens(output, None)
    count = stage.prefix.shape[1]
    return Tokens(output[:, count:], output[:, :count])


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1e-6))


def _as_linear(head: object) -> nn.Linear | None:
    if isinstance(head, nn.Linear):
        return head
    if not isinstance(head, nn.Conv2d) or head.kernel_size != (1, 1):
        return None
    layer = nn.Linear(head.in_channels, head.out_channels, bias=head.bias is not None)
    state = {"weight": head.weight.flatten(1)} | ({} if head.bias is None else {"bias": head.bias})
    layer.load_state_dict(state)
    return layer


def _is_projection(cfg: Any, num_classes: int) -> bool:
    architecture = str(cfg.get("architecture") or "")
    published = num_classes == cfg.get("num_classes")
    return "clip" in architecture and published and infer_imagenet_subset({"num_classes": num_classes}) is None


def _agrees(output: object, spatial: Tensor) -> bool:
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        return False
    if output.ndim == 3:
        views = [output[:, -spatial.shape[1] :]]
    else:  # NCHW, or NHWC as in Swin
        views = [output.flatten(2).transpose(1, 2), output.flatten(1, 2)]
    return any(view.shape == spatial.shape and torch.allclose(view, spatial) for view in views)


def _has_3d_weights(model: nn.Module) -> bool:
    return any(weight.ndim == 5 for weight in model.parameters())

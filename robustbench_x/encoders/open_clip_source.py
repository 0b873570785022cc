"""Image-text encoders through open_clip: `open_clip:ARCH/TAG`, `open_clip:ARCH@FILE` or `open_clip:hf-hub:ORG/NAME`."""

import contextlib
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder, LoadedEncoder, Preprocessing
from robustbench_x.encoders.hooked import HookedBackbone
from robustbench_x.encoders.hub import NETWORK_ERRORS, hub_file
from robustbench_x.encoders.loading import Checkpoint, file_sha256, load_strictly, read_state, strip_prefix
from robustbench_x.encoders.source import EncoderOptions, EncoderSource
from robustbench_x.encoders.text import TextTower
from robustbench_x.errors import ConfigError, MissingExtraError, SourceError, near_matches

__all__ = ["SOURCE"]

_BATCH = 64
_HUB = "hf-hub:"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_BUILD_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AssertionError,
    ImportError,
    *NETWORK_ERRORS,
)
_PIXELS = ("mean", "std", "interpolation", "resize_mode")


class _Wanted(NamedTuple):
    """What a source string asks for."""

    model: str
    """As open_clip's `create_model` takes it."""
    weights: Path
    quick_gelu: bool = False
    pixels: dict[str, Any] = {}  # noqa: RUF012 - never changed
    notes: tuple[str, ...] = ()


def _load(source: str, rest: str, options: EncoderOptions) -> LoadedEncoder:
    open_clip = _import(source)
    wanted = _find(open_clip, source, rest)
    checkpoint = read_state(wanted.weights, source, allow_pickle=options.allow_pickle)
    model = _create(open_clip, source, wanted, options.size)
    notes = _fill(open_clip, source, model, checkpoint)
    sha256 = file_sha256(wanted.weights)
    preprocessing = _preprocessing(open_clip, source, model)
    text = _text_tower(source, model, _tokenizer(open_clip, source, wanted.model), sha256)
    visual, model.visual = model.visual, nn.Identity()
    encoder = Encoder(
        source=source,
        backbone=_backbone(visual),
        preprocessing=preprocessing,
        sha256=sha256,
        notes=(*wanted.notes, *notes),
    )
    return LoadedEncoder(encoder, None, text)


SOURCE = EncoderSource(
    scheme="open_clip",
    usage="open_clip:ARCH/TAG, open_clip:ARCH@FILE",
    summary="any open_clip model with its text side: published weights, a local file, or hf-hub:ORG/NAME",
    load=_load,
)


def _import(source: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own dependencies' deprecations
            import open_clip
    except ImportError:
        raise MissingExtraError(source, package="open_clip_torch", extra="vlm") from None
    return open_clip


def _find(open_clip: Any, source: str, rest: str) -> _Wanted:
    if rest.startswith(_HUB):
        name = rest.removeprefix(_HUB)
        folder = Path(name).expanduser()
        if folder.is_dir():
            weights = next((folder / file for file in _WEIGHTS if (folder / file).is_file()), folder / _WEIGHTS[0])
            return _Wanted(f"local-dir:{folder}", weights)
        config = hub_file(source, name, ["open_clip_config.json"])
        return _Wanted(f"local-dir:{config.parent}", hub_file(source, name, _WEIGHTS))
    name, at, file = rest.partition("@")
    tag = ""
    if not at:
        name, _, tag = rest.partition("/")
    if (at and not file) or not (at or tag):
        raise ConfigError(f"encoder '{source}': write open_clip:ARCH/TAG or open_clip:ARCH@FILE")
    if name not in open_clip.list_models():
        near = near_matches(name, open_clip.list_models())
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise SourceError(f"{source}: open_clip has no model '{name}'; {hint}open_clip.list_models() lists them all")
    return _local(open_clip, name, Path(file).expanduser()) if at else _published(open_clip, source, name, tag)


def _local(open_clip: Any, name: str, file: Path) -> _Wanted:
    quick = bool(open_clip.get_model_config(name).get("quick_gelu", False))
    twin = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
    notes: tuple[str, ...] = ()
    if twin != name and twin in open_clip.list_models():
        word = "with" if quick else "without"
        notes = (f"run {word} QuickGELU, since no file says how it was trained; {twin} is the other way",)
    return _Wanted(name, file, notes=notes)


def _published(open_clip: Any, source: str, name: str, tag: str) -> _Wanted:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        known = ", ".join(tags) or f"none; load your own with open_clip:{name}@FILE"
        raise SourceError(f"{source}: open_clip knows no weights '{tag}' of {name}; it knows {known}")
    published = open_clip.get_pretrained_cfg(name, tag)
    quick = bool(published.get("quick_gelu", False))
    built = bool(open_clip.get_model_config(name).get("quick_gelu", False))
    if built and not quick:
        raise SourceError(
            f"{source}: the weights '{tag}' were trained without QuickGELU; use {name.removesuffix('-quickgelu')}/{tag}"
        )
    notes = ("the weights were trained with QuickGELU, so it was switched on",) if quick and not built else ()
    pixels = {key: published[key] for key in _PIXELS if key in published}
    return _Wanted(name, _download(open_clip, source, name, published), quick, pixels, notes)


def _download(open_clip: Any, source: str, name: str, published: dict[str, Any]) -> Path:
    if published.get("hf_hub"):
        repository, _, file = published["hf_hub"].rpartition("/")
        stem, dot, kind = file.rpartition(".")
        files = [f"{stem}.safetensors", file] if dot and kind in ("bin", "pth", "pt") else [file]
        return hub_file(source, repository, files if file else _WEIGHTS)
    try:
        return Path(open_clip.download_pretrained(published))
    except NETWORK_ERRORS as error:
        raise SourceError(
            f"{source} needs a network that is not there; open_clip:{name}@FILE loads a checkpoint you have"
        ) from error
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{source}: the weights could not be downloaded ({error})") from error


def _create(open_clip: Any, source: str, wanted: _Wanted, size: int | None) -> Any:
    try:
        with _quiet():
            model = open_clip.create_model(
                wanted.model,
                load_weights=False,
                force_quick_gelu=wanted.quick_gelu,
                force_image_size=size,
                force_preprocess_cfg=wanted.pixels,
                pretrained_text=False,
            )
    except _BUILD_ERRORS as error:
        text = str(error).strip() or type(error).__name__
        raise SourceError(f"{source}: open_clip cannot build the model ({text.splitlines()[0]})") from error
    patch = getattr(model.visual, "patch_size", None)
    if size and patch:
        step = int(max(patch)) if isinstance(patch, tuple | list) else int(patch)
        if size % step:
            below = max(size // step, 1) * step
            raise ConfigError(
                f"{source}: size {size} is no multiple of the patch size {step}; use {below} or {below + step}"
            )
    return model.eval().requires_grad_(False)


def _fill(open_clip: Any, source: str, model: Any, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Loads the checkpoint completely, through open_clip's own rules for older and foreign files where needed."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    expected = set(model.state_dict())

    def fits(keys: Collection[str]) -> bool:
        return set(keys) == expected

    checkpoint = strip_prefix(checkpoint, fits)
    state, notes = dict(checkpoint.state), checkpoint.notes
    if not fits(state):
        with contextlib.suppress(KeyError, IndexError, RuntimeError, ValueError, AttributeError):
            found = convert_state_dict(model, dict(state))
            if "positional_embedding" in found and not hasattr(model, "positional_embedding"):
                found = convert_to_custom_text_state_dict(found)
            if fits(found):
                state, notes = found, (*notes, "open_clip's rules renamed keys of the original release")
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in expected and state[name].numel() == 1:
            state[name] = state[name].reshape(getattr(model, name).shape)
    with contextlib.suppress(KeyError, IndexError, RuntimeError, AttributeError, AssertionError):
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    load_strictly(model, state, source)
    return notes


def _preprocessing(open_clip: Any, source: str, model: Any) -> Preprocessing:
    found = open_clip.get_model_preprocess_cfg(model)
    size = found.get("size", 224)
    mode = found.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise SourceError(f"{source}: open_clip resizes its images by '{mode}', which pads them; not supported")
    interpolation = found.get("interpolation", "bicubic")
    return Preprocessing(
        input_size=(int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1])),
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=interpolation if interpolation in ("bilinear", "bicubic", "nearest") else "bicubic",
        crop_mode="squash" if mode == "squash" else "center",
    )


def _backbone(visual: Any) -> HookedBackbone:
    """The image tower; its layers are named where open_clip's own classes or timm's transformers are used."""
    names: list[str] = []
    prefix = 0
    modules = dict(visual.named_modules())
    if "transformer.resblocks" in modules and getattr(visual.transformer, "batch_first", False):
        names = [f"transformer.resblocks.{i}" for i in range(len(visual.transformer.resblocks))]
        prefix = int(hasattr(visual, "class_embedding"))
    elif "trunk.blocks" in modules and hasattr(visual.trunk, "num_prefix_tokens"):
        names = [f"trunk.blocks.{i}" for i in range(len(visual.trunk.blocks))]
        prefix = int(visual.trunk.num_prefix_tokens)
    elif "layer4" in modules:
        names = [f"layer{i}" for i in range(1, 5)]
    parts = {f"{name}.{part}": f"{name}.{part}" for name in names for part in ("attn", "mlp")}
    parts = {name: path for name, path in parts.items() if path in modules}
    return HookedBackbone(visual, _pooled, blocks=names, parts=parts, num_prefix=prefix)


def _pooled(visual: nn.Module, images: Tensor) -> Tensor:
    found = visual(images)
    embedding: Tensor = found[0] if isinstance(found, tuple) else found  # CoCa returns its tokens too
    return embedding


def _tokenizer(open_clip: Any, source: str, model: str) -> Any:
    try:
        with _quiet():
            return open_clip.get_tokenizer(model)
    except _BUILD_ERRORS as error:
        text = str(error).strip() or type(error).__name__
        raise SourceError(f"{source}: its tokenizer could not be loaded ({text.splitlines()[0]})") from error


def _text_tower(source: str, model: Any, tokenizer: Any, sha256: str) -> TextTower:
    scale = float(model.logit_scale.exp())

    def embed(texts: Sequence[str]) -> Tensor:
        device = model.logit_scale.device
        rows = [
            model.encode_text(tokenizer(list(texts[start : start + _BATCH])).to(device))
            for start in range(0, len(texts), _BATCH)
        ]
        return torch.cat(rows)

    return TextTower(embed=embed, scale=scale, sha256=sha256, module=model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's log: it warns that weights are missing, which are loaded here."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(open_clip|transformers)(\..*)?")
            yield
    finally:
        logging.disable(previous)

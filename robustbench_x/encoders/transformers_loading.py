"""Models through the transformers library: offline once on disk, without pickles, complete or not at all."""

import contextlib
import json
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Preprocessing
from robustbench_x.encoders.hub import files_sha256, weight_files
from robustbench_x.errors import MissingExtraError, SourceError

__all__ = [
    "Pretrained",
    "import_transformers",
    "load_pretrained",
    "load_tokenizer",
    "read_config",
    "read_preprocessing",
]

_SHOWN = 6
# PIL's numbers, as the files hold them.
_RESAMPLE: dict[int, Literal["nearest", "lanczos", "bilinear", "bicubic"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}


class Pretrained(NamedTuple):
    """A model in eval mode, and the digest of its weight files."""

    model: Any
    sha256: str


def import_transformers(source: str) -> Any:
    """The library, imported when the first model needs it: that takes seconds.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtraError(source, package="transformers", extra="vlm") from None
    return transformers


def read_config(folder: Path, source: str) -> dict[str, Any]:
    """What `config.json` holds.

    Raises:
        SourceError: There is no such file, or it names no `model_type`.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{source}: {folder} has no config.json, so it holds no model of transformers") from None
    except ValueError as error:
        raise SourceError(f"{source}: config.json is no JSON ({error})") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise SourceError(f"{source}: config.json names no model_type")
    return found


def load_pretrained(
    name: str, folder: Path, source: str, *, allow_pickle: bool = False, dtype: torch.dtype = torch.float32
) -> Pretrained:
    """The model `transformers.NAME` with the weights in `folder`: every weight, no other, each finite.

    Args:
        name: A class of transformers, such as `CLIPModel`.
        folder: In the hub's layout.
        source: Opens every error message.
        allow_pickle: Reads `pytorch_model*.bin` where there are no safetensors.
        dtype: To convert weights to.

    Raises:
        SourceError: The weights are missing, pickled, damaged or do not fit.
    """
    transformers = import_transformers(source)
    files = weight_files(folder, allow_pickle=allow_pickle)
    if not files:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled:
            raise SourceError(
                f"{source}: its weights are pickles ({', '.join(pickled[:_SHOWN])}), which can run code while they "
                "load; save them as safetensors or, only if you trust whoever made them, pass --allow-pickle"
            )
        raise SourceError(f"{source}: {folder} holds no weights (model.safetensors)")
    safe = files[0].suffix == ".safetensors"
    try:
        with _quiet(transformers):
            model, report = getattr(transformers, name).from_pretrained(
                str(folder),
                dtype=dtype,
                use_safetensors=safe,
                weights_only=safe,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise SourceError(f"{source}: {name} could not be loaded ({_first_line(error)})") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("safetensors", "safetensors_rust", "huggingface_hub"):
            raise
        raise SourceError(f"{source}: {name} could not be loaded ({_first_line(error)})") from error
    _check_complete(model, report, source)
    return Pretrained(model.eval().requires_grad_(False), files_sha256(files))


def load_tokenizer(folder: Path, source: str, *, subfolder: str = "") -> Any:
    """The tokenizer in `folder`.

    Raises:
        SourceError: There is none, or it needs a package that is not installed.
    """
    transformers = import_transformers(source)
    try:
        with _quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(
                str(folder / subfolder), local_files_only=True, trust_remote_code=False
            )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        place = f"{folder.name}/{subfolder}" if subfolder else folder.name
        raise SourceError(f"{source}: {place} has no tokenizer that loads ({_first_line(error)})") from error


def read_preprocessing(folder: Path, source: str, *, size: int | None = None) -> Preprocessing:
    """The image processor's settings as ours.

    The processor resizes, crops, scales to [0, 1] and normalises; so does `Preprocessing`. What it cannot do
    (a scale other than 1/255, padding) is refused, because a model would silently see other pixels.

    Args:
        folder: In the hub's layout, with `preprocessor_config.json` or `processor_config.json`.
        source: Opens every error message.
        size: Height and width to run at instead of the published size; the share that is cropped stays.

    Raises:
        SourceError: There is no image processor, or it does something else as well.
    """
    found = _processor_config(folder, source)
    crops = bool(found.get("do_center_crop", "crop_size" in found)) and found.get("crop_size") is not None
    scaled = _sides(found.get("size", 224))
    shape = _sides(found["crop_size"]) if crops else scaled
    if found.get("do_resize", True) is False:
        scaled = shape
    if not found.get("do_rescale", True) or abs(float(found.get("rescale_factor", 1 / 255)) * 255 - 1) > 1e-3:
        raise SourceError(f"{source}: its image processor does not scale pixels to [0, 1]; nothing else is supported")
    if found.get("do_pad") or found.get("pad_size"):
        raise SourceError(f"{source}: its image processor pads images, which is not supported")
    # Without a crop, the whole image is squashed into the size; with one, `shortest_edge` keeps its shape.
    squash = not crops or "shortest_edge" not in _as_mapping(found.get("size", 224))
    input_size = (size, size) if size else shape
    normalises = found.get("do_normalize", True)
    return Preprocessing(
        input_size=input_size,
        mean=_triple(found.get("image_mean"), source) if normalises else (0.0, 0.0, 0.0),
        std=_triple(found.get("image_std"), source) if normalises else (1.0, 1.0, 1.0),
        interpolation=_RESAMPLE.get(int(found.get("resample", 3)), "bicubic"),
        crop_pct=min(1.0, shape[0] / scaled[0]),
        crop_mode="squash" if squash else "center",
    )


def _processor_config(folder: Path, source: str) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        found = found.get("image_processor", found)  # transformers 5 writes the processor's parts into one file
        if isinstance(found, dict) and "image_mean" in found:
            return found
    raise SourceError(f"{source}: {folder.name} describes no image processor (preprocessor_config.json)")


def _as_mapping(size: Any) -> dict[str, Any]:
    # A bare number is an old file: CLIP's mean the shorter edge, all others a square, which only a crop tells apart.
    return size if isinstance(size, dict) else {"shortest_edge": size}


def _sides(size: Any) -> tuple[int, int]:
    found = _as_mapping(size)
    if "height" in found and "width" in found:
        return int(found["height"]), int(found["width"])
    edge = int(found.get("shortest_edge") or 224)
    return edge, edge


def _triple(values: Any, source: str) -> tuple[float, float, float]:
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise SourceError(f"{source}: its image processor has mean or std {values}; three numbers are needed")
    return float(values[0]), float(values[1]), float(values[2])


def _check_complete(model: nn.Module, report: dict[str, Any], source: str) -> None:
    problems = {
        "missing": sorted(map(str, report.get("missing_keys", ()))),
        "unexpected": sorted(map(str, report.get("unexpected_keys", ()))),
        "wrongly shaped": sorted(str(entry[0]) for entry in report.get("mismatched_keys", ())),
        "not finite": [name for name, tensor in _floats(model) if not tensor.isfinite().all()],
    }
    found = [f"{len(keys)} {what}: {_listing(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise SourceError(f"{source}: the weights do not fit the model, so it was not loaded; {'; '.join(found)}")


def _floats(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in model.named_parameters() if tensor.is_floating_point())


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No load report, progress bar or advice: what matters of it becomes an error here."""
    before = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"transformers(\..*)?")
            yield
    finally:
        transformers.logging.set_verbosity(before)
        if bars:
            transformers.logging.enable_progress_bar()


def _listing(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]

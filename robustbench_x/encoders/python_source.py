"""A user's own encoder: `python:module:callable`."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Classifier, Encoder, LoadedEncoder, Preprocessing, Tokens
from robustbench_x.encoders.source import EncoderOptions, EncoderSource
from robustbench_x.encoders.timm_source import encoder_from_timm
from robustbench_x.errors import ConfigError, RobustbenchError, SourceError, near_matches

__all__ = ["SOURCE"]


class _ReachedError(Exception):
    """Ends a forward pass once the deepest wanted layer has run."""


@final
class _PlainBackbone(nn.Module):
    """Any module from pixels to rows of numbers; its `layers` are read with forward hooks."""

    def __init__(self, source: str, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._source = source
        modules = dict(module.named_modules())
        named = getattr(module, "layers", ())
        # A module may well call a submodule `layers`; only names are a request.
        self.layers: tuple[str, ...] = () if isinstance(named, nn.Module) else tuple(map(str, named))
        unknown = [name for name in self.layers if name not in modules]
        if unknown:
            near = near_matches(unknown[0], modules)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise SourceError(f"{source}: its attribute 'layers' names no module {', '.join(unknown)}{hint}")

    def forward(self, images: Tensor) -> Tensor:
        """Same as `pooled`."""
        return self.pooled(images)

    def pooled(self, images: Tensor) -> Tensor:
        """The module's own output."""
        features = self.module(images)
        if not isinstance(features, Tensor):
            raise SourceError(f"{self._source}: the module returns a {type(features).__name__}, not a tensor")
        return features

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        """Outputs of the named modules; the pass ends when all of them have run."""
        outputs: dict[str, Tokens] = {}

        def keep(name: str, output: object) -> None:
            outputs[name] = _as_tokens(self._source, name, output)
            if len(outputs) == len(set(layers)):
                raise _ReachedError

        modules = dict(self.module.named_modules())
        hooks = [
            modules[name].register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
            for name in set(layers)
        ]
        try:
            self.module(images)
        except _ReachedError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        silent = [name for name in layers if name not in outputs]
        if silent:
            raise SourceError(f"{self._source}: the forward pass never calls the layer {', '.join(silent)}")
        return [outputs[name] for name in layers]


def _load(source: str, rest: str, options: EncoderOptions) -> LoadedEncoder:
    made = _call(source, rest)
    if isinstance(made, Encoder):
        made = LoadedEncoder(made, None)
    if isinstance(made, LoadedEncoder):
        if options.size and made.encoder.input_size != (options.size, options.size):
            raise ConfigError(f"{source} returns a finished encoder of its own size; drop ?size={options.size}")
        return made
    if not isinstance(made, nn.Module):
        raise SourceError(
            f"{source} returned a {type(made).__name__}; expected a torch module, an Encoder or a LoadedEncoder"
        )
    made.eval()
    if hasattr(made, "pretrained_cfg") and hasattr(made, "forward_head"):
        return encoder_from_timm(source, made, size=options.size)
    return _plain(source, made, options)


SOURCE = EncoderSource(
    scheme="python",
    usage="python:module:callable",
    summary="your own: a function that returns a torch module, pixels in [0, 1] in, rows of features out",
    load=_load,
)


def _call(source: str, rest: str) -> object:
    module_name, colon, attribute = rest.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(f"encoder '{source}': write python:module:callable, for example python:my_models:encoder")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise SourceError(f"{source}: there is no module {module_name} here or among the installed ones") from error
        raise SourceError(f"{source}: importing {module_name} failed: {error}") from error
    except Exception as error:
        raise SourceError(f"{source}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        near = near_matches(attribute, [name for name in vars(module) if not name.startswith("_")])
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise SourceError(f"{source}: {module_name} has no {attribute}{hint}")
    factory = getattr(module, attribute)
    if not callable(factory):
        raise SourceError(f"{source}: {attribute} is a {type(factory).__name__}, not a callable")
    try:
        made: object = factory()
    except RobustbenchError:
        raise
    except Exception as error:
        raise SourceError(f"{source}: {attribute}() raised {type(error).__name__}: {error}") from error
    return made


def _plain(source: str, module: nn.Module, options: EncoderOptions) -> LoadedEncoder:
    size = _size(source, module, options)
    try:
        with torch.no_grad():
            output = module(torch.full((1, 3, *size), 0.5))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(f"{source}: the module does not run on images {size[0]}x{size[1]} ({reason})") from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise SourceError(f"{source}: the module returns {found} for one image; expected a tensor (1, dimensions)")
    width = int(output.shape[1])
    aliases = _aliases(source, module, width)
    encoder = Encoder(
        source=source,
        backbone=_PlainBackbone(source, module),
        preprocessing=Preprocessing(input_size=size),
        notes=(
            "normalisation is the module's own business",
            f"its {width} outputs serve as features and, for the native head, as logits",
        ),
    )
    return LoadedEncoder(encoder, Classifier(nn.Identity(), num_classes=width, aliases=aliases))


def _size(source: str, module: nn.Module, options: EncoderOptions) -> tuple[int, int]:
    wanted: Any = options.size or getattr(module, "input_size", 224)
    sides = tuple(wanted) if isinstance(wanted, tuple | list) else (wanted, wanted)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise SourceError(f"{source}: input_size = {wanted!r} is neither a positive whole number nor a pair of them")
    return sides[0], sides[1]


def _aliases(source: str, module: nn.Module, width: int) -> dict[str, int]:
    aliases = {str(i): i for i in range(width)}
    named = getattr(module, "classes", None)
    if named is None or isinstance(named, nn.Module):
        return aliases
    classes = [str(name) for name in named]
    if len(classes) != width or len(set(classes)) != width:
        raise SourceError(
            f"{source}: 'classes' has {len(set(classes))} different names for {width} outputs; one each is needed"
        )
    # A class called "3" is the user's word; the index 3 gives way.
    return aliases | {name: i for i, name in enumerate(classes)}


def _as_tokens(source: str, name: str, output: object) -> Tokens:
    if isinstance(output, Tensor) and output.ndim == 4:  # (N, D, H, W)
        return Tokens(output.flatten(2).transpose(1, 2), None)
    if isinstance(output, Tensor) and output.ndim == 3:  # (N, T, D)
        return Tokens(output, None)
    if isinstance(output, Tensor) and output.ndim == 2:  # (N, D)
        return Tokens(output.unsqueeze(1), None)
    found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
    raise SourceError(f"{source}: the layer {name} returns {found}, which is no set of tokens")

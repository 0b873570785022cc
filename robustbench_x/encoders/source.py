"""Source strings: `scheme:rest?option=value`, resolved through the registry."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from robustbench_x.encoders.encoder import LoadedEncoder
from robustbench_x.errors import ConfigError

if TYPE_CHECKING:
    from robustbench_x.registry import Registry

__all__ = ["EncoderOptions", "EncoderSource", "load_encoder", "split_source"]


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Options of any encoder source: `?size=98` sets the input size, `allow_pickle` comes from the command line."""

    size: int | None = None
    allow_pickle: bool = False


@dataclass(frozen=True, kw_only=True)
class EncoderSource:
    """A scheme that encoders are loaded by.

    `load` takes the source as written, the part between scheme and options, and the options.
    `names` lists what the scheme knows, where that is a closed list.
    """

    scheme: str
    usage: str
    summary: str
    load: Callable[[str, str, EncoderOptions], LoadedEncoder]
    names: tuple[str, ...] = ()


def load_encoder(source: str, registry: "Registry", *, allow_pickle: bool = False) -> LoadedEncoder:
    """The encoder that `source` names, frozen and in eval mode, with its classifier where it has one.

    Args:
        source: For example `packaged:dinov2_vits14?size=98` or `timm:resnet18@weights.safetensors`.
        registry: Where schemes are looked up.
        allow_pickle: Lets a checkpoint run code while it loads. Only for files you trust.

    Raises:
        UnknownNameError: No such scheme or name.
        SourceError: The weights could not be loaded completely.
    """
    scheme, rest, query = split_source(source, kind="encoder")
    size = query.pop("size", None)
    if query:
        raise ConfigError(f"encoder '{source}': unknown option {', '.join(query)}; known: size")
    if size is not None and not (size.isdecimal() and int(size) > 0):
        raise ConfigError(f"encoder '{source}': size={size} is not a positive whole number")
    options = EncoderOptions(size=int(size) if size else None, allow_pickle=allow_pickle)
    return registry.encoders[scheme].load(source, rest, options)


def split_source(source: str, *, kind: str) -> tuple[str, str, dict[str, str]]:
    """`scheme:rest?key=value&key=value` as its three parts.

    Raises:
        ConfigError: There is no scheme, or an option has no value.
    """
    scheme, colon, rest = source.partition(":")
    if not colon or not scheme or not rest:
        raise ConfigError(f"{kind} '{source}' has no scheme; write scheme:name, for example packaged:{_EXAMPLES[kind]}")
    rest, _, query = rest.partition("?")
    try:
        options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError:
        raise ConfigError(f"{kind} '{source}': options are written ?key=value&key=value") from None
    return scheme, rest, options


_EXAMPLES = {"encoder": "efficientnet_lite0", "data": "photos"}

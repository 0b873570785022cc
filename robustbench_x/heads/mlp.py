"""A two-layer perceptron on standardised features, stopped early on a held-out share."""

from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.errors import SampleError
from robustbench_x.heads._training import check_training, hold_out, standardisation
from robustbench_x.heads.base import HeadSpec

__all__ = ["SPEC", "MLPHead", "fit", "restore"]

_MAX_WIDTH = 512
_BATCH = 128
_EPOCHS = 100
_PATIENCE = 10
_RATE = 1e-3
_DECAY = 1e-2
_HELD_OUT = 0.1


@final
class MLPHead(nn.Module):
    """Features `(N, D)` to logits `(N, K)`: standardise, linear, GELU, linear."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        # By way of meta: the weights come from fit's own generator or from a file, never from the global one.
        self.hidden = nn.Linear(dim, width, device="meta").to_empty(device="cpu")
        self.out = nn.Linear(width, num_classes, device="meta").to_empty(device="cpu")

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(N, K)`."""
        logits: Tensor = self.out(F.gelu(self.hidden((features - self.mean) / self.scale)))
        return logits


@torch.enable_grad()
def fit(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> MLPHead:
    """AdamW on nine tenths of every class; the weights of the epoch with the lowest loss on the rest.

    Stops after 10 epochs without progress. A class with a single sample is trained on only; when every class
    is like that, the training loss decides.

    Args:
        features: `(N, D)`.
        labels: `(N,)` int64 in `[0, num_classes)`.
        num_classes: K.
        seed: Decides split, initial weights and batches; the global generator is neither read nor moved.

    Raises:
        DataError: A feature is not finite, or a class has no sample.
        SampleError: The loss was never finite.
    """
    check_training(features, labels, num_classes)
    generator = torch.Generator().manual_seed(seed)
    features = features.float()
    head = _initial(features, num_classes, generator)
    train, held_out = hold_out(labels.cpu(), _HELD_OUT, generator)
    optimizer = torch.optim.AdamW(head.parameters(), lr=_RATE, weight_decay=_DECAY)
    best, best_loss, since = _copy(head), float("inf"), 0
    for _ in range(_EPOCHS):
        for batch in torch.split(train[torch.randperm(len(train), generator=generator)], _BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(head(features[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            held_out_loss = float(F.cross_entropy(head(features[held_out]), labels[held_out]))
        if held_out_loss < best_loss:
            best, best_loss, since = _copy(head), held_out_loss, 0
        else:
            since += 1
            if since == _PATIENCE:
                break
    if best_loss == float("inf"):
        raise SampleError("the mlp head did not train: its held-out loss was never finite; try head linear")
    head.load_state_dict(best)
    return head.eval().requires_grad_(False)


def restore(state: Mapping[str, Tensor]) -> MLPHead:
    """The fitted head from its state dict."""
    width, dim = state["hidden.weight"].shape
    head = MLPHead(dim, width, state["out.weight"].shape[0])
    head.load_state_dict(dict(state))
    return head.eval().requires_grad_(False)


def _initial(features: Tensor, num_classes: int, generator: torch.Generator) -> MLPHead:
    dim = features.shape[1]
    head = MLPHead(dim, min(_MAX_WIDTH, 2 * dim), num_classes)
    mean, scale = standardisation(features)
    head.mean.copy_(mean)
    head.scale.copy_(scale)
    for layer in (head.hidden, head.out):
        # Drawn on the CPU, so that a seed means the same weights on every device. The bound is nn.Linear's.
        bound = layer.in_features**-0.5
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        nn.init.zeros_(layer.bias)
    return head.to(features.device)


def _copy(head: MLPHead) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}


SPEC = HeadSpec(
    name="mlp",
    summary="one hidden layer, AdamW, stopped early on a held-out tenth",
    fit=fit,
    restore=restore,
    settings={
        "max_width": _MAX_WIDTH,
        "batch": _BATCH,
        "epochs": _EPOCHS,
        "patience": _PATIENCE,
        "rate": _RATE,
        "decay": _DECAY,
        "held_out": _HELD_OUT,
    },
)

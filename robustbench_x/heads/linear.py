"""The linear probe: multinomial logistic regression on standardised features."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.errors import SampleError
from robustbench_x.heads._training import check_training, standardisation
from robustbench_x.heads.base import HeadSpec

__all__ = ["SPEC", "fit", "restore"]

_C = 1.0
_MAX_ITERATIONS = 5000
_TOLERANCE = 1e-7


def fit(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> nn.Linear:
    """The unique minimum of `C * sum(cross-entropy) + |W|^2 / 2` on standardised features, bias unpenalised.

    L-BFGS in float64 until no entry of the gradient (of the objective over `C * N`) exceeds 1e-7;
    standardisation is then folded into weight and bias. The problem is convex, so `seed` is not used.

    Args:
        features: `(N, D)`.
        labels: `(N,)` int64 in `[0, num_classes)`.
        num_classes: K.
        seed: Unused.

    Raises:
        DataError: A feature is not finite, or a class has no sample.
        SampleError: It did not converge.
    """
    del seed
    check_training(features, labels, num_classes)
    mean, scale = standardisation(features)
    weight, bias = _minimise((features.double() - mean) / scale, labels, num_classes)
    weight = weight / scale
    return _layer(weight.float(), (bias - weight @ mean).float())


def restore(state: Mapping[str, Tensor]) -> nn.Linear:
    """The fitted head from its state dict."""
    return _layer(state["weight"], state["bias"])


@torch.enable_grad()
def _minimise(inputs: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    weight = inputs.new_zeros(num_classes, inputs.shape[1], requires_grad=True)
    bias = inputs.new_zeros(num_classes, requires_grad=True)
    decay = 1 / (2 * _C * len(inputs))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        max_eval=2 * _MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=_TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + decay * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    objective()
    gradient = max(float(p.grad.abs().max()) for p in (weight, bias) if p.grad is not None)
    if not gradient <= _TOLERANCE:
        raise SampleError(
            f"the linear head did not converge: after {_MAX_ITERATIONS} iterations of L-BFGS its gradient is still "
            f"{gradient:.2g} (expected at most {_TOLERANCE:g}); try head prototype or knn"
        )
    return weight.detach(), bias.detach()


def _layer(weight: Tensor, bias: Tensor) -> nn.Linear:
    # By way of meta: nn.Linear would draw weights from the global generator only for them to be overwritten.
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta").to_empty(device=weight.device)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.requires_grad_(False)


SPEC = HeadSpec(
    name="linear",
    summary="logistic regression on standardised features, run to convergence",
    fit=fit,
    restore=restore,
    settings={"c": _C, "tolerance": _TOLERANCE},
)

"""Parameters that several torchattacks attacks share, with the pinned defaults."""

from typing import Any, Literal

from robustbench_x_attacks.torchattacks_bridge.entry import Knob

__all__ = [
    "BATCH",
    "CLEAN",
    "DIVERSITY",
    "ELASTIC",
    "ELASTIC_FIXED",
    "EOT",
    "FOOL_CLASSES",
    "KERNEL",
    "LOSS3",
    "LR",
    "NEIGHBOURS",
    "PATCHES",
    "RESIZES",
    "RHO",
    "SMOOTHING",
    "VERSIONS",
    "choice",
    "count",
    "decay",
    "real",
    "restarts",
    "start",
    "step_size",
    "steps",
]

CLEAN = "; returns the clean image where it fails"
BATCH = "; stops by the loss of the whole batch"
RESIZES = "its random resizing pads to a square"


def steps(default: int, argument: str = "steps", low: int = 1) -> Knob:
    """Gradient steps."""
    return Knob(name="steps", default=default, help="gradient steps", argument=argument, low=low)


def step_size(rule: str = "2.5 * eps / steps") -> Knob:
    """The size of a step; None leaves it to `rule`."""
    text = f"in [0, 1] units; default {rule}"
    return Knob(name="step_size", default=None, help=text, argument="alpha", kind=float | None)


def start(default: bool) -> Knob:
    """Whether it starts at a random point."""
    return Knob(name="random_start", default=default, help="start from a random point", argument="random_start")


def decay(default: float = 1.0) -> Knob:
    """The share of the momentum that is kept."""
    return Knob(name="decay", default=default, help="share of the momentum kept per step", argument="decay")


def restarts() -> Knob:
    """Random restarts."""
    return Knob(name="restarts", default=1, help="random restarts", argument="n_restarts", low=1)


def real(name: str, default: float, help: str, argument: str = "", high: float = float("inf")) -> Knob:  # noqa: A002
    """A number of at most `high`."""
    return Knob(name=name, default=default, help=help, argument=argument or name, high=high)


def count(name: str, default: int, help: str, argument: str = "") -> Knob:  # noqa: A002
    """A whole number of at least 1."""
    return Knob(name=name, default=default, help=help, argument=argument or name, low=1)


def choice(name: str, default: str, help: str, kind: Any, argument: str = "") -> Knob:  # noqa: A002
    """A parameter with a closed list of values; `kind` is their `Literal`."""
    return Knob(name=name, default=default, help=help, argument=argument or name, kind=kind)


EOT = count("eot", 10, "gradients averaged per step", "eot_iter")
RHO = real("rho", 0.75, "share of rising steps below which the step size is halved", high=1)
LR = real("lr", 0.01, "learning rate")
NEIGHBOURS = (
    count("neighbours", 20, "images drawn around the iterate per step", "N"),
    real("beta", 1.5, "how far they lie, as a multiple of eps"),
)
DIVERSITY = (
    Knob(name="resize_rate", default=0.9, help="smallest size resized to", argument="resize_rate", low=0.5, high=0.99),
    real("diversity_prob", 0.5, "probability of resizing", high=1),
    start(False),
)
SMOOTHING = (
    real("noise_sd", 0.25, "standard deviation of the smoothing noise"),
    count("draws", 8, "noisy copies per step", "noise_batch_size"),
)
KERNEL = (
    choice(
        "kernel", "gaussian", "gaussian, linear or uniform", Literal["gaussian", "linear", "uniform"], "kernel_name"
    ),
    count("kernel_size", 15, "side of the smoothing kernel in pixels", "len_kernel"),
)
PATCHES = (real("amplification", 10.0, "step size as a multiple of eps / steps"),)
# torchattacks moves the image it measures distances from along with its first gradient step (the parameter shares
# its storage): nothing at the small first weights here, but a large initial_const returns pixels outside [0, 1].
ELASTIC = (
    LR,
    count("search_steps", 9, "binary search steps on the trade-off", "binary_search_steps"),
    steps(100, "max_iterations", low=10),  # torchattacks takes the step modulo steps // 10
    real("initial_const", 1e-3, "first weight of the misclassification loss"),
    real("beta", 1e-3, "weight of the l1 norm"),
)
# kappa > 0 shifts the columns of every label of the batch, not each row's own: no parameter here.
ELASTIC_FIXED = {"kappa": 0, "abort_early": True}
FOOL_CLASSES = Knob(name="classes", default=10, help="likeliest classes considered, a gradient each", low=2)
VERSIONS = choice("version", "standard", "standard, plus or rand", Literal["standard", "plus", "rand"])
LOSS3 = Literal["ce", "margin", "dlr"]

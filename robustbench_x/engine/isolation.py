"""Keeps what a plugin does to the process out of everything that runs after it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from robustbench_x.randomness import derive_seed

__all__ = ["isolated"]


@contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds every global generator, and puts them and torch's switches back after.

    A plugin may seed or draw from torch, numpy and `random`, switch gradients or autocast, or change the default
    dtype: the judge and the next attack must not feel it, and a resumed run must draw what a whole one drew.
    """
    states = random.getstate(), np.random.get_state()  # the legacy generator is what plugins use
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in {"cpu", device.type}}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(derive_seed(seed, "numpy") % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_grad_enabled(grad)
            torch.set_default_dtype(dtype)
            if torch.get_float32_matmul_precision() != precision:
                torch.set_float32_matmul_precision(precision)
            for kind, enabled in autocast.items():
                torch.set_autocast_enabled(kind, enabled)

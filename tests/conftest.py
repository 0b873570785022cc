"""Settings of the whole suite: strict, offline, quick on two cores."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: no hub, and one thread a worker. Two workers share two cores, and on tensors this small
# a second thread costs more than it brings.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh cache: nothing the developer computed earlier can make a test pass."""
    cache = tmp_path_factory.mktemp("cache")
    before = os.environ.get("RBX_CACHE")
    os.environ["RBX_CACHE"] = str(cache)
    yield cache
    if before is None:
        del os.environ["RBX_CACHE"]
    else:
        os.environ["RBX_CACHE"] = before


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small learnable data set with `train/` and `test/`; nobody writes to it."""
    from project import write_images

    return write_images(tmp_path_factory.mktemp("images"))

"""Lets the tests of this folder, and the audits they start, import `project`."""

import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small learnable data set with `train/` and `test/`; nobody writes to it."""
    from project import write_images

    return write_images(tmp_path_factory.mktemp("images"))

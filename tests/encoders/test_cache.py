"""The tensor cache: what was written, or nothing."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from robustbench_x import cache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))


def test_the_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("RBX_CACHE")
    assert cache.cache_dir() == Path.home() / ".cache" / "robustbench_x"


def test_what_is_saved_comes_back() -> None:
    tensors = {"weight": torch.randn(3, 4).T, "steps": torch.tensor(7)}
    path = cache.save("head", tensors, {"classes": "a,b"})
    found = cache.load("head")
    assert found is not None
    assert found.metadata == {"classes": "a,b"}
    assert torch.equal(found.tensors["weight"], tensors["weight"])
    assert found.tensors["steps"].item() == 7
    assert [entry.name for entry in path.parent.iterdir()] == ["head.safetensors"]


def test_an_unknown_key_is_none() -> None:
    assert cache.load("never") is None


@pytest.mark.parametrize("position", [2, -1])
def test_a_flipped_byte_is_noticed(position: int) -> None:
    path = cache.save("head", {"weight": torch.ones(8)})
    content = bytearray(path.read_bytes())
    content[position] ^= 0x55
    path.write_bytes(content)
    assert cache.load("head") is None


def test_a_truncated_file_is_noticed_and_replaced() -> None:
    path = cache.save("head", {"weight": torch.ones(8)})
    path.write_bytes(path.read_bytes()[:20])
    assert cache.load("head") is None
    cache.save("head", {"weight": torch.ones(8)})
    assert cache.load("head") is not None


def test_a_foreign_file_and_changed_metadata_are_noticed() -> None:
    path = cache.save("head", {"weight": torch.ones(8)}, {"classes": "a"})
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"classes":"a"', b'"classes":"b"'))
    assert path.read_bytes() != content
    assert cache.load("head") is None
    safetensors.torch.save_file({"weight": torch.ones(8)}, path)
    assert cache.load("head") is None

"""Weight files: nothing runs while they load, and nothing is loaded halfway."""

import hashlib
import os
from collections.abc import Collection
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from robustbench_x.encoders.loading import Checkpoint, file_sha256, load_strictly, read_state, strip_prefix
from robustbench_x.errors import SourceError


class _RunsCode:
    """Unpickles by calling os.mkdir: proof that code ran."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def _state() -> dict[str, Tensor]:
    return {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}


def test_file_sha256_is_hashlibs(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * 5000)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_and_torch_files_hold_the_same_state(tmp_path: Path) -> None:
    safetensors.torch.save_file(_state(), tmp_path / "a.safetensors")
    torch.save(_state(), tmp_path / "a.pth")
    torch.save(_state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pth", "old.pth"):
        found = read_state(tmp_path / name, "timm:x")
        assert found.notes == ()
        assert {key: tensor.tolist() for key, tensor in found.state.items()} == {
            key: tensor.tolist() for key, tensor in _state().items()
        }


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "teacher", "model_ema"])
def test_wrappers_are_opened_and_named(tmp_path: Path, wrapper: str) -> None:
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, wrapper: _state()}, tmp_path / "a.pth")
    found = read_state(tmp_path / "a.pth", "timm:x")
    assert set(found.state) == {"weight", "bias"}
    assert found.notes == (f"the weights are the part '{wrapper}' of a.pth",)


def test_the_teacher_comes_before_the_student(tmp_path: Path) -> None:
    torch.save({"student": {"weight": torch.zeros(1)}, "teacher": {"weight": torch.ones(1)}}, tmp_path / "a.pth")
    assert read_state(tmp_path / "a.pth", "timm:x").state["weight"].item() == 1


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"weight": torch.ones(1), "evil": _RunsCode(str(trace))}, tmp_path / "evil.pth")
    with pytest.raises(SourceError, match=r"evil\.pth is a pickle that runs code .*mkdir.*--allow-pickle"):
        read_state(tmp_path / "evil.pth", "timm:x@evil.pth")
    assert not trace.exists()


def test_allow_pickle_lets_it_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"state_dict": _state(), "evil": _RunsCode(str(trace))}, tmp_path / "evil.pth")
    found = read_state(tmp_path / "evil.pth", "timm:x", allow_pickle=True)
    assert trace.exists()
    assert set(found.state) == {"weight", "bias"}


def test_a_pickled_module_needs_allow_pickle(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2), tmp_path / "module.pth")
    with pytest.raises(SourceError, match="--allow-pickle"):
        read_state(tmp_path / "module.pth", "timm:x")
    assert set(read_state(tmp_path / "module.pth", "timm:x", allow_pickle=True).state) == {"weight", "bias"}


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(_state(), path)
    else:
        safetensors.torch.save_file(_state(), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SourceError, match=rf"{name} is damaged"):
        read_state(path, "timm:x")


@pytest.mark.parametrize("content", [b"", b"hello, these are no weights", b"\x80\x02."])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(SourceError, match="damaged or no torch checkpoint"):
        read_state(tmp_path / "a.pth", "timm:x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"timm:x: there is no file .*gone\.pth"):
        read_state(tmp_path / "gone.pth", "timm:x")


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(SourceError, match="holds a list, not a state dict"):
        read_state(tmp_path / "list.pth", "timm:x")
    torch.save({"weight": torch.ones(1), "epoch": 3}, tmp_path / "mixed.pth")
    with pytest.raises(SourceError, match="1 entries are no tensors: epoch"):
        read_state(tmp_path / "mixed.pth", "timm:x")


def test_a_shared_prefix_goes_only_when_everything_fits_then() -> None:
    def fits(keys: Collection[str]) -> bool:
        return set(keys) == {"weight", "bias"}

    wrapped = Checkpoint({f"module.backbone.{key}": tensor for key, tensor in _state().items()})
    found = strip_prefix(wrapped, fits)
    assert set(found.state) == {"weight", "bias"}
    assert found.notes == ("the prefix 'module.backbone.' was stripped from every key",)

    partial = Checkpoint({"module.weight": torch.ones(2, 3), "head.bias": torch.zeros(2)})
    assert strip_prefix(partial, fits) is partial
    wrong = Checkpoint({"module.weight": torch.ones(2, 3), "module.scale": torch.zeros(2)})
    assert strip_prefix(wrong, fits) is wrong


def test_every_kind_of_misfit_is_listed_and_nothing_is_loaded() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    state = {
        "0.weight": torch.ones(2, 3),
        "0.bias": torch.tensor([1.0, torch.nan]),
        "1.weight": torch.ones(5, 2),
        "1.scale": torch.ones(1),
    }
    with pytest.raises(
        SourceError,
        match=r"nothing was loaded; 1 missing: 1\.bias; 1 unexpected: 1\.scale; "
        r"1 wrongly shaped: 1\.weight \(5, 2\) instead of \(2, 2\); 1 not finite: 0\.bias",
    ):
        load_strictly(module, state, "timm:x")
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())


def test_long_lists_are_cut_and_counted() -> None:
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(10)))
    with pytest.raises(SourceError, match=r"20 missing: 0\.weight, .*2\.bias, \.\.\.$"):
        load_strictly(module, {}, "timm:x")

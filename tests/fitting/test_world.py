"""One training by several processes, and one that is killed: as `rbx fit` runs them, on shards that are streamed."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from command import Command
from robustbench_x.errors import ConfigError, MissingExtraError
from robustbench_x.fitting import Artifact, read_artifact
from robustbench_x.world import SINGLE, leads, open_world, share

ENCODER = """
import torch
from torch import nn

def make(seed=0):
    torch.manual_seed(int(seed))
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GELU(), nn.Flatten())
    net.input_size = 16
    return net

def other():
    return make(7)
"""
TINY = ("steps=6", "batch=8", "k=2")


@pytest.fixture
def rbx(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    run = Command(capsys, monkeypatch, tmp_path, code=ENCODER, module="world_user_code")
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    random = np.random.default_rng(0)
    for shard in range(3):
        with tarfile.open(f"s-{shard}.tar", "w") as tar:
            for number in range(8):
                file = io.BytesIO()
                PIL.Image.fromarray(random.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(file, "png")
                content = b"damaged" if (shard, number) == (1, 3) else file.getvalue()
                info = tarfile.TarInfo(f"{number}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return run


def _fit(out: str, params: Sequence[str], *more: str) -> list[str]:
    chosen = [word for param in params for word in ("-p", param)]
    return [
        "fit", "anyattack", "-e", "python:world_user_code:make", "--surrogate", "wds:s-{0..2}.tar", "--stream",
        "--device", "cpu", "--out", f"{out}.safetensors", "--log", f"{out}.jsonl", *chosen, *more,
    ]  # fmt: skip


def _curve(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]


def _made(name: str) -> Artifact:
    return read_artifact(Path(f"{name}.safetensors"))


@pytest.mark.parametrize(
    "params",
    [("mode=fixed", "chunk=3"), ("stage=finetune", "auxiliary=python:world_user_code:other")],
    ids=["pretrain", "finetune"],
)
def test_two_processes_take_the_steps_of_one(rbx: Command, params: tuple[str, ...]) -> None:
    pytest.importorskip("lightning_fabric")
    ended = rbx(*_fit("one", [*TINY, *params]))
    assert ended.code == 0, ended.err
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "robustbench_x", *_fit("two", [*TINY, *params], "--no-resume")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two.safetensors sha256") + done.stdout.count("two.safetensors  sha256") == 1, "one speaks"
    one, two = _curve("one"), _curve("two")
    assert [row["step"] for row in two] == list(range(6))
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, abs=1e-4)
    first, second = _made("one"), _made("two")
    assert (first.provenance.processes, second.provenance.processes) == (1, 2)
    assert first.provenance.key == second.provenance.key
    assert first.provenance.forwards == second.provenance.forwards
    assert first.provenance.surrogate_unreadable == second.provenance.surrogate_unreadable == 1
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        # Adam moves a weight by its rate, whatever the size of its gradient: where that is rounding alone, so is the
        # direction. A few weights may part, the network does not.
        torch.testing.assert_close(second.tensors[name], tensor, rtol=1e-3, atol=2e-3, msg=name)


def test_a_killed_stream_goes_on_with_the_same_images(rbx: Command) -> None:
    params = ("steps=150", "batch=8", "k=2")
    whole = rbx(*_fit("whole", params))
    assert whole.code == 0, whole.err
    os.environ["RBX_CACHE"] += "-2"
    command = [sys.executable, "-m", "robustbench_x", *_fit("part", params, "--checkpoint-every", "0")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log, waited = Path("part.jsonl"), time.monotonic()
    while process.poll() is None and (not log.is_file() or log.read_text().count("\n") < 30):
        assert time.monotonic() - waited < 120
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert 30 <= len(_curve("part")) < 150
    assert not Path("part.safetensors").exists()
    resumed = rbx(*_fit("part", params))
    assert resumed.code == 0, resumed.err
    assert "1 of the images could not be read" in resumed.err
    assert _curve("part") == _curve("whole")
    first, second = _made("whole"), _made("part")
    assert first.sha256 == second.sha256
    assert first.provenance.streamed
    assert first.provenance.surrogate_unreadable == second.provenance.surrogate_unreadable == 1
    assert first.provenance.surrogate_samples == 24
    assert first.provenance.forwards == second.provenance.forwards


def test_a_stream_ends_as_images_in_memory_do_where_the_order_is_the_same(rbx: Command) -> None:
    """One image: there is only one order."""
    for name, more in (("streamed", ()), ("held", ())):
        command = _fit(name, ["steps=3", "batch=4"], "--samples", "2", *more)
        if name == "held":
            command.remove("--stream")
        assert rbx(*command).code == 0
    assert _made("held").provenance.surrogate_sha256 != _made("streamed").provenance.surrogate_sha256
    assert _made("held").provenance.surrogate_samples == 2


# -- what is refused


def test_what_cannot_be_streamed_or_shared_is_refused(rbx: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = rbx(*_fit("a", TINY)[:5], "packaged:digits", *_fit("a", TINY)[6:])
    assert ended.code == 2
    assert "lies in no file to stream it from; leave --stream out" in ended.err
    ended = rbx("fit", "raw_isp", "--out", "r.safetensors", "--stream")
    assert ended.code == 2
    assert "raw_isp takes its images into memory; leave --stream out" in ended.err
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    ended = rbx("fit", "advencoder", "-e", "python:world_user_code:make", "--out", "a.safetensors")
    assert ended.code == 2
    assert "advencoder is trained in one process; start it without torchrun" in ended.err


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_world(torch.device("cpu")) is SINGLE
    assert leads()
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    assert not leads()
    message = (
        r"a training on several processes needs the package lightning-fabric: pip install 'robustbench-x\[scale\]'"
    )
    with pytest.raises(MissingExtraError, match=message):
        open_world(torch.device("cpu"))


def test_the_parts_of_a_batch_are_equal_or_refused() -> None:
    assert [list(range(8))[share(8, rank, 4)] for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ConfigError, match="a batch of 9 cannot be shared equally by 2 processes"):
        share(9, 0, 2)

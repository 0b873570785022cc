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
# The paper's rate. At ten times that, so small a network drifts by more than 1e-4 in ten steps when its first weights
# are changed by 1e-7, in one process as in two.
TINY = ("steps=6", "batch=8", "k=2", "rate=1e-4")


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
        "--device", "cpu", "--out", f"{out}.safetensors", "--losses", f"{out}.jsonl", *chosen, *more,
    ]  # fmt: skip


def _curve(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]


def _made(name: str) -> Artifact:
    return read_artifact(Path(f"{name}.safetensors"))


SEVERAL = """
import json, sys
from robustbench_x.cli import main

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["rbx", *arguments]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
"""


def test_two_processes_take_the_steps_of_one(rbx: Command) -> None:
    pytest.importorskip("lightning_fabric")
    cases = {
        "pretrain": ("mode=fixed", "chunk=3"),
        "compat": ("mode=compat", "augment=false"),
        "finetune": ("stage=finetune", "auxiliary=python:world_user_code:other"),
    }
    for name, params in cases.items():
        ended = rbx(*_fit(f"one-{name}", [*TINY, *params]))
        assert ended.code == 0, ended.err
    Path("several.py").write_text(SEVERAL)
    commands = [_fit(f"two-{name}", [*TINY, *params], "--no-resume") for name, params in cases.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "several.py"]
    done = subprocess.run(
        [*launch, json.dumps(commands)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in cases:
        assert done.stdout.count(f"two-{name}.safetensors") == 1, "the first process alone speaks"
        one, two = _curve(f"one-{name}"), _curve(f"two-{name}")
        assert [row["step"] for row in two] == list(range(6))
        for a, b in zip(one, two, strict=True):
            assert b == pytest.approx(a, rel=0, abs=1e-4)
        _assert_alike(_made(f"one-{name}"), _made(f"two-{name}"))


def _assert_alike(one: Artifact, two: Artifact) -> None:
    """The same training by one process and by two."""
    first, second = one.provenance, two.provenance
    assert (first.processes, second.processes) == (1, 2)
    assert (first.key, first.forwards, first.backwards) == (second.key, second.forwards, second.backwards)
    assert first.surrogate_unreadable == second.surrogate_unreadable == 1
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        # Adam moves a weight by its rate, whatever the size of its gradient. In front of batch norm a bias has none but
        # rounding, which decides the direction of its six steps, and so the mean behind it.
        adrift = name.endswith(("conv.bias", "conv1.bias", "conv2.bias", "running_mean"))
        torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-3, atol=1.3e-3 if adrift else 2e-4, msg=name)


@pytest.mark.slow
def test_a_killed_stream_goes_on_with_the_same_images(rbx: Command) -> None:
    params = ("steps=60", "batch=8", "k=2")
    whole = rbx(*_fit("whole", params))
    assert whole.code == 0, whole.err
    os.environ["RBX_CACHE"] += "-2"
    command = [sys.executable, "-m", "robustbench_x", *_fit("part", params, "--checkpoint-every", "0")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log, waited = Path("part.jsonl"), time.monotonic()
    while process.poll() is None and (not log.is_file() or log.read_text().count("\n") < 12):
        assert time.monotonic() - waited < 120
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert 12 <= len(_curve("part")) < 60
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


def test_a_part_of_the_images_can_be_streamed(rbx: Command) -> None:
    ended = rbx(*_fit("part", ["steps=3", "batch=4"], "--samples", "5"))
    assert ended.code == 0, ended.err
    made = _made("part").provenance
    assert (made.surrogate_samples, made.streamed, made.processes) == (5, True, 1)
    command = _fit("held", ["steps=3", "batch=4"], "--samples", "5")
    command.remove("--stream")
    assert rbx(*command).code == 0
    assert not _made("held").provenance.streamed
    again = rbx(*_fit("part", ["steps=3", "batch=4"], "--samples", "5"))
    assert "part.jsonl is left as it is: nothing is trained, as this was fitted earlier" in again.err


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

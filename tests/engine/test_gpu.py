"""What only a CUDA device can show; skipped, and said so, where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from project import PGD, audit_config, registry
from robustbench_x.encoders.source import load_encoder
from robustbench_x.engine import run_audit
from robustbench_x.judge import read_features
from robustbench_x.victim import DefendedEncoder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_audit_on_the_gpu_agrees_with_the_cpu(images: Path, tmp_path: Path, precision: str) -> None:
    reports = {}
    for device in ("cpu", "cuda"):
        config = audit_config(images, attacks=[PGD, {"name": "embed", "steps": 5}], defenses=["jpeg"], device=device)
        config = config.model_copy(update={"precision": precision if device == "cuda" else "fp32"})
        reports[device] = run_audit(config, tmp_path / device, registry=registry())
    assert reports["cuda"].status == "complete"
    for a, b in zip(reports["cpu"].cells, reports["cuda"].cells, strict=True):
        assert a.metrics["clean_accuracy"] == b.metrics["clean_accuracy"]
        before, after = a.metrics["asr"].value, b.metrics["asr"].value
        assert before is not None
        assert after is not None
        assert abs(before - after) <= 0.1, a.id


def test_verdicts_are_float32_not_tf32() -> None:
    encoder = load_encoder("packaged:efficientnet_lite0", registry()).encoder
    images = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    exact = read_features(images, DefendedEncoder(encoder=encoder), draws=1, seed=0).features
    encoder.to("cuda")
    features = read_features(images.cuda(), DefendedEncoder(encoder=encoder), draws=1, seed=0).features.cpu()
    assert torch.backends.cudnn.allow_tf32, "the switch is put back"
    assert (features - exact).abs().max() < 1e-3 * exact.abs().max()


def test_tuned_victims_are_trained_and_judged_on_the_gpu(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))
    heads = ["linear", "lora", "adapter", "full"]
    config = audit_config(images, head=heads, attacks=[PGD, {"name": "embed", "steps": 5}], device="cuda")
    report = run_audit(config, tmp_path / "out", registry=registry())
    assert report.status == "complete"
    made = {info.head: info.settings for info in report.heads}
    assert all(made[head]["device"].startswith("cuda") for head in heads[1:])
    assert all(made[head]["tuned_sha256"] != report.encoders[0].sha256 for head in heads[1:])
    assert run_audit(config, tmp_path / "out", registry=registry()) == report


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "attack",
    [
        {"name": "advencoder", "steps": 20},
        {"name": "advencoder", "setting": "code", "steps": 20, "noises": 4, "width": 32},
        {"name": "xtransfer", "steps": 10, "partners": ["python:project:other"]},
    ],
    ids=lambda attack: attack.get("setting", attack["name"]),
)
def test_a_fitted_attack_trains_and_runs_on_the_gpu(
    attack: dict[str, object], precision: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))
    surrogate: dict[str, Any] = {"surrogate": "fractal:classes=4,train=6,test=1,size=32", "surrogate_samples": 24}
    config = audit_config(images, attacks=[attack], device="cuda", precision=precision, eps="16/255", **surrogate)
    report = run_audit(config, tmp_path / "out", registry=registry())
    (cell,) = [cell for cell in report.cells if not cell.control]
    assert report.status == "complete"
    assert cell.fit is not None
    assert cell.fit.device.startswith("cuda")
    moved = cell.metrics["feature_cosine"].value
    assert moved is not None
    assert moved < 0.99

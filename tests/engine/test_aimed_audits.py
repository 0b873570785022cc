"""Attacks that aim, from the command to the manifest: targets, encoders they were fitted on, files they start from."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from project import TINY, audit, audit_config, registry, value, write_images
from reading import READS
from robustbench_x.engine.craft_folder import CraftRequest, craft_folder
from robustbench_x.engine.fit import FitRequest, fit_plugin
from robustbench_x.errors import ConfigError, UsageError
from robustbench_x.threat import ThreatModel

_QUICK = {"steps": 3, "batch": 4, "k": 1}
OTHER = "python:project:other"


def _craft(tmp_path: Path, attack: str, **settings: object) -> CraftRequest:
    source = tmp_path / "images"
    if not source.exists():
        write_images(source, train=1, test=1)
    values = {"params": {"steps": 20}, "encoder": READS, "out": tmp_path / "out", **settings}
    return CraftRequest(attack=attack, images=source, threat=ThreatModel(eps=0.2), device="cpu", **values)  # type: ignore[arg-type]


def test_crafted_images_move_toward_their_targets(tmp_path: Path) -> None:
    targets = write_images(tmp_path / "targets", train=1, test=1, seed=9)
    for name in ("train/ant", "train/bee", "train/cat", "train/dog", "test/ant"):
        (targets / name / "00.png").unlink()
    manifest = craft_folder(_craft(tmp_path, "attackvlm_ii", targets=targets), registry())
    names = [entry["target"] for entry in manifest["images"]]
    assert names[:4] == ["test/bee/00.png", "test/cat/00.png", "test/dog/00.png", "test/bee/00.png"]
    for entry in manifest["images"]:
        made, clean, target = (
            np.asarray(PIL.Image.open(path).convert("RGB")).astype(float) / 255 - 0.5
            for path in (
                tmp_path / "out" / entry["file"],
                tmp_path / "images" / entry["source"],
                targets / entry["target"],
            )
        )
        assert np.abs(made - clean).max() <= 0.2 + 1e-6
        if Path(entry["source"]).parts[1] != Path(entry["target"]).parts[1]:
            assert (made * target).sum() > (clean * target).sum()


def test_one_target_serves_every_image(tmp_path: Path) -> None:
    targets = write_images(tmp_path / "targets", train=1, test=1, seed=9)
    single = next(targets.rglob("*.png"))
    manifest = craft_folder(_craft(tmp_path, "attackvlm_ii", targets=single), registry())
    assert {entry["target"] for entry in manifest["images"]} == {single.name}


def test_no_image_is_its_own_target(tmp_path: Path) -> None:
    source = write_images(tmp_path / "images", train=1, test=1)
    manifest = craft_folder(_craft(tmp_path, "attackvlm_ii", targets=source), registry())
    names = [entry["source"] for entry in manifest["images"]]
    assert [entry["target"] for entry in manifest["images"]] == [*names[1:], names[0]]
    assert all("error" not in entry for entry in manifest["images"])


def test_an_image_whose_only_target_is_itself_is_an_error(tmp_path: Path) -> None:
    source = write_images(tmp_path / "images", train=1, test=1)
    single = next(source.rglob("*.png"))
    manifest = craft_folder(_craft(tmp_path, "attackvlm_ii", targets=single), registry())
    failed = [entry for entry in manifest["images"] if "error" in entry]
    own = str(single.relative_to(source))
    assert failed == [{"source": own, "error": "its only target is the image itself"}]
    assert not (tmp_path / "out" / f"{own}.png").exists()
    assert len(list((tmp_path / "out").rglob("*.png"))) == len(manifest["images"]) - 1


def test_a_text_can_be_the_target(tmp_path: Path) -> None:
    single = next(write_images(tmp_path / "targets", train=1, test=1, seed=9).rglob("*.png"))
    request = _craft(tmp_path, "attackvlm_it", targets=single, target_text="a cat")
    assert all("error" not in entry for entry in craft_folder(request, registry())["images"])
    bare = _craft(tmp_path, "attackvlm_it", targets=single, out=tmp_path / "bare")
    assert all("caption" in entry["error"] for entry in craft_folder(bare, registry())["images"])


def test_targets_belong_to_attacks_that_aim(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="attack attackvlm_ii aims: name its targets with --targets"):
        craft_folder(_craft(tmp_path, "attackvlm_ii"), registry())
    with pytest.raises(UsageError, match="attack embed does not aim: drop --targets"):
        craft_folder(_craft(tmp_path, "embed", targets=tmp_path), registry())


def test_a_decoder_runs_on_the_encoder_it_was_fitted_on(images: Path, tmp_path: Path) -> None:
    attacks = [
        {"name": "anyattack", "label": "own", **_QUICK},
        {"name": "anyattack", "label": "elsewhere", "fit_encoder": OTHER, **_QUICK},
    ]
    config = audit_config(images, attacks=attacks, surrogate=f"folder:{images}", samples=8, eps=0.1)
    audited = audit(config, tmp_path / "out")
    for title in ("own", "elsewhere"):
        cell = audited.cell(title)
        assert cell.n_errors == 0
        assert value(cell, "forwards_per_sample") == 1.0
        assert cell.metrics["backwards_per_sample"].value == 0.0
    rows = [[row["linf"] for row in audited.of(audited.cell(title))] for title in ("own", "elsewhere")]
    assert rows[0] != rows[1]


def test_no_encoder_is_hardened_on_attacks_that_aim(tmp_path: Path) -> None:
    request = FitRequest(
        plugin="dta_training",
        encoder=TINY,
        threat=ThreatModel(eps=4 / 255),
        out=tmp_path / "hardened.safetensors",
        params={"inner": "attackvlm_ii?steps=1"},
        device="cpu",
    )
    with pytest.raises(ConfigError, match="attackvlm_ii aims at target images, and a hardening has none"):
        fit_plugin(request, registry())


def test_a_changed_start_is_another_training(images: Path, tmp_path: Path) -> None:
    def fit(out: str, **params: object) -> str:
        request = FitRequest(
            plugin="anyattack",
            encoder=TINY,
            threat=ThreatModel(eps=0.1),
            out=tmp_path / out,
            params={**_QUICK, **params},
            surrogate=f"folder:{images}",
            samples=8,
            device="cpu",
        )
        return fit_plugin(request, registry()).artifact.sha256

    fit("start.safetensors", steps=1)
    start = tmp_path / "start.safetensors"
    first = fit("first.safetensors", init=str(start))
    fit("start.safetensors", steps=2)
    again = fit("again.safetensors", init=str(start))
    assert first != again

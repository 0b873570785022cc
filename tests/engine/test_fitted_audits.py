"""Audits with attacks that are trained first: where the artefact comes from, what is kept, what is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from project import TINY, attack, audit, audit_config, defense, metrics_without_time, registry, value, write_images
from robustbench_x import cache
from robustbench_x.engine import run_audit
from robustbench_x.engine.craft_folder import CraftRequest, craft_folder
from robustbench_x.engine.fit import FitRequest, fit_plugin
from robustbench_x.errors import RunError, SampleError, SourceError, UsageError
from robustbench_x.fitting import read_artifact
from robustbench_x.merge import merge_runs
from robustbench_x.pairing import matching_cells
from robustbench_x.plugin import Fitted, Trainer
from robustbench_x.store import RunFolder
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderView, FitView

OTHER = "python:project:other"
SURROGATE = "fractal:classes=4,train=6,test=1,size=32"
QUICK: dict[str, Any] = {"name": "advencoder", "steps": 40, "contrast": "tokens"}
SETTINGS: dict[str, Any] = {"surrogate": SURROGATE, "surrogate_samples": 24, "eps": "16/255"}


@pytest.fixture(autouse=True)
def _no_earlier_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))


def _fit(out: Path, *, encoder: str = TINY, norm: str = "linf", eps: float = 16 / 255, **params: Any) -> Path:
    request = FitRequest(
        plugin="advencoder",
        encoder=encoder,
        threat=ThreatModel(norm=norm, eps=eps),  # type: ignore[arg-type]
        out=out,
        params={"steps": 40, "contrast": "tokens", **params},
        surrogate=SURROGATE,
        samples=24,
        device="cpu",
    )
    fit_plugin(request, registry())
    return out


def test_an_audit_fits_on_demand_keeps_the_artefact_and_says_how_it_was_made(images: Path, tmp_path: Path) -> None:
    done = audit(audit_config(images, attacks=[QUICK], head=["linear", "knn"], **SETTINGS), tmp_path / "out")
    cells = [cell for cell in done.report.cells if cell.attack == "advencoder"]
    assert done.report.status == "complete"
    assert len(cells) == 2
    for cell in cells:
        assert cell.access == "encoder"
        assert cell.fit is not None
        assert (cell.fit.encoder, cell.fit.surrogate, cell.fit.surrogate_samples) == (TINY, SURROGATE, 24)
        assert cell.fit.origin == "fitted for this run"
        assert (cell.fit.steps, cell.fit.backwards) == (40, 40 * 16)
        kept = read_artifact(tmp_path / "out" / "artifacts" / f"advencoder-{cell.fit.sha256[:12]}.safetensors")
        assert kept.sha256 == cell.fit.sha256
        assert value(cell, "forwards_per_sample") == 0
        assert cell.collapse is not None
    assert value(cells[0], "feature_cosine") < value(done.cell("noise", head="linear"), "feature_cosine") - 0.1
    assert all(cell.fit is None for cell in done.report.cells if cell.attack == "noise")


def test_the_perturbation_is_one_and_the_same_for_every_image(images: Path, tmp_path: Path) -> None:
    done = audit(audit_config(images, attacks=[QUICK], **SETTINGS), tmp_path / "out")
    cell = done.cell("advencoder")
    assert cell.fit is not None
    delta = read_artifact(tmp_path / "out" / "artifacts" / f"advencoder-{cell.fit.sha256[:12]}.safetensors").tensors
    assert float(delta["delta"].abs().max()) <= 16 / 255 + 1e-7
    assert {round(row["linf"], 5) for row in done.of(cell)} == {round(16 / 255, 5)}


def test_a_second_audit_takes_the_artefact_from_the_cache(images: Path, tmp_path: Path) -> None:
    config = audit_config(images, attacks=[QUICK], **SETTINGS)
    first = audit(config, tmp_path / "a").cell("advencoder").fit
    second = audit(config, tmp_path / "b").cell("advencoder").fit
    assert first is not None
    assert second is not None
    assert second.sha256 == first.sha256
    assert second.origin == "fitted earlier with these settings"


def test_a_damaged_cache_entry_is_made_again(images: Path, tmp_path: Path) -> None:
    config = audit_config(images, attacks=[QUICK], **SETTINGS)
    first = audit(config, tmp_path / "a").cell("advencoder").fit
    (entry,) = (cache.cache_dir() / "fits").glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-10])
    second = audit(config, tmp_path / "b").cell("advencoder").fit
    assert first is not None
    assert second is not None
    assert (second.sha256, second.origin) == (first.sha256, "fitted for this run")


def test_an_audit_takes_what_rbx_fit_wrote_and_gets_the_same_rows(images: Path, tmp_path: Path) -> None:
    path = _fit(tmp_path / "a.safetensors")
    demanded = audit(audit_config(images, attacks=[QUICK], **SETTINGS), tmp_path / "a")
    given = audit(audit_config(images, attacks=[{**QUICK, "artifact": str(path)}], **SETTINGS), tmp_path / "b")
    assert metrics_without_time(given.report) == metrics_without_time(demanded.report)
    fit = given.cell("advencoder").fit
    assert fit is not None
    assert fit.origin == f"artefact {path}"


@pytest.mark.parametrize(
    ("attack_changes", "settings", "message"),
    [
        ({"artifact": "missing.safetensors"}, {}, "there is no such file"),
        ({"artifact": "shipped"}, {}, f"ships no artefact for {TINY}"),
        ({"fit_encoder": "python:project:nobody"}, {}, "nobody"),
        ({"name": "xtransfer", "steps": 2, "partners": ["python:project:nobody"]}, {}, "nobody"),
        ({}, {"surrogate": "folder:/nowhere/at/all"}, "there is no folder"),
    ],
)
def test_what_cannot_be_had_ends_the_audit(
    attack_changes: Mapping[str, Any], settings: Mapping[str, Any], message: str, images: Path, tmp_path: Path
) -> None:
    entry = dict(attack_changes) if "name" in attack_changes else {**QUICK, **attack_changes}
    config = audit_config(images, attacks=[entry], **{**SETTINGS, **settings})
    with pytest.raises(UsageError, match=message):
        run_audit(config, tmp_path / "out", registry=registry())


def test_an_artefact_of_another_encoder_is_refused_with_both_hashes(images: Path, tmp_path: Path) -> None:
    path = _fit(tmp_path / "a.safetensors", encoder=OTHER)
    theirs = read_artifact(path).provenance.encoder_sha256
    config = audit_config(images, attacks=[{**QUICK, "artifact": str(path)}], **SETTINGS)
    with pytest.raises(SourceError, match=rf"fitted on {OTHER} with sha256 {theirs}, but {TINY} has [0-9a-f]{{64}}"):
        run_audit(config, tmp_path / "out", registry=registry())


def test_nor_one_of_another_norm(images: Path, tmp_path: Path) -> None:
    path = _fit(tmp_path / "a.safetensors", norm="patch", eps=0.1)
    config = audit_config(images, attacks=[{**QUICK, "artifact": str(path)}], **SETTINGS)
    with pytest.raises(SourceError, match="fitted for norm patch, but the budget here is linf"):
        run_audit(config, tmp_path / "out", registry=registry())


def test_transfer_names_the_encoder_it_was_fitted_on(images: Path, tmp_path: Path) -> None:
    path = _fit(tmp_path / "a.safetensors", encoder=OTHER)
    attacks = [
        {**QUICK, "label": "own"},
        {**QUICK, "label": "foreign", "fit_encoder": OTHER},
        {**QUICK, "label": "foreign file", "fit_encoder": OTHER, "artifact": str(path)},
    ]
    done = audit(audit_config(images, attacks=attacks, **SETTINGS), tmp_path / "out")
    own, foreign, from_file = (done.cell(a["label"]) for a in attacks)
    assert own.fit is not None
    assert foreign.fit is not None
    assert from_file.fit is not None
    assert (own.fit.encoder, foreign.fit.encoder, from_file.fit.encoder) == (TINY, OTHER, OTHER)
    assert foreign.fit.sha256 == from_file.fit.sha256 != own.fit.sha256
    assert value(own, "flip_rate") >= value(foreign, "flip_rate")


def test_against_a_defence_it_is_fitted_through_what_it_knows(images: Path, tmp_path: Path) -> None:
    config = audit_config(images, attacks=[QUICK], defenses=["jpeg"], samples=12, **SETTINGS)
    done = audit(config, tmp_path / "out")
    fits = {cell.knowledge: cell.fit for cell in done.report.cells if cell.attack == "advencoder"}
    assert set(fits) == {"none", "oblivious", "bpda", "full"}
    digests = {level: fit.sha256 for level, fit in fits.items() if fit is not None}
    assert digests["none"] == digests["oblivious"]
    assert len({digests["none"], digests["bpda"], digests["full"]}) == 3
    assert {level: (fit.defense, fit.knowledge) for level, fit in fits.items() if fit is not None} == {
        "none": ("none", "none"),
        "oblivious": ("none", "none"),
        "bpda": ("jpeg", "bpda"),
        "full": ("jpeg", "full"),
    }


def test_a_finished_artefact_knows_no_defence(images: Path, tmp_path: Path) -> None:
    """Its cells would otherwise claim an adaptive attacker, and the run would pass as adaptively attacked."""
    path = _fit(tmp_path / "a.safetensors")
    attacks = [{**QUICK, "artifact": str(path)}]
    done = audit(audit_config(images, attacks=attacks, defenses=["jpeg"], samples=8, **SETTINGS), tmp_path / "out")
    levels = {cell.knowledge for cell in done.report.cells if cell.attack == "advencoder"}
    assert levels == {"none", "oblivious"}
    assert "no_adaptive_attack" in done.ids("error")


def test_at_budget_zero_nothing_is_fitted_and_nothing_changes(images: Path, tmp_path: Path) -> None:
    done = audit(audit_config(images, attacks=[QUICK], samples=8, **{**SETTINGS, "eps": 0}), tmp_path / "out")
    cell = done.cell("advencoder")
    assert (value(cell, "flip_rate"), value(cell, "linf_max"), cell.fit) == (0, 0, None)
    assert not (tmp_path / "out" / "artifacts").exists()


def test_shards_of_different_artefacts_are_not_merged(images: Path, tmp_path: Path) -> None:
    base = audit_config(images, attacks=[QUICK], samples=8, **SETTINGS)
    shards = [base.model_copy(update={"shard": f"{i}/2"}) for i in (1, 2)]
    for i, config in enumerate(shards):
        run_audit(config, tmp_path / f"s{i}", registry=registry())
    merged = merge_runs([tmp_path / "s0", tmp_path / "s1"], tmp_path / "whole", registry())
    whole = run_audit(base, tmp_path / "once", registry=registry())
    assert [cell.fit and cell.fit.sha256 for cell in merged.cells] == [c.fit and c.fit.sha256 for c in whole.cells]
    report = (tmp_path / "s1" / "report.json").read_text()
    used = whole.cells[-1].fit
    assert used is not None
    (tmp_path / "s1" / "report.json").write_text(report.replace(used.sha256, "0" * 64))
    assert list((tmp_path / "whole" / "artifacts").iterdir())
    with pytest.raises(UsageError, match="their artefacts"):
        merge_runs([tmp_path / "s0", tmp_path / "s1"], tmp_path / "mixed", registry())


# -- resume


class _Stop(BaseException):
    pass


def _interrupted(config: Any, out: Path, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Runs until `after` batches are stored, then dies."""
    stored = RunFolder.add_batch
    count = 0

    def dies(self: RunFolder, *args: Any) -> None:
        nonlocal count
        stored(self, *args)
        count += 1
        if count == after:
            raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add_batch", dies)
        with pytest.raises(_Stop, match=r"^$"):
            run_audit(config, out, registry=registry())


def test_a_resumed_audit_goes_on_with_the_artefact_of_its_rows(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = audit_config(images, attacks=[QUICK], batch_size=10, **SETTINGS)
    whole = run_audit(config, tmp_path / "whole", registry=registry())
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "elsewhere"))
    _interrupted(config, tmp_path / "out", monkeypatch, after=5)  # four of noise, one of the attack
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "empty"))  # nothing there to take it from
    resumed = run_audit(config, tmp_path / "out", registry=registry())
    assert metrics_without_time(resumed) == metrics_without_time(whole)
    assert not (tmp_path / "empty" / "fits").exists()


def test_rows_of_an_artefact_that_was_changed_are_not_continued(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = audit_config(images, attacks=[QUICK], **SETTINGS)
    _interrupted(config, tmp_path / "out", monkeypatch, after=4)
    (kept,) = (tmp_path / "out" / "artifacts").iterdir()
    _fit(kept, rate=0.4)
    with pytest.raises(RunError, match="is not what the rows were made with"):
        run_audit(config, tmp_path / "out", registry=registry())


def test_a_finished_run_is_not_served_for_a_file_that_changed(images: Path, tmp_path: Path) -> None:
    path = _fit(tmp_path / "a.safetensors")
    config = audit_config(images, attacks=[{**QUICK, "artifact": str(path)}], samples=8, **SETTINGS)
    first = run_audit(config, tmp_path / "out", registry=registry())
    assert run_audit(config, tmp_path / "out", registry=registry()) == first
    _fit(path, rate=0.4)
    with pytest.raises(RunError, match=r"a.safetensors\) changed since this audit was finished"):
        run_audit(config, tmp_path / "out", registry=registry())
    assert run_audit(config, tmp_path / "out", registry=registry(), resume=False).status == "complete"


# -- planted frauds


@dataclass(frozen=True, kw_only=True)
class _Planted(Fitted):
    """Trained like any other, and misbehaving in one way."""

    def run(self, view: EncoderView) -> Tensor:
        assert view.artifact is not None
        return view.inputs + view.artifact["delta"]

    def trainer(self, view: FitView) -> Trainer:
        return _Harmless()


class _Harmless:
    steps, batch = 1, 1

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        return {"adv": torch.tensor(0.0)}

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        del state

    def result(self) -> dict[str, Tensor]:
        return {"delta": torch.full((1, 3, 1, 1), 0.5)}


@dataclass(frozen=True, kw_only=True)
class Raises(_Planted):
    """Fails while it trains."""

    def trainer(self, view: FitView) -> Trainer:
        raise RuntimeError("no luck")


@dataclass(frozen=True, kw_only=True)
class Leaves(_Planted):
    """Ends the process while it trains."""

    def trainer(self, view: FitView) -> Trainer:
        raise SystemExit(0)


@dataclass(frozen=True, kw_only=True)
class Hardens(_Planted):
    """Changes the victim while it trains, so that nothing works on it afterwards."""

    def trainer(self, view: FitView) -> Trainer:
        for part in view.encoder._encoder.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.data.zero_()
        return _Harmless()


@dataclass(frozen=True, kw_only=True)
class Overruns(_Planted):
    """Learns a change far outside its budget."""


@pytest.mark.parametrize(
    ("factory", "message"),
    [(Raises, "no luck"), (Leaves, "SystemExit"), (Hardens, "the attack changed the victim's weights")],
)
def test_a_training_that_fails_or_tampers_makes_error_rows_every_time(
    factory: type, message: str, images: Path, tmp_path: Path
) -> None:
    planted = attack(factory, access="encoder", fits=True)
    config = audit_config(images, attacks=[planted.name, "pgd"], samples=12, **SETTINGS)
    for out in ("first", "second"):  # the second must not find in the cache what the first refused
        done = audit(config, tmp_path / out, planted)
        cell = done.cell(planted.name)
        assert done.report.status == "error"
        assert (cell.n_errors, cell.metrics["asr"].value, cell.fit) == (12, None, None)
        assert all(message in row["error"] for row in done.of(cell))
        assert done.lenient_gate().exit_code != 0
        assert value(done.cell("pgd"), "asr") > 0.5, "the victim was put back for the next attack"


def test_rbx_fit_and_craft_refuse_a_training_that_tampers(images: Path, tmp_path: Path) -> None:
    plugins = registry(attack(Hardens, access="encoder", fits=True))
    shared: dict[str, Any] = {"encoder": TINY, "threat": ThreatModel(eps=0.1), "params": {}, "surrogate": SURROGATE}
    fit = FitRequest(plugin="hardens", out=tmp_path / "a.safetensors", device="cpu", **shared)
    with pytest.raises(SampleError, match="during the training of hardens: the attack changed the victim's weights"):
        fit_plugin(fit, plugins)
    assert not (tmp_path / "a.safetensors").exists()
    craft = CraftRequest(attack="hardens", images=images, out=tmp_path / "out", device="cpu", **shared)
    with pytest.raises(SampleError, match="the attack changed the victim's weights"):
        craft_folder(craft, plugins)


@dataclass(frozen=True, kw_only=True)
class Dims:
    """A defence that halves the contrast."""

    def apply(self, images: Tensor) -> Tensor:
        return 0.25 + 0.5 * images


@dataclass(frozen=True, kw_only=True)
class Flips:
    """A defence that mirrors the image."""

    def apply(self, images: Tensor) -> Tensor:
        return images.flip(3)


def test_defences_under_one_label_do_not_share_what_was_learned(images: Path, tmp_path: Path) -> None:
    learned = []
    for factory in (Dims, Flips):
        shield = defense(factory, knowledge=("oblivious", "full"))
        shields = [{"name": shield.name, "label": "shield"}]
        config = audit_config(images, attacks=[QUICK], defenses=shields, samples=8, **SETTINGS)
        cell = audit(config, tmp_path / shield.name, shield).cell("advencoder", defense="shield", knowledge="full")
        assert cell.fit is not None
        assert cell.fit.origin == "fitted for this run"
        learned.append(cell.fit.sha256)
    assert learned[0] != learned[1]


def test_a_transfer_attacker_is_no_adaptive_one(images: Path, tmp_path: Path) -> None:
    attacks = [{**QUICK, "fit_encoder": OTHER}]
    config = audit_config(images, attacks=attacks, defenses=["jpeg"], samples=8, **SETTINGS)
    done = audit(config, tmp_path / "out")
    assert {cell.knowledge for cell in done.report.cells if cell.attack == "advencoder"} == {"none", "oblivious"}
    assert "no_adaptive_attack" in done.ids("error")


def test_a_pattern_used_otherwise_than_fitted_is_flagged(images: Path, tmp_path: Path) -> None:
    small, large = (_fit(tmp_path / f"{name}.safetensors", eps=eps) for name, eps in (("s", 1 / 255), ("l", 32 / 255)))
    attacks = [{**QUICK, "artifact": str(path), "label": path.stem} for path in (small, large)]
    done = audit(audit_config(images, attacks=attacks, samples=8, **SETTINGS), tmp_path / "out")
    found = {f.cell: f for f in done.report.findings if f.id == "stretched_artifact"}
    assert "eps 1/255, used at 16/255" in found[done.cell("s").id].message
    assert {name: found[done.cell(name).id].level for name in ("s", "l")} == {"s": "warning", "l": "note"}


def test_a_cell_says_what_its_artefact_was_trained_with(images: Path, tmp_path: Path) -> None:
    path = _fit(tmp_path / "a.safetensors", contrast="cosine", steps=3)
    attacks = [{"name": "advencoder", "artifact": str(path)}]
    cell = audit(audit_config(images, attacks=attacks, samples=8, **SETTINGS), tmp_path / "out").cell("advencoder")
    assert (cell.params["contrast"], cell.params["steps"], cell.params["artifact"]) == ("cosine", 3, str(path))


def test_evaluated_images_among_the_surrogate_ones_are_flagged(images: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "surrogate": f"images:{images / 'test'}"}
    done = audit(audit_config(images, attacks=[QUICK], samples=8, **settings), tmp_path / "out")
    assert "surrogate_overlap" in done.ids("warning")
    assert "surrogate_overlap" not in audit(
        audit_config(images, attacks=[QUICK], samples=8, **SETTINGS), tmp_path / "other"
    ).ids("warning")


def test_runs_with_other_surrogates_are_not_compared(images: Path, tmp_path: Path) -> None:
    runs = []
    for count in (6, 24):
        settings = {**SETTINGS, "surrogate_samples": count}
        runs.append(audit(audit_config(images, attacks=[QUICK], samples=8, **settings), tmp_path / str(count)).report)
    with pytest.raises(UsageError, match="advencoder ran with another surrogate_samples in the two runs"):
        matching_cells(runs[0], runs[1])


def test_a_finished_run_is_not_served_for_other_surrogate_images(tmp_path: Path, images: Path) -> None:
    photos = write_images(tmp_path / "photos", train=1, test=1)
    config = audit_config(images, attacks=[QUICK], samples=8, **{**SETTINGS, "surrogate": f"images:{photos}"})
    first = run_audit(config, tmp_path / "out", registry=registry())
    assert run_audit(config, tmp_path / "out", registry=registry()) == first
    write_images(tmp_path / "new", train=1, test=1, seed=5)
    (tmp_path / "new" / "test" / "ant" / "00.png").replace(photos / "test" / "ant" / "00.png")
    with pytest.raises(RunError, match=r"what advencoder learned from .* changed since this audit was finished"):
        run_audit(config, tmp_path / "out", registry=registry())


def test_no_resume_leaves_foreign_files_alone(images: Path, tmp_path: Path) -> None:
    config = audit_config(images, attacks=[QUICK], samples=8, **SETTINGS)
    run_audit(config, tmp_path / "out", registry=registry())
    (tmp_path / "out" / "artifacts" / "mine.txt").write_text("mine")
    run_audit(config, tmp_path / "out", registry=registry(), resume=False)
    assert (tmp_path / "out" / "artifacts" / "mine.txt").read_text() == "mine"


def test_rbx_fit_overwrites_nothing_but_an_artefact(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(UsageError, match="this is no artefact of rbx fit, so it is left alone"):
        _fit(path)
    assert set(safetensors.torch.load_file(path)) == {"weight"}
    _fit(_fit(tmp_path / "a.safetensors"))


def test_a_learned_overrun_is_projected_and_flagged(images: Path, tmp_path: Path) -> None:
    planted = attack(Overruns, access="encoder", fits=True)
    done = audit(audit_config(images, attacks=[planted.name], samples=12, **SETTINGS), tmp_path / "out", planted)
    assert value(done.cell("overruns"), "linf_max") <= 16 / 255 + 1e-6
    assert "budget_overrun" in done.ids("error")


# -- craft


def test_crafted_images_are_valid_files_inside_the_budget(tmp_path: Path) -> None:
    import numpy as np
    import PIL.Image

    source = write_images(tmp_path / "images", train=1, test=1)
    (source / "test" / "ant" / "broken.png").write_bytes(b"no image")
    path = _fit(tmp_path / "a.safetensors")
    request = CraftRequest(
        attack="advencoder",
        images=source,
        out=tmp_path / "out",
        encoder=TINY,
        threat=ThreatModel(eps=16 / 255),
        params={"artifact": str(path)},
        device="cpu",
    )
    manifest = craft_folder(request, registry())
    entries = {entry["source"]: entry for entry in manifest["images"]}
    assert len(entries) == 9
    assert "cannot be read" in entries["test/ant/broken.png"]["error"]
    assert manifest["artifact"]["sha256"] == read_artifact(path).sha256
    for name, entry in entries.items():
        if "error" in entry:
            assert not (tmp_path / "out" / f"{name}.png").exists()
            continue
        clean = np.asarray(PIL.Image.open(source / name).convert("RGB")).astype(int)
        made = np.asarray(PIL.Image.open(tmp_path / "out" / entry["file"])).astype(int)
        assert 0 < np.abs(made - clean).max() <= 16
        assert entry["linf"] == pytest.approx(np.abs(made - clean).max() / 255, abs=1e-6)
        assert entry["feature_cosine"] < 0.999
    with pytest.raises(UsageError, match="name an empty or a new folder"):
        craft_folder(request, registry())


def test_a_folder_has_no_head_for_a_white_box_attack(tmp_path: Path) -> None:
    request = CraftRequest(
        attack="pgd", images=tmp_path, out=tmp_path / "out", encoder=TINY, threat=ThreatModel(eps=0.1), params={}
    )
    with pytest.raises(UsageError, match="pgd needs access whitebox: a folder of images has no head; use rbx audit"):
        craft_folder(request, registry())

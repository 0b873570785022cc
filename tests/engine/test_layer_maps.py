"""Layer maps in audits: made once, stored with the encoder, shown in every report, and never trusted blindly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from project import attack, audit, audit_config, registry
from robustbench_x.engine import run_audit
from robustbench_x.fitting.layer_map import LayerMap, pack_layers, read_layers, unpack_layers
from robustbench_x.plugin import Fitted, Trainer
from robustbench_x.report.layers import layer_tables
from robustbench_x.report.markdown import render_markdown
from robustbench_x.result import Decision, read_report
from robustbench_x.views import EncoderView, FitView

SURROGATE = "fractal:classes=4,train=6,test=1,size=32"
SETTINGS: dict[str, Any] = {"surrogate": SURROGATE, "surrogate_samples": 24, "eps": ["4/255", "16/255"]}
DTA: dict[str, Any] = {"name": "dta", "top": 1, "search_images": 16}


@pytest.fixture(autouse=True)
def _no_earlier_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))


def _map(**changes: Any) -> LayerMap:
    values: dict[str, Any] = {
        "names": ("blocks.0", "bl\u00f6cke.1"),
        "vulnerability": torch.tensor([0.25, 0.5], dtype=torch.float64),
        "own": torch.tensor([0.3, 0.6], dtype=torch.float64),
        "features": torch.tensor([0.1, 0.9], dtype=torch.float64),
        "chosen": torch.tensor([False, True]),
    }
    return LayerMap(**{**values, **changes})


def test_a_map_survives_its_tensors() -> None:
    found = unpack_layers(pack_layers(_map()))
    assert found is not None
    assert found.names == ("blocks.0", "bl\u00f6cke.1")
    assert [column.tolist() for column in found[1:]] == [column.tolist() for column in _map()[1:]]
    assert unpack_layers({"delta": torch.zeros(3)}) is None
    assert read_layers({}, ["blocks.0"]) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"own": torch.zeros(3)}, "names 2 layers, but holds"),
        ({"features": torch.tensor([0.1, float("nan")])}, "no cosine distances"),
        ({"vulnerability": torch.tensor([0.1, 2.5])}, "no cosine distances"),
        ({"names": ("blocks.0", "head")}, "names 'head', which is no layer of this encoder"),
    ],
)
def test_a_map_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        read_layers(pack_layers(_map(**changes)), ["blocks.0", "bl\u00f6cke.1"])


def test_an_audit_stores_and_shows_the_layer_map_of_each_budget(images: Path, tmp_path: Path) -> None:
    done = audit(audit_config(images, attacks=[DTA], head=["linear", "knn"], **SETTINGS), tmp_path / "out")
    (encoder,) = read_report(tmp_path / "out").encoders
    assert [(m.attack, round(m.threat.eps * 255), m.defense, m.surrogate) for m in encoder.layer_vulnerability] == [
        ("dta", 4, "none", SURROGATE),
        ("dta", 16, "none", SURROGATE),
    ]
    small, large = (m.layers for m in encoder.layer_vulnerability)
    assert [d.layer for d in small] == ["early", "late"]
    assert all(sum(d.chosen for d in layers) == 1 for layers in (small, large))
    assert all(b.vulnerability > a.vulnerability > 0 for a, b in zip(small, large, strict=True))
    (table,) = layer_tables(done.report)
    assert table.columns == ("dta linf 4/255", "dta linf 16/255")
    assert [row[0] for row in table.rows] == ["early", "late"]
    text = render_markdown(done.report, Decision(exit_code=0, answer="unjudged", reason="-"))
    assert "### Layer vulnerability of python:project:tiny" in text
    assert f"| {small[0].layer} | {small[0].vulnerability:.2f}" in text


def test_the_map_in_the_report_is_the_one_the_attack_used(images: Path, tmp_path: Path) -> None:
    done = audit(audit_config(images, attacks=[DTA], **{**SETTINGS, "eps": "16/255"}), tmp_path / "searched")
    (found,) = done.report.encoders[0].layer_vulnerability
    (chosen,) = [d.layer for d in found.layers if d.chosen]
    other = {"early": "late", "late": "early"}[chosen]
    rows = {}
    for name in (chosen, other):
        again = audit(
            audit_config(images, attacks=[{**DTA, "layers": name}], **{**SETTINGS, "eps": "16/255"}), tmp_path / name
        )
        rows[name] = [row["feature_cosine"] for row in again.of(again.cell("dta"))]
        assert again.report.encoders[0].layer_vulnerability == ()
    used = [row["feature_cosine"] for row in done.of(done.cell("dta"))]
    assert used == pytest.approx(rows[chosen], abs=1e-4)
    assert used != pytest.approx(rows[other], abs=1e-4)


def test_a_defence_that_is_known_has_a_map_of_its_own(images: Path, tmp_path: Path) -> None:
    config = audit_config(
        images,
        attacks=[DTA],
        defenses=[{"name": "jpeg", "quality": 30, "knowledge": ["bpda"]}],
        **{**SETTINGS, "eps": "16/255"},
    )
    report = run_audit(config, tmp_path / "out", registry=registry())
    plain, through = report.encoders[0].layer_vulnerability
    assert (plain.defense, through.defense, through.knowledge) == ("none", "jpeg", "bpda")
    assert [d.vulnerability for d in plain.layers] != [d.vulnerability for d in through.layers]
    assert layer_tables(report)[0].columns[1] == "dta linf 16/255 through jpeg (bpda)"


@dataclass(frozen=True, kw_only=True)
class Boasts(Fitted):
    """Claims a layer that the encoder does not have."""

    def trainer(self, view: FitView) -> Trainer:
        return _Made()

    def run(self, view: EncoderView) -> Tensor:
        return view.inputs


class _Made:
    steps, batch = 0, 0

    def step(self, number: int, index: Tensor) -> dict[str, Tensor]:
        raise AssertionError("never called")

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: object) -> None:
        return None

    def result(self) -> dict[str, Tensor]:
        return pack_layers(_map())


def test_a_map_of_layers_that_are_not_there_makes_error_rows_not_robustness(images: Path, tmp_path: Path) -> None:
    config = audit_config(images, attacks=["boasts"], **{**SETTINGS, "eps": "16/255"})
    done = audit(config, tmp_path / "out", attack(Boasts, access="encoder", fits=True))
    cell = done.cell("boasts")
    assert (done.report.status, cell.n_errors) == ("error", cell.n)
    said = {row["error"] for row in done.of(cell)}
    assert said == {
        "what boasts learned cannot be used: the layer map names 'blocks.0', which is no layer of this encoder"
    }

"""A finished run is shown again only for the very victim it measured."""

from pathlib import Path

import pytest
import torch

from project import TINY, audit_config, registry, save_image, write_images
from robustbench_x.engine import run_audit
from robustbench_x.engine.stage import StageAtWork
from robustbench_x.errors import RunError
from robustbench_x.findings import finding
from robustbench_x.result import Finding


def test_a_finished_run_is_read_again_when_nothing_changed(images: Path, tmp_path: Path) -> None:
    config = audit_config(images, samples=8)
    first = run_audit(config, tmp_path / "out", registry=registry())
    again = run_audit(config, tmp_path / "out", registry=registry())
    assert again == first


def test_a_finished_run_is_never_served_for_another_model(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import project

    config = audit_config(images, encoder=TINY, samples=8)
    run_audit(config, tmp_path / "out", registry=registry())
    monkeypatch.setattr(project, "tiny", project.other)
    with pytest.raises(RunError, match="changed since this audit was finished; name another --out"):
        run_audit(config, tmp_path / "out", registry=registry())
    fresh = run_audit(config, tmp_path / "out", registry=registry(), resume=False)
    assert fresh.status == "complete"


def test_nor_for_changed_code_with_the_same_weights(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import project

    config = audit_config(images, encoder=TINY, samples=8)
    run_audit(config, tmp_path / "out", registry=registry())
    forward = project.TinyNet.forward
    monkeypatch.setattr(project.TinyNet, "forward", lambda self, x: torch.sin(5 * forward(self, x)))
    with pytest.raises(RunError, match="changed since this audit was finished"):
        run_audit(config, tmp_path / "out", registry=registry())


def test_nor_for_other_images(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    config = audit_config(images)
    run_audit(config, tmp_path / "out", registry=registry())
    save_image(images / "test" / "ant" / "00.png", torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(RunError, match=r"or the images of .* changed since"):
        run_audit(config, tmp_path / "out", registry=registry())


@pytest.mark.parametrize("head", ["linear", "mlp", "knn", "prototype"])
def test_every_head_fitted_for_the_first_time_gives_verdicts(head: str, tmp_path: Path) -> None:
    """The very first fit leaves no gradient behind that an attack would be accused of."""
    images = write_images(tmp_path / "images", seed=len(head) + ord(head[0]))
    report = run_audit(audit_config(images, head=head, eps="16/255"), tmp_path / "out", registry=registry())
    assert report.status == "complete"
    (pgd,) = [cell for cell in report.cells if cell.attack == "pgd"]
    assert pgd.metrics["asr"].value == 1.0, f"{head} hides its gradient"
    assert not [f for f in report.findings if f.level == "error"]


def test_a_finished_run_is_attacked_again_once_that_is_asked_for(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def strict(stage: StageAtWork, *others: object) -> list[Finding]:
        calls.append(stage.stage.encoder)
        cells = tuple(cell.id for craft in stage.stage.crafts for cell in craft.cells)
        return [finding("black_box_wins", "planted", "the victim", figure=0.5).model_copy(update={"applies_to": cells})]

    monkeypatch.setattr("robustbench_x.engine.run.strict_findings", strict)
    quick = audit_config(images, encoder=TINY, samples=6)
    thorough = quick.model_copy(update={"checks": "all"})
    first = run_audit(quick, tmp_path / "out")
    assert not calls
    second = run_audit(thorough, tmp_path / "out")
    assert len(calls) == 1
    assert [f.id for f in second.findings if f not in first.findings] == ["black_box_wins"]
    assert all("black_box_wins" in {flag.id for flag in cell.flags} for cell in second.cells)
    assert [cell.metrics for cell in second.cells] == [cell.metrics for cell in first.cells]
    for again in (thorough, quick):
        assert run_audit(again, tmp_path / "out") == second
    assert len(calls) == 1

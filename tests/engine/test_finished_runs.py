"""A finished run is shown again only for the very victim it measured."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from project import TINY, audit_config, defense, registry, save_image, write_images
from robustbench_x.config import load_config
from robustbench_x.engine import run_audit
from robustbench_x.engine.finish import write_texts
from robustbench_x.engine.proof import same_proof
from robustbench_x.engine.stage import StageAtWork
from robustbench_x.errors import RunError
from robustbench_x.findings import finding
from robustbench_x.result import Decision, Finding, read_report


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
    with pytest.raises(RunError, match=r"or the images or captions of .* changed since"):
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


def test_a_run_that_was_attacked_again_is_judged_anew_and_says_so_in_every_file(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strict(stage: StageAtWork, *others: object) -> list[Finding]:
        return [finding("black_box_wins", "planted doubt", "the victim", figure=0.5)]

    monkeypatch.setattr("robustbench_x.engine.run.strict_findings", strict)
    quick, out = audit_config(images, encoder=TINY, samples=6), tmp_path / "out"
    first = run_audit(quick, out)
    assert "planted doubt" not in (out / "report.md").read_text(encoding="utf-8")
    assert load_config(out / "audit.toml") == quick
    # As rbx audit leaves it: judged, and found good.
    decision = Decision(exit_code=0, answer="yes", reason="all of 1 gate held")
    write_texts(first.model_copy(update={"decision": decision}), out)
    assert "all of 1 gate held" in (out / "report.md").read_text(encoding="utf-8")
    thorough = quick.model_copy(update={"checks": "all"})
    second = run_audit(thorough, out)
    assert (second.decision, second.gates, read_report(out)) == (None, (), second)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "planted doubt" in text
    assert "all of 1 gate held" not in text
    assert load_config(out / "audit.toml") == thorough


# -- a defence whose code changed


@dataclass(frozen=True, kw_only=True)
class Dims:
    """A defence that halves the contrast."""

    def apply(self, images: Tensor) -> Tensor:
        return 0.25 + 0.5 * images

    def stand_in(self, images: Tensor) -> Tensor:
        return images


@dataclass(frozen=True, kw_only=True)
class Grains:
    """A random defence."""

    def apply(self, images: Tensor) -> Tensor:
        return (images + 0.05 * torch.randn_like(images)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class NumpyGrains:
    """A random defence that draws from numpy."""

    def apply(self, images: Tensor) -> Tensor:
        noise = torch.from_numpy(np.random.standard_normal(images.shape)).float()  # what a plugin may well do
        return (images + 0.05 * noise).clamp(0, 1)


Method = Callable[[object, Tensor], Tensor]
CHANGES: dict[str, tuple[type, dict[str, object], str, Method]] = {
    "code": (Dims, {}, "apply", lambda self, x: 0.2 + 0.6 * x),
    "a little code": (Dims, {}, "apply", lambda self, x: 0.26 + 0.48 * x),
    "looks": (Dims, {}, "apply", lambda self, x: torch.stack([x, x.flip(3)], dim=1)),
    "nothing any more": (Dims, {}, "apply", lambda self, x: x),
    "a stand-in": (Dims, {"gradient": "stand-in"}, "stand_in", lambda self, x: 0.25 + 0.5 * x),
    "random": (Grains, {"stochastic": True}, "apply", lambda self, x: (x + 0.06 * torch.randn_like(x)).clamp(0, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
def test_nor_for_a_defence_whose_code_changed(
    change: str, finished: bool, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory, spec, method, changed = CHANGES[change]
    plugins = registry(defense(factory, **spec))
    shields = [factory.__name__.lower()]
    config = audit_config(images, attacks=["noise"], defenses=shields, samples=4, judge_draws=1)
    with monkeypatch.context() as patched:
        if not finished:

            def cut(*args: object) -> None:
                raise KeyboardInterrupt("pulled the plug")

            patched.setattr("robustbench_x.engine.run.finish", cut)
            with pytest.raises(KeyboardInterrupt, match="pulled the plug"):
                run_audit(config, tmp_path / "out", registry=plugins)
        else:
            run_audit(config, tmp_path / "out", registry=plugins)
    with monkeypatch.context() as patched:
        patched.setattr(factory, method, changed)
        with pytest.raises(RunError, match=r"or defenses of .* changed since this audit was"):
            run_audit(config, tmp_path / "out", registry=plugins)
    assert run_audit(config, tmp_path / "out", registry=plugins).status == "complete", "it is as it was"


@pytest.mark.parametrize("factory", [Grains, NumpyGrains])
def test_a_random_defence_that_is_as_it_was_is_no_other(factory: type, images: Path, tmp_path: Path) -> None:
    plugins = registry(defense(factory, stochastic=True))
    config = audit_config(images, attacks=["noise"], defenses=[factory.__name__.lower()], samples=4)
    first = run_audit(config, tmp_path / "out", registry=plugins)
    torch.manual_seed(1)
    assert run_audit(config, tmp_path / "out", registry=plugins) == first


def test_proofs_of_defences_hold_within_rounding_and_across_devices(images: Path, tmp_path: Path) -> None:
    plugins = registry(defense(Grains, stochastic=True), defense(Dims))
    config = audit_config(images, attacks=["noise"], defenses=["grains", "dims"], samples=4)
    (proof,) = run_audit(config, tmp_path / "out", registry=plugins).proofs
    assert proof.shields is not None
    assert {title: set(answers) for title, answers in proof.shields.items()} == {
        "grains": {"pixels", "features"},
        "dims": {"pixels", "features"},
    }
    assert proof.drawn == {"grains": "cpu"}

    def moved(title: str, by: float) -> dict[str, dict[str, tuple[float, ...]]]:
        assert proof.shields is not None
        mine = {name: tuple(by * v for v in values) for name, values in proof.shields[title].items()}
        return proof.shields | {title: mine}

    for title in proof.shields:
        assert same_proof(proof, proof.model_copy(update={"shields": moved(title, 1.001)}))
        assert not same_proof(proof, proof.model_copy(update={"shields": moved(title, 1.05)}))
    # Another kind of device draws otherwise; what draws nothing answers alike there.
    elsewhere = {"drawn": {"grains": "cuda"}}
    assert same_proof(proof, proof.model_copy(update={"shields": moved("grains", 3), **elsewhere}))
    assert not same_proof(proof, proof.model_copy(update={"shields": moved("dims", 3), **elsewhere}))
    assert not same_proof(proof, proof.model_copy(update={"drawn": {}})), "it was random"
    assert not same_proof(proof, proof.model_copy(update={"shields": {}}))
    assert same_proof(proof.model_copy(update={"shields": None}), proof), "a run from before defences were asked"

"""Audits of whole vision-language models as heads: matching, entailment and captioning by a reader that is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from project import CLASSES, SIDE, Audited, attack, audit, defense, patterns, value
from reading import READS, write_captions
from robustbench_x.config import AuditConfig
from robustbench_x.encoders.encoder import Preprocessing
from robustbench_x.errors import ConfigError, SourceError
from robustbench_x.heads import build
from robustbench_x.imagetext.captions import cider
from robustbench_x.imagetext.metrics import Pairing, Spoken
from robustbench_x.imagetext.reader import LoadedReader, Skills
from robustbench_x.plugin import DefenseSpec
from robustbench_x.views import EncoderView


@dataclass(frozen=True, kw_only=True)
class Become:
    """Every image becomes its target."""

    def run(self, view: EncoderView) -> Tensor:
        assert view.targets is not None
        return view.targets


BECOME = attack(Become, access="encoder", goal="targeted", aims=True)


def _held(images: Tensor) -> Tensor:
    """How much of each class's pattern is in `images`, `(N, 4)`."""
    return (images - 0.5).flatten(1) @ patterns().flatten(1).T / (3 * SIDE * SIDE)


def _named(text: str) -> int:
    return next(i for i, name in enumerate(CLASSES) if name in text)


def _match(images: Tensor, texts: Sequence[str]) -> Tensor:
    return _held(images)[:, [_named(text) for text in texts]]


def _caption(images: Tensor) -> list[str]:
    return [f"there is a {CLASSES[i]} in it" for i in _held(images).argmax(dim=1).tolist()]


def _answer(images: Tensor, questions: Sequence[str], choices: Sequence[str]) -> Tensor:
    assert tuple(choices) == ("yes", "no", "maybe")
    own = torch.stack([row[_named(q)] for row, q in zip(_held(images), questions, strict=True)])
    return torch.stack([100 * (own - 0.02), torch.zeros_like(own), torch.full_like(own, -50.0)], dim=1)


def _reader(source: str, *, skills: Skills | None = None, allow_pickle: bool = False) -> LoadedReader:
    return LoadedReader(
        source=source,
        model=torch.nn.Linear(2, 2),
        skills=skills or Skills(match=_match, caption=_caption, answer=_answer),
        preprocessing=Preprocessing(input_size=(SIDE, SIDE)),
        sha256="reader",
    )


@pytest.fixture(autouse=True)
def _readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load_reader", _reader)


def _data(folder: Path) -> str:
    captions = {f"{name}_0": (f"a {name}", f"there is one {name} in it") for name in CLASSES}
    return f"captions:{write_captions(folder, captions)}"


def _run(
    folder: Path,
    head: str | Sequence[str],
    attacks: Sequence[str | Mapping[str, Any]] = ("become",),
    planted: DefenseSpec | None = None,
    **settings: Any,
) -> Audited:
    values = {
        "target": [{"encoder": READS, "head": head, "data": _data(folder)}],
        "attack": [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in attacks],
        "eps": 1.0,
        "device": "cpu",
        **settings,
    }
    return audit(AuditConfig.model_validate(values), folder / "out", BECOME, *([] if planted is None else [planted]))


def test_a_matching_model_is_told_from_its_texts(tmp_path: Path) -> None:
    cell = _run(tmp_path, "match:hf:some/model").cell("become")
    assert cell.task == "image_text"
    assert value(cell, "clean_accuracy") == value(cell, "targeted_success") == value(cell, "asr") == 1.0
    assert value(cell, "clean_tr@1") == value(cell, "target_tr@1") == value(cell, "target_ir@1") == 1.0
    assert value(cell, "tr@1") == 0.0


def test_a_matching_model_is_attacked_through_its_gradient(tmp_path: Path) -> None:
    pgd = [{"name": "pgd", "steps": 5}]
    cell = _run(tmp_path, "match:hf:some/model", pgd, eps=0.2).cell("pgd")
    assert value(cell, "asr") == 1.0


def test_what_a_model_says_is_scored_against_own_and_target_captions(tmp_path: Path) -> None:
    audited = _run(tmp_path, "caption:hf:some/model")
    cell = audited.cell("become")
    assert cell.task == "captioning"
    assert value(cell, "targeted_success") == value(cell, "clean_accuracy") == 1.0
    rows = audited.of(cell)
    assert all(row["clean_text"] == f"there is a {row['sample'].split('_')[0]} in it" for row in rows)
    own = {row["sample"]: row["own_texts"] for row in rows}
    for row in rows:
        aimed = CLASSES[row["target"]]
        assert row["adv_text"] == f"there is a {aimed} in it"
        assert row["target_texts"] == own[f"{aimed}_0.png"]
    clean = cider([row["clean_text"] for row in rows], [row["own_texts"] for row in rows]).corpus
    hit = cider([row["adv_text"] for row in rows], [row["target_texts"] for row in rows]).corpus
    assert value(cell, "clean_cider") == pytest.approx(clean)
    assert value(cell, "target_cider") == pytest.approx(hit)
    assert value(cell, "cider") < clean
    assert value(cell, "target_rouge_l") == pytest.approx(value(cell, "clean_rouge_l"))
    assert value(audited.cell("noise"), "target_cider") < value(cell, "target_cider")
    assert all(cell.metrics["feature_cosine"].value is None for cell in audited.report.cells)


def test_a_captioner_without_gradient_is_never_robust_by_that(tmp_path: Path) -> None:
    audited = _run(tmp_path, "caption:hf:some/model", [{"name": "pgd", "steps": 2}])
    cell = audited.cell("pgd")
    assert cell.n_errors == cell.n
    assert audited.report.status != "complete"
    assert all(cell.metrics[name].value is None for name in ("cider", "bleu4", "rouge_l"))


def test_checks_by_gradient_do_not_run_on_a_captioner(tmp_path: Path) -> None:
    attacks: list[str | Mapping[str, Any]] = ["become", {"name": "pgd", "steps": 2}]
    (tmp_path / "match").mkdir()
    found = _run(tmp_path, "caption:hf:some/model", attacks, checks="all", eps=0.01).report.findings
    assert "strict_check_failed" not in {f.id for f in found}
    (told,) = [f for f in found if f.id == "check_not_run" and "the head passes no gradient" in f.message]
    assert told.level == "note"
    by_gradient = "unstable_loss, unbounded_fails, more_iterations_break, more_restarts_break, single_step_wins"
    assert told.message.startswith(f"{by_gradient}: ")
    found = _run(tmp_path / "match", "match:hf:some/model", attacks, checks="all", eps=0.01).report.findings
    assert not [f for f in found if "no gradient" in f.message]


def test_a_model_that_is_asked_says_yes_to_the_target(tmp_path: Path) -> None:
    cell = _run(tmp_path, "entail:hf:some/model").cell("become")
    assert cell.task == "entailment"
    assert value(cell, "clean_entailed") == value(cell, "target_entailed") == 1.0
    assert value(cell, "entailed") == value(cell, "clean_entailed_other") == 0.0


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Two looks at every image."""

    def apply(self, images: Tensor) -> Tensor:
        return torch.stack([images, images.flip(3)], dim=1)


@dataclass(frozen=True, kw_only=True)
class Holes:
    """NaN where the first row of pixels is darker than the last."""

    def apply(self, images: Tensor) -> Tensor:
        dark = images[:, :, 0].mean(dim=(1, 2)) < images[:, :, -1].mean(dim=(1, 2))
        return torch.where(dark[:, None, None, None], torch.nan, images)


@pytest.mark.parametrize("kind", ["match", "caption", "entail"])
def test_no_whole_model_sees_the_mean_of_several_looks(tmp_path: Path, kind: str) -> None:
    audited = _run(tmp_path, f"{kind}:hf:some/model", defense=[{"name": "looks"}], planted=defense(Looks))
    rows = audited.of(audited.cell("become", defense="looks", knowledge="oblivious"))
    assert all("2 looks at an image" in row["error"] for row in rows)


@pytest.mark.parametrize("kind", ["match", "caption", "entail"])
def test_a_broken_image_costs_its_row_alone(tmp_path: Path, kind: str) -> None:
    audited = _run(tmp_path, f"{kind}:hf:some/model", defense=[{"name": "holes"}], planted=defense(Holes))
    rows = audited.of(audited.cell("become", defense="holes", knowledge="oblivious"))
    assert {row["error"] is not None for row in rows} == {True, False}


def test_a_model_that_fails_costs_its_own_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fails(images: Tensor, texts: Sequence[str]) -> Tensor:
        calls.append(len(images))
        if len(calls) > 3:
            raise RuntimeError("the tokenizer fell over")
        return _match(images, texts)

    monkeypatch.setattr(build, "load_reader", lambda source, **_: _reader(source, skills=Skills(match=fails)))
    audited = _run(tmp_path, ["match:hf:some/model", "captions"])
    broken = audited.of(audited.cell("become", head="match:hf:some/model"))
    assert all("the tokenizer fell over" in row["error"] for row in broken)
    assert audited.cell("become", head="captions").n_errors == 0


def test_equal_scores_make_no_image_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Skills(match=lambda images, texts: torch.zeros(len(images), len(texts)) + 0 * images.sum())
    monkeypatch.setattr(build, "load_reader", lambda source, **_: _reader(source, skills=flat))
    cell = _run(tmp_path, "match:hf:some/model").cell("become")
    assert value(cell, "clean_accuracy") == value(cell, "clean_tr@1") == 0.0


def test_pickles_are_read_where_the_audit_allows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def load(source: str, *, allow_pickle: bool = False) -> LoadedReader:
        asked.append(allow_pickle)
        return _reader(source)

    monkeypatch.setattr(build, "load_reader", load)
    _run(tmp_path, "match:hf:some/model", allow_pickle=True)
    assert asked
    assert all(asked)


def test_asking_about_too_many_captions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustbench_x.heads.reader._MOST_QUESTIONS", 7)
    with pytest.raises(ConfigError, match="asked about each of 8 captions; draw fewer with --samples"):
        _run(tmp_path, "entail:hf:some/model")


@pytest.mark.parametrize(("kind", "skill"), [("match", "match"), ("entail", "answer"), ("caption", "caption")])
def test_a_model_is_not_asked_for_what_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, skill: str
) -> None:
    able = {"match": _match, "caption": _caption, "answer": _answer}
    able.pop(skill)
    monkeypatch.setattr(build, "load_reader", lambda source, **_: _reader(source, skills=Skills(**able)))  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=f"cannot {skill}; it can"):
        _run(tmp_path, f"{kind}:hf:some/model")


def test_reading_heads_need_a_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="caption:hf:ORG/NAME"):
        _run(tmp_path, "caption")


# -- metrics by hand


def test_recalls_by_hand() -> None:
    """Two images with two captions each; image 0 finds its caption second, image 1 first."""
    scores = np.array([[0.1, 0.4, 0.5, 0.0], [0.2, 0.3, 0.1, 0.9]])
    pairing = Pairing(clean=scores, adv=scores, group=np.array([0, 0, 1, 1]))
    found = pairing.metrics(np.array([0, 1]), np.array([-1, -1]), np.array([True, True]))
    assert found["tr@1"].value == 0.5
    assert found["tr@5"].value == 1.0
    # Captions 0 and 2 prefer the other image, captions 1 and 3 their own.
    assert found["ir@1"].value == 0.5
    assert found["ir@5"].value == 1.0
    assert found["r@mean"].value == pytest.approx((0.5 + 1 + 1 + 0.5 + 1 + 1) / 6)
    assert "target_tr@1" not in found


def test_a_tie_counts_against_the_right_caption() -> None:
    scores = np.array([[0.5, 0.5]])
    pairing = Pairing(clean=scores, adv=scores, group=np.array([0, 1]))
    assert pairing.metrics(np.array([0]), np.array([-1]), np.array([True]))["tr@1"].value == 0.0


def test_rows_that_were_not_judged_are_in_no_gallery() -> None:
    rows = np.empty(2, dtype=object)
    rows[:] = [[[0.1], [0.9]], None]
    pairing = Pairing.from_rows(rows, rows)
    assert pairing is not None
    found = pairing.metrics(np.array([1, 0]), np.array([0, -1]), np.array([True, False]))
    assert found["tr@1"].value == found["ir@1"].value == 1.0
    assert found["target_tr@1"].value == 0.0
    assert Pairing.from_rows(np.array([None, None]), np.array([None, None])) is None


def test_cider_of_a_single_image_is_not_measured() -> None:
    spoken = Spoken(clean=["a"], adv=["a"], own=[["a b"]], target=[None])
    found = spoken.metrics(np.array([True]))
    assert found["cider"].value is None
    assert found["rouge_l"].value is not None
    assert "target_cider" not in found

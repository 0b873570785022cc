"""Audits of tuned victims: who sees which encoder, what is crafted once, verdicts against plain torch, resume."""

import dataclasses
import gc
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import project
from project import (
    PGD,
    TINY,
    Audited,
    attack,
    audit,
    audit_config,
    defense,
    metrics_without_time,
    registry,
    rows_without_time,
)
from robustbench_x.config import AuditConfig
from robustbench_x.data.dataset import open_dataset
from robustbench_x.encoders.encoder import Encoder
from robustbench_x.encoders.source import load_encoder
from robustbench_x.engine import run_audit
from robustbench_x.engine.finish import _training_findings
from robustbench_x.engine.proof import same_proof
from robustbench_x.errors import MissingExtraError, RunError
from robustbench_x.heads.base import FittedHead
from robustbench_x.heads.build import build_head
from robustbench_x.heads.saved import save_head
from robustbench_x.plan import make_plan
from robustbench_x.report.markdown import render_markdown
from robustbench_x.result import HeadInfo, StageProof
from robustbench_x.victim import DefendedEncoder
from robustbench_x.views import EncoderView, QueryView, WhiteboxView

TUNED = ("lora", "full", "adapter")
HEADS = ("linear", *TUNED)
SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Blur:
    """Averages 2 x 2 pixels: an honest defence with an honest gradient."""

    def apply(self, images: Tensor) -> Tensor:
        pooled = F.avg_pool2d(images, 2)
        return pooled.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


BLUR = defense(Blur)


def _head(name: str, images: Path) -> tuple[FittedHead, Encoder]:
    """The head as the audit built it (from the cache it left), and the public encoder."""
    made = registry()
    loaded = load_encoder(TINY, made)
    dataset = open_dataset(f"folder:{images}", made, seed=0)
    head = build_head(
        name, loaded=loaded, dataset=dataset, registry=made, seed=0, device=torch.device("cpu"), batch_size=16
    )
    return head, loaded.encoder


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def _reachable(root: object) -> Iterator[object]:
    """Everything reachable from `root` through attributes, items and closures; classes and modules are not entered."""
    known, todo = set(), [root]
    while todo:
        thing = todo.pop()
        if id(thing) in known or isinstance(thing, (type, ModuleType, BuiltinFunctionType)):
            continue
        known.add(id(thing))
        yield thing
        if isinstance(thing, FunctionType):
            todo += [cell.cell_contents for cell in thing.__closure__ or ()]
        else:
            todo += gc.get_referents(thing)


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Any]]:
    """What the planted attacks of the audit below were handed and returned, by attack."""
    return {"feature": [], "gradient": [], "score": [], "reachable": []}


@pytest.fixture(scope="module")
def audited(images: Path, seen: dict[str, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """Four heads, an attack for each access level that sees a model, one defence, one batch."""

    @dataclass(frozen=True, kw_only=True)
    class Feature:
        """Three ascents away from the clean features, from a random start; sees the encoder."""

        def run(self, view: EncoderView) -> Tensor:
            clean = view.encoder.features(view.inputs).detach()
            point = view.threat.start(view.inputs, view.random)
            for _ in range(3):
                point = point.detach().requires_grad_(True)
                loss = (view.encoder.features(point) - clean).square().sum()
                (gradient,) = torch.autograd.grad(loss, point)
                point = view.threat.project(point.detach() + 0.01 * gradient.sign(), view.inputs)
            seen["feature"].append((view.encoder.sha256, clean, point, view.inputs))
            seen["reachable"] += [_digest(thing) for thing in _reachable(view) if isinstance(thing, Tensor)]
            return point

    @dataclass(frozen=True, kw_only=True)
    class Gradient:
        """One step against the true class; sees logits with gradients."""

        def run(self, view: WhiteboxView) -> Tensor:
            point = view.inputs.clone().requires_grad_(True)
            logits = view.model(point)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, view.labels, reduction="sum"), point)
            made = view.threat.project(view.inputs + view.threat.eps * gradient.sign(), view.inputs)
            seen["gradient"].append((logits.detach(), gradient, made, view.inputs))
            return made

    @dataclass(frozen=True, kw_only=True)
    class Score:
        """Asks for the scores of the clean images."""

        def run(self, view: QueryView) -> Tensor:
            seen["score"].append((view.query(view.inputs), view.inputs))
            return view.threat.noise(view.inputs, view.random)

    specs = (attack(Feature, access="encoder"), attack(Gradient), attack(Score, access="scores"))
    config = audit_config(
        images,
        head=HEADS,
        attacks=["feature", "gradient", "score"],
        defenses=["blur"],
        samples=SAMPLES,
        batch_size=SAMPLES,
        eps="6/255",
    )
    return audit(config, tmp_path_factory.mktemp("tuned") / "out", *specs, BLUR)


def test_every_cell_is_judged(audited: Audited) -> None:
    assert audited.report.status == "complete"
    assert {cell.head for cell in audited.report.cells} == set(HEADS)
    assert audited.ids("error") <= {"no_better_than_noise"}, "one-step attacks may be weak"


def test_an_attack_on_the_encoder_gets_the_public_one_and_crafts_once(
    audited: Audited, seen: dict[str, list[Any]], images: Path
) -> None:
    public = audited.report.encoders[0].sha256
    assert [sha256 for sha256, *_ in seen["feature"]] == [public] * 3, "blind, bpda, full: once for all four heads"
    _, encoder = _head("linear", images)
    _, clean, _, inputs = seen["feature"][0]
    with torch.no_grad():
        assert torch.equal(clean, encoder(inputs))
    for head in TUNED:
        tuned, _ = _head(head, images)
        assert tuned.encoder is not None
        with torch.no_grad():
            assert not torch.allclose(clean, tuned.encoder(inputs), atol=1e-5)


def test_no_tuned_weight_is_within_reach_of_an_attack_on_the_encoder(
    seen: dict[str, list[Any]], audited: Audited, images: Path
) -> None:
    reachable = set(seen["reachable"])
    _, public = _head("linear", images)
    assert {_digest(weight) for weight in public.parameters()} <= reachable, "the walk finds what is there"
    for name in TUNED:
        head, _ = _head(name, images)
        assert head.encoder is not None
        secrets = [head.encoder.backbone.state_dict()[changed] for changed in head.changed]
        assert len(secrets) == head.settings["changed_tensors"] > 0
        assert not {_digest(secret) for secret in (*secrets, *head.layer.parameters())} & reachable


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_verdicts_are_those_of_plain_torch_on_the_head_s_own_encoder(
    name: str, audited: Audited, seen: dict[str, list[Any]], images: Path
) -> None:
    head, public = _head(name, images)
    body = head.encoder or public
    _, _, made, inputs = seen["feature"][0]
    for blurred in (False, True):
        cell = audited.cell(
            "feature", head=name, defense="blur" if blurred else "none", knowledge="oblivious" if blurred else None
        )
        rows = audited.of(cell)
        labels = torch.tensor([row["label"] for row in rows])

        def features(batch: Tensor, encoder: Encoder, blurred: bool = blurred) -> Tensor:
            answer: Tensor = encoder(Blur().apply(batch) if blurred else batch)
            return answer

        clean, adversarial = features(inputs, body), features(made, body)
        logits = head.layer(adversarial)
        others = logits.clone().scatter_(1, labels[:, None], -torch.inf).amax(dim=1)
        margin = logits.gather(1, labels[:, None]).squeeze(1) - others
        assert [row["clean_pred"] for row in rows] == head.layer(clean).argmax(dim=1).tolist()
        assert [row["adv_pred"] for row in rows] == logits.argmax(dim=1).tolist()
        assert [row["margin"] for row in rows] == pytest.approx(margin.tolist(), rel=1e-4, abs=1e-4)
        cosine = F.cosine_similarity(adversarial, clean).tolist()
        assert [row["feature_cosine"] for row in rows] == pytest.approx(cosine, abs=1e-5)
        if head.encoder is not None:  # the control: the public encoder under this head gives other figures
            wrong = head.layer(features(made, public)).gather(1, labels[:, None]).squeeze(1) - others
            assert (wrong - margin).abs().max() > 1e-3
            other = F.cosine_similarity(features(made, public), features(inputs, public))
            assert (other - torch.tensor(cosine)).abs().max() > 1e-4


def _order(head: str) -> int:
    """Where the crafts of a head come in the plan: undefended, bpda, full for each head in turn."""
    return 3 * HEADS.index(head)


@pytest.mark.parametrize("name", HEADS)
def test_a_white_box_attack_s_gradients_run_through_the_tuned_encoder(
    name: str, audited: Audited, seen: dict[str, list[Any]], images: Path
) -> None:
    assert len(seen["gradient"]) == 3 * len(HEADS)
    head, public = _head(name, images)
    logits, gradient, made, inputs = seen["gradient"][_order(name)]
    rows = audited.of(audited.cell("gradient", head=name))
    labels = torch.tensor([row["label"] for row in rows])

    def by_hand(encoder: Encoder) -> tuple[Tensor, Tensor]:
        point = inputs.clone().requires_grad_(True)
        answer = head.layer(encoder(point))
        return answer.detach(), torch.autograd.grad(F.cross_entropy(answer, labels, reduction="sum"), point)[0]

    expected = by_hand(head.encoder or public)
    torch.testing.assert_close((logits, gradient), expected, rtol=1e-4, atol=1e-6)
    if head.encoder is not None:  # the control: through the public encoder it would be another gradient
        wrong = by_hand(public)[1]
        assert (wrong - gradient).norm() > 0.01 * gradient.norm()
    with torch.no_grad():
        verdict = head.layer((head.encoder or public)(made)).argmax(dim=1).tolist()
    assert [row["adv_pred"] for row in rows] == verdict


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_a_query_attack_asks_the_tuned_victim(
    name: str, audited: Audited, seen: dict[str, list[Any]], images: Path
) -> None:
    head, public = _head(name, images)
    undefended, deployed = seen["score"][2 * HEADS.index(name) : 2 * HEADS.index(name) + 2]
    for (scores, inputs), prepare in ((undefended, lambda batch: batch), (deployed, Blur().apply)):
        expected = head.layer((head.encoder or public)(prepare(inputs)))
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        if head.encoder is not None:
            assert (head.layer(public(prepare(inputs))) - scores).abs().max() > 1e-3


def test_the_report_says_how_each_victim_was_tuned(audited: Audited, tmp_path: Path) -> None:
    infos = {info.head: info for info in audited.report.heads}
    assert set(infos) == set(HEADS)
    public = audited.report.encoders[0].sha256
    for name in TUNED:
        made = infos[name].settings
        assert (made["scheme"], made["encoder_sha256"]) == (name, public)
        assert made["tuned_sha256"] != public
        assert made["epochs_run"] >= made["best_epoch"] >= 1
        assert {"probe_held_out_accuracy", "held_out_accuracy", "train_accuracy", "feature_cosine", "seconds"} < set(
            made
        )
    assert len({infos[name].settings["tuned_sha256"] for name in TUNED}) == 3
    json.dumps(audited.report.model_dump(mode="json"), allow_nan=False)
    text = render_markdown(audited.report, audited.decide())
    assert all(f"{name} head" in text for name in HEADS)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_the_proof_holds_what_the_tuned_victim_answers(name: str, audited: Audited, images: Path) -> None:
    (proof,) = audited.report.proofs
    head, public = _head(name, images)
    fixed = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    directions = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    expected = (head.layer((head.encoder or public)(fixed)) @ directions).flatten()
    assert proof.answers[name] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-4)


def test_public_heads_share_a_reading_and_every_tuned_one_has_its_own(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Tensor] = []

    class Watched(project.TinyNet):
        def forward(self, images: Tensor) -> Tensor:
            passes.append(images.detach())
            return super().forward(images)

    monkeypatch.setattr(project, "tiny", Watched)
    heads = ["linear", "prototype", "full", "adapter"]
    config = audit_config(images, head=heads, attacks=[PGD], samples=12, batch_size=12)
    audit(config, tmp_path / "out")
    clean = next(p for p in passes if len(p) == 12)
    assert sum(p.shape == clean.shape and torch.equal(p, clean) for p in passes) == 3


def test_a_deployed_encoder_refuses_a_head_that_reads_another(images: Path) -> None:
    head, public = _head("full", images)
    with pytest.raises(AssertionError, match="head full reads an encoder of its own"):
        DefendedEncoder(encoder=public).logits(torch.rand(1, 3, 32, 32), head)


@dataclass
class _Told:
    """Collects what is told, and interrupts the run after so many batches."""

    tasks: list[str]
    lines: list[str]
    after: int = 10**6

    def begin(self, total: int, done: int) -> None:
        """Ignored."""

    def task(self, text: str) -> None:
        """Kept."""
        self.tasks.append(text)

    def say(self, text: str) -> None:
        """Kept."""
        self.lines.append(text)

    def advance(self, units: int) -> None:
        """Counts."""
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt("stop here")


def _config(images: Path, **settings: Any) -> AuditConfig:
    heads = ["linear", "full", "adapter"]
    return audit_config(
        images, head=heads, attacks=[PGD, {"name": "embed", "steps": 3}], samples=16, batch_size=8, **settings
    )


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """The audit, never interrupted."""
    return audit(_config(images), tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize("keep_cache", [True, False])
def test_an_interrupted_audit_goes_on_with_the_same_victims(
    keep_cache: bool, images: Path, tmp_path: Path, whole: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))
    first = _Told([], [], after=7)
    with pytest.raises(KeyboardInterrupt, match="stop here"):
        run_audit(_config(images), tmp_path / "out", registry=registry(), progress=first)
    assert any("head full on" in text and "epoch 1 of" in text for text in first.tasks)
    assert sum("feature cosine to the public encoder" in line for line in first.lines) == 2
    if not keep_cache:
        shutil.rmtree(tmp_path / "cache")
    second = _Told([], [])
    again = audit(_config(images), tmp_path / "out", progress=second)
    assert any("epoch" in text for text in second.tasks) != keep_cache
    assert rows_without_time(again.rows) == rows_without_time(whole.rows)
    assert metrics_without_time(again.report) == metrics_without_time(whole.report)


def test_a_finished_audit_is_served_only_for_the_victims_it_was_of(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))
    head, _ = _head("full", images)
    path = tmp_path / "head.safetensors"
    save_head(head, path)
    config = audit_config(images, head=f"file:{path}", samples=8)
    first = audit(config, tmp_path / "out")
    assert first.report.heads[0].settings["tuned_sha256"] == head.settings["tuned_sha256"]
    assert audit(config, tmp_path / "out").report == first.report
    made = registry()
    dataset = open_dataset(f"folder:{images}", made, seed=0)
    turned = tuple(dataclasses.replace(item, label=(item.label + 1) % 4) for item in dataset.train)
    other = build_head(
        "full",
        loaded=load_encoder(TINY, made),
        dataset=dataclasses.replace(dataset, train=turned),
        registry=made,
        seed=0,
        device=torch.device("cpu"),
        batch_size=16,
    )
    save_head(other, path)
    with pytest.raises(RunError, match=r"the weights, code, heads or defenses of python:project:tiny.*changed"):
        audit(config, tmp_path / "out")


def test_what_a_tuned_head_needs_is_said_before_anything_is_loaded(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match="head lora needs the package peft"):
        make_plan(audit_config(images, head=["linear", "lora"]), registry())
    make_plan(audit_config(images, head=["linear", "full", "adapter"]), registry())


def test_a_victim_that_was_tuned_again_is_another_one_even_where_it_answers_alike() -> None:
    values: dict[str, Any] = {
        "encoder": "e",
        "data": "d",
        "sha256": "0",
        "images": "1",
        "answers": {"lora": (1.0, 2.0)},
    }
    stored = StageProof(**values, tuned={"lora": "a" * 64})
    assert same_proof(stored, StageProof(**values, tuned={"lora": "a" * 64}))
    assert not same_proof(stored, StageProof(**values, tuned={"lora": "b" * 64}))
    assert not same_proof(StageProof(**values), stored)


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({}, []),
        ({"feature_cosine": 0.999}, ["barely_tuned"]),
        ({"held_out_loss": 0.3}, ["tuned_below_probe"]),
    ],
)
def test_a_victim_that_tuning_hardly_changed_or_made_worse_is_doubted(changes: dict[str, Any], ids: list[str]) -> None:
    settings = {
        "tuned_sha256": "0",
        "feature_cosine": 0.9,
        "held_out_loss": 0.1,
        "probe_held_out_loss": 0.2,
        "held_out_accuracy": 0.9,
        "probe_held_out_accuracy": 0.8,
        **changes,
    }
    head = HeadInfo(encoder="e", data="d", head="lora", num_classes=3, settings=settings)
    assert [f.id for f in _training_findings([head])] == ids
    assert _training_findings([head.model_copy(update={"settings": {}})]) == []

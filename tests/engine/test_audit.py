"""What every audit keeps: controls, sharing of images and features, batch size, shards, memory, unreadable files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import project
from project import (
    NATIVE,
    PGD,
    TINY,
    Audited,
    attack,
    audit,
    audit_config,
    corrupt_jpeg,
    defense,
    metrics_without_time,
    rows_without_time,
    value,
    write_images,
)
from robustbench_x.encoders.encoder import Encoder
from robustbench_x.encoders.source import load_encoder
from robustbench_x.errors import NothingEvaluatedError
from robustbench_x.plugin import DefenseSpec
from robustbench_x.views import EncoderView, QueryView, View, WhiteboxView


@dataclass(frozen=True, kw_only=True)
class Blur:
    """Averages 2 x 2 pixels: an honest defence with an honest gradient."""

    def apply(self, images: Tensor) -> Tensor:
        pooled = torch.nn.functional.avg_pool2d(images, 2)
        return pooled.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Rounds to few levels; the stand-in is the identity."""

    def apply(self, images: Tensor) -> Tensor:
        return (images.detach() * 60).round() / 60

    def stand_in(self, images: Tensor) -> Tensor:
        return images


BLUR = defense(Blur)
LEVELS: DefenseSpec = defense(Levels, gradient="stand-in")


def test_an_honest_audit_raises_no_doubt(images: Path, tmp_path: Path) -> None:
    attacks = [PGD, {"name": "mifgsm", "steps": 5}, {"name": "apgd_ce", "steps": 8}, {"name": "apgd_t", "steps": 5}]
    config = audit_config(images, attacks=[*attacks, {"name": "embed", "steps": 5}], defenses=["blur", "levels"])
    audited = audit(config, tmp_path / "out", BLUR, LEVELS)
    assert audited.report.status == "complete"
    assert [f for f in audited.report.findings if f.level == "error"] == []
    undefended = [f for f in audited.report.findings if f.cell and "| none |" in f.cell and f.level != "note"]
    assert undefended == []
    assert value(audited.cell("pgd"), "asr") > 0.9
    assert audited.decide(strict=True).exit_code == audited.lenient_gate().exit_code == 0


@pytest.mark.parametrize(("norm", "eps"), [("linf", 4 / 255), ("linf", 1 / 255), ("l2", 0.5), ("patch", 0.1)])
@pytest.mark.parametrize(("encoder", "head"), [(TINY, "linear"), (TINY, "knn"), (NATIVE, "native")])
def test_no_honest_victim_is_doubted_at_any_budget(
    images: Path, tmp_path: Path, encoder: str, head: str, norm: str, eps: float
) -> None:
    config = audit_config(images, encoder=encoder, head=head, norm=norm, eps=eps, samples=32)
    audited = audit(config, tmp_path / "out")
    assert audited.ids("error", "warning") == set()
    assert audited.report.status == "complete"


def test_the_controls_always_run(images: Path, tmp_path: Path) -> None:
    audited = audit(audit_config(images, defenses=["blur"], eps=["2/255", "4/255"]), tmp_path / "out", BLUR)
    cells = Counter((c.defense, c.attack, c.knowledge) for c in audited.report.cells)
    assert cells == {
        ("none", "noise", "none"): 2,
        ("blur", "noise", "oblivious"): 2,
        ("none", "pgd", "none"): 2,
        ("blur", "pgd", "oblivious"): 2,
        ("blur", "pgd", "bpda"): 2,
        ("blur", "pgd", "full"): 2,
    }
    assert {c.attack for c in audited.report.cells if c.control} == {"noise"}


def test_images_are_made_once_and_judged_wherever_they_count(images: Path, tmp_path: Path) -> None:
    runs: list[str] = []

    @dataclass(frozen=True, kw_only=True)
    class Feature:
        """Counts its runs; sees the encoder."""

        def run(self, view: EncoderView) -> Tensor:
            runs.append("encoder")
            assert not hasattr(view, "labels")
            return view.threat.noise(view.inputs, view.random)

    @dataclass(frozen=True, kw_only=True)
    class Logit:
        """Counts its runs; sees the logits."""

        def run(self, view: WhiteboxView) -> Tensor:
            runs.append("whitebox")
            return view.threat.noise(view.inputs, view.random)

    @dataclass(frozen=True, kw_only=True)
    class Score:
        """Counts its runs; asks for scores."""

        def run(self, view: QueryView) -> Tensor:
            runs.append("scores")
            assert not view.query(view.inputs).requires_grad
            return view.threat.noise(view.inputs, view.random)

    specs = (attack(Feature, access="encoder"), attack(Logit), attack(Score, access="scores"))
    config = audit_config(
        images,
        head=["linear", "prototype", "knn"],
        attacks=["feature", "logit", "score"],
        defenses=["blur"],
        batch_size=40,
    )
    audited = audit(config, tmp_path / "out", *specs, BLUR)
    # One batch. Encoder access: blind, bpda, full. Logits: the same per head. Scores: undefended and deployed per head.
    assert Counter(runs) == {"encoder": 3, "whitebox": 9, "scores": 6}
    for head in ("linear", "prototype", "knn"):
        one = audited.of(audited.cell("feature", head=head))
        assert [r["linf"] for r in one] == [r["linf"] for r in audited.of(audited.cell("feature", head="linear"))]
        oblivious = audited.of(audited.cell("feature", defense="blur", knowledge="oblivious", head=head))
        assert [r["l2"] for r in one] == [r["l2"] for r in oblivious], "the very images made without the defence"
        assert audited.cell("score", defense="blur", head=head).knowledge == "full"
        assert audited.cell("noise", defense="blur", head=head).knowledge == "oblivious"


def test_clean_features_are_computed_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One encoder, one defence, one batch: the clean images go through once for all heads and attacks."""
    passes: list[Tensor] = []

    class Watched(project.TinyNet):
        def forward(self, images: Tensor) -> Tensor:
            passes.append(images.detach())
            return super().forward(images)

    monkeypatch.setattr(project, "tiny", Watched)
    attacks = [{**PGD, "label": f"pgd{i}"} for i in range(3)]
    config = audit_config(images, head=["linear", "knn"], attacks=attacks, defenses=["blur"], samples=12, batch_size=12)
    audit(config, tmp_path / "out", BLUR)
    clean = next(p for p in passes if len(p) == 12)
    assert sum(p.shape == clean.shape and torch.equal(p, clean) for p in passes) == 1


@pytest.mark.parametrize("spec", [BLUR, LEVELS], ids=["exact", "stand-in"])
def test_knowledge_decides_value_and_gradient(images: Path, tmp_path: Path, spec: DefenseSpec) -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    order: list[str] = []

    @dataclass(frozen=True, kw_only=True)
    class Looks:
        """Records logits and gradient at the clean images."""

        def run(self, view: WhiteboxView) -> Tensor:
            point = view.inputs.clone().requires_grad_(True)
            logits = view.model(point)
            (gradient,) = torch.autograd.grad(logits[:, 0].sum(), point)
            seen[("none", "bpda", "full")[len(order)]] = (logits.detach(), gradient)
            order.append("x")
            return view.threat.noise(view.inputs, view.random)

    config = audit_config(images, encoder=NATIVE, head="native", attacks=["looks"], defenses=[spec.name],
                          samples=8, batch_size=8)  # fmt: skip
    audited = audit(config, tmp_path / "out", attack(Looks), spec)
    assert [c.knowledge for c in audited.report.cells if c.attack == "looks"] == ["none", "oblivious", "bpda", "full"]
    assert torch.equal(seen["bpda"][0], seen["full"][0]), "both run the deployed defence forward"
    assert not torch.equal(seen["none"][0], seen["full"][0])
    # The classifier is linear: through the identity its gradient is its weight, through the blur its average.
    weight = seen["none"][1]
    assert torch.allclose(seen["bpda"][1], weight)
    expected = Blur().apply(weight) if spec is BLUR else weight
    assert torch.allclose(seen["full"][1], expected, atol=1e-6)


@pytest.mark.parametrize("attacks", [[PGD, {"name": "embed", "steps": 4}], [{"name": "apgd_ce", "steps": 6}]])
def test_the_batch_size_decides_nothing(images: Path, tmp_path: Path, attacks: list[dict[str, Any]]) -> None:
    keys = ("cell", "sample", "seed", "label", "clean_pred", "adv_pred", "adv8_pred", "error")

    def verdicts(batch_size: int) -> list[tuple[Any, ...]]:
        config = audit_config(images, attacks=attacks, defenses=["blur"], batch_size=batch_size, samples=24, eps=0.01)
        return [tuple(row[key] for key in keys) for row in audit(config, tmp_path / str(batch_size), BLUR).rows]

    assert verdicts(3) == verdicts(16)


def test_shards_make_up_the_whole(images: Path, tmp_path: Path) -> None:
    def run(name: str, **settings: Any) -> Audited:
        config = audit_config(images, attacks=[PGD, {"name": "embed", "steps": 4}], eps=0.01, **settings)
        return audit(config, tmp_path / name)

    def by_sample(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], tuple[Any, ...]]:
        keys = ("seed", "sha256", "label", "clean_pred", "adv_pred", "adv8_pred")
        return {(row["cell"], row["sample"]): tuple(row[key] for key in keys) for row in rows}

    whole, parts = run("whole"), [run(f"part{i}", shard=f"{i}/2") for i in (1, 2)]
    assert {len(part.rows) for part in parts} == {len(whole.rows) // 2}
    assert by_sample(parts[0].rows) | by_sample(parts[1].rows) == by_sample(whole.rows)


def test_an_empty_shard_is_nothing_evaluated(images: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingEvaluatedError, match="nothing to evaluate") as caught:
        audit(audit_config(images, samples=2, shard="3/3"), tmp_path / "out")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_short_memory_halves_the_batch(images: Path, tmp_path: Path, error: Exception) -> None:
    sizes: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Hungry:
        """Has room for two images."""

        def run(self, view: View) -> Tensor:
            sizes.append(len(view.inputs))
            if len(view.inputs) > 2:
                raise error
            return view.threat.noise(view.inputs, view.random)

    spec = attack(Hungry, access="none")
    audited = audit(audit_config(images, attacks=["hungry", PGD], samples=20), tmp_path / "out", spec)
    assert audited.report.status == "complete"
    assert sizes[:4] == [16, 8, 4, 2]
    assert set(sizes[3:]) == {2}
    plain = audit(audit_config(images, samples=20), tmp_path / "plain")
    assert [r["adv_pred"] for r in audited.of(audited.cell("pgd"))] == [
        r["adv_pred"] for r in plain.of(plain.cell("pgd"))
    ]


def test_no_memory_at_all_is_an_error_row_and_the_run_goes_on(images: Path, tmp_path: Path) -> None:
    sizes: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Starving:
        """Has room for nothing."""

        def run(self, view: View) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    @dataclass(frozen=True, kw_only=True)
    class After:
        """Runs later, and must not suffer."""

        def run(self, view: View) -> Tensor:
            sizes.append(len(view.inputs))
            return view.threat.noise(view.inputs, view.random)

    specs = [attack(Starving, access="none"), attack(After, access="none")]
    audited = audit(audit_config(images, attacks=["starving", "after", PGD]), tmp_path / "out", *specs)
    assert audited.cell("starving").n_errors == 40
    assert all("out of memory" in row["error"] for row in audited.of(audited.cell("starving")))
    assert audited.report.status == "error"
    assert audited.decide().exit_code == 3
    assert sizes == [16, 16, 8], "full batches again"
    assert value(audited.cell("pgd"), "asr") > 0.9


def test_one_image_that_does_not_fit_costs_one_row(images: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Picky:
        """Has no room for images with a bright corner."""

        def run(self, view: View) -> Tensor:
            if (view.inputs[:, 0, 0, 0] > 0.55).any():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return view.threat.noise(view.inputs, view.random)

    audited = audit(audit_config(images, attacks=["picky"]), tmp_path / "out", attack(Picky, access="none"))
    assert 0 < audited.cell("picky").n_errors < 40


def test_a_query_cap_counts_per_sample(images: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Asks:
        """Asks until it is told off."""

        def run(self, view: QueryView) -> Tensor:
            while view.query.remaining:
                view.query(view.inputs)
            return view.threat.noise(view.inputs, view.random)

    @dataclass(frozen=True, kw_only=True)
    class Greedy:
        """Asks once too often."""

        def run(self, view: QueryView) -> Tensor:
            for _ in range(4):
                view.query(view.inputs)
            return view.inputs

    specs = [attack(Asks, access="labels"), attack(Greedy, access="scores")]
    audited = audit(audit_config(images, attacks=["asks", "greedy"], query_cap=3), tmp_path / "out", *specs)
    assert value(audited.cell("asks"), "forwards_per_sample") == 3
    assert audited.cell("greedy").n_errors == 40
    assert all("query cap of" in row["error"] for row in audited.of(audited.cell("greedy")))


def test_an_unreadable_test_image_is_an_error_row_that_names_it(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    (images / "test" / "bee" / "99.jpg").write_bytes(corrupt_jpeg())
    audited = audit(audit_config(images, defenses=["blur"], head=["linear", "knn"]), tmp_path / "out", BLUR)
    for cell in audited.report.cells:
        assert (cell.n, cell.n_errors) == (41, 1)
        rows = audited.of(cell)
        assert [r["sample"] for r in rows if r["error"]] == ["test/bee/99.jpg"]
        assert all("99.jpg cannot be read as an image" in r["error"] for r in rows if r["error"])
    assert audited.report.status == "error"
    assert audited.decide().exit_code == audited.lenient_gate().exit_code == 3
    assert any("99.jpg" in message for message in audited.report.data[0].unreadable)
    without = audit(audit_config(write_images(tmp_path / "healthy")), tmp_path / "without")
    judged = [r["adv_pred"] for r in audited.of(audited.cell("noise", head="linear")) if not r["error"]]
    assert judged == [r["adv_pred"] for r in without.of(without.cell("noise"))]


def test_a_split_without_a_readable_image_is_all_errors(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", test=1)
    for file in images.glob("test/*/*.png"):
        file.write_bytes(b"not a picture")
    audited = audit(audit_config(images), tmp_path / "out")
    assert all(cell.n_errors == cell.n == 4 for cell in audited.report.cells)
    assert audited.decide().exit_code == 3


def test_an_unreadable_training_image_is_a_warning_that_names_it(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    (images / "train" / "bee" / "99.jpg").write_bytes(corrupt_jpeg())
    audited = audit(audit_config(images), tmp_path / "out")
    (doubt,) = [f for f in audited.report.findings if f.id == "unreadable_images"]
    assert doubt.level == "warning"
    assert "99.jpg" in doubt.message
    assert audited.report.status == "complete"


def test_attacks_under_bf16_are_judged_in_fp32(images: Path, tmp_path: Path) -> None:
    kept: list[tuple[Tensor, Tensor, torch.dtype]] = []

    @dataclass(frozen=True, kw_only=True)
    class Keeps:
        """One sign step, with what it saw."""

        def run(self, view: WhiteboxView) -> Tensor:
            start = view.inputs.clone().requires_grad_(True)
            logits = view.model(start)
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, view.labels), start)
            made = view.threat.project(view.inputs + view.threat.eps * gradient.sign(), view.inputs)
            kept.append((made, logits.detach(), logits.dtype))
            return made

    def run(precision: str) -> Audited:
        kept.clear()
        config = audit_config(images, encoder=NATIVE, head="native", attacks=["keeps"], precision=precision, eps=0.05)
        return audit(config, tmp_path / precision, attack(Keeps))

    full = run("fp32")
    exact = torch.cat([logits for _, logits, _ in kept])
    audited = run("bf16")
    rough = torch.cat([logits for _, logits, _ in kept])
    assert {dtype for *_, dtype in kept} == {torch.float32}
    assert not torch.equal(rough, exact), "the attack ran in less than fp32"
    assert torch.allclose(rough, exact, rtol=0.05, atol=0.05)
    made = torch.cat([images for images, *_ in kept])
    encoder: Encoder = load_encoder(NATIVE, project.registry()).encoder
    with torch.no_grad():
        logits = encoder(made)
    rows = audited.of(audited.cell("keeps"))
    assert [r["adv_pred"] for r in rows] == logits.argmax(dim=1).tolist()
    own = torch.tensor([r["label"] for r in rows])
    others = logits.scatter(1, own[:, None], -torch.inf).amax(dim=1)
    margin = logits.gather(1, own[:, None]).squeeze(1) - others
    assert [r["margin"] for r in rows] == pytest.approx(margin.tolist(), abs=1e-5)
    assert value(full.cell("noise"), "robust_accuracy") == value(audited.cell("noise"), "robust_accuracy")


def test_two_runs_of_one_audit_agree(images: Path, tmp_path: Path) -> None:
    config = audit_config(images, attacks=[PGD, {"name": "apgd_t", "steps": 4}], defenses=["levels"])
    one, two = (audit(config, tmp_path / name, LEVELS) for name in ("one", "two"))
    assert metrics_without_time(one.report) == metrics_without_time(two.report)
    assert rows_without_time(one.rows) == rows_without_time(two.rows)

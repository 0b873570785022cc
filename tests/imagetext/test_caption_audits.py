"""Audits of image-text encoders: zero-shot and caption heads, targets that the harness chooses, recalls from rows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from project import CLASSES, TINY, Audited, attack, audit, audit_config, metrics_without_time, registry, value
from reading import READS, write_captions
from robustbench_x.config import AuditConfig
from robustbench_x.data.dataset import open_dataset
from robustbench_x.encoders.encoder import Preprocessing
from robustbench_x.encoders.source import load_encoder
from robustbench_x.engine.targets import Targets
from robustbench_x.errors import DataError, RunError, SourceError, UsageError
from robustbench_x.merge import merge_runs
from robustbench_x.registry import Registry, load_registry
from robustbench_x.views import EncoderView


@dataclass(frozen=True, kw_only=True)
class Aim:
    """Moves every image toward its target as far as the budget allows: with enough of it, the image is the target."""

    def run(self, view: EncoderView) -> Tensor:
        assert view.targets is not None
        return view.inputs + (view.targets - view.inputs).clamp(-view.threat.eps, view.threat.eps)


AIM = attack(Aim, access="encoder", goal="targeted", aims=True)


def _captioned(folder: Path) -> Path:
    captions: dict[str, tuple[str, ...]] = {}
    for name in CLASSES:
        captions[f"{name}_0"] = (f"a {name}", f"one {name} here")
        captions[f"{name}_1"] = (f"a nice {name}", f"the {name} is nice")
    return write_captions(folder, captions)


def _config(source: str, **settings: Any) -> AuditConfig:
    values = {
        "target": [{"encoder": READS, "head": settings.pop("head", "captions"), "data": source}],
        "attack": [{"name": "aim"}],
        "eps": 1.0,
        "device": "cpu",
        **settings,
    }
    return AuditConfig.model_validate(values)


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Audited:
    folder = tmp_path_factory.mktemp("captions")
    return audit(_config(f"captions:{_captioned(folder)}"), folder / "out", AIM)


def test_an_image_that_became_its_target_is_found_by_the_targets_captions(audited: Audited) -> None:
    cell = audited.cell("aim")
    rows = audited.of(cell)
    clean = {row["label"]: row for row in rows}
    for row in rows:
        became = clean[row["target"]]
        assert row["adv_pred"] == became["clean_pred"]
        for mine, theirs in zip(row["adv_scores"], became["clean_scores"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)
    # Each image is the target of one other, so the gallery is the same in another order.
    for name in ("tr@1", "tr@5", "ir@1", "ir@5", "r@mean"):
        assert value(cell, f"target_{name}") == pytest.approx(value(cell, f"clean_{name}"))
    assert value(cell, "target_tr@5") == 1.0
    assert value(cell, "tr@1") < value(cell, "clean_tr@1")


def test_the_same_recalls_follow_from_the_stored_scores(audited: Audited) -> None:
    for name, side, wanted in (("clean_", "clean_scores", "label"), ("target_", "adv_scores", "target")):
        rows = audited.of(audited.cell("aim"))
        ranks = []
        for row in rows:
            own = max(row[side][row[wanted]])
            others = [s for g, group in enumerate(row[side]) if g != row[wanted] for s in group]
            ranks.append(1 + sum(score >= own for score in others))
        for k in (1, 5, 10):
            share = sum(rank <= k for rank in ranks) / len(ranks)
            assert value(audited.cell("aim"), f"{name}tr@{k}") == pytest.approx(share)


def test_every_sample_has_a_target_of_another_image(audited: Audited) -> None:
    rows = audited.of(audited.cell("aim"))
    assert sorted(row["target"] for row in rows) == sorted(row["label"] for row in rows)
    assert all(row["target"] != row["label"] for row in rows)
    noise = {row["sample"]: row["target"] for row in audited.of(audited.cell("noise"))}
    assert noise == {row["sample"]: row["target"] for row in rows}, "what the targets are worth by chance"


def test_where_nothing_aims_there_is_no_target(images: Path, tmp_path: Path) -> None:
    audited = audit(audit_config(images, encoder=READS, head="zero_shot"), tmp_path / "out")
    assert all(row["target"] is None for row in audited.rows)
    assert all("targeted_success" not in cell.metrics for cell in audited.report.cells)


def test_images_of_the_same_captions_are_not_aimed_at_each_other(tmp_path: Path) -> None:
    captions = {f"cat_{i}": ("a cat",) for i in range(6)} | {"dog_0": ("a dog",), "dog_1": ("a dog",)}
    path = write_captions(tmp_path, captions)
    audited = audit(_config(f"captions:{path}"), tmp_path / "out", AIM)
    for row in audited.of(audited.cell("aim")):
        assert row["target"] != row["label"]


def _edit(path: Path) -> None:
    entries = json.loads(path.read_text())
    entries[0]["caption"][0] = "an ant, to be exact"
    path.write_text(json.dumps(entries))


def test_changed_captions_are_another_audit(tmp_path: Path) -> None:
    path = _captioned(tmp_path)
    audit(_config(f"captions:{path}"), tmp_path / "out", AIM)
    _edit(path)
    with pytest.raises(RunError, match=r"images or captions of .* changed since this audit was finished"):
        audit(_config(f"captions:{path}"), tmp_path / "out", AIM)


def test_shards_of_other_captions_do_not_merge(tmp_path: Path) -> None:
    path = _captioned(tmp_path)
    audit(_config(f"captions:{path}", shard="1/2"), tmp_path / "one", AIM)
    _edit(path)
    audit(_config(f"captions:{path}", shard="2/2"), tmp_path / "two", AIM)
    with pytest.raises(UsageError, match="captions, or what reads them differ"):
        merge_runs([tmp_path / "one", tmp_path / "two"], tmp_path / "whole", registry(AIM))


def test_shards_merge_to_the_whole(tmp_path: Path) -> None:
    path = _captioned(tmp_path)
    whole = audit(_config(f"captions:{path}"), tmp_path / "whole", AIM).report
    for shard in ("1/2", "2/2"):
        audit(_config(f"captions:{path}", shard=shard), tmp_path / shard[0], AIM)
    merged = merge_runs([tmp_path / "1", tmp_path / "2"], tmp_path / "merged", registry(AIM))
    assert metrics_without_time(merged) == metrics_without_time(whole)


def test_targets_do_not_depend_on_batches_or_shards(tmp_path: Path) -> None:
    source = f"captions:{_captioned(tmp_path)}"
    whole = audit(_config(source), tmp_path / "whole", AIM)
    wanted = {row["sample"]: row["target"] for row in whole.of(whole.cell("aim"))}
    single = audit(_config(source, batch_size=1), tmp_path / "single", AIM)
    assert {row["sample"]: row["target"] for row in single.of(single.cell("aim"))} == wanted
    shard = audit(_config(source, shard="2/2"), tmp_path / "shard", AIM)
    mine = {row["sample"]: row["target"] for row in shard.of(shard.cell("aim"))}
    assert mine == {sample: wanted[sample] for sample in mine}
    assert len(mine) == 4


def test_zero_shot_reads_the_names_of_the_classes(images: Path, tmp_path: Path) -> None:
    attacks: list[str | Mapping[str, Any]] = [{"name": "pgd", "steps": 3}, "aim"]
    config = audit_config(images, encoder=READS, head="zero_shot", attacks=attacks, eps=0.1)
    audited = audit(config, tmp_path / "out", AIM)
    assert value(audited.cell("pgd"), "clean_accuracy") > 0.9
    assert value(audited.cell("pgd"), "asr") > 0.9
    assert 0 <= value(audited.cell("aim"), "targeted_success") <= 1
    labels = {row["sample"]: (row["label"], row["target"]) for row in audited.of(audited.cell("aim"))}
    assert all(label != target for label, target in labels.values())


def test_a_targeted_attack_beyond_its_budget_hits_the_target_class(images: Path, tmp_path: Path) -> None:
    audited = audit(
        audit_config(images, encoder=READS, head=["zero_shot", "linear"], attacks=["aim"], eps=1.0),
        tmp_path / "out",
        AIM,
    )
    for head in ("zero_shot", "linear"):
        cell = audited.cell("aim", head=head)
        assert value(cell, "targeted_success") > 0.9
        for row in audited.of(cell):
            assert row["target"] != row["label"]


def test_a_head_of_text_needs_an_encoder_that_reads(images: Path, tmp_path: Path) -> None:
    for head in ("zero_shot", "captions"):
        with pytest.raises(SourceError, match=f"head {head} needs an encoder that reads text"):
            audit(audit_config(images, encoder=TINY, head=head), tmp_path / head)


def test_captions_need_captions(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no caption for"):
        audit(audit_config(images, encoder=READS, head="captions"), tmp_path / "out")


def test_one_class_leaves_nothing_to_aim_at(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    write_captions_of_one(folder)
    audited = audit(_config(f"folder:{folder}", head="zero_shot"), tmp_path / "out", AIM)
    assert audited.report.status != "complete"
    assert all("no readable image of another class" in row["error"] for row in audited.of(audited.cell("aim")))


def write_captions_of_one(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split / "cat").mkdir(parents=True)
        write_captions(folder / split / "cat", {"cat_0": ("a cat",), "cat_1": ("a cat",)}).unlink()


def test_unreadable_targets_are_passed_over(tmp_path: Path) -> None:
    path = _captioned(tmp_path)
    (tmp_path / "ant_0.png").write_bytes(b"broken")
    items = open_dataset(f"captions:{path}", load_registry()).test
    targets = Targets(items, Preprocessing(input_size=(8, 8)), seed=0)
    found = [targets.of(item) for item in items]
    assert all(target is not None and target.id != "ant_0.png" for target in found)
    assert targets.images(items).shape == (8, 3, 8, 8)
    assert targets.texts(items[:1]) == ((found[0].captions[0],) if found[0] else None)


_COCO = {
    "images": [{"id": 7, "file_name": "ant_0.png"}, {"id": 9, "file_name": "bee_0.png"}],
    "annotations": [
        {"image_id": 9, "caption": " a bee "},
        {"image_id": 7, "caption": "an ant"},
        {"image_id": 9, "caption": "one bee"},
    ],
}


def test_coco_annotations_are_read(tmp_path: Path) -> None:
    _captioned(tmp_path)
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(_COCO))
    dataset = open_dataset(f"captions:{path}", load_registry())
    assert [(item.id, item.captions) for item in dataset.test] == [
        ("ant_0.png", ("an ant",)),
        ("bee_0.png", ("a bee", "one bee")),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('"text"', "expected a list of images"),
        ('[{"image": "ant_0.png"}]', "entry 0 has not the keys"),
        ('[{"image": "ant_0.png", "caption": []}]', "ant_0.png has no caption"),
        ('[{"image": "none.png", "caption": "a"}]', "none.png is not there"),
        ('{"images": []}', "not in COCO's layout"),
        ('{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}', "not in COCO's layout"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    _captioned(tmp_path)
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        open_dataset(f"captions:{path}", load_registry())


def test_texts_of_an_encoder_are_unit_vectors_in_order() -> None:
    tower = load_encoder(READS, load_registry()).text
    assert tower is not None
    made = tower(["a bee", "an ant or so"])
    assert torch.allclose(made.norm(dim=1), torch.ones(2))
    assert made.argmax(dim=1).tolist() == [1, 0]
    with pytest.raises(SourceError, match="no text to embed"):
        tower([])


def test_registry_lists_the_heads_of_text() -> None:
    known: Registry = load_registry()
    names: Sequence[str] = list(known.heads)
    assert {"zero_shot", "captions"} <= set(names)

"""Shards joined are the whole: same rows, same metrics; anything else is refused."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from torch import Tensor

from project import PGD, TINY, audit_config, defense, metrics_without_time, registry
from robustbench_x.config import AuditConfig
from robustbench_x.engine import run_audit
from robustbench_x.errors import UsageError
from robustbench_x.merge import merge_runs
from robustbench_x.registry import load_registry
from robustbench_x.result import read_report


def _config(images: Path, shard: str | None, **settings: object) -> AuditConfig:
    attacks = [PGD, {"name": "embed", "steps": 3}]
    asked = {"encoder": [TINY], "attacks": attacks, "samples": 18, "batch_size": 4, **settings}
    config = audit_config(images, **asked)  # type: ignore[arg-type]
    return config.model_copy(update={"shard": shard})


def _verdicts(run: Path) -> list[tuple[object, ...]]:
    """What the judge said, row by row; a row's cost is its batch's mean, and batches differ between shards."""
    names = ("cell", "position", "sample", "sha256", "label", "clean_pred", "adv_pred", "adv8_pred", "seed", "error")
    table = pq.read_table(run / "samples.parquet")
    return [tuple(row[name] for name in names) for row in table.to_pylist()]


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three shards of one audit."""
    root = tmp_path_factory.mktemp("shards")
    for i in (1, 2, 3):
        run_audit(_config(images, f"{i}/3"), root / str(i))
    return [root / str(i) for i in (1, 2, 3)]


def test_the_merged_run_is_the_whole_run(images: Path, shards: list[Path], tmp_path: Path) -> None:
    whole = run_audit(_config(images, None), tmp_path / "whole")
    merged = merge_runs(list(reversed(shards)), tmp_path / "merged", load_registry())
    assert read_report(tmp_path / "merged") == merged
    assert metrics_without_time(merged) == metrics_without_time(whole)
    assert _verdicts(tmp_path / "merged") == _verdicts(tmp_path / "whole")
    assert merged.run.fingerprint == whole.run.fingerprint
    assert [d.evaluated for d in merged.data] == [d.evaluated for d in whole.data]
    assert {f.id for f in merged.findings} == {f.id for f in whole.findings}
    assert [w.asr for w in merged.worst_case] == [w.asr for w in whole.worst_case]


@dataclass(frozen=True, kw_only=True)
class Breaks:
    """A defence that nothing gets through, so that nobody can time it."""

    def apply(self, images: Tensor) -> Tensor:
        raise RuntimeError("no luck")


def test_what_every_shard_says_is_said_once(images: Path, tmp_path: Path) -> None:
    plugins = registry(defense(Breaks))
    settings = {"defenses": ["breaks"], "knowledge": ["full"], "samples": 4}
    for i in (1, 2):
        run_audit(_config(images, f"{i}/2", **settings), tmp_path / str(i), registry=plugins)
    merged = merge_runs([tmp_path / "1", tmp_path / "2"], tmp_path / "merged", plugins)
    texts = [finding.model_dump_json() for finding in merged.findings]
    assert len(texts) == len(set(texts))
    assert len([finding for finding in merged.findings if finding.id == "runtime_unmeasured"]) == 1
    for cell in merged.cells:
        flags = [flag.id for flag in cell.flags if flag.id == "runtime_unmeasured"]
        assert len(flags) == (cell.defense == "breaks")


def test_a_missing_shard_is_named(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shard 2/3 is missing"):
        merge_runs([shards[0], shards[2]], tmp_path / "out", load_registry())
    assert not (tmp_path / "out").exists()


def test_a_shard_given_twice_is_named(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shard 1/3 is given twice"):
        merge_runs([shards[0], shards[0], shards[1], shards[2]], tmp_path / "out", load_registry())


def test_a_whole_run_is_no_shard(images: Path, shards: list[Path], tmp_path: Path) -> None:
    run_audit(_config(images, None), tmp_path / "whole")
    with pytest.raises(UsageError, match="is a whole run, not a shard"):
        merge_runs([tmp_path / "whole"], tmp_path / "out", load_registry())


def test_shards_of_another_audit_are_refused(images: Path, shards: list[Path], tmp_path: Path) -> None:
    run_audit(_config(images, "3/3", seed=5), tmp_path / "stranger")
    with pytest.raises(UsageError, match="their configuration differ"):
        merge_runs([shards[0], shards[1], tmp_path / "stranger"], tmp_path / "out", load_registry())


def test_a_folder_in_use_is_left_alone(shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="name an empty or a new folder"):
        merge_runs(shards, tmp_path, load_registry())


def test_shards_of_changed_code_are_refused(
    images: Path, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    import project

    forward = project.TinyNet.forward
    monkeypatch.setattr(project.TinyNet, "forward", lambda self, x: torch.sin(5 * forward(self, x)))
    run_audit(_config(images, "3/3"), tmp_path / "changed")
    with pytest.raises(UsageError, match="the code, heads or defenses of python:project:tiny changed"):
        merge_runs([shards[0], shards[1], tmp_path / "changed"], tmp_path / "out", load_registry())

"""An audit killed anywhere, by whatever, ends with what an uninterrupted one ends with, or says why it cannot."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from project import (
    CLASSES,
    PGD,
    TINY,
    Audited,
    attack,
    audit,
    audit_config,
    metrics_without_time,
    patterns,
    registry,
    rows_without_time,
    save_image,
    value,
    write_images,
)
from robustbench_x.config import AuditConfig
from robustbench_x.engine import run_audit
from robustbench_x.errors import RunError, UsageError
from robustbench_x.views import View

OTHER = "python:project:other"
BATCHES = 5
"""Of 4 images each, per craft; a stage has three crafts: noise, pgd, embed."""


def _config(images: Path, **settings: Any) -> AuditConfig:
    asked = {
        "encoder": [TINY, OTHER],
        "attacks": [PGD, {"name": "embed", "steps": 5}],
        "batch_size": 4,
        "samples": 20,
        **settings,
    }
    return audit_config(images, **asked)


def _small(images: Path, **settings: Any) -> AuditConfig:
    """One stage with two crafts."""
    return _config(images, **{"encoder": [TINY], "attacks": [PGD], **settings})


@dataclass
class _Stops:
    """Interrupts the run after so many batches."""

    after: int

    def begin(self, total: int, done: int) -> None:
        """Ignored."""

    def task(self, text: str) -> None:
        """Ignored."""

    def say(self, text: str) -> None:
        """Ignored."""

    def advance(self, units: int) -> None:
        """Counts."""
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt("stop here")


def _interrupt(config: AuditConfig, out: Path, *, after: int) -> None:
    with pytest.raises(KeyboardInterrupt, match="stop here"):
        run_audit(config, out, registry=registry(), progress=_Stops(after))
    assert not (out / "report.json").exists()


def _batches(out: Path) -> list[Path]:
    return sorted((out / ".state").glob("*/*.parquet"))


def _assert_same(one: Audited, two: Audited) -> None:
    assert metrics_without_time(one.report) == metrics_without_time(two.report)
    assert rows_without_time(one.rows) == rows_without_time(two.rows)
    assert one.report.findings == two.report.findings
    assert one.report.status == two.report.status


def _assert_alike(one: Audited, two: Audited) -> None:
    """The same but for float32 rounding, which hangs on where a process happens to place its tensors."""
    for mine, theirs in zip(rows_without_time(one.rows), rows_without_time(two.rows), strict=True):
        for name, stored in theirs.items():
            close = pytest.approx(stored, rel=1e-3, abs=1e-4) if isinstance(stored, float) else stored
            assert mine[name] == close, (name, mine["cell"], mine["sample"])
    for cell, same in zip(one.report.cells, two.report.cells, strict=True):
        for name in ("clean_accuracy", "robust_accuracy", "asr", "asr_total", "flip_rate", "asr_8bit"):
            assert cell.metrics[name] == same.metrics[name], (cell.id, name)
    assert one.report.status == two.report.status


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """The audit, never interrupted."""
    return audit(_config(images), tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize("batches", [2, 3 * BATCHES + 5], ids=["first-stage", "second-stage"])
def test_a_killed_process_resumes(images: Path, tmp_path: Path, whole: Audited, batches: int) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", "import sys, project; project.main(*sys.argv[1:])"]
    command += [_config(images).model_dump_json(), str(out)]
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    try:
        deadline = time.monotonic() + 60
        while len(_batches(out)) < batches and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = len(_batches(out))
    assert process.returncode == -signal.SIGKILL
    assert batches <= done < 6 * BATCHES, "the kill fell in the middle"
    assert not (out / "report.json").exists()
    _assert_alike(audit(_config(images), out), whole)


@pytest.mark.parametrize("after", [0, 1, BATCHES - 1, BATCHES, 2 * BATCHES + 3, 3 * BATCHES, 6 * BATCHES - 1])
def test_an_interrupted_audit_resumes(images: Path, tmp_path: Path, whole: Audited, after: int) -> None:
    out = tmp_path / "out"
    _interrupt(_config(images), out, after=after)
    files = {p: p.read_bytes() for p in _batches(out)}
    assert len(files) == after + 1
    (_batches(out)[-1].with_suffix(".partial")).write_bytes(b"PAR1 half a file")
    (out / ".state" / "probes-9.json.partial").write_text("{")
    _assert_same(audit(_config(images), out), whole)
    assert not (out / ".state").exists()


def test_interrupted_again_and_again(images: Path, tmp_path: Path, whole: Audited) -> None:
    out = tmp_path / "out"
    for after in (3, 11, 16, 24):
        _interrupt(_config(images), out, after=after)
    _assert_same(audit(_config(images), out), whole)


def test_what_is_on_disk_is_not_made_again(images: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Watched:
        """Counts the images it is given."""

        def run(self, view: View) -> Tensor:
            seen.append(len(view.inputs))
            return view.threat.noise(view.inputs, view.random)

    spec = attack(Watched, access="none")
    config = audit_config(images, attacks=["watched"], batch_size=4)
    with pytest.raises(KeyboardInterrupt, match="stop here"):
        run_audit(config, tmp_path / "out", registry=registry(spec), progress=_Stops(15))
    assert sum(seen) == 24
    audit(config, tmp_path / "out", spec)
    assert sum(seen) == 40


def test_the_batch_size_of_the_first_start_is_kept(images: Path, tmp_path: Path, whole: Audited) -> None:
    out = tmp_path / "out"
    _interrupt(_config(images), out, after=BATCHES + 2)
    resumed = audit(_config(images, batch_size=7), out)
    assert resumed.report.run.batch_size == 4
    _assert_same(resumed, whole)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all"], ids=["empty", "cut", "foreign"])
def test_a_damaged_batch_is_named_at_once(images: Path, tmp_path: Path, whole: Audited, content: bytes) -> None:
    out = tmp_path / "out"
    _interrupt(_config(images), out, after=BATCHES)
    victim = _batches(out)[1]
    victim.write_bytes(content)
    with pytest.raises(RunError, match=rf"{victim.name} cannot be read.*delete this file") as caught:
        audit(_config(images), out)
    assert caught.value.exit_code == 3
    assert not (out / "report.json").exists()
    victim.unlink()
    _assert_same(audit(_config(images), out), whole)


def test_a_batch_that_lacks_rows_is_never_used(images: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    out = tmp_path / "out"
    _interrupt(_small(images), out, after=BATCHES)
    craft = next(p.parent for p in _batches(out) if p.stem == "000001")
    victim = craft / "000001.parquet"
    pq.write_table(pq.read_table(victim).slice(1), victim)
    with pytest.raises(RunError, match="cover 19 of 20 samples, 19 rows"):
        audit(_small(images), out)
    shutil.copy(craft / "000000.parquet", victim)
    with pytest.raises(RunError, match="cover 16 of 20 samples, 20 rows"):
        audit(_small(images), out)
    assert not (out / "report.json").exists()


def test_a_damaged_note_is_named(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _interrupt(_small(images), out, after=2)
    (out / ".state" / "stage-0.json").write_text("{half")
    with pytest.raises(RunError, match=r"stage-0\.json is damaged"):
        audit(_small(images), out)
    (out / ".state" / "plan.json").write_text("{half")
    with pytest.raises(RunError, match=r"plan\.json is damaged"):
        audit(_small(images), out)
    (out / ".state" / "plan.json").unlink()
    with pytest.raises(RunError, match=r"plan\.json is missing"):
        audit(_small(images), out)


def test_changed_images_are_refused(tmp_path: Path) -> None:
    images, out = write_images(tmp_path / "images"), tmp_path / "out"
    _interrupt(_small(images), out, after=4)
    for i in range(10):
        save_image(images / "test" / CLASSES[1] / f"{i:02d}.png", 0.5 - 0.05 * patterns()[1])
    with pytest.raises(RunError, match="changed since this audit was interrupted") as caught:
        audit(_small(images), out)
    assert caught.value.exit_code == 3
    assert audit(_small(images), out, resume=False).report.status == "complete"


def test_changed_training_images_are_refused(tmp_path: Path) -> None:
    """Another head, with the same encoder and the same evaluated images."""
    images, out = write_images(tmp_path / "images", train=4), tmp_path / "out"
    _interrupt(_small(images), out, after=4)
    for i in range(4):
        save_image(images / "train" / CLASSES[0] / f"{i:02d}.png", 0.5 - 0.2 * patterns()[2])
    with pytest.raises(RunError, match="changed since this audit was interrupted"):
        audit(_small(images), out)


def test_changed_weights_are_refused(images: Path, tmp_path: Path) -> None:
    import project

    out, honest = tmp_path / "out", project.tiny
    _interrupt(_small(images), out, after=4)
    try:
        project.tiny = project.other
        with pytest.raises(RunError, match="changed since this audit was interrupted"):
            audit(_small(images), out)
    finally:
        project.tiny = honest


def test_changed_code_under_the_same_weights_is_refused(images: Path, tmp_path: Path) -> None:
    import project

    class Doubled(project.TinyNet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).square()

    out, honest = tmp_path / "out", project.tiny
    _interrupt(_small(images), out, after=4)
    try:
        project.tiny = Doubled
        with pytest.raises(RunError, match="changed since this audit was interrupted"):
            audit(_small(images), out)
    finally:
        project.tiny = honest


@pytest.mark.parametrize("settings", [{"eps": "5/255"}, {"seed": 1}, {"samples": 8}, {"attacks": ["noise"]}])
def test_another_audit_is_refused(images: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    out = tmp_path / "out"
    _interrupt(_small(images), out, after=1)
    with pytest.raises(UsageError, match="the folder holds another audit") as caught:
        audit(_small(images, **settings), out)
    assert caught.value.exit_code == 2


def test_starting_over_replaces_everything(images: Path, tmp_path: Path, whole: Audited) -> None:
    out = tmp_path / "out"
    _interrupt(_config(images, seed=5), out, after=BATCHES)
    _assert_same(audit(_config(images), out, resume=False), whole)
    for name in ("report.html", "junit.xml", "report.sarif"):
        (out / name).write_text("rendered later")
    fresh = audit(_config(images, encoder=[TINY], attacks=[PGD]), out, resume=False)
    assert len(fresh.report.cells) == 2
    assert not (out / "report.html").exists()


def test_starting_over_never_removes_what_is_not_a_run(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    (out / "samples.parquet").write_bytes(b"someone's own")
    for resume in (True, False):
        with pytest.raises(UsageError, match="the folder holds something else"):
            audit(_small(images), out, resume=resume)
    assert sorted(p.name for p in out.iterdir()) == ["samples.parquet", "thesis.tex"]


def test_a_finished_run_is_read_again(images: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Watched:
        """Counts its calls."""

        def run(self, view: View) -> Tensor:
            calls.append(1)
            return view.threat.noise(view.inputs, view.random)

    spec = attack(Watched, access="none")
    config = audit_config(images, attacks=["watched"])
    first = audit(config, tmp_path / "out", spec)
    made = len(calls)
    again = audit(config, tmp_path / "out", spec)
    assert len(calls) == made
    assert again.report == first.report


def test_a_kill_amid_the_last_clean_up_leaves_a_finished_run(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = audit(_small(images), out)
    (out / ".state.done" / "0123").mkdir(parents=True)
    assert audit(_small(images), out).report == first.report
    assert not (out / ".state.done").exists()


def test_a_kill_in_the_first_instant_is_no_obstacle(images: Path, tmp_path: Path, whole: Audited) -> None:
    out = tmp_path / "out"
    (out / ".state").mkdir(parents=True)
    (out / ".state" / "plan.json.partial").write_text("{")
    _assert_same(audit(_config(images), out), whole)


def test_a_stochastic_defence_resumes_to_the_same_draws(images: Path, tmp_path: Path) -> None:
    from project import defense

    @dataclass(frozen=True, kw_only=True)
    class Jitters:
        """Adds noise, and says so."""

        def apply(self, images: Tensor) -> Tensor:
            return (images + 0.05 * torch.randn_like(images)).clamp(0, 1)

    spec = defense(Jitters, stochastic=True)
    config = audit_config(images, attacks=[{**PGD, "eot": 2}], defenses=["jitters"], samples=16, batch_size=4)
    one = audit(config, tmp_path / "one", spec)
    with pytest.raises(KeyboardInterrupt, match="stop here"):
        run_audit(config, tmp_path / "two", registry=registry(spec), progress=_Stops(9))
    _assert_same(audit(config, tmp_path / "two", spec), one)
    assert value(one.cell("pgd"), "asr") > 0.5

"""The run folder: rows and notes as they come, written atomically, so that a killed audit resumes.

While an audit runs, `<out>/.state/` holds one small Parquet file per crafted batch. When it is complete they
become `samples.parquet`, and the folder goes.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq

from robustbench_x.errors import RunError, UsageError

__all__ = ["ACCEPTED", "RANKED", "ROWS", "SAID", "SCORED", "RunFolder", "write_atomically"]

ROWS = pa.schema(
    [
        ("cell", pa.string()),
        ("encoder", pa.string()),
        ("head", pa.string()),
        ("data", pa.string()),
        ("defense", pa.string()),
        ("knowledge", pa.string()),
        ("attack", pa.string()),
        ("norm", pa.string()),
        ("eps", pa.float64()),
        ("position", pa.int64()),
        ("sample", pa.string()),
        ("sha256", pa.string()),
        ("label", pa.int64()),
        ("clean_pred", pa.int64()),
        ("adv_pred", pa.int64()),
        ("adv8_pred", pa.int64()),
        ("target", pa.int64()),
        ("clean_correct", pa.bool_()),
        ("fooled", pa.bool_()),
        ("flipped", pa.bool_()),
        ("margin", pa.float64()),
        ("linf", pa.float64()),
        ("l2", pa.float64()),
        ("ssim", pa.float64()),
        ("feature_cosine", pa.float64()),
        ("clean_ap", pa.float64()),
        ("adv_ap", pa.float64()),
        ("clean_rank", pa.float64()),
        ("adv_rank", pa.float64()),
        ("clean_acceptance", pa.float64()),
        ("adv_acceptance", pa.float64()),
        ("adv8_acceptance", pa.float64()),
        ("clean_scores", pa.list_(pa.list_(pa.float32()))),
        ("adv_scores", pa.list_(pa.list_(pa.float32()))),
        ("clean_text", pa.string()),
        ("adv_text", pa.string()),
        ("own_texts", pa.list_(pa.string())),
        ("target_texts", pa.list_(pa.string())),
        ("seen_fooled", pa.bool_()),
        ("late_gain", pa.float64()),
        ("overrun", pa.float64()),
        ("forwards", pa.float64()),
        ("backwards", pa.float64()),
        ("seconds", pa.float64()),
        ("seed", pa.int64()),
        ("error", pa.string()),
    ]
)
"""One row per sample and cell. Predictions are logit indices, -1 where there is none; measures are null in error
rows. `margin` is the true class's logit minus the largest other on the adversarial image, `overrun` how far the
candidate lay outside its budget before projection. `clean_ap`, `adv_ap` (average precision of the first 10) and
`clean_rank`, `adv_rank` (place of the first relevant item) are null where the head ranks nothing. An acceptance is how
clearly a detector accepts the image, in spreads of the clean scores: below 0 it is refused; null behind no detector.
`target` is the class that the sample was aimed at, null where the attack does not aim. The scores are those of every
caption, group by group; null where the head ranks no captions. The texts are what the victim says of the image, and
the captions of the image and of its target; null where it says nothing.
`seen_fooled` says whether the victim was seen to be wrong inside the budget while it was attacked, and `late_gain` how
much of the gain in margin came with the last ten looks; null where nobody could watch."""

RANKED = ("clean_ap", "adv_ap", "clean_rank", "adv_rank")
"""The columns of a head that ranks a gallery."""

ACCEPTED = ("clean_acceptance", "adv_acceptance", "adv8_acceptance")
"""The columns of a victim behind a detector."""

SCORED = ("clean_scores", "adv_scores")
"""The columns of a head that ranks captions."""

SAID = ("clean_text", "adv_text", "own_texts", "target_texts")
"""The columns of a victim that describes images."""

_LATER = ("target", *RANKED, *ACCEPTED, *SCORED, *SAID, "seen_fooled", "late_gain")
"""Columns that came after the first version."""

_ARTIFACTS = "artifacts"
_STATE = ".state"
_DROPPED = ".state.done"
_RESULTS = ("report.json", "report.md", "report.html", "report.sarif", "junit.xml", "samples.parquet", "audit.toml")
_PLAN = "plan.json"


@final
class RunFolder:
    """The folder of one run.

    Args:
        path: Made when missing.
        fingerprint: Of the plan; a folder that holds another audit is refused.
        resume: Keep what is there; else start over.
    """

    def __init__(self, path: Path, *, fingerprint: str, resume: bool) -> None:
        self.path = path
        self.state = path / _STATE
        if path.exists() and not path.is_dir():
            raise UsageError(f"--out {path}: this is a file, not a folder")
        shutil.rmtree(path / _DROPPED, ignore_errors=True)
        if not resume and (self.state.exists() or (path / "report.json").exists()):
            self._clear()
            held = None
        else:
            held = stored_fingerprint(path)
            if held is None and path.exists() and any(entry != self.state for entry in path.iterdir()):
                raise UsageError(f"--out {path}: the folder holds something else; name an empty or a new one")
            # An empty state is what a kill in the first instant leaves.
            if held is None and any(entry.suffix != ".partial" for entry in self.state.glob("*")):
                raise RunError(f"{self.state / _PLAN} is missing, so its rows cannot be trusted; use --no-resume")
        if held is not None and held != fingerprint:
            raise UsageError(
                f"--out {path}: the folder holds another audit; choose another --out, or start over with --no-resume"
            )
        if not self.finished:
            self.state.mkdir(parents=True, exist_ok=True)
            if held is None:
                self.note("plan", {"fingerprint": fingerprint})

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "report.json").exists() and not self.state.exists()

    def note(self, name: str, values: Mapping[str, Any]) -> None:
        """Stores a small JSON document about the run in progress."""
        write_atomically(self.state / f"{name}.json", json.dumps(values, indent=1, allow_nan=False))

    def notes(self, name: str) -> dict[str, Any] | None:
        """A document stored by `note`; None when there is none.

        Raises:
            RunError: The file is damaged.
        """
        path = self.state / f"{name}.json"
        if not path.exists():
            return None
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}); start over with --no-resume") from error
        return values

    def has_batch(self, craft: str, batch: int) -> bool:
        """Whether the rows of this batch are on disk."""
        return self._batch(craft, batch).exists()

    def add_batch(self, craft: str, batch: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Stores the rows of a batch; after this returns they survive a kill."""
        path = self._batch(craft, batch)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        pq.write_table(pa.Table.from_pylist(list(rows), schema=ROWS), partial)
        _sync(partial)
        os.replace(partial, path)

    def rows(self) -> pa.Table:
        """Every row on disk, in order of craft and batch.

        Raises:
            RunError: A file is damaged or of another layout.
        """
        paths = sorted(self.state.glob("*/*.parquet")) if self.state.exists() else [self.path / "samples.parquet"]
        return pa.concat_tables([read_rows(path) for path in paths]) if paths else ROWS.empty_table()

    def check(self) -> None:
        """Looks into every batch on disk, so that a damaged one is known before hours are spent.

        Raises:
            RunError: A file is damaged; names it.
        """
        for path in sorted(self.state.glob("*/*.parquet")):
            try:
                read_rows(path)
            except RunError as error:
                raise RunError(f"{error}; delete this file to have its rows made again") from error

    def finish(self) -> None:
        """Drops the working state; call when every result file is in place."""
        # Renamed first: a kill amid the removal must not leave half a state that looks like a run to resume.
        dropped = self.path / _DROPPED
        os.replace(self.state, dropped)
        shutil.rmtree(dropped)

    def _batch(self, craft: str, batch: int) -> Path:
        return self.state / craft / f"{batch:06d}.parquet"

    def _clear(self) -> None:
        """Removes what an audit wrote here, and nothing else."""
        shutil.rmtree(self.state, ignore_errors=True)
        kept = self.path / _ARTIFACTS
        for artifact in kept.glob(f"*-{'[0-9a-f]' * 12}.safetensors"):
            artifact.unlink()
        if kept.is_dir() and not any(kept.iterdir()):
            kept.rmdir()
        for name in _RESULTS:
            (self.path / name).unlink(missing_ok=True)
            (self.path / f"{name}.partial").unlink(missing_ok=True)


def stored_fingerprint(path: Path) -> str | None:
    """The fingerprint of the audit that `path` holds, finished or not; None when it holds none.

    Raises:
        RunError: There is a run, but its files are damaged.
    """
    for file, keys in ((path / _STATE / _PLAN, ("fingerprint",)), (path / "report.json", ("run", "fingerprint"))):
        if file.exists():
            try:
                value: Any = json.loads(file.read_text(encoding="utf-8"))
                for key in keys:
                    value = value[key]
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{file} is damaged: no readable {'.'.join(keys)}") from error
            return str(value)
    return None


def read_rows(path: Path) -> pa.Table:
    """The rows of one Parquet file.

    Raises:
        RunError: It is missing, damaged, or lacks a column; names file and column.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    for name in (name for name in _LATER if name not in table.column_names):  # a run from before there was such a thing
        table = table.append_column(name, pa.nulls(len(table), ROWS.field(name).type))
    missing = [name for name in ROWS.names if name not in table.column_names]
    if missing:
        raise RunError(f"{path} has no column {', '.join(missing)}")
    try:
        return table.select(ROWS.names).cast(ROWS)
    except pa.ArrowInvalid as error:
        raise RunError(f"{path} does not hold the columns of a run: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a reader or a kill sees the old file or the new one, never half."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    os.replace(partial, path)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())

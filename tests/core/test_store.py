"""The run folder: written atomically, resumed exactly, never mistaken, never cleared by accident."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustbench_x.errors import RunError, UsageError
from robustbench_x.store import ROWS, RunFolder, read_rows, stored_fingerprint, write_atomically


def _row(position: int, **changes: Any) -> dict[str, Any]:
    return {"cell": "c", "sample": f"s{position}", "position": position, "label": 0, "linf": 0.1, **changes}


def _folder(path: Path, *, fingerprint: str = "f", resume: bool = True) -> RunFolder:
    return RunFolder(path, fingerprint=fingerprint, resume=resume)


def _finished(path: Path) -> RunFolder:
    folder = _folder(path)
    (path / "report.json").write_text('{"run": {"fingerprint": "f"}}')
    folder.finish()
    return folder


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "out")
    folder.add_batch("b", 0, [_row(0), _row(1, error="boom", linf=None)])
    folder.add_batch("a", 1, [_row(5)])
    folder.add_batch("a", 0, [_row(4)])
    assert folder.has_batch("a", 1)
    assert not folder.has_batch("a", 2)
    rows = _folder(tmp_path / "out").rows()
    assert rows.schema == ROWS
    assert rows.column("position").to_pylist() == [4, 5, 0, 1]
    assert rows.column("error").to_pylist() == [None, None, None, "boom"]
    folder.check()


def test_a_run_without_rows_has_no_rows(tmp_path: Path) -> None:
    assert _folder(tmp_path / "out").rows().num_rows == 0


def test_notes_come_back_and_damage_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "out")
    assert folder.notes("x") is None
    folder.note("x", {"a": [1, None]})
    assert folder.notes("x") == {"a": [1, None]}
    (folder.state / "x.json").write_text('{"a"')
    with pytest.raises(RunError, match=r"x\.json is damaged"):
        folder.notes("x")
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.note("y", {"a": float("nan")})


def test_half_a_file_is_never_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    (tmp_path / "a.json.partial").write_text("ne")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_belongs_to_one_audit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert stored_fingerprint(out) is None
    _folder(out)
    assert stored_fingerprint(out) == "f"
    with pytest.raises(UsageError, match="holds another audit"):
        _folder(out, fingerprint="g")
    _folder(out, fingerprint="g", resume=False)
    assert stored_fingerprint(out) == "g"


def test_a_finished_run_is_known_by_its_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not _folder(out).finished
    assert _finished(out).finished
    assert stored_fingerprint(out) == "f"
    assert _folder(out).finished
    assert [p.name for p in out.iterdir()] == ["report.json"]
    with pytest.raises(UsageError, match="holds another audit"):
        _folder(out, fingerprint="g")
    assert not _folder(out, fingerprint="g", resume=False).finished


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": {}}'])
def test_a_damaged_report_is_named_and_can_be_replaced(tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    _finished(out)
    (out / "report.json").write_text(content)
    with pytest.raises(RunError, match=r"report\.json is damaged"):
        _folder(out)
    assert not _folder(out, resume=False).finished


def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "samples.parquet").write_bytes(b"mine")
    for resume in (True, False):
        with pytest.raises(UsageError, match="holds something else"):
            _folder(tmp_path, resume=resume)
    assert (tmp_path / "samples.parquet").read_bytes() == b"mine"
    with pytest.raises(UsageError, match="this is a file, not a folder"):
        _folder(tmp_path / "samples.parquet")


def test_starting_over_keeps_what_is_not_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _finished(out)
    (out / "notes.txt").write_text("keep")
    (out / "report.html").write_text("old")
    (out / "samples.parquet.partial").write_text("old")
    _folder(out, resume=False)
    assert sorted(p.name for p in out.iterdir()) == [".state", "notes.txt"]


def test_rows_of_another_layout_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(RunError, match=r"x\.parquet cannot be read"):
        read_rows(path)
    pq.write_table(pa.table({"cell": ["c"]}), path)
    with pytest.raises(RunError, match="has no column encoder, head"):
        read_rows(path)
    wrong = pa.Table.from_pylist([_row(0)], schema=ROWS).set_column(
        ROWS.get_field_index("label"), "label", pa.array(["cat"])
    )
    pq.write_table(wrong, path)
    with pytest.raises(RunError, match="does not hold the columns of a run"):
        read_rows(path)


def test_rows_of_an_earlier_version_lack_what_it_did_not_know(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    later = ["clean_ap", "adv_rank", "adv_acceptance", "seen_fooled", "late_gain"]
    pq.write_table(pa.Table.from_pylist([_row(0)], schema=ROWS).drop_columns(later), path)
    (row,) = read_rows(path).to_pylist()
    assert [row[name] for name in later] == [None] * len(later)

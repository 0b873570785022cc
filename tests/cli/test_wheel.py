"""The wheel, built and unpacked elsewhere, is whole: it runs with nothing of the checkout in reach."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from robustbench_x.cli import main; main()"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run([sys.executable, *command, "--disable-pip-version-check", str(ROOT)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_package_and_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, root in (
        ("robustbench_x", ROOT / "robustbench_x"),
        ("robustbench_x_attacks", ROOT / "attacks" / "robustbench_x_attacks"),
        ("robustbench_x_defenses", ROOT / "defenses" / "robustbench_x_defenses"),
    ):
        wanted = {
            f"{package}/{path.relative_to(root).as_posix()}"
            for path in root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert wanted <= names, f"missing: {sorted(wanted - names)}"
    assert not [name for name in names if name.startswith(("tests/", "docs/", "runs/"))]


def test_the_unpacked_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(site), "init"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "audit.toml").exists()
    where = "import sys; sys.path.insert(0, sys.argv[1]); import robustbench_x as r, robustbench_x_attacks as a; "
    found = subprocess.run(
        [sys.executable, "-c", where + "print(r.__file__, a.__file__)", str(site)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.count(str(site)) == 2

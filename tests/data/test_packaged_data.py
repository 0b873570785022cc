"""`packaged:` data against the packages they come from."""

import importlib.util
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from robustbench_x.data.packaged import SOURCE
from robustbench_x.errors import MissingExtraError, UnknownNameError


def test_digits_are_the_scans_of_scikit_learn_in_order() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    scans = datasets.load_digits()
    dataset = SOURCE.open("packaged:digits", "digits", 0)
    items = sorted(dataset.train + dataset.test, key=lambda item: item.id)
    assert [dataset.classes[item.label] for item in items] == [str(digit) for digit in scans.target]
    for item, scan in list(zip(items, scans.images, strict=True))[::100]:
        image = item.load()
        assert (image.mode, image.size) == ("RGB", (8, 8))
        pixels = np.asarray(image, dtype=float)
        assert np.abs(pixels - scan[:, :, None] * 255 / 16).max() <= 0.5


def test_digits_split_is_stratified_and_fixed() -> None:
    pytest.importorskip("sklearn")
    dataset = SOURCE.open("packaged:digits", "digits", 0)
    assert Counter(item.label for item in dataset.train) == dict.fromkeys(range(10), 100)
    assert (len(dataset.train), len(dataset.test)) == (1000, 797)
    assert len({item.id for item in dataset.train + dataset.test}) == 1797
    assert SOURCE.open("packaged:digits", "digits", 99) == dataset


def test_photos_match_their_imagenet_classes() -> None:
    pytest.importorskip("foolbox")
    dataset = SOURCE.open("packaged:photos", "photos", 0)
    assert dataset.train == ()
    assert len(dataset.test) == 20
    assert list(dataset.classes) == sorted(set(dataset.classes))
    wordnet = {item.id: dataset.classes[item.label] for item in dataset.test}
    # From the ILSVRC 2012 list: 22 is the bald eagle, 243 the bull mastiff, 990 the buckeye.
    assert wordnet["imagenet_17_22.jpg"] == "n01614925"
    assert wordnet["imagenet_00_243.jpg"] == "n02108422"
    assert wordnet["imagenet_03_990.jpg"] == "n12768682"
    assert {item.load().mode for item in dataset.test} == {"RGB"}
    assert pickle.loads(pickle.dumps(dataset.test[3])).load() == dataset.test[3].load()


def test_photos_are_found_without_importing_foolbox() -> None:
    if importlib.util.find_spec("foolbox") is None:
        pytest.skip("foolbox is not installed")
    code = (
        "import sys; from robustbench_x.data.packaged import SOURCE; "
        "SOURCE.open('packaged:photos', 'photos', 0); sys.exit('foolbox' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean digits"):
        SOURCE.open("packaged:digit", "digit", 0)


@pytest.mark.parametrize(("name", "package"), [("digits", "scikit-learn"), ("photos", "foolbox")])
def test_a_missing_package_prints_the_command(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    modules = {"digits": "sklearn", "photos": "foolbox"}
    for loaded in [module for module in sys.modules if module.split(".")[0] == modules[name]]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder)])
    importlib.invalidate_caches()
    with pytest.raises(MissingExtraError, match=rf"needs the package {package}: pip install .*\[packaged\]"):
        SOURCE.open(f"packaged:{name}", name, 0)

"""`python:module:callable`: a user's own module, and what is said when it cannot be used."""

import itertools
from pathlib import Path

import pytest
import torch

from robustbench_x.encoders.encoder import LoadedEncoder
from robustbench_x.encoders.python_source import SOURCE
from robustbench_x.encoders.source import EncoderOptions
from robustbench_x.errors import ConfigError, SourceError

_counter = itertools.count()
_HEADER = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.deep = nn.Conv2d(4, 6, 2, stride=2)
        self.runs = []
        self.deep.register_forward_hook(lambda *_: self.runs.append("deep"))

    def forward(self, images):
        assert images.min() >= 0
        return self.deep(self.stem(images).relu()).mean((2, 3))

"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Loader":
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Loader(tmp_path)


class Loader:
    """Writes a module of its own name (imports are cached) and loads `make` from it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, body: str, attribute: str = "make", **options: int) -> LoadedEncoder:
        name = f"user_module_{next(_counter)}"
        (self._folder / f"{name}.py").write_text(_HEADER + body)
        rest = f"{name}:{attribute}"
        return SOURCE.load(f"python:{rest}", rest, EncoderOptions(**options))  # type: ignore[arg-type]


_MAKE = """
def make():
    net = Net()
    net.input_size = 32
    net.layers = ["stem", "deep"]
    net.classes = ["a", "b", "c", "d", "e", "5"]
    return net
"""


def test_a_plain_module_is_encoder_and_head_at_once(load: Loader) -> None:
    encoder, classifier, _ = load(_MAKE)
    assert (encoder.input_size, encoder.feature_dim) == ((32, 32), 6)
    assert classifier is not None
    assert classifier.num_classes == 6
    assert classifier.aliases["a"] == classifier.aliases["0"] == 0
    assert classifier.aliases["5"] == 5
    assert any("serve as features and" in note for note in encoder.notes)
    features = encoder(torch.rand(2, 3, 32, 32))
    assert torch.equal(classifier(features), features)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_its_layers_are_hooked_and_a_shallow_pass_stops_early(load: Loader) -> None:
    encoder = load(_MAKE).encoder
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    net = encoder.get_submodule("backbone.module")
    tokens = encoder.tokens(images, ["stem"])["stem"].spatial
    assert tokens.shape == (2, 64, 4)
    expected = net.get_submodule("stem")(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected)
    runs = len(net.runs)  # type: ignore[arg-type]
    encoder.tokens(images, ["stem"])
    assert len(net.runs) == runs  # type: ignore[arg-type]
    both = encoder.tokens(images, ["deep", "stem"])
    assert both["deep"].spatial.shape == (2, 16, 6)
    (gradient,) = torch.autograd.grad(both["deep"].spatial.sum(), images)
    assert gradient.any()


def test_defaults_without_attributes(load: Loader) -> None:
    encoder, classifier, _ = load("make = Net")
    assert (encoder.input_size, encoder.layers) == ((224, 224), ())
    assert classifier is not None
    assert classifier.aliases == {str(i): i for i in range(6)}
    assert load("make = Net", size=40).encoder.input_size == (40, 40)


def test_the_digest_follows_the_weights(load: Loader) -> None:
    body = "def make():\n    torch.manual_seed({seed})\n    return Net()\n"
    digests = [load(body.format(seed=seed)).encoder.sha256 for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_a_module_that_changes_itself_is_refused(load: Loader) -> None:
    body = """
class Drifting(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, images):
        self.calls += 1
        return super().forward(images)
"""
    with pytest.raises(SourceError, match="changes its own weights or buffers when it runs"):
        load(body, "Drifting")


def test_a_timm_model_is_treated_as_one(load: Loader) -> None:
    encoder, classifier, _ = load(
        "import timm\ndef make():\n    return timm.create_model('vit_tiny_patch16_224', depth=2)"
    )
    assert encoder.preprocessing.mean == (0.5, 0.5, 0.5)
    assert encoder.layers == ("blocks.0", "blocks.1")
    assert classifier is not None
    assert classifier.num_classes == 1000


def test_a_finished_encoder_is_passed_on(load: Loader) -> None:
    body = """
from robustbench_x.encoders import Classifier, Encoder, LoadedEncoder
from robustbench_x.encoders.encoder import Preprocessing

class Backbone(Net):
    layers = ()
    pooled = Net.forward

def encoder():
    return Encoder(source="mine", backbone=Backbone(), preprocessing=Preprocessing(input_size=(32, 32)))

def loaded():
    return LoadedEncoder(encoder(), Classifier(nn.Linear(6, 2), num_classes=2))
"""
    alone = load(body, "encoder")
    assert (alone.encoder.source, alone.classifier) == ("mine", None)
    both = load(body, "loaded")
    assert both.classifier is not None
    with pytest.raises(ConfigError, match=r"finished encoder of its own size; drop \?size=64"):
        load(body, "encoder", size=64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def makes(): ...", "has no make; did you mean makes"),
        ("make = 3", "make is a int, not a callable"),
        ("def make(): return 3", "returned a int; expected a torch module"),
        ("def make(): raise ValueError('no weights')", r"make\(\) raised ValueError: no weights"),
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("import not_installed_anywhere", "failed: No module named 'not_installed_anywhere'"),
        ("make = lambda: nn.Conv2d(3, 4, 1)", r"shape \(1, 4, 224, 224\) for one image"),
        ("make = lambda: nn.Linear(7, 2)", "does not run on images 224x224"),
        ("def make():\n    n = Net()\n    n.layers = ['steem']\n    return n", "no module steem; did you mean stem"),
        ("def make():\n    n = Net()\n    n.classes = ['a']\n    return n", "1 different names for 6 outputs"),
        ("def make():\n    n = Net()\n    n.input_size = 'big'\n    return n", "input_size = 'big' is neither"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(load: Loader, body: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load(body)


def test_a_missing_module_and_a_malformed_source() -> None:
    with pytest.raises(SourceError, match="there is no module no_such_module here"):
        SOURCE.load("python:no_such_module:make", "no_such_module:make", EncoderOptions())
    with pytest.raises(ConfigError, match="write python:module:callable"):
        SOURCE.load("python:no_such_module", "no_such_module", EncoderOptions())

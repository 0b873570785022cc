"""Negative controls: attacks that fail, cheat or tamper. None makes a victim look robust or touches the next cell."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from project import PGD, TINY, Audited, attack, audit, audit_config, metrics_without_time, rows_without_time, value
from robustbench_x.plugin import AttackSpec
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderView, QueryView, View, WhiteboxView


@dataclass(frozen=True, kw_only=True)
class Raises:
    """Raises."""

    def run(self, view: View) -> Tensor:
        raise RuntimeError("nothing works")


@dataclass(frozen=True, kw_only=True)
class Exits:
    """Ends the process with a success."""

    def run(self, view: View) -> Tensor:
        raise SystemExit(0)


@dataclass(frozen=True, kw_only=True)
class NoTensor:
    """Returns nothing."""

    def run(self, view: View) -> Tensor:
        return None  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class WrongShape:
    """Returns one image."""

    def run(self, view: View) -> Tensor:
        return view.inputs[:1].repeat(1, 1, 2, 1)


@dataclass(frozen=True, kw_only=True)
class SomeNaN:
    """Noise, with NaN on every other image."""

    def run(self, view: View) -> Tensor:
        images = view.threat.noise(view.inputs, view.random)
        images[::2, 0, 0, 0] = torch.nan
        return images


@dataclass(frozen=True, kw_only=True)
class Overruns:
    """Ten times the budget."""

    def run(self, view: View) -> Tensor:
        larger = ThreatModel(norm=view.threat.norm, eps=10 * view.threat.eps)
        return larger.noise(view.inputs, view.random)


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Returns what it was given, having asked nothing."""

    def run(self, view: View) -> Tensor:
        return view.inputs


@dataclass(frozen=True, kw_only=True)
class IdleAfterAQuestion:
    """Looks at the model once and gives up."""

    def run(self, view: WhiteboxView) -> Tensor:
        view.model(view.inputs)
        return view.inputs


@dataclass(frozen=True, kw_only=True)
class HardlyMoves:
    """Changes every image by next to nothing, one properly."""

    def run(self, view: WhiteboxView) -> Tensor:
        view.model(view.inputs)
        images = view.inputs + 1e-6
        images[:1] = view.threat.noise(view.inputs, view.random)[:1]
        return images.clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Descends:
    """PGD with the sign of its step turned round."""

    def run(self, view: WhiteboxView) -> Tensor:
        images = view.inputs
        for _ in range(3):
            images = images.detach().requires_grad_(True)
            loss = nn.functional.cross_entropy(view.model(images), view.labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, images)
            images = view.threat.project(images - view.threat.eps / 2 * gradient.sign(), view.inputs)
        return images.detach()


@dataclass(frozen=True, kw_only=True)
class JustNoise:
    """Claims to see the model and returns a uniform draw."""

    def run(self, view: WhiteboxView) -> Tensor:
        view.model(view.inputs)
        return view.threat.start(view.inputs, view.random)


@dataclass(frozen=True, kw_only=True)
class WritesInputs:
    """Paints over everything it was handed."""

    def run(self, view: WhiteboxView) -> Tensor:
        view.inputs.fill_(0.5)
        view.labels.fill_(0)
        object.__setattr__(view.threat, "eps", 0.0)
        return view.inputs


@dataclass(frozen=True, kw_only=True)
class WritesSurrogate:
    """Blanks the surrogate images, and says so by failing when they were blank before."""

    def run(self, view: EncoderView) -> Tensor:
        assert view.surrogate is not None
        assert view.surrogate.std() > 0.01, "someone blanked the surrogate"
        view.surrogate.zero_()
        return view.threat.noise(view.inputs, view.random)


@dataclass(frozen=True, kw_only=True)
class TouchesTheProcess:
    """Leaves every global switch the other way round."""

    def run(self, view: View) -> Tensor:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_autocast_enabled("cpu", True)
        return view.threat.noise(view.inputs, view.random)


@dataclass(frozen=True, kw_only=True)
class KeepsAsking:
    """Keeps its query function for the next batch."""

    def run(self, view: QueryView) -> Tensor:
        _KEPT.append(view)
        for kept in _KEPT:
            kept.query(view.inputs)
        return view.threat.noise(view.inputs, view.random)


_KEPT: list[QueryView] = []


def _network(view: EncoderView) -> Any:
    return view.encoder._encoder.backbone.module


def _forget(view: EncoderView) -> None:
    _network(view).late[0].weight.data.mul_(0.0)


def _permute(view: EncoderView) -> None:
    """Neither the sum nor the sum of squares of the weights moves."""
    weight = _network(view).late[0].weight.data
    weight.copy_(weight.flip(0).clone())


def _statistics(view: EncoderView) -> None:
    _network(view).early[1].running_mean.add_(3.0)


def _train_mode(view: EncoderView) -> None:
    _network(view).train()


def _hook(view: EncoderView) -> None:
    _network(view).register_forward_hook(lambda _module, _args, output: output * 0 + 1)


def _global_hook(view: EncoderView) -> None:
    own = _network(view)
    nn.modules.module.register_module_forward_hook(
        lambda module, _args, output: output * 0 + 1 if module is own else None
    )


def _method(view: EncoderView) -> None:
    _network(view).forward = lambda images: torch.ones(len(images), 384)


def _submodule(view: EncoderView) -> None:
    _network(view).late = nn.Sequential(nn.AdaptiveAvgPool2d(4))


def _weight_object(view: EncoderView) -> None:
    _network(view).late[0].weight = nn.Parameter(torch.zeros(1), requires_grad=False)


def _preprocessing(view: EncoderView) -> None:
    view.encoder._encoder.std.fill_(1e6)


def _gradients(view: EncoderView) -> None:
    _network(view).requires_grad_(True)
    view.encoder.features(view.inputs).sum().backward()  # type: ignore[no-untyped-call]


TAMPERING: tuple[Callable[[EncoderView], None], ...] = (
    _forget,
    _permute,
    _statistics,
    _train_mode,
    _hook,
    _global_hook,
    _method,
    _submodule,
    _weight_object,
    _preprocessing,
    _gradients,
)


def _tamperer(act: Callable[[EncoderView], None], *, then: type[Exception] | None = None) -> AttackSpec:
    @dataclass(frozen=True, kw_only=True)
    class Tampers:
        """Changes the encoder, and leaves it changed."""

        def run(self, view: EncoderView) -> Tensor:
            act(view)
            if then is not None:
                raise then("out of memory")
            return view.threat.noise(view.inputs, view.random)

    return attack(Tampers, access="encoder")


def _with(images: Path, out: Path, spec: AttackSpec, **settings: Any) -> Audited:
    """The planted attack first, an honest one after it."""
    return audit(audit_config(images, attacks=[spec.name, PGD], **settings), out, spec)


@pytest.fixture(scope="module")
def honest(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """The same audit without a fraud."""
    return audit(audit_config(images), tmp_path_factory.mktemp("honest") / "out")


def _assert_caught(audited: Audited, honest: Audited, kinds: set[str], *, code: int) -> None:
    """Named as an error, no exit code 0 to be had, and the honest cells as if the fraud had never run."""
    assert kinds <= audited.ids("error"), audited.report.findings
    assert audited.decide(strict=True).exit_code == code
    assert audited.lenient_gate().exit_code == code
    assert audited.report.status == ("error" if code == 3 else "complete")
    theirs, mine = metrics_without_time(honest.report), metrics_without_time(audited.report)
    for cell in honest.report.cells:
        assert mine[cell.id] == theirs[cell.id], f"{cell.id} felt the fraud"
        assert rows_without_time(audited.of(cell)) == rows_without_time(honest.of(cell))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Raises, "RuntimeError: nothing works"),
        (Exits, "SystemExit: 0"),
        (NoTensor, "returned a NoneType, not a tensor"),
        (WrongShape, "the attack returned shape"),
    ],
)
def test_a_failing_attack_ends_in_error_rows(
    images: Path, tmp_path: Path, honest: Audited, factory: type, message: str
) -> None:
    audited = _with(images, tmp_path / "out", attack(factory, access="none"))
    _assert_caught(audited, honest, {"sample_errors"}, code=3)
    cell = audited.cell(factory.__name__.lower())
    assert cell.n_errors == cell.n == 40
    assert {m.value for m in cell.metrics.values()} == {None}
    assert all(message in row["error"] for row in audited.of(cell))


def test_nan_on_some_samples_costs_those_samples_only(images: Path, tmp_path: Path, honest: Audited) -> None:
    audited = _with(images, tmp_path / "out", attack(SomeNaN, access="none"))
    _assert_caught(audited, honest, {"sample_errors"}, code=3)
    cell = audited.cell("somenan")
    errors = [row["error"] for row in audited.of(cell)]
    assert sum(error is not None for error in errors) == cell.n_errors == 20
    assert all("NaN or infinite pixels" in error for error in errors if error)
    assert value(cell, "robust_accuracy") <= 0.5, "the failed ones are not robust"


def test_an_attack_that_leaves_its_budget_is_projected_and_named(images: Path, tmp_path: Path, honest: Audited) -> None:
    audited = _with(images, tmp_path / "out", attack(Overruns, access="none"))
    _assert_caught(audited, honest, {"budget_overrun"}, code=4)
    assert value(audited.cell("overruns"), "linf_max") <= 4 / 255 + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2", "patch"])
@pytest.mark.parametrize("factory", [Idle, IdleAfterAQuestion, HardlyMoves])
def test_clean_images_are_no_attack(images: Path, tmp_path: Path, factory: type, norm: str) -> None:
    norms = ("linf", "l2", "patch")
    spec = attack(factory, access="none" if factory is Idle else "whitebox", norms=norms)
    eps = {"linf": 4 / 255, "l2": 0.5, "patch": 0.05}[norm]
    audited = audit(audit_config(images, attacks=[spec.name], norm=norm, eps=eps), tmp_path / "out", spec)
    assert value(audited.cell(spec.name), "robust_accuracy") > 0.8
    assert "idle_attack" in audited.ids("error")
    assert audited.decide(strict=True).exit_code == audited.lenient_gate().exit_code == 4


def test_a_search_that_finds_nothing_is_only_a_warning(images: Path, tmp_path: Path) -> None:
    spec = attack(IdleAfterAQuestion, budget=False)
    audited = audit(audit_config(images, attacks=[spec.name]), tmp_path / "out", spec)
    assert "idle_attack" in audited.ids("warning")
    lazy = attack(Idle, access="none", budget=False)
    assert "idle_attack" in audit(audit_config(images, attacks=["idle"]), tmp_path / "lazy", lazy).ids("error")


@pytest.mark.parametrize("factory", [Descends, JustNoise])
def test_an_attack_that_is_no_better_than_noise_is_named(
    images: Path, tmp_path: Path, honest: Audited, factory: type
) -> None:
    audited = _with(images, tmp_path / "out", attack(factory))
    _assert_caught(audited, honest, {"no_better_than_noise"}, code=4)


def test_writing_to_the_view_changes_nothing(images: Path, tmp_path: Path, honest: Audited) -> None:
    audited = _with(images, tmp_path / "out", attack(WritesInputs))
    _assert_caught(audited, honest, {"budget_overrun"}, code=4)
    cell = audited.cell("writesinputs")
    assert value(cell, "linf_max") == pytest.approx(4 / 255, abs=1e-6), "measured from the true clean images"
    assert value(cell, "clean_accuracy") == value(honest.cell("pgd"), "clean_accuracy")


def test_every_batch_gets_its_own_surrogate(images: Path, tmp_path: Path) -> None:
    spec = attack(WritesSurrogate, access="encoder")
    settings: dict[str, Any] = {"surrogate": f"folder:{images}", "surrogate_samples": 6}
    audited = audit(audit_config(images, attacks=[spec.name], **settings), tmp_path / "out", spec)
    assert audited.cell(spec.name).n_errors == 0, [row["error"] for row in audited.rows]


def test_global_switches_are_put_back(images: Path, tmp_path: Path, honest: Audited) -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)
    spec = attack(TouchesTheProcess, access="none")
    audited = _with(images, tmp_path / "out", spec)
    for cell in honest.report.cells:
        assert rows_without_time(audited.of(cell)) == rows_without_time(honest.of(cell))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state(legacy=True)) == str(states[2])
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_a_query_function_ends_with_its_batch(images: Path, tmp_path: Path, honest: Audited) -> None:
    _KEPT.clear()
    audited = _with(images, tmp_path / "out", attack(KeepsAsking, access="scores"))
    _assert_caught(audited, honest, {"sample_errors"}, code=3)
    cell = audited.cell("keepsasking")
    assert cell.n_errors == cell.n - 16, "the first batch asked its own function only"


@pytest.mark.parametrize("act", TAMPERING, ids=lambda act: act.__name__.strip("_"))
def test_tampering_is_caught_and_undone(
    images: Path, tmp_path: Path, honest: Audited, act: Callable[[EncoderView], None]
) -> None:
    audited = _with(images, tmp_path / "out", _tamperer(act))
    _assert_caught(audited, honest, {"sample_errors"}, code=3)
    cell = audited.cell("tampers")
    assert cell.n_errors == cell.n
    assert all("the attack" in row["error"] for row in audited.of(cell)), audited.of(cell)[0]["error"]


@pytest.mark.parametrize("then", [ValueError, MemoryError])
def test_tampering_is_undone_when_the_attack_fails_as_well(
    images: Path, tmp_path: Path, honest: Audited, then: type[Exception]
) -> None:
    audited = _with(images, tmp_path / "out", _tamperer(_hook, then=then))
    _assert_caught(audited, honest, {"sample_errors"}, code=3)


def test_tampering_by_one_of_many_heads_is_undone(images: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Rewires:
        """Reaches through the closure for the head."""

        def run(self, view: WhiteboxView) -> Tensor:
            see: Any = view.model._logits
            cells = see.__closure__
            head = next(c.cell_contents for c in cells if hasattr(c.cell_contents, "num_classes"))
            head.layer.bias.data.add_(torch.tensor([50.0, 0, 0, 0]))
            return view.inputs

    spec = attack(Rewires)
    heads = ["linear", "prototype"]
    plain = audit(audit_config(images, head=heads), tmp_path / "plain")
    audited = audit(audit_config(images, head="linear", attacks=[spec.name, PGD]), tmp_path / "out", spec)
    assert audited.cell("rewires").n_errors == 40
    mine = metrics_without_time(audited.report)[audited.cell("pgd").id]
    assert mine == metrics_without_time(plain.report)[plain.cell("pgd", head="linear").id]


def test_the_encoder_is_what_it_was(images: Path, tmp_path: Path) -> None:
    """Nothing of the frauds above is left in the process: an audit now equals one in a fresh folder."""
    one = audit(audit_config(images, encoder=TINY), tmp_path / "one")
    two = audit(audit_config(images, encoder=TINY), tmp_path / "two")
    assert rows_without_time(one.rows) == rows_without_time(two.rows)

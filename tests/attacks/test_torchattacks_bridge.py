"""The torchattacks bridge: a contract over every name, and one test per guard that fails without it."""

import importlib
import inspect
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_x.encoders.encoder import check_range
from robustbench_x.errors import AttackError, BudgetError, ConfigError, MissingExtraError, RangeError
from robustbench_x.plugin import check_spec
from robustbench_x.randomness import SampleRandom
from robustbench_x.threat import Norm, ThreatModel
from robustbench_x.views import ImageView, Meter, ModelHandle, Query, QueryView, View, WhiteboxView
from robustbench_x_attacks.torchattacks_bridge import attack_class, specs
from robustbench_x_attacks.torchattacks_bridge.adapter import Adapter
from robustbench_x_attacks.torchattacks_bridge.catalogue import ENTRIES
from robustbench_x_attacks.torchattacks_bridge.entry import Entry
from robustbench_x_attacks.torchattacks_bridge.instance import INSTANCE_ENTRIES

pytest.importorskip("torchattacks")

SIDE, CLASSES = 16, 5
BY_NAME = {entry.name: entry for entry in ENTRIES}
QUICK: dict[str, Any] = {
    "steps": 3,
    "search_steps": 2,
    "queries": 20,
    "samples": 4,
    "popsize": 10,
    "tries": 2,
    "neighbours": 2,
    "draws": 2,
    "eot": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "CW": {"steps": 40},
    "EADEN": {"steps": 20, "initial_const": 10.0},
    "EADL1": {"steps": 20, "initial_const": 10.0},
    "JSMA": {"gamma": 0.01},
    "Square": {"queries": 60},
}
CLAMPING = [entry.name for entry in ENTRIES if entry.clamps]
CASES = [(entry.name, norm) for entry in ENTRIES for norm in entry.norms]
Fn = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only pay for threads, dearly where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """A convolution with dropout (dead in eval mode) that refuse what our encoder refuses."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, stride=2), nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Linear(8, classes)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * 0.5
        self.eval()
        with torch.no_grad():  # no class wins everywhere
            self.head.bias.sub_(self(pixels(32)).mean(dim=0))

    def forward(self, images: Tensor) -> Tensor:
        check_range(images)
        logits: Tensor = self.head(self.body(images).mean(dim=(2, 3)) * 4)
        return logits


def pixels(count: int = 2, *, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def global_states() -> tuple[bytes, object, bytes]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), pickle.dumps(np.random.get_state())


def view_of(
    entry: Entry,
    fn: Fn,
    inputs: Tensor,
    *,
    norm: Norm | None = None,
    eps: float | None = None,
    labels: Tensor | None = None,
    classes: int = CLASSES,
    cap: int | None = None,
    meter: Meter | None = None,
    seed: int = 0,
) -> View:
    norm = norm or entry.norms[0]
    budget = (0.1 if norm == "linf" else 3.0) if eps is None else eps
    threat, meter = ThreatModel(norm=norm, eps=budget), meter or Meter()
    seeds = SampleRandom([seed + row for row in range(len(inputs))])
    if entry.access == "none":
        return ImageView(inputs=inputs, threat=threat, random=seeds)
    if labels is None:
        with torch.no_grad():
            labels = fn(inputs).argmax(dim=1) if len(inputs) else torch.zeros(0, dtype=torch.long)
    if entry.access == "scores":
        query = Query(fn, meter, answer="scores", cap=cap)
        return QueryView(inputs=inputs, threat=threat, random=seeds, labels=labels, query=query, num_classes=classes)
    model = ModelHandle(fn, meter)
    return WhiteboxView(inputs=inputs, threat=threat, random=seeds, labels=labels, model=model, num_classes=classes)


def build(entry: Entry, **params: Any) -> Any:
    names = {knob.name: knob for knob in entry.all_knobs}
    quick = {key: max(value, int(names[key].low)) for key, value in QUICK.items() if key in names}
    return attack_class(entry)(**{**quick, **OWN.get(entry.name, {}), **params})


def run(name: str, fn: Fn, inputs: Tensor, *, params: dict[str, Any] | None = None, **options: Any) -> Tensor:
    entry = BY_NAME[name]
    result: Tensor = build(entry, **(params or {})).run(view_of(entry, fn, inputs, **options))
    return result


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_contract(name: str, norm: Norm, capsys: pytest.CaptureFixture[str]) -> None:
    net, inputs, entry = Net(), pixels(), BY_NAME[name]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    kept = inputs.clone()
    states = global_states()
    view = view_of(entry, net, inputs, norm=norm)
    first = build(entry).run(view)
    assert global_states() == states
    torch.rand(3)
    np.random.rand(3)
    random.random()
    assert torch.equal(first, build(entry).run(view_of(entry, net, inputs, norm=norm)))
    assert first.shape == inputs.shape
    assert first.dtype == torch.float32
    assert not first.requires_grad
    assert first.isfinite().all()
    if entry.budget:
        assert view.threat.overrun(first, inputs).max() < 1e-5
    final = view.threat.project(first, inputs)
    assert final.min() >= 0
    assert final.max() <= 1
    assert not torch.equal(first, inputs)
    assert torch.equal(inputs, kept)
    assert not net.training
    assert all(weight.grad is None and weight.requires_grad for weight in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", BY_NAME)
def test_one_oblong_image_and_few_classes(name: str) -> None:
    entry = BY_NAME[name]
    shape = {} if entry.square else {"width": SIDE + 4}
    classes = entry.min_classes
    inputs = pixels(1, **shape)
    assert run(name, Net(classes), inputs, classes=classes).shape == inputs.shape


@pytest.mark.parametrize("name", BY_NAME)
def test_zero_eps_and_empty_batch_change_nothing(name: str) -> None:
    inputs = pixels()
    assert torch.equal(run(name, Net(), inputs, eps=0.0), inputs)
    assert run(name, Net(), inputs[:0]).shape == (0, 3, SIDE, SIDE)


@pytest.mark.parametrize("name", BY_NAME)
def test_every_constructor_argument_is_pinned(name: str) -> None:
    entry = BY_NAME[name]
    theirs = set(inspect.signature(getattr(importlib.import_module("torchattacks"), name).__init__).parameters)
    ours = set(entry.arguments({knob.name: knob.default for knob in entry.all_knobs})) | {"self", "model"}
    ours |= ({entry.eps} - {""}) | ({"norm"} if entry.dual else set()) | ({"seed"} if entry.seeded else set())
    ours |= {"n_classes"} if entry.counts_classes else set()
    assert ours == theirs


def test_catalogue_is_all_of_torchattacks_but_wrappers_and_the_identity() -> None:
    everything = set(importlib.import_module("torchattacks").__all__)
    assert everything - set(BY_NAME) == {"VANILA", "MultiAttack", "LGV"}
    instances = [f"instance:{entry.name}" for entry in INSTANCE_ENTRIES]
    assert [spec.name for spec in specs()] == [f"torchattacks:{entry.name}" for entry in ENTRIES] + instances
    for spec in specs():
        check_spec(spec)
        assert all(p.help for p in spec.params)
        assert spec.effective() == {p.name: p.default for p in spec.params}


def test_importing_the_plugin_does_not_import_torchattacks() -> None:
    code = (
        "import sys, robustbench_x_attacks.torchattacks_bridge as bridge; "
        "assert len(bridge.specs()) == 36 + 5; assert 'torchattacks' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'robustbench-x\[torchattacks\]'"):
        specs()[0].build()


def test_parameters_out_of_bounds_are_configuration_errors() -> None:
    spec = {spec.name: spec for spec in specs()}
    with pytest.raises(ConfigError, match="steps=0 must be at least 1"):
        spec["torchattacks:PGD"].build({"steps": 0})
    # Fewer than 10 and torchattacks divides by zero.
    with pytest.raises(ConfigError, match="steps=9 must be at least 10"):
        spec["torchattacks:EADEN"].build({"steps": 9})
    with pytest.raises(ConfigError, match=r"resize_rate=1 must be in \[0.5, 0.99\]"):
        spec["torchattacks:DIFGSM"].build({"resize_rate": 1})


def test_normalised_inputs_are_refused() -> None:
    with pytest.raises(RangeError, match=r"pixels must lie in \[0, 1\]"):
        run("PGD", lambda images: images.mean(dim=(2, 3)), pixels() * 4 - 2)


@pytest.mark.parametrize("name", CLAMPING)
def test_attacks_that_leave_the_range_need_the_clamp(name: str) -> None:
    entry = BY_NAME[name].replace(clamps=False)
    inputs = (pixels() > 0.5).float() * 0.999 + 0.0005
    far = {"lam": 1000.0} if name == "SparseFool" else {}
    with pytest.raises(RangeError, match="pixels must lie"):
        build(entry, **far).run(view_of(entry, Net(), inputs))


def test_clamp_keeps_the_gradient_and_holds_far_outside() -> None:
    adapter = Adapter(Net(), device=torch.device("cpu"), num_classes=CLASSES, gradients=True, clamps=True)
    images = ((pixels() - 0.5) * 1e7).requires_grad_()
    adapter(images).sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).any()


@pytest.mark.parametrize(
    ("name", "params"),
    [("CW", {}), ("EADEN", {}), ("EADL1", {}), ("UPGD", {"loss": "margin", "steps": 10})],
)
def test_negative_logits_are_attacked_as_well_as_positive_ones(name: str, params: dict[str, Any]) -> None:
    net, inputs, entry = Net(), pixels(8), BY_NAME[name]
    labels = net(inputs).argmax(dim=1)

    def negative(images: Tensor) -> Tensor:
        logits: Tensor = net(images) - 100
        return logits

    def fooled(chosen: Entry) -> int:
        view = view_of(chosen, negative, inputs)
        candidates = view.threat.project(build(chosen, **params).run(view), inputs)
        return int((net(candidates).argmax(dim=1) != labels).sum())

    assert fooled(entry) >= 6
    assert fooled(entry.replace(lifts=False)) < fooled(entry)


def test_cw_moves_saturated_pixels_and_returns_failures_untouched() -> None:
    net, entry = Net(), BY_NAME["CW"]
    inputs = (pixels(8) > 0.5).float()
    labels = net(inputs).argmax(dim=1)
    stuck = entry.replace(insets=False)
    assert torch.equal(build(stuck, steps=300).run(view_of(stuck, net, inputs)), inputs)
    candidates = run("CW", net, inputs, params={"steps": 300})
    fooled = net(candidates).argmax(dim=1) != labels
    assert fooled.sum() >= 4
    assert torch.equal(run("CW", net, inputs, params={"c": 0.0}), inputs)


def test_jsma_aims_at_the_next_class_modulo_the_classes() -> None:
    net, inputs = Net(), pixels(6)
    labels = torch.full((6,), CLASSES - 1)
    candidates = run("JSMA", net, inputs, labels=labels, params={"gamma": 0.145})
    assert (net(candidates).argmax(dim=1) == 0).any()


@pytest.mark.parametrize("name", ["DeepFool", "SparseFool"])
@pytest.mark.parametrize("label", [0, 2])
def test_zero_gradients_leave_nan_in_their_own_row(name: str, label: int) -> None:
    net, inputs = Net(), pixels(2)
    inputs[0] *= 0.1

    def half_dead(images: Tensor) -> Tensor:
        dark = (images.detach().mean(dim=(1, 2, 3)) < 0.2)[:, None]
        flat = images.sum(dim=(1, 2, 3))[:, None] * 0 + torch.eye(CLASSES)[label]
        return torch.where(dark, flat, net(images))

    candidates = run(name, half_dead, inputs)
    assert candidates[0].isnan().any()
    assert candidates[1].isfinite().all()


def test_deepfool_pays_for_its_likeliest_classes_only() -> None:
    net, inputs, meter = Net(40), pixels(2), Meter()
    labels = net(inputs).argmax(dim=1)
    candidates = run("DeepFool", net, inputs, classes=40, params={"steps": 50}, meter=meter)
    assert (net(candidates).argmax(dim=1) != labels).all()
    assert meter.backwards % 10 == 0
    assert meter.backwards <= 10 * meter.forwards


def test_targeted_auto_pgd_tries_nine_targets() -> None:
    net, inputs, meter = Net(40), pixels(2), Meter()
    assert torch.equal(run("APGDT", net, inputs, classes=40, eps=1e-6, meter=meter), inputs)
    per_target = 1 + QUICK["eot"] * (QUICK["steps"] + 1)
    assert meter.forwards == len(inputs) * (1 + 9 * per_target)


def test_autoattack_runs_its_parts_for_the_steps_asked() -> None:
    def passes(steps: int) -> int:
        meter = Meter()
        run("AutoAttack", Net(), pixels(1), eps=1e-6, params={"steps": steps}, meter=meter)
        return meter.backwards

    targets = CLASSES - 1
    # One more step is one more gradient of APGD, one of APGDT and one of FAB for each target.
    assert passes(5) - passes(4) == 1 + 2 * targets


def test_autoattack_gives_square_the_queries_asked() -> None:
    def passes(queries: int) -> int:
        meter = Meter()
        run("AutoAttack", Net(), pixels(1), eps=1e-6, params={"queries": queries}, meter=meter)
        return meter.forwards

    assert passes(25) - passes(20) == 5


@pytest.mark.parametrize("name", ["APGD", "APGDT", "Square", "AutoAttack"])
def test_attacks_that_seed_themselves_get_the_views_seed(name: str) -> None:
    first, second = (run(name, Net(), pixels(), eps=0.3, seed=seed) for seed in (0, 100))
    assert not torch.equal(first, second)


def test_spsa_is_kept_from_asking_about_its_copies_all_at_once() -> None:
    net, sizes = Net(), []

    def sized(images: Tensor) -> Tensor:
        sizes.append(len(images))
        logits: Tensor = net(images)
        return logits

    run("SPSA", sized, pixels(5), params={"samples": 32, "steps": 1})
    assert max(sizes) == 64


@pytest.mark.parametrize("name", ["APGDT", "AutoAttack"])
@pytest.mark.parametrize("classes", [2, 3])
def test_too_few_classes_name_another_attack(name: str, classes: int) -> None:
    with pytest.raises(AttackError, match=f"needs 4 classes, the head has {classes}: use torchattacks:APGD"):
        run(name, Net(classes), pixels(), classes=classes)


@pytest.mark.parametrize("name", ["APGD", "UPGD"])
def test_dlr_needs_three_classes(name: str) -> None:
    with pytest.raises(AttackError, match=rf"needs 3 classes, the head has 2: use torchattacks:{name} with loss=ce"):
        run(name, Net(2), pixels(), classes=2, params={"loss": "dlr"})


@pytest.mark.parametrize("name", ["DIFGSM", "TIFGSM", "Pixle", "Square", "AutoAttack"])
def test_oblong_images_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(AttackError, match=f"needs square images, got 16x20: {BY_NAME[name].square}"):
        run(name, Net(), pixels(1, width=20))


def test_jsma_refuses_what_does_not_fit_in_memory() -> None:
    with pytest.raises(AttackError, match="memory quadratic in the 12288 pixel values"):
        run("JSMA", Net(), pixels(1, height=64, width=64))


def test_other_norms_are_refused() -> None:
    with pytest.raises(AttackError, match="CW runs with l2, not with linf"):
        run("CW", Net(), pixels(), norm="linf")


@pytest.mark.parametrize("gradients", [True, False])
def test_answers_are_fresh_so_that_square_may_write_into_them(gradients: bool) -> None:
    table = torch.arange(10.0).view(2, 5).requires_grad_(gradients)
    adapter = Adapter(lambda images: table, device=torch.device("cpu"), num_classes=5, gradients=gradients)
    images = pixels().requires_grad_(gradients)
    answer = adapter(images).detach()
    answer[:] = -torch.inf
    assert table.isfinite().all()


def test_a_victim_without_gradient_is_an_error_not_robust() -> None:
    net = Net()
    with pytest.raises(AttackError, match="carry no gradient"):
        run("PGD", lambda images: net(images).detach(), pixels())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_where_gradients_are_off(mode: Callable[[], Any]) -> None:
    net = Net()
    expected = run("CW", net, pixels())
    with mode():
        assert torch.equal(run("CW", net, pixels()), expected)


def test_the_callers_autocast_does_not_reach_the_attack() -> None:
    net, inputs, entry = Net(), pixels(), BY_NAME["TIFGSM"]
    labels = net(inputs).argmax(dim=1)
    expected = run("TIFGSM", net, inputs, labels=labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(build(entry).run(view_of(entry, net, inputs, labels=labels)), expected)


def test_prints_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    net = Net()

    def chatty(images: Tensor) -> Tensor:
        print("asked")  # noqa: T201
        logits: Tensor = net(images)
        return logits

    entry = BY_NAME["FGSM"]
    view = view_of(entry, chatty, pixels(), labels=torch.zeros(2, dtype=torch.long))
    build(entry).run(view)
    assert capsys.readouterr() == ("", "asked\n")


def test_an_exception_mid_attack_leaves_nothing_behind() -> None:
    net, calls = Net(), [0]

    def fragile(images: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise AttackError("the victim broke")
        logits: Tensor = net(images)
        return logits

    attack, entry, inputs = build(BY_NAME["OnePixel"]), BY_NAME["OnePixel"], pixels()
    labels = net(inputs).argmax(dim=1)
    states = global_states()
    with pytest.raises(AttackError, match="the victim broke"):
        attack.run(view_of(entry, fragile, inputs, labels=labels))
    assert global_states() == states
    expected = build(entry).run(view_of(entry, net, inputs))
    assert torch.equal(attack.run(view_of(entry, fragile, inputs, labels=labels)), expected)


def test_square_stops_at_the_query_cap_and_others_overrun_it_loudly() -> None:
    meter = Meter()
    run("Square", Net(), pixels(), eps=1e-6, params={"queries": 5000}, cap=40, meter=meter)
    assert 30 <= meter.forwards <= 40
    with pytest.raises(BudgetError, match="the query cap of 10 images is spent"):
        run("OnePixel", Net(), pixels(), cap=10)


def test_one_gradient_is_counted_as_one() -> None:
    meter = Meter()
    run("FGSM", Net(), pixels(), meter=meter, labels=torch.zeros(2, dtype=torch.long))
    assert (meter.forwards, meter.backwards) == (2, 2)


@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES if entry.targets])
def test_targets_can_be_chosen(name: str) -> None:
    assert run(name, Net(), pixels(), params={"target": "least_likely"}).isfinite().all()


@pytest.mark.parametrize(
    ("name", "params"),
    [("PGD", {}), ("UPGD", {"loss": "dlr"}), ("Jitter", {}), ("PIFGSMPP", {}), ("CW", {"c": 100.0, "lr": 0.05})],
)
def test_targets_are_approached(name: str, params: dict[str, Any]) -> None:
    net, inputs = Net(), pixels(6)
    labels = net(inputs).argmax(dim=1)
    targets = (labels + 1) % CLASSES
    candidates = run(name, net, inputs, params={"target": "next", "steps": 40, **params}, eps=0.3)
    before = net(inputs).softmax(dim=1).gather(1, targets[:, None])
    after = net(candidates).softmax(dim=1).gather(1, targets[:, None])
    assert (after > before).float().mean() >= 0.5


@pytest.mark.parametrize(("name", "params"), [("FGSM", {}), ("PGD", {"steps": 20})])
def test_a_linear_victim_is_fooled_at_its_known_distance(name: str, params: dict[str, Any]) -> None:
    inputs = pixels(6) * 0.5 + 0.25
    weight = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    scores = (inputs * weight).sum(dim=(1, 2, 3))

    def linear(images: Tensor) -> Tensor:
        score = (images * weight).sum(dim=(1, 2, 3)) - scores.mean()
        return torch.stack([score, torch.zeros_like(score)], dim=1)

    for row in range(len(inputs)):
        image = inputs[row : row + 1]
        nearest = (linear(image)[:, 0].abs() / weight.abs().sum()).item()
        label = linear(image).argmax(dim=1)
        near, far = (
            run(name, linear, image, eps=nearest * factor, classes=2, params=params) for factor in (0.99, 1.05)
        )
        assert linear(near).argmax(dim=1) == label
        assert linear(far).argmax(dim=1) != label

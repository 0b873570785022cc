"""Every head against an independent implementation, and the contract that all of them keep."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from robustbench_x.errors import DataError, SampleError
from robustbench_x.heads import knn, linear, mlp, prototype
from robustbench_x.heads.base import FittedHead, HeadSpec
from robustbench_x.heads.catalogue import HEADS

FITTED = [spec for spec in HEADS if spec.fit]


def _clusters(
    n: int = 120, dim: int = 12, classes: int = 3, *, apart: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Overlapping Gaussian clusters whose dimensions differ in scale and offset, as features do."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = apart * torch.randn(classes, dim, generator=generator)
    features = centres[labels] + torch.randn(n, dim, generator=generator)
    return features * torch.logspace(-1, 1, dim) + torch.linspace(-2, 2, dim), labels


def _fit(spec: HeadSpec, features: Tensor, labels: Tensor, classes: int = 3, seed: int = 0) -> FittedHead:
    assert spec.fit is not None
    layer = spec.fit(features, labels, classes, seed)
    return FittedHead(name=spec.name, layer=layer, num_classes=classes, aliases={})


def test_the_catalogue_is_complete() -> None:
    assert [spec.name for spec in HEADS] == [
        "native", "linear", "mlp", "knn", "prototype", "retrieval", "zero_shot", "captions", "match", "entail",
        "caption", "lora", "adapter", "full", "file",
    ]  # fmt: skip
    assert [spec.name for spec in HEADS if not (spec.fit or spec.tune)] == [
        "native", "zero_shot", "captions", "match", "entail", "caption", "file",
    ]  # fmt: skip
    assert all(spec.summary for spec in HEADS)


@pytest.mark.parametrize("spec", FITTED, ids=lambda spec: spec.name)
def test_a_head_learns_clusters_and_generalises(spec: HeadSpec) -> None:
    features, labels = _clusters(apart=3.0)
    head = _fit(spec, features[:60], labels[:60])
    logits = head(features[60:])
    assert logits.shape == (60, 3)
    assert logits.dtype == torch.float32
    assert (logits.argmax(dim=1) == labels[60:]).float().mean() > 0.9


@pytest.mark.parametrize("spec", FITTED, ids=lambda spec: spec.name)
def test_gradients_reach_the_features(spec: HeadSpec) -> None:
    features, labels = _clusters()
    head = _fit(spec, features, labels)
    inputs = features[:5].clone().requires_grad_()
    torch.nn.functional.cross_entropy(head(inputs), labels[:5]).backward()  # type: ignore[no-untyped-call]
    assert inputs.grad is not None
    assert inputs.grad.isfinite().all()
    assert (inputs.grad.abs().amax(dim=1) > 0).all()
    assert not any(p.requires_grad for p in head.parameters())


@pytest.mark.parametrize("spec", [s for s in FITTED if s.name != "knn"], ids=lambda spec: spec.name)
def test_the_gradient_is_that_of_the_logits(spec: HeadSpec) -> None:
    features, labels = _clusters()
    head = _fit(spec, features[1:], labels[1:])  # on a gallery item itself the cosine is at its peak, and flat
    point = features[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(head(point)[0, labels[0]], point)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        change = head(point + step)[0, labels[0]] - head(point - step)[0, labels[0]]
    assert float(change) == pytest.approx(2e-2 * float(gradient.norm()), rel=0.02)


@pytest.mark.parametrize("spec", FITTED, ids=lambda spec: spec.name)
def test_a_fit_repeats_and_leaves_the_global_generator_alone(spec: HeadSpec) -> None:
    features, labels = _clusters()
    before = torch.random.get_rng_state()
    first = _fit(spec, features, labels, seed=3)(features)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(_fit(spec, features, labels, seed=3)(features), first)


@pytest.mark.parametrize("spec", FITTED, ids=lambda spec: spec.name)
def test_a_restored_head_is_the_same_head(spec: HeadSpec) -> None:
    features, labels = _clusters()
    head = _fit(spec, features, labels)
    assert spec.restore is not None
    before = torch.random.get_rng_state()
    restored = spec.restore({name: t.clone() for name, t in head.layer.state_dict().items()})
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(restored(features), head(features))


@pytest.mark.parametrize("spec", FITTED, ids=lambda spec: spec.name)
def test_fitting_does_not_touch_its_inputs(spec: HeadSpec) -> None:
    features, labels = _clusters()
    copies = features.clone(), labels.clone()
    with torch.no_grad():
        head = _fit(spec, features, labels)
    head(features)
    assert torch.equal(features, copies[0])
    assert torch.equal(labels, copies[1])


@pytest.mark.parametrize("spec", FITTED, ids=lambda spec: spec.name)
def test_a_class_without_samples_is_named(spec: HeadSpec) -> None:
    features, labels = _clusters()
    with pytest.raises(DataError, match=r"class index 3 has no training sample \(and 1 more classes\)"):
        _fit(spec, features, labels, classes=5)


@pytest.mark.parametrize("spec", FITTED, ids=lambda spec: spec.name)
def test_features_that_are_not_finite_are_counted(spec: HeadSpec) -> None:
    features, labels = _clusters()
    features[3, 2], features[7] = torch.nan, torch.inf
    with pytest.raises(DataError, match="2 of 120 training images have NaN or infinite features"):
        _fit(spec, features, labels)


@pytest.mark.parametrize("spec", FITTED, ids=lambda spec: spec.name)
def test_labels_must_fit_features_and_classes(spec: HeadSpec) -> None:
    features, labels = _clusters()
    with pytest.raises(DataError, match=r"got \(119, 12\) and \(120,\)"):
        _fit(spec, features[1:], labels)
    with pytest.raises(DataError, match=r"labels must lie in \[0, 2\), got \[0, 2\]"):
        _fit(spec, features, labels, classes=2)


@pytest.mark.parametrize("spec", FITTED, ids=lambda spec: spec.name)
def test_a_constant_feature_is_harmless(spec: HeadSpec) -> None:
    features, labels = _clusters(apart=3.0)
    features[:, 4] = 0.1  # its float32 variance may be rounding noise, never a direction to attack
    logits = _fit(spec, features, labels)(features + 1e-4 * torch.eye(12)[4])
    assert (logits.argmax(dim=1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("spec", FITTED, ids=lambda spec: spec.name)
def test_one_sample_per_class_is_enough(spec: HeadSpec) -> None:
    features, labels = _clusters(3, apart=4.0)
    head = _fit(spec, features, labels)
    assert torch.equal(head(features).argmax(dim=1), labels)


# scikit-learn solves two classes with one weight vector, which halves the penalty that softmax pays.
@pytest.mark.parametrize(("classes", "c"), [(2, 2.0), (3, 1.0), (7, 1.0)])
@pytest.mark.parametrize("apart", [0.3, 3.0])
def test_linear_is_scikit_learns_logistic_regression(classes: int, c: float, apart: float) -> None:
    features, labels = _clusters(140, classes=classes, apart=apart)
    head = _fit(linear.SPEC, features, labels, classes)
    scaler = StandardScaler().fit(features.double().numpy())
    inputs = scaler.transform(features.double().numpy())
    reference = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(inputs, labels.numpy())
    found = head(features).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, reference.predict_proba(inputs), atol=2e-5)
    logits = head(features).double()
    if classes > 2:
        expected = torch.tensor(reference.decision_function(inputs))
        centred = logits - logits.mean(dim=1, keepdim=True)
        torch.testing.assert_close(centred, expected - expected.mean(dim=1, keepdim=True), atol=5e-4, rtol=1e-4)


def test_linear_does_not_pass_off_an_unfinished_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_MAX_ITERATIONS", 2)
    features, labels = _clusters()
    with pytest.raises(SampleError, match="did not converge: after 2 iterations"):
        linear.fit(features, labels, 3, 0)


def test_linear_ignores_the_seed() -> None:
    features, labels = _clusters()
    one, two = linear.fit(features, labels, 3, 1), linear.fit(features, labels, 3, 2)
    assert torch.equal(one.weight, two.weight)


def test_mlp_depends_on_its_seed() -> None:
    features, labels = _clusters()
    one, two = mlp.fit(features, labels, 3, 1), mlp.fit(features, labels, 3, 2)
    assert not torch.equal(one.hidden.weight, two.hidden.weight)
    assert one.hidden.out_features == 24


def test_mlp_learns_what_no_linear_head_can() -> None:
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(50, 1)
    noise = 0.1 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 0]).repeat(50)
    features = torch.cat([corners + noise, torch.zeros(200, 30)], dim=1)
    accuracy = {
        spec.name: float((_fit(spec, features, labels, 2)(features).argmax(dim=1) == labels).float().mean())
        for spec in (linear.SPEC, mlp.SPEC)
    }
    assert accuracy["linear"] < 0.8
    assert accuracy["mlp"] > 0.95


def test_mlp_keeps_the_best_weights_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 40, generator=generator), torch.arange(60) % 3
    stopped = mlp.fit(features, labels, 3, 0)
    monkeypatch.setattr(mlp, "_PATIENCE", 1000)
    unstopped = mlp.fit(features, labels, 3, 0)  # labels are noise: 90 more epochs only overfit
    assert torch.equal(stopped.out.weight, unstopped.out.weight)
    assert torch.nn.functional.cross_entropy(unstopped(features), labels) > 0.1


def test_mlp_does_not_pass_off_a_loss_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "_RATE", 1e30)
    features, labels = _clusters()
    with pytest.raises(SampleError, match="held-out loss was never finite"):
        mlp.fit(features, labels, 3, 0)


def _brute_votes(bank: Tensor, labels: Tensor, queries: Tensor, k: int, classes: int) -> np.ndarray:
    votes = np.zeros((len(queries), classes))
    for row, query in enumerate(queries.double().numpy()):
        cosines = [float(query @ b / (np.linalg.norm(query) * np.linalg.norm(b))) for b in bank.double().numpy()]
        for i in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            votes[row, labels[i]] += np.exp(cosines[i] / 0.07)
    return votes


@pytest.mark.parametrize(("n", "k"), [(100, 20), (9, 9)])
def test_knn_is_the_brute_force_vote(n: int, k: int) -> None:
    features, labels = _clusters(n + 30)
    bank, queries = features[:n], features[n:]
    logits = _fit(knn.SPEC, bank, labels[:n])(queries)
    votes = _brute_votes(bank, labels[:n], queries, k, 3)
    assert np.array_equal(logits.argmax(dim=1).numpy(), votes.argmax(axis=1))
    shares = votes / votes.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(logits.detach().numpy(), np.log(shares + 1e-4), atol=1e-4)


def test_knn_lets_an_attacker_move_toward_a_class_without_a_neighbour() -> None:
    """The k nearest agree, so a vote of those alone would be flat; following the gradient must change the class."""
    labels, target = torch.arange(60) // 30, 1
    features = torch.nn.functional.one_hot(labels, 4).float()
    features = features + 0.05 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    head = knn.fit(features, labels, 2, 0)
    point = features[:1].clone()
    with torch.no_grad():
        plain = head(point)
    assert plain[0, target] == pytest.approx(np.log(1e-4), abs=1e-3), "the premise: no neighbour of that class"
    torch.testing.assert_close(head(point.requires_grad_()).detach(), plain)
    for _ in range(200):
        point = point.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(head(point), torch.tensor([target]))
        (gradient,) = torch.autograd.grad(loss, point)
        assert gradient.abs().max() > 0
        point = point - 0.05 * point.norm() * gradient / gradient.norm()
    assert int(head(point).argmax()) == target


def test_prototype_is_the_cosine_to_class_means() -> None:
    features, labels = _clusters()
    logits = _fit(prototype.SPEC, features, labels)(features)
    rows = features.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    means = np.stack([rows[labels.numpy() == k].mean(axis=0) for k in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(logits.numpy(), rows @ means.T / 0.07, atol=1e-4)

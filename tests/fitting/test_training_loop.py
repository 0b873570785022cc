"""The training loop: seeds, batches, checkpoints, and a resume that equals no interruption at all."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robustbench_x.errors import SampleError
from robustbench_x.fitting import run_training
from robustbench_x.fitting.loop import Trained, batch_index
from robustbench_x.plugin import AttackSpec, Trainer
from robustbench_x.registry import load_registry
from robustbench_x.testing.toys import fit_toy, toy_job, toy_victim
from robustbench_x.threat import ThreatModel
from robustbench_x.views import Meter

THREATS = (ThreatModel(eps=16 / 255), ThreatModel(norm="patch", eps=0.1, placement="random"))
GENERATOR: dict[str, Any] = {"setting": "code", "noises": 4, "width": 32, "batch": 8}
ATTACKS = load_registry().attacks
CASES: list[tuple[AttackSpec, dict[str, Any]]] = [
    (ATTACKS["advencoder"], GENERATOR),
    *((spec, {}) for spec in ATTACKS.values() if spec.fits),
]
CASES.append((ATTACKS["pap"], {"variant": "ugs"}))
CASES.append((ATTACKS["xtransfer"], {"partners": ["toy", "toy"]}))


class _KilledError(Exception):
    pass


class _Dies:
    """A trainer that is killed at one step."""

    def __init__(self, trainer: Trainer, at: int) -> None:
        self._trainer, self._at = trainer, at
        self.steps, self.batch = trainer.steps, trainer.batch
        self.state, self.restore, self.result = trainer.state, trainer.restore, trainer.result

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        if number == self._at:
            raise _KilledError("at a step")
        return self._trainer.step(number, index)


def _train(
    spec: AttackSpec, params: dict[str, Any], threat: ThreatModel, path: Path, die: int | None = None
) -> Trained:
    job = toy_job(spec, {"steps": 7, **params}, toy_victim(), threat)
    meter = Meter()
    view = job.view(meter)

    def make() -> Trainer:
        trainer = job.attack.trainer(view)
        return trainer if die is None else _Dies(trainer, die)

    return run_training(
        make, pool=len(view.surrogate), seed=view.seed, meter=meter, checkpoint=path, key=job.key(), every=0.0
    )


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize(("spec", "params"), CASES, ids=lambda v: v.name if isinstance(v, AttackSpec) else str(len(v)))
def test_a_killed_and_resumed_training_equals_an_uninterrupted_one(
    spec: AttackSpec, params: dict[str, Any], threat: ThreatModel, tmp_path: Path
) -> None:
    whole = _train(spec, params, threat, tmp_path / "whole.safetensors")
    path = tmp_path / "part.safetensors"
    for at in (1, whole.steps - 1):
        with pytest.raises(_KilledError, match="at a step"):
            _train(spec, params, threat, path, die=at)
    resumed = _train(spec, params, threat, path)
    assert whole.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(whole.tensors[name], resumed.tensors[name]) for name in whole.tensors)
    assert whole.losses == resumed.losses
    assert (whole.forwards, whole.backwards) == (resumed.forwards, resumed.backwards)


def test_a_training_killed_after_its_last_step_only_has_to_be_read(tmp_path: Path) -> None:
    spec, path = ATTACKS["advencoder"], tmp_path / "a.safetensors"
    whole = _train(spec, {}, THREATS[0], path)
    again = _train(spec, {}, THREATS[0], path)
    assert torch.equal(whole.tensors["delta"], again.tensors["delta"])
    assert (again.losses, again.forwards, again.backwards) == (whole.losses, whole.forwards, whole.backwards)


def test_a_damaged_checkpoint_or_one_of_another_training_is_not_resumed(tmp_path: Path) -> None:
    spec, path = ATTACKS["advencoder"], tmp_path / "a.safetensors"
    whole = _train(spec, {}, THREATS[0], path)
    with pytest.raises(_KilledError, match="at a step"):
        _train(spec, {"rate": 0.4}, THREATS[0], path, die=6)
    assert torch.equal(_train(spec, {}, THREATS[0], path).tensors["delta"], whole.tensors["delta"])
    with pytest.raises(_KilledError, match="at a step"):
        _train(spec, {"rate": 0.4}, THREATS[0], path, die=6)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    faster = _train(spec, {"rate": 0.4}, THREATS[0], tmp_path / "b.safetensors")
    assert torch.equal(_train(spec, {"rate": 0.4}, THREATS[0], path).tensors["delta"], faster.tensors["delta"])


@pytest.mark.parametrize("params", [{}, GENERATOR], ids=["direct", "generator"])
def test_a_seed_decides_what_is_learned(params: dict[str, Any]) -> None:
    spec, victim = ATTACKS["advencoder"], toy_victim()
    with torch.random.fork_rng(devices=[]):
        one = fit_toy(spec, {"steps": 4, **params}, victim, THREATS[0], seed=1)
        torch.manual_seed(99)
        again = fit_toy(spec, {"steps": 4, **params}, victim, THREATS[0], seed=1)
    other = fit_toy(spec, {"steps": 4, **params}, victim, THREATS[0], seed=2)
    assert one.sha256 == again.sha256
    assert one.sha256 != other.sha256


def test_every_image_is_seen_once_an_epoch() -> None:
    for batch in (3, 8, 10):
        seen = Counter(i for n in range(40) for i in batch_index(n, batch=batch, pool=8, seed=0).tolist())
        assert max(seen.values()) - min(seen.values()) <= 1
        assert sum(seen.values()) == 40 * batch
    order = [batch_index(n, batch=8, pool=8, seed=0).tolist() for n in range(3)]
    assert order[0] != order[1] != order[2]
    assert batch_index(5, batch=0, pool=8, seed=0).shape == (0,)


class _Breaks:
    """A training whose loss is not finite."""

    steps, batch = 3, 1

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        return {"adv": torch.tensor(float("nan"))}

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        del state

    def result(self) -> dict[str, Tensor]:
        return {"delta": torch.zeros(1, 3, 4, 4)}


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(SampleError, match="the training broke down: adv is nan at step 0"):
        run_training(_Breaks, pool=4, seed=0, meter=Meter())


def test_a_training_without_images_is_an_error() -> None:
    with pytest.raises(SampleError, match="needs surrogate images and there is none"):
        run_training(_Breaks, pool=0, seed=0, meter=Meter())


def test_progress_shows_the_loss_terms() -> None:
    seen: list[tuple[int, int, dict[str, float]]] = []
    job = toy_job(ATTACKS["advencoder"], {**GENERATOR, "steps": 3}, toy_victim(), THREATS[0])
    job.run(None, lambda done, total, losses: seen.append((done, total, dict(losses))))
    assert seen[-1][:2] == (3, 3)
    assert set(seen[-1][2]) == {"adv", "hfc", "quality"}

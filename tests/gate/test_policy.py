"""What a gate policy may say, and how it is told what it may not."""

from pathlib import Path

import pytest

from robustbench_x.errors import ConfigError
from robustbench_x.policy import Policy, load_policy


def load(tmp_path: Path, text: str) -> Policy:
    file = tmp_path / "gate.toml"
    file.write_text(text, encoding="utf-8")
    return load_policy(file)


def test_a_policy_reads_as_it_is_written(tmp_path: Path) -> None:
    policy = load(
        tmp_path,
        'inconclusive = "point"\n[[gate]]\nmetric = "asr"\nmax = "30/100"\neps = "4/255"\n'
        "[baseline]\nmax_increase = { asr = 0.02 }\n[reliability]\nfail_on = []\n",
    )
    assert policy.gate[0].title == "asr <= 0.3"
    assert policy.gate[0].eps == 4 / 255
    assert policy.baseline is not None
    assert policy.baseline.max_increase == {"asr": 0.02}
    assert policy.reliability.fail_on == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[gate]]\nmetric = "asr"\nmx = 0.3', r"gate\.toml:3: unknown key 'gate\.1\.mx'; did you mean 'max'\?"),
        (
            '[[gate]]\nmetric = "asrr"\nmax = 0.3',
            r"gate\.toml:2: key 'gate\.1\.metric': unknown metric 'asrr'; did you",
        ),
        ('[[gate]]\nmetric = "asr"\nmax = "lots"', r"gate\.toml:3: key 'gate\.1\.max': 'lots' is not a number"),
        ('[[gate]]\nmetric = "asr"\nmax = true', r"gate\.toml:3: key 'gate\.1\.max': must be a number, not true"),
        ('[[gate]]\nmetric = "asr"\nmax = nan', r"gate\.toml:3: .*'nan' is not a finite number"),
        ('[[gate]]\nmetric = "asr"\nmax = 30', r"gate\.toml:3: .*asr is a rate between 0 and 1, not 30; write 0\.30"),
        ('[[gate]]\nmetric = "asr"\nmin = -0.1', r"gate\.toml:3: .*asr is a rate between 0 and 1, not -0\.1"),
        ('[[gate]]\nmetric = "asr"', r"gate\.toml:1: key 'gate\.1': a gate has either max or min"),
        ('[[gate]]\nmetric = "asr"\nmax = 0.1\nmin = 0.1', r"gate\.toml:1: .*either max or min, and not both"),
        ("[[gate]]\nmax = 0.1", r"gate\.toml:1: key 'gate\.1\.metric': missing"),
        (
            '# one\n[[gate]]\nmetric = "asr"\nmax = 0.1\n\n'
            '[[gate]]\nmetric = "flip_rate"\nattack = "worst_case"\nmax = 0',
            r"gate\.toml:6: key 'gate\.2': worst_case has asr and robust_accuracy, not flip_rate",
        ),
        (
            '[[gate]]\nmetric = "asr"\nmax = 0.1\nattack = "worst_case"\nknowledge = "full"',
            r"gate\.toml:1: .*worst_case is taken over every knowledge level",
        ),
        ('inconclusive = "maybe"', r"gate\.toml:1: key 'inconclusive': input should be 'fail', 'pass' or 'point'"),
        ("", r"gate\.toml: the policy holds no gate"),
        ("gate = 3", r"gate\.toml:1: key 'gate'"),
        ("[[gate]]\nmetric = asr", r"gate\.toml:2: key 'metric': not valid TOML, invalid value"),
        ("[baseline]", r"gate\.toml:1: key 'baseline': a baseline rule needs max_increase or max_decrease"),
        ("[baseline]\nmax_increase = { asrr = 0.1 }", r"gate\.toml:2: .*'asrr' cannot be compared.*did you mean asr"),
        ("[baseline]\nmax_increase = { asr = 2 }", r"gate\.toml:2: .*cannot move by 2; write 0\.02"),
        (
            '[[gate]]\nmetric = "asr"\nmax = 0.1\n[reliability]\nfail_on = ["bad"]',
            r"gate\.toml:5: .*reliability\.fail_on",
        ),
    ],
)
def test_what_is_wrong_is_named_by_file_line_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)

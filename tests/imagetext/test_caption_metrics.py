"""Caption metrics against pycocoevalcap 1.2, by hand, and the Java pair's refusals."""

import math
import os
import shutil
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_x.errors import MissingExtraError, NothingEvaluatedError, RunError
from robustbench_x.imagetext.captions import CaptionScore, bleu, cider, java_metrics, rouge_l, tokenize

# fmt: off
GROUPS = [
    ("A man rides a wave on a surfboard.",
     ["A man riding a wave on top of a surfboard.", "A surfer rides a big wave."]),
    ("Two dogs play in the snow.", ["Two dogs play in the snow.", "A pair of dogs running in the snow."]),
    ("the the the the the the", ["The cat sat on the mat.", "There is a cat on the mat."]),
    ("", ["A red bus drives down the street.", "A bus on a road."]),
    ("Pizza", ["A pizza on a plate.", "Pizza"]),
    ("A cat", ["A cat sleeps on a couch next to a remote control and a blanket."]),
    ("A plate of food with broccoli, rice, and meat on a table in a very busy restaurant",
     ["A plate of food.", "Food."]),
    ("The dog's ball isn't here", ["The dog's ball is not here.", "A dog lost its ball.", "No ball here!"]),
    ("zebras graze", ["A man is talking on his phone.", "A woman at a desk."]),
    ("A man standing in front of a man standing in front of a man", ["A man standing in front of a building."]),
    ("A black-and-white photo of a T-shirt (small).", ["A black-and-white photo of a shirt.", "T-shirt (small)"]),
    ("a kitchen with a stove a sink and a window",
     ["A kitchen with a sink, a stove and a window.", "A small kitchen.", "The kitchen has white cabinets.",
      "A kitchen with a stove a sink", "An old stove in a kitchen with a window."]),
    ("On a street a bus drives", ["A bus drives on a street"]),
    ("...", ["A bird.", "A bird on a wire."]),
]

# pycocoevalcap 1.2 on GROUPS: its PTBTokenizer (CoreNLP 3.4.1, OpenJDK 17), then Bleu(4), Rouge, Cider and Meteor, with
# numpy 2.4.6. The corpus score, then one for each sample, to nine digits.
COCO: dict[str, tuple[float, list[float]]] = {
    "bleu-1": (0.693181818, [
        1, 1, 0.333333333, 0, 0.999999998, 0.00247875217, 0.235294118, 0.857142857, 1.1156508e-16, 0.5, 1, 1, 1, 0
    ]),
    "bleu-2": (0.626254721, [
        0.845154255, 1, 8.16496581e-09, 0, 0.000999999999, 0.00247875217, 0.210042013, 0.755928946, 1.57776849e-16,
        0.480384461, 0.935414347, 0.942809041, 0.894427191, 0
    ]),
    "bleu-3": (0.552818074, [
        0.491934073, 1, 2.55436477e-11, 0, 9.99999999e-05, 2.47875217e-05, 0.180516551, 0.699902805, 1.77098525e-13,
        0.458130164, 0.854987973, 0.873580465, 0.736806299, 0
    ]),
    "bleu-4": (0.475884872, [
        6.98534206e-05, 1, 1.53525978e-12, 0, 3.16227766e-05, 2.47875217e-06, 0.143171232, 0.643458884,
        5.93336107e-12, 0.432422708, 0.747674391, 0.785629302, 0.000107456993, 0
    ]),
    "rouge_l": (0.530817422, [
        0.7625, 1, 0.333333333, 0, 1, 0.220216606, 0.428822496, 0.857142857, 0, 0.669278997, 0.75308642,
        0.907063197, 0.5, 0
    ]),
    "cider": (2.14422726, [
        2.36675127, 6.28635781, 0.227482977, 0, 2.04411941, 0.161894898, 0.184047857, 2.81895153, 0, 2.49035911,
        4.45273975, 3.50818057, 5.47829642, 0
    ]),
    "meteor": (0.325059858, [
        0.415990641, 1, 0.0720720721, 0, 1, 0.078306502, 0.362014958, 0.479495486, 0, 0.433406454, 0.507241888,
        0.561064355, 0.518355063, 0
    ]),
}
# fmt: on
CANDIDATES = [candidate for candidate, _ in GROUPS]
REFERENCES = [references for _, references in GROUPS]
WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)


def assert_as_coco(score: CaptionScore, name: str) -> None:
    corpus, samples = COCO[name]
    assert score.corpus == pytest.approx(corpus, rel=1e-7, abs=1e-20)
    assert score.samples == pytest.approx(samples, rel=1e-7, abs=1e-20)


def test_bleu_is_that_of_coco() -> None:
    for n, score in enumerate(bleu(CANDIDATES, REFERENCES), start=1):
        assert_as_coco(score, f"bleu-{n}")
    assert_as_coco(bleu(CANDIDATES, REFERENCES, max_n=2)[1], "bleu-2")


def test_rouge_l_is_that_of_coco() -> None:
    assert_as_coco(rouge_l(CANDIDATES, REFERENCES), "rouge_l")


def test_cider_is_that_of_coco() -> None:
    assert_as_coco(cider(CANDIDATES, REFERENCES), "cider")


@pytest.mark.skipif(
    find_spec("pycocoevalcap") is None or not shutil.which("java"), reason="needs pycocoevalcap and java"
)
def test_meteor_is_that_of_coco() -> None:
    assert_as_coco(java_metrics(CANDIDATES, REFERENCES, ["meteor"])["meteor"], "meteor")


def test_by_hand() -> None:
    candidates, references = ["The cat sat on mat."], [["The cat sat on the mat.", "A cat on a mat."]]
    one, two = bleu(candidates, references, max_n=2)
    # All 5 words are in the first reference, of the 4 bigrams all but "on mat"; the closest length is 5, no penalty.
    assert one.corpus == pytest.approx(5 / 5)
    assert two.corpus == pytest.approx(math.sqrt(5 / 5 * 3 / 4))
    # Common subsequences of 5 and 3 words: P = max(5/5, 3/5), R = max(5/6, 3/5), and beta^2 = 1.44.
    assert rouge_l(candidates, references).corpus == pytest.approx(2.44 * 1 * (5 / 6) / (5 / 6 + 1.44 * 1))


def test_brevity_penalty_by_hand() -> None:
    # 2 words against 3 or 1, equally close: the shorter counts, so no penalty. Against 4 it is exp(1 - 4 / 2).
    assert bleu(["a b"], [["a b c", "a"]], max_n=1)[0].corpus == pytest.approx(1.0)
    assert bleu(["a b"], [["a b c d"]], max_n=1)[0].corpus == pytest.approx(math.exp(-1))


def test_cider_by_hand() -> None:
    score = cider(["red bus", "bus"], [["red bus", "red"], ["blue bus"]])
    # "bus" is in both documents, idf 0; "red" and "red bus" in one of two, idf log 2.
    # Against "red bus" the cosine is 1 for n = 1 and 2, 0 above: mean 2/4. Against "red" it is 1 for n = 1 only: 1/4,
    # and the lengths, in bigrams, differ by 1: exp(-1 / (2 * 36)). Mean of the two references, times 10.
    assert score.samples[0] == pytest.approx(10 * (2 / 4 + 1 / 4 * math.exp(-1 / 72)) / 2)
    assert score.samples[1] == 0.0
    assert score.corpus == pytest.approx(score.samples[0] / 2)


def test_a_perfect_caption() -> None:
    captions = ["one red bus stops here", "two old men sit down"]
    references = [[caption] for caption in captions]
    assert [score.corpus for score in bleu(captions, references)] == pytest.approx([1.0] * 4)
    assert rouge_l(captions, references).samples == pytest.approx((1.0, 1.0))
    assert cider(captions, references).samples == pytest.approx((10.0, 10.0))


@settings(max_examples=200, deadline=None)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_rouge_l_agrees_with_recursion(words: list[str], texts: list[list[str]]) -> None:
    @lru_cache(None)
    def common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + common(a[1:], b[1:])
        return max(common(a[1:], b), common(a, b[1:]))

    pairs = [(tuple(words or [""]), tuple(text or [""])) for text in texts]
    precision = max(common(a, b) / len(a) for a, b in pairs)
    recall = max(common(a, b) / len(b) for a, b in pairs)
    expected = 2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0.0
    found = rouge_l([" ".join(words)], [[" ".join(text) for text in texts]], tokenizer=str.split)
    assert found.corpus == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=2, max_size=4))
def test_ranges_and_the_order_of_references(samples: list[tuple[list[str], list[list[str]]]]) -> None:
    candidates = [" ".join(words) for words, _ in samples]
    references = [[" ".join(text) for text in texts] for _, texts in samples]
    turned = [group[::-1] for group in references]
    for top, score, again in (
        *((1, a, b) for a, b in zip(bleu(candidates, references), bleu(candidates, turned), strict=True)),
        (1, rouge_l(candidates, references), rouge_l(candidates, turned)),
        (10, cider(candidates, references), cider(candidates, turned)),
    ):
        assert all(0 <= value <= top + 1e-6 for value in (score.corpus, *score.samples))
        assert score.samples == pytest.approx(again.samples)


# What `java ... PTBTokenizer -preserveLines -lowerCase` of CoreNLP 3.4.1 and COCO's list of marks leave.
TOKENS = {
    "A man riding a wave on top of a surfboard.": "a man riding a wave on top of a surfboard",
    "The dog's ball isn't here, it's \"gone\" -- really!": "the dog 's ball is n't here it 's gone really",
    "two-story building; a T-shirt and well-known U.S. flag.": "two-story building a t-shirt and well-known u.s. flag",
    "Mr. Smith paid $1,200.50 at 10:30 p.m. today...": "mr. smith paid $ 1,200.50 at 10:30 p.m. today",
    "a (red) car [blue] {green}": "a -lrb- red -rrb- car -lsb- blue -rsb- -lcb- green -rcb-",
    "cannot gonna don't won't I'll we've they're I'd": "can not gon na do n't wo n't i 'll we 've they 're i 'd",
    "a/c and/or 50% off @ store & more #tag": "a/c and/or 50 % off @ store & more #tag",
    "the boys' room 'quoted words' and `back' ticks": "the boys room quoted words and back ticks",
    "hello....world and- dash -start mid - space": "hello world and dash start mid space",
    "\u201ccurly\u201d \u2018single\u2019 don\u2019t \u2014 caf\u00e9\u2026": "curly single do n't caf\u00e9",
    "what?! why!? wow!!! yes!": "what ?! why !? wow !!! yes",
    "o'clock rock 'n' roll ma'am 'tis '80s 1980's": "o'clock rock 'n' roll ma'am 't is '80s 1980 's",
    "black&white AT&T R&B": "black & white at&t r&b",
    "Main St. near No. 7, no. 5pm 5:30pm": "main st. near no. 7 no. 5pm 5:30 pm",
    "man in t-shirt.He sits,one cat": "man in t-shirt he sits one cat",
    "mother-in-law's hat w/o 10-year-old": "mother-in-law 's hat w/o 10-year-old",
    "\u00a35 or \u20ac6": "# 5 or $ 6",
    "  \t tabbed\ttext \n two lines ": "tabbed text two lines",
    "... . - '": "",
    "": "",
}


@pytest.mark.parametrize("text", TOKENS)
def test_tokens(text: str) -> None:
    assert " ".join(tokenize(text)) == TOKENS[text]


@pytest.mark.parametrize("unit", ["1", "a", "a.", "1.", "a-", "'", "n't", "x@", "!", "ab.", "1:"])
def test_long_nonsense_is_tokenised_in_time(unit: str) -> None:
    assert tokenize(unit * 3000 + "_") is not None


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider, java_metrics])
def test_refuses_what_is_no_corpus(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NothingEvaluatedError, match="no caption to score"):
        metric([], [])
    with pytest.raises(ValueError, match="got 1 for 2"):
        metric(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="1 have none, the first is sample 1"):
        metric(["a", "b"], [["a"], []])
    for candidates, references in (("ab", [["a"], ["b"]]), (["a", "b"], ["a", "b"])):
        with pytest.raises(ValueError, match="got a string in its place"):
            metric(candidates, references)


def test_refuses_orders_and_a_corpus_of_one() -> None:
    with pytest.raises(ValueError, match="max_n must be at least 1, got 0"):
        bleu(["a"], [["a"]], max_n=0)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        cider(["a"], [["a"]])
    for names in ([], ["rouge"]):
        with pytest.raises(ValueError, match="names must be among"):
            java_metrics(["a"], [["a"]], names)


STAND_IN = """
import subprocess, threading

LOCKS = []


class {name}:
    def __init__(self):
        self.lock = threading.Lock()
        LOCKS.append(self.lock)

    def compute_score(self, gts, res):
        self.lock.acquire()
        {body}
        self.lock.release()
        return answer
"""


@pytest.fixture
def toolbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package pycocoevalcap without scorers, and a `java` that is never called, as the only one on PATH."""
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "pycocoevalcap"}
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.touch(mode=0o755)
    package = tmp_path / "pycocoevalcap"
    (package / "spice" / "lib").mkdir(parents=True)
    (package / "meteor").mkdir()
    (package / "spice" / "lib" / "stanford-corenlp-3.6.0.jar").touch()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(java.parent))
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "pycocoevalcap"]:
        del sys.modules[name]
    sys.modules.update(held)


def write_scorer(package: Path, name: str, body: str) -> None:
    (package / name / f"{name}.py").write_text(STAND_IN.format(name=name.capitalize(), body=body), encoding="utf-8")


def test_java_metrics_are_read(toolbox: Path) -> None:
    write_scorer(toolbox, "meteor", "answer = 0.4, [0.25, 0.5]")
    write_scorer(toolbox, "spice", "answer = 0.2, [{'All': {'f': len(res[i][0]) / 10}} for i in res]")
    found = java_metrics(["A cat.", "b ||| c"], [["a"], ["b"]])
    assert found["meteor"] == CaptionScore(corpus=0.4, samples=(0.25, 0.5))
    assert found["spice"].samples == (0.5, 0.9)


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("meteor", "float('')", "METEOR failed, so it has no score: ValueError"),
        ("meteor", "raise BrokenPipeError('gone')", "METEOR failed.*BrokenPipeError: gone"),
        ("spice", "raise subprocess.CalledProcessError(1, 'java')", "SPICE failed.*non-zero exit status 1"),
        ("spice", "answer = 0.5, [{}]", "SPICE failed.*KeyError"),
        ("meteor", "answer = 0.5, [0.5, 0.5]", "METEOR gave 2 scores for 1 captions"),
        ("meteor", "answer = 0.5, [float('nan')]", "METEOR gave 1 scores for 1 captions, or one that is no number"),
    ],
)
def test_a_java_program_that_fails_gives_no_number(toolbox: Path, name: str, body: str, message: str) -> None:
    write_scorer(toolbox, name, body)
    with pytest.raises(RunError, match=message):
        java_metrics(["a"], [["a"]], [name])
    # pycocoevalcap would wait for its own lock when it is collected.
    assert not any(lock.locked() for lock in sys.modules[f"pycocoevalcap.{name}.{name}"].LOCKS)


def test_says_what_is_missing(toolbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (toolbox / "spice" / "lib" / "stanford-corenlp-3.6.0.jar").unlink()
    with pytest.raises(MissingExtraError, match=r"SPICE \(not found: stanford-corenlp-3.6.0.jar, which python -m"):
        java_metrics(["a"], [["a"]], ["spice"])
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(MissingExtraError, match=r"METEOR \(not found: the program java on PATH"):
        java_metrics(["a"], [["a"]], ["meteor"])
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(
        MissingExtraError, match=r"METEOR and SPICE \(not found: the module pycocoevalcap; the program java"
    ):
        java_metrics(["a"], [["a"]])

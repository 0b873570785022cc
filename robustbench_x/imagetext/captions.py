"""Caption metrics as the COCO caption evaluation (pycocoevalcap 1.2) defines them: BLEU, ROUGE-L and CIDEr natively.

Each function takes raw captions and gives a score for every sample and one for the corpus. They reproduce that code,
its quirks included, since published numbers come from it; where one is odd the docstring says so. METEOR and SPICE
exist as Java programs only: `java_metrics` runs those of pycocoevalcap, or says what is missing.
"""

import importlib.util
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustbench_x.errors import MissingExtraError, NothingEvaluatedError, RunError

__all__ = ["JAVA_METRICS", "CaptionScore", "Tokenizer", "bleu", "cider", "java_metrics", "rouge_l", "tokenize"]

Tokenizer = Callable[[str], Sequence[str]]
"""A caption to its words; `str.split` for captions that are tokenised already."""

JAVA_METRICS = ("meteor", "spice")
"""What `java_metrics` can compute."""

_CIDER_N = 4
_CIDER_SIGMA = 6.0
_ROUGE_BETA = 1.2
_TINY = 1e-15
_SMALL = 1e-9
_CORENLP = "stanford-corenlp-3.6.0.jar"

FloatArray = NDArray[np.float64]
_Counts = Counter[tuple[str, ...]]
_Tokens = Sequence[str]


@dataclass(frozen=True, kw_only=True)
class CaptionScore:
    """One metric: `samples` in the order of the candidates, and the `corpus` score, which need not be their mean."""

    corpus: float
    samples: tuple[float, ...]


_ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|mt|ft|ave|blvd|rd|prof|gen|sgt|lt|capt|gov|sen|rep|rev|hon|jr|sr|inc|co|corp|ltd|jan|feb|mar|apr|"
    "jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|etc|vs|dept|est|sq|tel|ext|univ|bros|assn|col|maj|"
    r"adm|cpl|pvt|messrs|al|calif|fla|mich|va|ind|ala|ariz|ph\.d"
)
_TOKEN = re.compile(
    rf"""
    \.{{3,}} | \.(?:[ ]\.){{2,}}                                                        # dots that trail off
  | (?i:https?://|www\.)\S+ | [\w.+-]+@\w[\w-]*(?:\.\w+)+                               # addresses
  | (?i:can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b) | gim(?=me\b) | lem(?=me\b))
  | (?i:'t(?=is\b|was\b)) | (?<!\d)'\d\ds?\b | (?i:'(?:em|til|cause)\b | 'n')           # words that begin with a quote
  | (?i:'(?:s|m|d|ll|re|ve)\b | n't\b)                                                  # clitics
  | (?i:[a-z]+(?=n't\b))
  | (?i:o'clock | ma'am | ne'er | c'mon | ol' | y'(?=all) | [dlo]'[a-z]{{3,}})
  | \d+:\d\d(?=(?i:[ap]m)\b) | (?<![\w-])[-+]?\.?\d+(?:[.,:/]\d+)*(?![\w-])             # 5:30(pm) 1,200.50 1/2 -5
  | (?i:(?<![\w.])(?:[a-z]\.)+[a-z]\b\.? | (?<![\w.'&])[a-z]\.(?!\w))                   # u.s. p.m a.
  | (?i:(?<!\w)(?:{_ABBREVIATIONS})\.(?!\w) | no\.(?=\s*\d))
  | [A-Z]+(?:&[A-Z]+)+                                                                  # AT&T
  | (?:[^\W_]+[.!?])+[a-z]{{2,}}\b                                                      # photo.jpg
  | [\#@][^\W\d_]\w*                                                                    # a tag, a handle
  | \w+(?:[-/]\w+)*                                                                     # t-shirt w/o 10-year-old
  | -+ | [!?]+ | \*+                                                                    # runs are one token
  | \S
    """,
    re.VERBOSE,
)
_ASCII = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--",
                        "\u2026": "..."})  # fmt: skip
_RENAMED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
            "\u00a3": "#", "\u20ac": "$"}  # fmt: skip
_REMOVED = frozenset(["'", '"', "`", "?", "!", ",", ":", ";"])


@lru_cache(maxsize=65536)
def tokenize(text: str) -> tuple[str, ...]:
    """Lower-case words in the manner of the Penn Treebank, without the punctuation that COCO's evaluation removes.

    COCO runs the Java PTBTokenizer of Stanford CoreNLP 3.4.1 with -lowerCase, then drops a list of marks. Brackets
    stay, as `-lrb-`: the list has them in upper case. So do `!!` and other runs of marks, which it lacks.

    >>> tokenize("The dog's ball isn't here, it's on a T-shirt.")
    ('the', 'dog', "'s", 'ball', 'is', "n't", 'here', 'it', "'s", 'on', 'a', 't-shirt')

    This is a regular expression written from what the Java program answers, not a port of its grammar. It departs where
    captions rarely go: smileys and mark-up are split at every sign, a telephone number or mixed fraction is not
    joined, and of the abbreviations that keep their dot the common ones are known.
    """
    words = (match.group().lower() for match in _TOKEN.finditer(text.translate(_ASCII)))
    # Dots and dashes go in runs too.
    return tuple(_RENAMED.get(word, word) for word in words if word not in _REMOVED and word.strip(". -"))


def bleu(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    max_n: int = 4,
    *,
    tokenizer: Tokenizer = tokenize,
) -> tuple[CaptionScore, ...]:
    """BLEU-1 to BLEU-`max_n`, each in [0, 1]; the corpus score pools the counts of all samples.

    Papineni et al. (ACL 2002), in COCO's variant: a clipped precision is (correct + 1e-15) / (guessed + 1e-9), so a
    sentence without one matching 4-gram scores a tiny number and not 0; the brevity penalty takes the length of the
    reference closest to the candidate, of two equally close the shorter one.

    Args:
        candidates: N captions; one without a word is allowed, and scores 0.
        references: For each candidate its one or more reference captions.
        max_n: Longest n-gram, at least 1.
        tokenizer: How captions become words.

    Raises:
        ValueError: The two differ in length, a sample has no reference, or `max_n` is below 1.
        NothingEvaluatedError: There is no candidate.
    """
    if max_n < 1:
        raise ValueError(f"max_n must be at least 1, got {max_n}")
    hypotheses, truths = _tokens(candidates, references, tokenizer)
    correct = np.zeros((len(hypotheses), max_n))
    guessed = np.zeros((len(hypotheses), max_n))
    closest = np.zeros(len(hypotheses))
    for i, (words, texts) in enumerate(zip(hypotheses, truths, strict=True)):
        most: _Counts = Counter()
        for text in texts:
            most |= _ngrams(text, max_n)
        for ngram, count in (_ngrams(words, max_n) & most).items():
            correct[i, len(ngram) - 1] += count
        guessed[i] = np.maximum(len(words) - np.arange(max_n), 0)
        closest[i] = min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
    lengths = guessed[:, 0]
    samples = [_bleu(*counts) for counts in zip(correct, guessed, lengths, closest, strict=True)]
    corpus = _bleu(correct.sum(axis=0), guessed.sum(axis=0), float(lengths.sum()), float(closest.sum()))
    return tuple(CaptionScore(corpus=corpus[k], samples=tuple(sample[k] for sample in samples)) for k in range(max_n))


def rouge_l(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, tokenizer: Tokenizer = tokenize
) -> CaptionScore:
    """ROUGE-L in [0, 1], an F-score of the longest common subsequence; the corpus score is the mean.

    Lin (2004) with beta = 1.2. As in COCO's code the precision and the recall are each the best over the references, so
    the two may come from different ones, and a caption without a word counts as one empty word: it scores 0, except
    against a reference that is as empty, where it scores 1.

    Args:
        candidates: N captions.
        references: For each candidate its one or more reference captions.
        tokenizer: How captions become words.

    Raises:
        ValueError: The two differ in length, or a sample has no reference.
        NothingEvaluatedError: There is no candidate.
    """
    hypotheses, truths = _tokens(candidates, references, tokenizer)
    return _averaged([_rouge(words or [""], [text or [""] for text in texts])
                      for words, texts in zip(hypotheses, truths, strict=True)])  # fmt: skip


def cider(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, tokenizer: Tokenizer = tokenize
) -> CaptionScore:
    """CIDEr as COCO reports it, in [0, 10]; the corpus score is the mean.

    Vedantam et al. (CVPR 2015). What COCO's code calls CIDEr is the paper's CIDEr-D without stemming: n-grams of 1 to 4
    words weighed by tf-idf, the candidate's weights clipped to the reference's, a Gaussian penalty (sigma 6) on the
    difference in length, times 10. Its tf is a bare count, and it takes for the length the number of bigrams, so
    empty and one-word captions are equally long. Document frequencies come from `references`, one document a
    sample, hence a sample's score depends on the whole corpus: compare only scores over the same references.

    Args:
        candidates: N >= 2 captions.
        references: For each candidate its one or more reference captions.
        tokenizer: How captions become words.

    Raises:
        ValueError: The two differ in length, a sample has no reference, or there is just one sample: all its idf would
            be log 1 = 0, and so the score whatever the captions, which COCO's code reports.
        NothingEvaluatedError: There is no candidate.
    """
    hypotheses, truths = _tokens(candidates, references, tokenizer)
    if len(hypotheses) == 1:
        raise ValueError("CIDEr needs at least 2 samples, got 1: with one document every idf is 0, and the score too")
    counted = [[_ngrams(text, _CIDER_N) for text in texts] for texts in truths]
    documents: _Counts = Counter()
    for texts in counted:
        documents.update(set().union(*texts))
    unseen = math.log(len(hypotheses))
    idf = {ngram: unseen - math.log(seen) for ngram, seen in documents.items()}

    def weigh(counts: _Counts) -> _Weighed:
        weights = {ngram: count * idf.get(ngram, unseen) for ngram, count in counts.items()}
        squares = [0.0] * _CIDER_N
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        bigrams = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return _Weighed(weights=weights, squares=squares, bigrams=bigrams)

    samples = []
    for words, texts in zip(hypotheses, counted, strict=True):
        candidate = weigh(_ngrams(words, _CIDER_N))
        samples.append(10 * math.fsum(_cider_similarity(candidate, weigh(text)) for text in texts) / len(texts))
    return _averaged(samples)


def java_metrics(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    names: Sequence[str] = JAVA_METRICS,
    *,
    tokenizer: Tokenizer = tokenize,
) -> dict[str, CaptionScore]:
    """METEOR and SPICE, each in [0, 1], from the Java programs that pycocoevalcap carries.

    METEOR (Denkowski and Lavie, 2014; version 1.5) pools over the corpus, SPICE (Anderson et al., ECCV 2016) averages.
    The programs get the words of `tokenizer`, not those of the Java PTBTokenizer, so that all metrics see the same.
    SPICE needs Stanford CoreNLP 3.6.0 as well, which pycocoevalcap downloads on first use; this function does not.

    Args:
        candidates: N captions.
        references: For each candidate its one or more reference captions.
        names: Which of `JAVA_METRICS`.
        tokenizer: How captions become words.

    Raises:
        ValueError: The captions differ in length, a sample has no reference, or a name is unknown.
        NothingEvaluatedError: There is no candidate.
        MissingExtraError: pycocoevalcap, java, or for SPICE CoreNLP is not there; the message says which.
        RunError: A program failed, or did not answer with one number for every sample.
    """
    if not names or not set(names) <= set(JAVA_METRICS):
        raise ValueError(f"names must be among {list(JAVA_METRICS)}, got {list(names)}")
    hypotheses, truths = _tokens(candidates, references, tokenizer)
    _check_java(names)
    results = {i: [_line(words)] for i, words in enumerate(hypotheses)}
    truth = {i: [_line(text) for text in texts] for i, texts in enumerate(truths)}
    return {name: _run_java(name, truth, results) for name in names}


@dataclass(frozen=True, kw_only=True)
class _Weighed:
    # tf-idf of each n-gram, the sum of their squares by n, and COCO's idea of the length.
    weights: Mapping[tuple[str, ...], float]
    squares: Sequence[float]
    bigrams: int


def _tokens(
    candidates: Sequence[str], references: Sequence[Sequence[str]], tokenizer: Tokenizer
) -> tuple[list[_Tokens], list[list[_Tokens]]]:
    if isinstance(candidates, str) or any(isinstance(group, str) for group in references):
        raise ValueError("expected a list of candidates, and for each a list of references; got a string in its place")
    if len(candidates) != len(references):
        raise ValueError(f"expected references for every candidate, got {len(references)} for {len(candidates)}")
    if not len(candidates):
        raise NothingEvaluatedError("there is no caption to score")
    bare = [i for i, group in enumerate(references) if not len(group)]
    if bare:
        raise ValueError(f"every sample needs a reference; {len(bare)} have none, the first is sample {bare[0]}")
    return [tokenizer(text) for text in candidates], [[tokenizer(text) for text in group] for group in references]


def _ngrams(words: _Tokens, max_n: int) -> _Counts:
    return Counter(tuple(words[i : i + n]) for n in range(1, max_n + 1) for i in range(len(words) - n + 1))


def _averaged(samples: Sequence[float]) -> CaptionScore:
    return CaptionScore(corpus=math.fsum(samples) / len(samples), samples=tuple(samples))


def _bleu(correct: FloatArray, guessed: FloatArray, length: float, closest: float) -> list[float]:
    ratio = (length + _TINY) / (closest + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n, (right, total) in enumerate(zip(correct, guessed, strict=True), start=1):
        product *= (float(right) + _TINY) / (float(total) + _SMALL)
        scores.append(product ** (1 / n) * penalty)
    return scores


def _rouge(words: _Tokens, texts: Sequence[_Tokens]) -> float:
    common = [_longest_common_subsequence(words, text) for text in texts]
    precision = max(common) / len(words)
    recall = max(length / len(text) for length, text in zip(common, texts, strict=True))
    if not precision:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _longest_common_subsequence(a: _Tokens, b: _Tokens) -> int:
    lengths = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for j, right in enumerate(b, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if left == right else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]


def _cider_similarity(candidate: _Weighed, reference: _Weighed) -> float:
    products = [0.0] * _CIDER_N
    for ngram, weight in candidate.weights.items():
        against = reference.weights.get(ngram, 0.0)
        products[len(ngram) - 1] += min(weight, against) * against
    cosines = [
        product / math.sqrt(a * b) if a and b else 0.0
        for product, a, b in zip(products, candidate.squares, reference.squares, strict=True)
    ]
    gap = candidate.bigrams - reference.bigrams
    return math.fsum(cosines) / _CIDER_N * math.exp(-(gap**2) / (2 * _CIDER_SIGMA**2))


def _check_java(names: Sequence[str]) -> None:
    missing = []
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None:
        missing.append("the module pycocoevalcap")
    if shutil.which("java") is None:
        missing.append("the program java on PATH, which comes with no Python package")
    if "spice" in names and spec is not None:
        folders = [Path(folder) / "spice" / "lib" for folder in spec.submodule_search_locations or []]
        if not any((folder / _CORENLP).exists() for folder in folders):
            missing.append(f"{_CORENLP}, which python -m pycocoevalcap.spice.get_stanford_models downloads")
    if missing:
        what = f"{' and '.join(name.upper() for name in names)} (not found: {'; '.join(missing)})"
        raise MissingExtraError(what, package="pycocoevalcap", extra="captions")


def _line(words: _Tokens) -> str:
    # METEOR is sent lines whose fields end at three bars.
    return " ".join(words).replace("|||", " ")


def _let_go(scorer: Any) -> None:
    # METEOR's wrapper keeps its lock when the program fails, and would wait for it forever once collected. It ends the
    # program then, but never closes what it read from.
    lock, process = getattr(scorer, "lock", None), getattr(scorer, "meteor_p", None)
    if lock is not None and lock.locked():
        lock.release()
    if process is not None:
        process.stdout.close()
        process.stderr.close()


def _run_java(name: str, truth: dict[int, list[str]], results: dict[int, list[str]]) -> CaptionScore:
    scorer = None
    try:
        scorer = getattr(importlib.import_module(f"pycocoevalcap.{name}.{name}"), name.capitalize())()
        mean, answers = scorer.compute_score(truth, results)
        corpus = float(mean)
        samples = tuple(float(answer["All"]["f"] if name == "spice" else answer) for answer in answers)
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        raise RunError(f"{name.upper()} failed, so it has no score: {type(error).__name__}: {error}") from error
    finally:
        _let_go(scorer)
    if len(samples) != len(results) or not all(map(math.isfinite, (corpus, *samples))):
        raise RunError(
            f"{name.upper()} gave {len(samples)} scores for {len(results)} captions, or one that is no number"
        )
    return CaptionScore(corpus=corpus, samples=samples)

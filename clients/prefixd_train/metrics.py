"""The metrics of generated text against one or more references.

Each is the field's own implementation (sacrebleu, rouge-score, nltk), split in two: what a segment
adds, and the score of the sums. That is what makes a thousand resamples cheap (`bootstrap`). NIST
is written out here, because nltk's gives only the final figure; it is tested against nltk's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.translate.meteor_score import meteor_score
from nltk.translate.nist_score import nist_length_penalty
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from prefixd_train.wordnet import HOW_TO_GET_IT, load_wordnet

__all__ = ["Metric", "make_metrics"]

Array = NDArray[Any]
References = Sequence[Sequence[str]]
"""of each segment, one or more"""

NIST_ORDER = 5

_tokenize: Callable[[str], str] = Tokenizer13a()  # type: ignore[no-untyped-call]
"""mteval's tokenisation, with a blank between tokens"""


class Metric(ABC):
    """A corpus score made of sums over segments."""

    name: str
    digits = 2
    """after the point, where it is shown"""

    @abstractmethod
    def statistics(self, hypotheses: Sequence[str], references: References) -> Array:
        """``[N, S]``: what each segment adds to the sums."""

    @abstractmethod
    def score(self, sums: Array) -> float:
        """The corpus score of ``[S]`` sums."""

    @property
    def signature(self) -> str:
        """How it was computed, for the report; known once ``statistics`` has run."""
        return ""


class _Sacre(Metric):
    """A metric of sacrebleu, whose own resampling uses the two methods that are called here."""

    def __init__(self, name: str, metric: BLEU | CHRF) -> None:
        self.name = name
        self._metric = metric

    def statistics(self, hypotheses: Sequence[str], references: References) -> Array:
        # sacrebleu wants the first reference of all segments, then the second: None where none is.
        most = max(map(len, references))
        streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
        rows = self._metric._extract_corpus_statistics(hypotheses, streams)  # type: ignore[arg-type]
        return np.asarray(rows, dtype=np.float64)

    def score(self, sums: Array) -> float:
        return float(self._metric._compute_score_from_stats(sums.tolist()).score)

    @property
    def signature(self) -> str:
        return str(self._metric.get_signature())


class _Mean(Metric):
    """The mean over segments of a score of one segment, as a percentage."""

    def statistics(self, hypotheses: Sequence[str], references: References) -> Array:
        pairs = zip(hypotheses, references, strict=True)
        return np.asarray([(self.segment(text, refs), 1.0) for text, refs in pairs])

    def score(self, sums: Array) -> float:
        return float(100 * sums[0] / sums[1])

    @abstractmethod
    def segment(self, hypothesis: str, references: Sequence[str]) -> float:
        """0 … 1"""


class _Rouge(_Mean):
    """The F-measure of the reference that gives the best one."""

    def __init__(self, kind: str) -> None:
        self.name = f"ROUGE-{kind}"
        self._kind = f"rouge{kind}"
        self._scorer = RougeScorer([self._kind], use_stemmer=True)

    def segment(self, hypothesis: str, references: Sequence[str]) -> float:
        scores = (self._scorer.score(reference, hypothesis) for reference in references)
        return max(float(score[self._kind].fmeasure) for score in scores)

    @property
    def signature(self) -> str:
        return "rouge-score, Porter stemmer, F1 of the best reference, mean over segments"


class _Meteor(_Mean):
    name = "METEOR"

    def __init__(self, wordnet: WordNetCorpusReader) -> None:
        self._wordnet = wordnet

    def segment(self, hypothesis: str, references: Sequence[str]) -> float:
        words = [_words(reference) for reference in references]
        return float(meteor_score(words, _words(hypothesis), wordnet=self._wordnet))

    @property
    def signature(self) -> str:
        return "nltk with WordNet; not the figures of METEOR 1.5, which also knows paraphrases"


class _Nist(Metric):
    """Doddington 2002, as nltk computes it, on mteval's tokens in lower case.

    An n-gram's weight is its information among all references. The weights are those of the whole
    set that ``statistics`` was given, also in a resample or a part of it. Sums: for each order the
    information of matched n-grams and the n-grams made, then the lengths of reference and text.
    """

    name = "NIST"

    def statistics(self, hypotheses: Sequence[str], references: References) -> Array:
        words = [[_words(text.lower()) for text in refs] for refs in references]
        information = _information(words)
        pairs = zip(hypotheses, words, strict=True)
        rows = [_nist_row(_words(text.lower()), refs, information) for text, refs in pairs]
        return np.asarray(rows, dtype=np.float64)

    def score(self, sums: Array) -> float:
        matched, made = sums[:NIST_ORDER], sums[NIST_ORDER : 2 * NIST_ORDER]
        precision = float(
            np.divide(matched, made, out=np.zeros_like(matched), where=made > 0).sum()
        )
        return precision * float(nist_length_penalty(sums[-2], sums[-1]))

    @property
    def signature(self) -> str:
        return "nltk's formula, 13a tokens, lower case, weights from all references of the set"


def _words(text: str) -> list[str]:
    return _tokenize(text).split()


def _ngrams(words: Sequence[str], order: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(order)), strict=False)


def _information(references: Sequence[Sequence[Sequence[str]]]) -> dict[tuple[str, ...], float]:
    """log2 of how often an n-gram's head occurs for each time that the n-gram does."""
    seen: Counter[tuple[str, ...]] = Counter()
    total = 0
    for reference in (reference for refs in references for reference in refs):
        total += len(reference)
        for order in range(1, NIST_ORDER + 1):
            seen.update(_ngrams(reference, order))
    heads = {ngram: seen[ngram[:-1]] if len(ngram) > 1 else total for ngram in seen}
    return {ngram: math.log2(heads[ngram] / times) for ngram, times in seen.items()}


def _nist_row(
    hypothesis: Sequence[str],
    references: Sequence[Sequence[str]],
    information: dict[tuple[str, ...], float],
) -> list[float]:
    matched, made = [], []
    reference_length = 0
    for order in range(1, NIST_ORDER + 1):
        mine = Counter(_ngrams(hypothesis, order))
        candidates = []
        for reference in references:
            common = mine & Counter(_ngrams(reference, order))
            gained = sum(information[ngram] * times for ngram, times in common.items())
            candidates.append((gained, len(reference)))
        # Each order takes its own best reference, the longer one of two that are as good.
        best, length = max(candidates)
        matched.append(best)
        made.append(mine.total())
        reference_length += length
    return [*matched, *made, reference_length, NIST_ORDER * len(hypothesis)]


def make_metrics(*, lowercase: bool = False) -> tuple[list[Metric], list[str]]:
    """All metrics that can be computed here, and a line for each that cannot.

    ``lowercase``: BLEU and chrF ignore case, as the E2E challenge's own script does.
    """
    metrics: list[Metric] = [
        _Sacre("BLEU", BLEU(lowercase=lowercase, force=True)),
        _Sacre("chrF", CHRF(lowercase=lowercase)),
        *map(_Rouge, ("1", "2", "L")),
        _Nist(),
    ]
    wordnet = load_wordnet()
    if wordnet is None:
        return metrics, [f"METEOR needs WordNet: {HOW_TO_GET_IT}"]
    return [*metrics, _Meteor(wordnet)], []

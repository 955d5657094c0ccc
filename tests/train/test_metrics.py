"""Scores against sacrebleu, rouge-score and nltk; intervals against scoring resampled texts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nltk
import numpy as np
import pytest
import sacrebleu
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from prefixd_train import wordnet
from prefixd_train.bootstrap import draw, interval
from prefixd_train.metrics import Metric, make_metrics

# Case, punctuation, no overlap, an empty text, an exact one; one to three references.
TEXTS = [
    (
        "The Blue Spice is a coffee shop near the river.",
        ["Blue Spice is a coffee shop by the river."],
    ),
    (
        "Loch Fyne serves French food.",
        ["Loch Fyne serves French food.", "French food at Loch Fyne"],
    ),
    ("", ["Cocum is cheap.", "Cocum, a pub, is cheap and near The Portland Arms."]),
    ("nothing of it", ["The leader of Aarhus is Jacob Bundsgaard.", "Aarhus: Bundsgaard!"]),
    (
        "Aarhus airport, in denmark, serves Aarhus airport city.",
        ["Aarhus Airport serves Aarhus.", "Aarhus Airport (Denmark)", "The airport of Aarhus"],
    ),
    ("Green Man is near All Bar One.", ["near All Bar One is the Green Man pub.", "Green Man"]),
]
HYPOTHESES = [text for text, _ in TEXTS]
REFERENCES = [references for _, references in TEXTS]


def metric(name: str, **options: bool) -> Metric:
    return next(metric for metric in make_metrics(**options)[0] if metric.name == name)


def corpus_score(metric: Metric, hypotheses: list[str], references: list[list[str]]) -> float:
    return metric.score(metric.statistics(hypotheses, references).sum(0))


def streams(references: list[list[str]]) -> list[list[str | None]]:
    most = max(map(len, references))
    return [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]


def rouge(kind: str) -> Callable[[list[str], list[list[str]]], float]:
    scorer = RougeScorer([kind], use_stemmer=True)

    def mean(hypotheses: list[str], references: list[list[str]]) -> float:
        return 100 * float(
            np.mean(
                [
                    scorer.score_multi(refs, text)[kind].fmeasure
                    for text, refs in zip(hypotheses, references, strict=True)
                ]
            )
        )

    return mean


def nist(hypotheses: list[str], references: list[list[str]]) -> float:
    split = Tokenizer13a()
    words = [[split(text.lower()).split() for text in refs] for refs in references]
    return float(corpus_nist(words, [split(text.lower()).split() for text in hypotheses]))


ORACLES: dict[str, Callable[[list[str], list[list[str]]], float]] = {
    "BLEU": lambda texts, refs: sacrebleu.corpus_bleu(texts, streams(refs)).score,
    "chrF": lambda texts, refs: sacrebleu.corpus_chrf(texts, streams(refs)).score,
    "ROUGE-1": rouge("rouge1"),
    "ROUGE-2": rouge("rouge2"),
    "ROUGE-L": rouge("rougeL"),
    "NIST": nist,
}


@pytest.mark.parametrize("name", ORACLES)
def test_a_score_is_the_librarys(name: str) -> None:
    ours = corpus_score(metric(name), HYPOTHESES, REFERENCES)
    assert ours == pytest.approx(ORACLES[name](HYPOTHESES, REFERENCES), abs=1e-9)
    assert ours > 1


@pytest.mark.parametrize("name", ORACLES)
def test_a_perfect_text_and_one_with_nothing_right(name: str) -> None:
    perfect = corpus_score(metric(name), [refs[0] for refs in REFERENCES], REFERENCES)
    assert perfect == pytest.approx(perfect if name == "NIST" else 100)
    assert corpus_score(metric(name), ["zzz"] * len(TEXTS), REFERENCES) == pytest.approx(
        0, abs=1e-9
    )


@pytest.mark.parametrize("lowercase", [False, True])
def test_bleu_is_that_of_sacrebleus_command(tmp_path: Path, lowercase: bool) -> None:
    (tmp_path / "texts").write_text("\n".join(HYPOTHESES) + "\n")
    # The command has no way to leave a reference out, so those that lack repeat the first.
    repeated = [[refs[i] if i < len(refs) else refs[0] for i in range(3)] for refs in REFERENCES]
    files = [tmp_path / f"references{number}" for number in range(3)]
    for number, file in enumerate(files):
        file.write_text("\n".join(refs[number] for refs in repeated) + "\n")
    command = [sys.executable, "-m", "sacrebleu", *map(str, files), "-i", str(tmp_path / "texts")]
    command += ["-m", "bleu", "-b", "-w", "4", *(["-lc"] if lowercase else [])]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    ours = corpus_score(metric("BLEU", lowercase=lowercase), HYPOTHESES, repeated)
    assert ours == pytest.approx(float(printed), abs=1e-4)


# NIST's weights stay those of the whole set, so a resample scored as a set of its own differs.
@pytest.mark.parametrize("name", ["BLEU", "chrF", "ROUGE-L"])
def test_an_interval_is_that_of_resampled_texts(name: str) -> None:
    draws = draw(len(TEXTS), 60, seed=7)
    scores = [
        ORACLES[name]([HYPOTHESES[i] for i in row], [REFERENCES[i] for i in row]) for row in draws
    ]
    ours = metric(name)
    found = interval(ours.statistics(HYPOTHESES, REFERENCES), ours.score, draws)
    assert found == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=1e-9)
    assert found.low < corpus_score(ours, HYPOTHESES, REFERENCES) < found.high


def test_draws_are_seeded_and_with_replacement() -> None:
    first = draw(50, 20, seed=1)
    assert (first == draw(50, 20, seed=1)).all()
    assert (first != draw(50, 20, seed=2)).any()
    assert first.shape == (20, 50)
    assert {0, 49} <= set(first.ravel().tolist()) <= set(range(50))
    assert all(len(set(row.tolist())) < 50 for row in first)


@pytest.mark.parametrize("name", ORACLES)
def test_one_segment_has_an_interval_of_no_width(name: str) -> None:
    ours = metric(name)
    statistics = ours.statistics(HYPOTHESES[:1], REFERENCES[:1])
    found = interval(statistics, ours.score, draw(1, 5, seed=0))
    assert found.low == found.high == pytest.approx(ours.score(statistics[0]))


@pytest.fixture
def small_wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A WordNet of one synset, dog and hound, where nltk looks for it."""
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for name in WordNetCorpusReader._FILES:
        (folder / name).write_text("")
    (folder / "lexnames").write_text("00\tnoun.animal\t1\n")
    (folder / "data.noun").write_text("00000000 00 n 02 dog 0 hound 0 000 | an animal\n")
    (folder / "index.noun").write_text("dog n 1 0 1 0 00000000\nhound n 1 0 1 0 00000000\n")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])


@pytest.mark.usefixtures("small_wordnet")
def test_meteor_knows_synonyms_and_takes_the_best_reference() -> None:
    metrics, missing = make_metrics()
    assert missing == []
    meteor = metrics[-1]
    assert meteor.name == "METEOR"
    references = [["A cat.", "The hound runs."], ["The hound runs."]]
    same, other = meteor.statistics(["The dog runs.", "The cow runs."], references)[:, 0]
    # All four tokens match in one chunk: 1 - 0.5 * (1 / 4) ** 3.
    assert same == pytest.approx(1 - 0.5 / 64)
    assert other < same


@pytest.fixture
def no_nltk_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])


@pytest.mark.usefixtures("no_nltk_data")
@pytest.mark.skipif(
    not wordnet.DEBIAN.exists(), reason="needs Debian's WordNet: apt-get install wordnet-base"
)
def test_meteor_with_the_whole_wordnet() -> None:
    metrics, missing = make_metrics()
    assert missing == []
    (meteor,) = (metric for metric in metrics if metric.name == "METEOR")
    # The example of nltk's own documentation, where 0.6944 is the figure.
    text = (
        "It is a guide to action which ensures that the military always obeys the commands of the"
        " party"
    )
    references = [
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the guiding principle which guarantees the military forces always being under the"
        " command of the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    ]
    texts = [text, "The dog is quick.", "The dog is quick."]
    scores = meteor.statistics(texts, [references, ["The dog is fast."], ["The dog is wet."]])[:, 0]
    # Fast is quick: five matches in one chunk, 1 - 0.5 * (1 / 5) ** 3. Wet is not: four of five
    # words, F 0.8, in two chunks, 0.8 * (1 - 0.5 * (2 / 4) ** 3).
    assert scores == pytest.approx([0.6944, 0.996, 0.75], abs=5e-5)


@pytest.mark.usefixtures("no_nltk_data")
def test_meteor_is_left_out_where_there_is_no_wordnet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wordnet, "DEBIAN", tmp_path / "wordnet")
    metrics, (line,) = make_metrics()
    assert "METEOR" not in {metric.name for metric in metrics}
    assert "nltk.downloader wordnet" in line
    assert "wordnet-base" in line

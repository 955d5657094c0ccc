"""WordNet 3.0, for METEOR's synonyms: nltk's own download or Debian's package wordnet-base."""

from __future__ import annotations

import io
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import nltk.data
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader

__all__ = ["HOW_TO_GET_IT", "load_wordnet"]

HOW_TO_GET_IT = "python -m nltk.downloader wordnet, or Debian's package wordnet-base"

DEBIAN = Path("/usr/share/wordnet")


class _DebianWordNet(WordNetCorpusReader):  # type: ignore[misc]
    """The package's files are those that nltk downloads, but for two that synonyms do not need."""

    def open(self, file: str) -> Any:
        if file == "lexnames":  # of the 45 files that the synsets were once written in
            return io.StringIO("".join(f"{index:02}\t{index:02}\t0\n" for index in range(45)))
        return super().open(file)

    def map_wn(self, version: str = "wordnet") -> None:
        """No map from another version's synsets, which would be made from index.sense."""


def load_wordnet() -> WordNetCorpusReader | None:
    """nltk's, else Debian's, else None. Takes about two seconds and 100 MB."""
    # nltk's own instance needs a second corpus for other languages than English.
    wordnet = LazyCorpusLoader("wordnet", WordNetCorpusReader, omw_reader=None)
    with warnings.catch_warnings(action="ignore"):
        try:
            wordnet.ensure_loaded()
        except LookupError:
            return _load_debian() if (DEBIAN / "data.noun").exists() else None
    return wordnet


def _load_debian() -> WordNetCorpusReader:
    if str(DEBIAN) not in nltk.data.path:  # nltk reads no file outside of it
        nltk.data.path.append(str(DEBIAN))
    return _read(str(DEBIAN))


_read = cache(partial(_DebianWordNet, omw_reader=None))

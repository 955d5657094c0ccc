from __future__ import annotations

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from prefixd_server.frontend.text import TextCodec
from tests.frontend.tokenizers_ import byte_fallback, byte_level
from tests.support.models import demo_folder


@pytest.fixture(scope="session")
def smollm() -> PreTrainedTokenizerBase:
    """SmolLM2's own tokenizer, as the demo model has it."""
    return AutoTokenizer.from_pretrained(demo_folder())


@pytest.fixture(scope="session", params=["smollm", "byte_level", "byte_fallback", "slow"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """Every kind in turn; `slow` is ByT5's, plain Python, one token a byte."""
    if request.param == "smollm":
        return request.getfixturevalue("smollm")
    return {"byte_level": byte_level, "byte_fallback": byte_fallback, "slow": ByT5Tokenizer}[
        request.param
    ]()


@pytest.fixture(scope="session")
def codec(smollm: PreTrainedTokenizerBase) -> TextCodec:
    return TextCodec(smollm)


@pytest.fixture(scope="session")
def any_codec(tokenizer: PreTrainedTokenizerBase) -> TextCodec:
    return TextCodec(tokenizer)

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from prefixd_server.engine.mailbox import Mailbox
from prefixd_server.frontend.service import Frontend
from prefixd_server.frontend.text import TextCodec
from tests.frontend.engines import HandEngine
from tests.frontend.support import Log
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


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(max_queue=8)


@pytest.fixture
def engine(mailbox: Mailbox) -> HandEngine:
    return HandEngine(mailbox)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
async def frontend(mailbox: Mailbox, codec: TextCodec, log: Log) -> AsyncIterator[Frontend]:
    frontend = Frontend(mailbox, codec, max_model_len=128, observer=log, grace_s=0.0)
    frontend.attach(asyncio.get_running_loop())
    yield frontend
    frontend.close()

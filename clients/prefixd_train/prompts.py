"""What to send the server for a row of a test set, so that the LM reads what training read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prefixd import Version
from prefixd_train.errors import TrainError
from prefixd_train.template import PromptTemplate, check_messages, lone_message, messages_text

__all__ = ["Prompts"]


@dataclass(frozen=True)
class Prompts:
    """Rows → ``inputs`` of requests, for one version of a task."""

    version: Version
    chat: bool
    """The task's defaults put inputs through the chat template, as one user's message."""
    asked: str | None = None
    """a prompt template that goes before the version's own; with ``chat``, the message's"""
    tokenizer: Any = None
    """the model's own, to write messages where the server does not"""

    def inputs(self, fields: Mapping[str, Any]) -> str:
        """Raises ValueError for a row that makes no prompt, TrainError where it would make
        another than in training."""
        if "messages" in fields:
            return self._of_messages(fields["messages"])
        return self.template.render(fields)

    @cached_property
    def template(self) -> PromptTemplate:
        """That of rows that are not messages. Raises TrainError where none is known."""
        text = self._trained_with() if self.asked is None else self.asked
        try:
            return PromptTemplate(text)
        except ValueError as error:
            raise TrainError(str(error)) from error

    def _trained_with(self) -> str:
        text = _at(self.version.provenance, "training", "prompt_template")
        if not isinstance(text, str):
            raise TrainError(
                f"{self._name} does not say which prompt template it was trained"
                " with: give one, such as '{source}\\n'"
            )
        if "template" not in self._trained_on(default="template"):
            raise TrainError(
                f"{self._name} was trained on messages, with no prompt template: give one that"
                " makes a user's message of a row, such as '{source}'"
            )
        if self.chat:
            raise TrainError(
                f"{self._name} was trained with the prompt template {text!r} and no chat template,"
                " but the task's default chat_template is 'model': take it away, or give the"
                " template of a user's message"
            )
        return text

    def _of_messages(self, messages: Any) -> str:
        check_messages(messages)
        if "messages" not in self._trained_on(default="messages"):
            raise TrainError(
                f"{self._name} was trained on rows of a prompt template, not on messages"
            )
        if self.chat:
            message = lone_message(messages)
            if message is None:
                raise ValueError(
                    "the server makes a prompt of one user's message, as the task's default"
                    " chat_template says; these are more before the answer"
                )
            return message
        if self.tokenizer is None:
            raise ValueError(
                "has messages, which the server does not put through the chat template for this"
                " task: set the task's default chat_template, or name the model, whose tokenizer"
                " then writes them"
            )
        return _untokenised(self.tokenizer, messages_text(self.tokenizer, messages)[0])

    def _trained_on(self, *, default: str) -> list[str]:
        """``template``, ``messages`` or both; of what does not say, the default."""
        kinds = _at(self.version.provenance, "data", "train", "prompts")
        return kinds if isinstance(kinds, list) else [default]

    @property
    def _name(self) -> str:
        return f"{self.version.task}@{self.version.version}"


def _untokenised(tokenizer: Any, prompt: str) -> str:
    """The text of which the server makes the tokens of ``prompt``. It adds special tokens, and the
    chat template has written them already."""
    expected = tokenizer(prompt, add_special_tokens=False).input_ids
    for text in (prompt, prompt.removeprefix(tokenizer.bos_token or "")):
        if tokenizer(text).input_ids == expected:
            return text
    raise ValueError(
        "the tokenizer adds special tokens to what the chat template writes, so no text gives the"
        " server the tokens of training"
    )


def _at(tree: Any, *names: str) -> Any:
    for name in names:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree

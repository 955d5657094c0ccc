"""The prompt of a row: a template with named fields, or the tokenizer's chat template."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "ROLES",
    "PromptTemplate",
    "check_messages",
    "lone_message",
    "messages_text",
    "shown",
    "target_texts",
]

ROLES = ("system", "user", "assistant", "tool")


class PromptTemplate:
    """``"{source}\\n"``: plain names in braces, and ``{{`` or ``}}`` for a brace.

    No attributes, indices, conversions or format specs: they would reach into objects. Raises
    ValueError, as does :meth:`render` for a field that the row lacks.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"prompt template {text!r}: {error}") from error
        for _, name, spec, conversion in self._parts:
            if name is not None and (not name.isidentifier() or spec or conversion):
                field = (
                    name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                )
                raise ValueError(f"prompt template {text!r}: {{{field}}} is not a plain name")
        if not self.names:
            raise ValueError(f"prompt template {text!r} has no field, such as {{source}}")

    @property
    def names(self) -> list[str]:
        return [name for _, name, _, _ in self._parts if name is not None]

    def render(self, fields: Mapping[str, Any]) -> str:
        filled = []
        for literal, name, _, _ in self._parts:
            filled.append(literal)
            if name is not None:
                filled.append(_text(name, fields))
        return "".join(filled)


def _text(name: str, fields: Mapping[str, Any]) -> str:
    if name not in fields:
        raise ValueError(f"has no {name}, which the prompt template names")
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a text that is not empty, not {shown(value)}")
    return _unicode(name, value)


def messages_text(tokenizer: Any, messages: Any) -> tuple[str, str]:
    """The prompt as the tokenizer's chat template writes it, and what it writes after that for the
    last message, the assistant's. Raises ValueError."""
    check_messages(messages)
    if not tokenizer.chat_template:
        raise ValueError("has messages, but the model's tokenizer has no chat template")
    try:
        prompt: str = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # the template's own code: whatever it raises is about the messages
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    if not whole.startswith(prompt):
        raise ValueError("the chat template does not end with the last message as it is")
    return prompt, whole[len(prompt) :]


def lone_message(messages: Sequence[Mapping[str, str]]) -> str | None:
    """What the user says, if that is all there is before the assistant's answer."""
    first, *rest = messages
    return first["content"] if first["role"] == "user" and len(rest) == 1 else None


def check_messages(messages: Any) -> None:
    """Raises ValueError, with the value, unless they are two or more, the assistant's last."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"messages must be a list of two or more, not {shown(messages)}")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where} must be an object, not {shown(message)}")
        if message.get("role") not in ROLES:
            raise ValueError(
                f"{where}.role is {shown(message.get('role'))}; known are {', '.join(ROLES)}"
            )
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"{where}.content must be text, not {shown(content)}")
        _unicode(f"{where}.content", content)
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"the last message must be the assistant's, is the {messages[-1]['role']}'s"
        )


def target_texts(fields: Mapping[str, Any]) -> Sequence[str]:
    """Of ``target``, or of each of ``targets``. Raises ValueError."""
    if "target" in fields:
        return [_target("target", fields["target"])]
    targets = fields["targets"]
    if not isinstance(targets, list) or not targets:
        raise ValueError(f"targets must be a list that is not empty, not {shown(targets)}")
    return [_target(f"targets[{index}]", text) for index, text in enumerate(targets)]


def _target(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not empty, not {shown(value)}")
    return _unicode(name, value)


def _unicode(name: str, text: str) -> str:
    """JSON can escape half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"{name} holds a lone surrogate, U+{code:04X}") from error
    return text


def shown(value: Any) -> str:
    """A value of the user's for a message: short whatever it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"

"""Distils a document into a prefix: context distillation, as for Cartridges (arXiv 2506.06266).

The prefix is trained so that the LM's next-token distributions over answers are those that the LM
itself has with the document in its context. Prompts stand behind the prefix as they are served, at
position P; behind the document they stand at its own length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from prefixd_train.data import Encoder, file_sha256, split
from prefixd_train.errors import TooLongError, TrainError
from prefixd_train.initialise import activations_of_tokens
from prefixd_train.lm import FrozenLM
from prefixd_train.options import TrainOptions
from prefixd_train.prepare import Data, prompt_template
from prefixd_train.questions import Question, Questions, read_questions, write_questions
from prefixd_train.sites import Site
from prefixd_train.teacher import Teacher, write_teacher
from prefixd_train.template import PromptTemplate
from prefixd_train.text_file import read_text

__all__ = ["Lesson", "read_lesson", "teach"]


@dataclass(frozen=True)
class Lesson:
    """What is to be learnt, read and checked before anything is computed."""

    document: Sequence[int]
    """its tokens"""
    questions: Sequence[Question]
    """none: the LM is to write them"""
    encoder: Encoder
    summary: Mapping[str, Any]
    """files, digests and counts, as JSON values"""


def read_lesson(options: TrainOptions, lm: FrozenLM, lengths: Mapping[Site, int]) -> Lesson:
    """Raises DataError, TooLongError, TrainError, OSError."""
    path = options.document
    assert path is not None
    if lm.is_encoder_decoder:
        raise TrainError(f"a document is distilled into a decoder-only LM; {lm.name} is not one")
    _check_top_k(options.top_k, lm)
    document = _read_document(path, lm, options.answer_tokens)
    if options.starts_from_data:
        _check_long_enough(path, len(document), max(lengths.values()))
    encoder = _encoder(options, lm, max(len(document), *lengths.values()))
    summary: dict[str, Any] = {
        "document": {
            "file": path.name,
            "sha256": file_sha256(path),
            "tokens": len(document),
        }
    }
    questions = Questions()
    if options.questions is not None:
        questions = read_questions(
            options.questions,
            encoder,
            answer_tokens=options.answer_tokens,
            skip_too_long=options.too_long == "skip",
        )
        name, digest = options.questions.name, file_sha256(options.questions)
        summary["questions"] = {
            "file": name,
            "sha256": digest,
            "questions": len(questions),
            "rows_skipped": questions.num_skipped,
        }
    if options.dev_fraction and (len(questions) or options.self_generate) == 1:
        raise TrainError(
            f"{options.questions or 'self_generate'}: one question; a dev split of"
            f" {options.dev_fraction} takes two or more"
        )
    return Lesson(document, questions, encoder, summary)


def teach(
    options: TrainOptions, lm: FrozenLM, lesson: Lesson, folder: Path, accelerator: Accelerator
) -> tuple[Teacher, Data]:
    """The teacher in that folder, which the first process writes where there is none yet."""
    if accelerator.is_main_process and not folder.exists():
        _write(options, lm, lesson, folder)
    accelerator.wait_for_everyone()
    teacher = Teacher(folder)
    train, dev = teacher.examples, None
    if options.dev_fraction:
        file = folder / "examples.jsonl"
        train, dev = split(file, train, options.dev_fraction, seed=options.seed)
    parts = {"train": train} | ({"dev": dev} if dev is not None else {})
    summary = {
        name: {
            "file": "teacher/examples.jsonl",
            "sha256": teacher.digests["examples.jsonl"],
            "examples": len(examples),
            "target_tokens": examples.num_targets,
        }
        for name, examples in parts.items()
    }
    told = {"dev": None, **summary, **lesson.summary, "teacher": teacher.digests}
    return teacher, Data(train, dev, told, _left_out(options, lesson, teacher))


def _left_out(options: TrainOptions, lesson: Lesson, teacher: Teacher) -> list[str]:
    if options.questions is not None:
        skipped, where = lesson.summary["questions"]["rows_skipped"], str(options.questions)
    else:
        skipped = (options.self_generate or 0) - len(teacher.examples)
        where = "the questions that the model wrote"
    return [f"{skipped:,} of {where}"] if skipped else []


def _write(options: TrainOptions, lm: FrozenLM, lesson: Lesson, folder: Path) -> None:
    questions = lesson.questions or write_questions(
        lm,
        lesson.document,
        options.self_generate or 0,
        lesson.encoder,
        chunk_tokens=options.chunk_tokens,
        answer_tokens=options.answer_tokens,
        seed=options.seed,
        skip_too_long=options.too_long == "skip",
    )
    write_teacher(
        folder,
        lm,
        activations_of_tokens(lm, lesson.document),
        questions,
        top_k=options.top_k,
        answer_tokens=options.answer_tokens,
        batch_size=options.batch_size,
    )


def _read_document(path: Path, lm: FrozenLM, answer_tokens: int) -> list[int]:
    tokens: list[int] = lm.tokenizer(read_text(path), verbose=False).input_ids
    if lm.max_positions is not None and len(tokens) + answer_tokens >= lm.max_positions:
        raise TooLongError(
            f"{path} has {len(tokens)} tokens; with an answer of up to {answer_tokens} it does not"
            f" fit {lm.name}'s {lm.max_positions} positions"
        )
    return tokens


def _check_top_k(top_k: int, lm: FrozenLM) -> None:
    vocabulary = len(lm.module.get_output_embeddings().weight)
    if top_k >= vocabulary:
        raise TrainError(
            f"top_k is {top_k}; {lm.name} has {vocabulary} tokens, so it is at most"
            f" {vocabulary - 1}"
        )


def _check_long_enough(path: Path, tokens: int, length: int) -> None:
    if tokens < length:
        raise TrainError(
            f"{path} has {tokens} tokens, fewer than the {length} virtual tokens that start from"
            " its first ones"
        )


def _encoder(options: TrainOptions, lm: FrozenLM, first: int) -> Encoder:
    """``first``: the position of a prompt behind the document or the prefix, whichever is later."""
    room = options.max_length
    if lm.max_positions is not None:
        left = lm.max_positions - first
        room = left if room is None else min(room, left)
    template = PromptTemplate(prompt_template(options, lm))
    return Encoder(lm.tokenizer, template, is_encoder_decoder=False, max_total=room)

"""Exact match on held-out questions, with the control that shows whether the images are looked at.

A suite is a JSONL file of {"images": [paths relative to its folder], "question": text with <image>, "answer": text}.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_vlm.data.sample import Message
from qwen3_vlm.errors import DataError
from qwen3_vlm.eval.generate import GreedyGenerator, Prompt

PROMPTS_PER_BATCH = 64
"""Questions that go through the model together."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One line of a suite."""

    images: tuple[Path, ...]
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question, and what the model said with its own images and with another question's."""

    question: Question
    said: str
    said_with_other_images: str

    @property
    def is_right(self) -> bool:
        """The answer is the truth, but for space around it."""
        return self.said.strip() == self.question.answer.strip()


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """Scores in 0..1."""

    n: int
    exact_match: float
    exact_match_images_shuffled: float
    """The same questions with the images of others: what words alone achieve."""
    chance: float
    """The best constant answer for each question text."""


def read_suite(path: Path) -> list[Question]:
    """Read a suite.

    Raises:
        DataError: a line has another form, or an image is missing.
    """
    if not path.is_file():
        raise DataError(f"suite {path} does not exist")
    questions = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row: dict[str, Any] = json.loads(line)
            question = Question(
                images=tuple(path.parent / name for name in row["images"]),
                question=row["question"],
                answer=row["answer"],
            )
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise DataError(
                f'{path} line {number}: expected {{"images": [...], "question": ..., "answer": ...}}; '
                f"{type(e).__name__}: {e}"
            ) from e
        missing = [str(p) for p in question.images if not p.is_file()]
        if missing:
            raise DataError(f"{path} line {number}: image {missing[0]} does not exist")
        questions.append(question)
    if not questions:
        raise DataError(f"suite {path} is empty")
    return questions


def chance(questions: Sequence[Question]) -> float:
    """Share of right answers when every question text always gets its most frequent answer."""
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    for q in questions:
        forms[q.question][q.answer] += 1
    return sum(max(form.values()) for form in forms.values()) / len(questions)


def shuffled_images(questions: Sequence[Question], *, seed: int) -> list[tuple[Path, ...]]:
    """Give every question the images of another one that has as many; no question keeps its own unless it is alone."""
    by_count: dict[int, list[int]] = defaultdict(list)
    for n, q in enumerate(questions):
        by_count[len(q.images)].append(n)
    images: list[tuple[Path, ...]] = [q.images for q in questions]
    for members in by_count.values():
        random.Random(seed).shuffle(members)
        for n, other in zip(members, members[1:] + members[:1], strict=True):
            images[n] = questions[other].images
    return images


def answer_all(
    generator: GreedyGenerator,
    questions: Sequence[Question],
    images: Sequence[tuple[Path, ...]],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to all questions, each with the given images."""
    prompts = [
        Prompt(messages=[Message(role="user", content=q.question)], media={"image": [p.read_bytes() for p in paths]})
        for q, paths in zip(questions, images, strict=True)
    ]
    answers: list[str] = []
    for start in range(0, len(prompts), PROMPTS_PER_BATCH):
        answers += generator.generate(prompts[start : start + PROMPTS_PER_BATCH], max_new_tokens=max_new_tokens)
    return answers


def evaluate(
    generator: GreedyGenerator, questions: Sequence[Question], *, max_new_tokens: int, seed: int
) -> tuple[ExactMatch, list[Answered]]:
    """Score a model on a suite.

    Args:
        generator: the model.
        questions: the suite.
        max_new_tokens: longest answer.
        seed: of the shuffled control.
    """
    said = answer_all(generator, questions, [q.images for q in questions], max_new_tokens=max_new_tokens)
    other = answer_all(generator, questions, shuffled_images(questions, seed=seed), max_new_tokens=max_new_tokens)
    answered = [
        Answered(question=q, said=a, said_with_other_images=b) for q, a, b in zip(questions, said, other, strict=True)
    ]
    n = len(answered)
    return (
        ExactMatch(
            n=n,
            exact_match=sum(a.is_right for a in answered) / n,
            exact_match_images_shuffled=sum(
                a.said_with_other_images.strip() == a.question.answer.strip() for a in answered
            )
            / n,
            chance=chance(questions),
        ),
        answered,
    )

"""The training loop: documentation in, a checkpoint out."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, count
from pathlib import Path

import lance
import pyarrow as pa
import torch
from lance.query import MatchQuery
from transformers import T5Gemma2ForConditionalGeneration

from jobs.demo_training import objective
from jobs.demo_training.architecture import DEMO, configuration
from jobs.demo_training.documentation import (
    Document,
    held_out,
    installed_packages,
    standard_library,
    without_copies,
)
from jobs.demo_training.questions import KINDS, Question, cut
from jobs.demo_training.start import start_as_matcher
from jobs.demo_training.tokenizer import train_tokenizer
from kalm_encoder.model.checkpoint import answer_token_id
from kalm_encoder.prompts import render_passage, render_query

FINE, COARSE = (1, 2, 4, 8), (16, 32, 64)
"""The loss of each step is the sum over one ratio of each."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a training.

    Attributes:
        steps: Number of optimiser steps.
        queries: Queries per step.
        hard: Passages per query that BM25 confuses with the relevant one.
        easy: Relevant passages of other queries, per query.
        max_tokens: Tokens of a passage, prefix included.
        per_package: Limits the documents of one package.
        learning_rate: Highest learning rate, see `_schedule`.
        seed: Seed of all that is random.
    """

    steps: int = 4500
    queries: int = 8
    hard: int = 4
    easy: int = 3
    max_tokens: int = 128
    per_package: int = 5000
    learning_rate: float = 1e-3
    seed: int = 0


def training_documents(recipe: Recipe) -> list[Document]:
    """Return what may be trained on, shuffled: nothing that is held out, and no copy of it."""
    library = list(standard_library())
    test = [d for d in library if held_out(d.source)]
    shuffled = [d for d in library if not held_out(d.source)]
    shuffled += installed_packages()
    random.Random(recipe.seed).shuffle(shuffled)
    counts: Counter[str] = Counter()
    documents = []
    for document in without_copies(shuffled, test):
        counts[document.source] += 1
        if counts[document.source] <= recipe.per_package:
            documents.append(document)
    return documents


class Trainer:
    """A model in training, and what it is trained with."""

    def __init__(self, recipe: Recipe, documents: Sequence[Document], folder: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.documents = documents
        texts = [f"{d.name} {d.text}" for d in documents]
        prompt = render_query("")  # its words become tokens of their own
        self.tokenizer = train_tokenizer([*texts, *[prompt] * 1000], DEMO.vocabulary)
        self.model = T5Gemma2ForConditionalGeneration(configuration(DEMO, self.tokenizer)).train()
        self.answers = [answer_token_id(self.tokenizer, a) for a in ("yes", "no")]
        sample = self.tokenizer(texts[:60_000], add_special_tokens=False)["input_ids"]
        start_as_matcher(self.model, self.tokenizer, sample, recipe.seed)
        table = pa.table({"number": range(len(texts)), "text": texts})
        self.index = lance.write_dataset(table, str(folder / "documents.lance"), mode="overwrite")
        self.index.create_scalar_index("text", "INVERTED", with_position=False)

    def run(self) -> Iterator[tuple[int, float]]:
        """Train, and yield (step, mean loss since the last yield) every 50 steps."""
        recipe = self.recipe
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(
            parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        losses: list[float] = []
        for step, numbers in zip(range(1, recipe.steps + 1), self._order(), strict=False):
            for options in optimiser.param_groups:
                options["lr"] = recipe.learning_rate * _schedule(step / recipe.steps)
            group = self._group(step - 1, numbers)
            with torch.autocast("cpu", torch.bfloat16):
                loss = self._loss(group, random.Random(f"{recipe.seed} {step}"))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            losses.append(loss.item())
            if step % 50 == 0 or step == recipe.steps:
                yield step, sum(losses) / len(losses)
                losses.clear()

    def save(self, folder: Path) -> None:
        """Write the checkpoint in 16 bit."""
        folder.mkdir(parents=True, exist_ok=True)
        copy.deepcopy(self.model).half().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=1) + "\n")

    def _loss(self, group: list[tuple[Question, list[str]]], pick: random.Random) -> torch.Tensor:
        """Return the loss of some questions, each against its own and some others' passages."""
        rendered = [
            render_passage(p) for question, hard in group for p in (question.passage, *hard)
        ]
        tokens = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        ratios = (pick.choice(FINE), pick.choice(COARSE))
        encoder, decoder = self.model.model.encoder.text_model, self.model.model.decoder
        states, real = objective.pooled(
            encoder,
            [ids[: self.recipe.max_tokens] for ids in tokens],
            self.tokenizer.pad_token_id,
            ratios,
        )
        answers = decoder.embed_tokens.weight[self.answers]
        starts = list(accumulate((1 + len(hard) for _, hard in group), initial=0))
        total = torch.zeros(())
        for i, (question, _) in enumerate(group):
            others = [start for j, start in enumerate(starts[:-1]) if j != i]
            rows = [*range(starts[i], starts[i + 1])]
            rows += pick.sample(others, min(self.recipe.easy, len(others)))
            prompt = self.tokenizer(render_query(question.query), add_special_tokens=False)
            both = states[:, rows].flatten(0, 1), real[:, rows].flatten(0, 1)
            margin = objective.margins(decoder, answers, prompt["input_ids"], *both)
            for part in margin.chunk(len(ratios)):
                total = total + objective.loss(part)
        return total / (len(group) * len(ratios))

    def _order(self) -> Iterator[list[int]]:
        """Yield numbers of documents, more than a step needs, each once per epoch."""
        for epoch in count():
            numbers = list(range(len(self.documents)))
            random.Random(f"{self.recipe.seed} epoch {epoch}").shuffle(numbers)
            size = 2 * self.recipe.queries  # not every document makes a question
            yield from (numbers[i : i + size] for i in range(0, len(numbers) - size, size))

    def _group(self, step: int, numbers: list[int]) -> list[tuple[Question, list[str]]]:
        """Return the questions of a step, each with its hard passages."""
        pick = random.Random(f"{self.recipe.seed} group {step}")
        group = []
        for number in numbers:
            question = cut(self.documents[number], pick.choice(KINDS), seed=step)
            if question is None:
                continue
            others = []
            for other in self._search(question.query):
                same = cut(self.documents[other], question.kind, seed=step)
                if other != number and same is not None and same.passage != question.passage:
                    others.append(same.passage)
            if len(others) >= self.recipe.hard:
                group.append((question, pick.sample(others, self.recipe.hard)))
            if len(group) == self.recipe.queries:
                break
        return group

    def _search(self, query: str) -> list[int]:
        """Return the numbers of the documents that BM25 finds, the best first."""
        hits = self.index.to_table(
            columns=["number", "_score"],
            full_text_query=MatchQuery(query, "text"),
            limit=4 * self.recipe.hard,
        )
        numbers: list[int] = hits["number"].to_pylist()
        return numbers


def _schedule(done: float) -> float:
    """Return the share of the highest learning rate when this share of the steps is done."""
    return done / 0.03 if done < 0.03 else 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2

"""The training loop: documentation in, a checkpoint out."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from jobs.demo_training.start import RESERVED, rarity, start_as_matcher, word_vectors
from jobs.demo_training.tokenizer import train_tokenizer
from kalm_encoder.model.checkpoint import answer_token_id
from kalm_encoder.prompts import render_passage, render_query

logger = logging.getLogger(__name__)

TEST_ONE_IN = 4
"""Of the standard library's modules, held out for tests."""
FINE, COARSE = (1, 2, 4, 8), (16, 32, 64)
"""Each step is the sum of one ratio of each."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: optimiser steps.
        queries: of a step.
        hard: passages BM25 confuses with the relevant one, a query.
        easy: relevant passages of other queries, a query.
        max_tokens: of a passage, prefix included.
        per_package: documents of one package at most.
        learning_rate: at its highest, see `_schedule`.
        seed: of all that is random.
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
    test = [d for d in library if held_out(d.source, TEST_ONE_IN)]
    rest = [d for d in library if not held_out(d.source, TEST_ONE_IN)]
    shuffled = [*rest, *installed_packages()]
    random.Random(recipe.seed).shuffle(shuffled)
    counts: dict[str, int] = {}
    documents = []
    for document in without_copies(shuffled, test):
        counts[document.source] = counts.get(document.source, 0) + 1
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
        logger.info("%d documents, %d parameters", len(documents), self.model.num_parameters())
        self.answers = [answer_token_id(self.tokenizer, a) for a in ("yes", "no")]
        sample = self.tokenizer(texts[:60_000], add_special_tokens=False)["input_ids"]
        start_as_matcher(
            self.model,
            word_vectors(sample, DEMO.vocabulary, DEMO.hidden - RESERVED, recipe.seed),
            rarity(sample, DEMO.vocabulary),
            {"yes": self.answers[0], "no": self.answers[1], "<bos>": self.tokenizer.bos_token_id},
        )
        self.search = _index(documents, folder / "documents.lance")

    def run(self) -> Iterator[tuple[int, float]]:
        """Train; yields (step, mean loss since the last yield) every 50 steps."""
        recipe = self.recipe
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(
            parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        losses: list[float] = []
        for step, group in enumerate(self._groups(), start=1):
            for options in optimiser.param_groups:
                options["lr"] = recipe.learning_rate * _schedule(step / recipe.steps)
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
        passages = [p for question, hard in group for p in (question.passage, *hard)]
        tokens = self._passage_tokens(passages)
        ratios = (pick.choice(FINE), pick.choice(COARSE))
        encoder, decoder = self.model.model.encoder.text_model, self.model.model.decoder
        states = objective.pooled(encoder, tokens, self.tokenizer.pad_token_id, ratios)
        answers = decoder.embed_tokens.weight[self.answers]
        starts = [0]
        for _, hard in group:
            starts.append(starts[-1] + 1 + len(hard))
        total = torch.zeros(())
        for i, (question, hard) in enumerate(group):
            others = [s for j, s in enumerate(starts[:-1]) if j != i]
            rows = [*range(starts[i], starts[i] + 1 + len(hard))]
            rows += pick.sample(others, min(self.recipe.easy, len(others)))
            prompt = self.tokenizer(render_query(question.query), add_special_tokens=False)
            both = objective.stacked([states[ratio] for ratio in ratios], rows)
            margin = objective.margins(decoder, answers, prompt["input_ids"], *both)
            for part in margin.chunk(len(ratios)):
                total = total + objective.loss(part)
        return total / (len(group) * len(ratios))

    def _passage_tokens(self, passages: list[str]) -> list[list[int]]:
        rendered = [render_passage(text) for text in passages]
        encoded = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return [ids[: self.recipe.max_tokens] for ids in encoded]

    def _groups(self) -> Iterator[list[tuple[Question, list[str]]]]:
        """Yield the questions of each step with their hard passages, searched ahead."""
        recipe = self.recipe
        with ThreadPoolExecutor(1) as pool:
            ahead: list[Any] = []
            for step, numbers in enumerate(self._order()):
                ahead.append(pool.submit(self._group, step, numbers))
                if len(ahead) > 4:
                    yield ahead.pop(0).result()
                if step + 1 == recipe.steps:
                    break
            for future in ahead:
                yield future.result()

    def _order(self) -> Iterator[list[int]]:
        """Yield numbers of documents, more than a step needs, each once an epoch."""
        epoch = 0
        while True:
            numbers = list(range(len(self.documents)))
            random.Random(f"{self.recipe.seed} epoch {epoch}").shuffle(numbers)
            size = 2 * self.recipe.queries  # not every document makes a question
            yield from (numbers[i : i + size] for i in range(0, len(numbers) - size, size))
            epoch += 1

    def _group(self, step: int, numbers: list[int]) -> list[tuple[Question, list[str]]]:
        pick = random.Random(f"{self.recipe.seed} group {step}")
        group = []
        for number in numbers:
            document = self.documents[number]
            question = cut(document, pick.choice(KINDS), seed=step)
            if question is None:
                continue
            others = []
            for other in self.search(question.query, 4 * self.recipe.hard):
                same = cut(self.documents[other], question.kind, seed=step)
                if other != number and same is not None and same.passage != question.passage:
                    others.append(same.passage)
            if len(others) >= self.recipe.hard:
                group.append((question, pick.sample(others, self.recipe.hard)))
            if len(group) == self.recipe.queries:
                break
        return group


def _schedule(done: float) -> float:
    """Return the share of the highest learning rate when this share of the steps is done."""
    return done / 0.03 if done < 0.03 else 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2


def _index(documents: Sequence[Document], uri: Path) -> Any:
    """Return a BM25 search over documents: (query, limit) -> their numbers, best first."""
    began = time.monotonic()
    table = pa.table(
        {"number": range(len(documents)), "text": [f"{d.name} {d.text}" for d in documents]}
    )
    dataset = lance.write_dataset(table, str(uri), mode="overwrite")
    dataset.create_scalar_index("text", "INVERTED", with_position=False)
    dataset = lance.dataset(str(uri))
    logger.info("full-text index in %.0f s", time.monotonic() - began)

    def search(query: str, limit: int) -> list[int]:
        hits = dataset.scanner(
            columns=["number", "_score"], full_text_query=MatchQuery(query, "text"), limit=limit
        ).to_table()
        numbers: list[int] = hits["number"].to_pylist()
        return numbers

    return search

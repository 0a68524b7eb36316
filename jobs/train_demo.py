"""`kalm train-demo`: the checkpoint that ships, trained again from the documentation at hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer


def train_demo(
    to: Annotated[
        Path, typer.Option(help="Folder for the checkpoint and the files that training needs.")
    ],
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps; fewer of them make a quick trial.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of all that is random; another one makes another checkpoint.")
    ] = 0,
    threads: Annotated[
        int, typer.Option(help="CPU threads; more than one of them gains little.")
    ] = 1,
) -> None:
    """Train a small reranker on the documentation of this Python and its packages, on CPU."""
    import torch

    from jobs.demo_training.training import Recipe, Trainer, training_documents

    torch.set_num_threads(threads)
    recipe = Recipe(seed=seed) if steps is None else Recipe(seed=seed, steps=steps)
    began = time.monotonic()
    print("reading the documentation of this Python and its packages")
    documents = training_documents(recipe)
    print(f"{len(documents):,} documents in {time.monotonic() - began:.0f} s")
    trainer = Trainer(recipe, documents, to / "work")
    for step, loss in trainer.run():
        print(
            f"step {step:,} of {recipe.steps:,}: loss {loss:.3f}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    trainer.save(to / "model")
    print(f"{to / 'model'} is complete: kalm evaluate --demo --model {to / 'model'}")

"""The demo checkpoint: its documentation, its start, and that what is trained is what is served."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import T5Gemma2ForConditionalGeneration

from jobs.demo_training import objective
from jobs.demo_training.architecture import DEMO, configuration
from jobs.demo_training.documentation import Document, held_out, standard_library, without_copies
from jobs.demo_training.questions import KINDS, cut, name_words
from jobs.demo_training.start import start_as_matcher
from jobs.demo_training.tokenizer import train_tokenizer
from jobs.demo_training.training import Recipe, Trainer
from kalm_encoder import PassageEncoder, QueryDecoder
from kalm_encoder.model.checkpoint import DEMO_CHECKPOINT
from kalm_encoder.prompts import render_passage, render_query
from tests.conftest import make_texts

SENTENCES = ("Return the value here.", "It is a b c d.", "Not more than that, then.", "Raise it.")


@pytest.fixture(scope="module")
def library() -> list[Document]:
    return list(standard_library())


def test_documentation_of_source_and_c_modules_is_found(library):
    found = {d.name: d.text for d in library}
    assert "Return a list of lines" in found["gzip.GzipFile"] or "gzip" in found["gzip.GzipFile"]
    assert found["builtins.list.sort"].startswith("Sort the list")
    assert not any("site-packages" in d.name or ".test." in d.name for d in library)


def test_what_is_held_out_is_decided_by_its_name_alone(library):
    sources = {d.source for d in library}
    out = {s for s in sources if held_out(s)}
    assert {"gzip", "importlib", "logging"} <= out  # as on every machine
    assert 0.1 < len(out) / len(sources) < 0.4


def test_a_copy_of_held_out_text_is_not_trained_on():
    sentence = "A sentence that is long enough to tell one document from another."
    ours = [Document("gzip.open", f"Open it. {sentence}")]
    copy = Document("vendored.gzip.open", f"Changed here. {sentence}")
    other = Document("other.thing", "Nothing in common with that one, whatever it may say.")
    assert without_copies([copy, other, other], of=ours) == [other]


@given(
    st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=6, unique=True),
    st.sampled_from(KINDS),
)
def test_what_is_asked_is_not_in_the_passage(sentences, kind):
    document = Document("package.module.function_name", " ".join(sentences))
    question = cut(document, kind)
    if question is not None and kind != "name":
        asked = question.query.rstrip("?").split()[-3:]
        assert " ".join(asked).lower() not in question.passage.lower()
    assert question == cut(document, kind)


def test_names_become_words():
    assert name_words("gzip.GzipFile.readAll_2") == "gzip gzip file read all 2"


def test_cut_decoded_and_tokenised_again_a_query_stays_the_same():
    tokenizer = train_tokenizer([*make_texts(100), render_query("")] * 5, 1500)
    for answer in ("yes", "no"):
        assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) == 1
    for text in ("How do I read a zipfile.ZipFile line_by_line?", "检索增强 naïve 🎉", "yes, no"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        again = tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
        assert again == ids and tokenizer.unk_token_id not in ids


def test_the_loss_is_the_documented_one():
    assert float(objective.loss(torch.zeros(2))) == pytest.approx(1.5 * 0.6931, abs=1e-4)
    better = objective.loss(torch.tensor([3.0, 0.0, 0.0]))
    assert better < objective.loss(torch.zeros(3)) < objective.loss(torch.tensor([-3.0, 0, 0]))


def test_what_is_trained_is_what_is_served(model_dir):
    """Margins of the training forward equal those of encoder, pooling and decoder as served."""
    whole = T5Gemma2ForConditionalGeneration.from_pretrained(model_dir)
    encoder, decoder = PassageEncoder(str(model_dir)), QueryDecoder(str(model_dir))
    texts = make_texts(6, seed=5, longest=60)
    tokenizer = encoder.tokenizer
    batch = tokenizer([render_passage(t) for t in texts], add_special_tokens=False)["input_ids"]
    prompt = tokenizer(render_query("index query"), add_special_tokens=False)["input_ids"]
    answers = whole.model.decoder.embed_tokens.weight[
        [tokenizer.convert_tokens_to_ids(a) for a in ("yes", "no")]
    ]
    text_encoder = whole.model.encoder.text_model
    states, real = objective.pooled(text_encoder, batch, tokenizer.pad_token_id, (2, 8))
    both = states.flatten(0, 1), real.flatten(0, 1)
    got = objective.margins(whole.model.decoder, answers, prompt, *both)
    got.sum().backward()
    assert whole.model.decoder.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert text_encoder.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    for part, ratio in zip(got.chunk(2), (2, 8), strict=True):
        served = decoder.score(
            "index query", [p.states for p in encoder.encode(texts, ratio=ratio)]
        )
        assert part.tolist() == pytest.approx([margin for _, margin in served], abs=1e-4)


def test_the_start_already_prefers_passages_that_belong_to_the_query(library, tmp_path):
    documents = [d for d in library if 80 < len(d.text) < 600][:2000]
    texts = [f"{d.name} {d.text}" for d in documents]
    tokenizer = train_tokenizer([*texts, *[render_query("")] * 50], DEMO.vocabulary)
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    torch.manual_seed(0)
    model = T5Gemma2ForConditionalGeneration(configuration(DEMO, tokenizer)).eval()
    start_as_matcher(model, tokenizer, tokens)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder, decoder = PassageEncoder(str(tmp_path)), QueryDecoder(str(tmp_path))
    questions = [q for d in documents[::20] if (q := cut(d, "summary"))][:40]
    states = [p.states for p in encoder.encode([q.passage for q in questions], ratio=1)]
    first = 0
    for i, question in enumerate(questions):
        margins = [margin for _, margin in decoder.score(question.query, states)]
        first += sorted(margins, reverse=True).index(margins[i]) < 10
    assert first >= 20  # of 40 in the first quarter; 10 by chance


def test_a_few_steps_lower_the_loss_and_are_seeded(library, tmp_path):
    documents = [d for d in library if 40 < len(d.text) < 400][:200]
    recipe = Recipe(steps=6, queries=2, hard=1, easy=1, max_tokens=32)
    trainer = Trainer(recipe, documents, tmp_path / "one")
    group = trainer._group(0, list(range(40)))
    before = float(trainer._loss(group, random.Random(0)).detach())
    first = [loss for _, loss in trainer.run()]
    assert float(trainer._loss(group, random.Random(0)).detach()) < before
    again = [loss for _, loss in Trainer(recipe, documents, tmp_path / "two").run()]
    assert again == pytest.approx(first, rel=1e-3)
    trainer.save(tmp_path / "model")
    assert QueryDecoder(str(tmp_path / "model")).dim == DEMO.hidden


def test_the_checkpoint_that_ships_is_small_and_in_16_bit():
    files = list(Path(DEMO_CHECKPOINT).iterdir())
    assert sum(f.stat().st_size for f in files) <= 15e6
    assert "README.md" in {f.name for f in files}
    with safe_open(DEMO_CHECKPOINT / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(k).dtype for k in weights.keys()} == {torch.float16}  # noqa: SIM118

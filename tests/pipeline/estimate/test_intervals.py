"""Blocks, totals with intervals, operations: against counting, simulation and torch's counter."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kalm_encoder.errors import InputError
from kalm_encoder.model import checkpoint
from kalm_encoder.model.decoder import Pair
from pipeline.corpus.passages import Fields
from pipeline.estimate.blocks import Piece, count_lines, read_piece
from pipeline.estimate.flops import MODELS, Shape, decoder_flops, encoder_flops
from pipeline.estimate.intervals import Estimate, Part, mean, quantiles, student, total


@given(
    lines=st.lists(st.integers(0, 90), max_size=40),
    block=st.integers(1, 64),
    ends=st.booleans(),
)
def test_every_line_is_in_exactly_one_block(tmp_path_factory, lines, block, ends):
    file = tmp_path_factory.mktemp("blocks") / "c.jsonl"
    raw = "\n".join(f'"{i}' + "x" * n + '"' for i, n in enumerate(lines)) + "\n" * ends
    file.write_text(raw)
    size = file.stat().st_size
    piece = Piece(0, str(file), Fields("id", "text"), 0, size, block)
    read = [read_piece(piece, k, None) for k in range(piece.num_blocks)]
    assert sum(found for found, _, _ in read) == size
    reasons = [record for _, _, records in read for _, record in records]
    assert len(reasons) == len(lines)  # strings, no objects: each is a reject
    assert sum(number for _, number, _ in read) == len(raw.splitlines())
    assert count_lines([piece], float("inf")) == len(raw.splitlines())


def population(seed):
    """Blocks of a corpus whose passages differ wildly: y nearly proportional to x, skewed."""
    rng = np.random.default_rng(seed)
    x = rng.lognormal(8, 0.6, 3000)
    return x * rng.lognormal(0, 0.3, 3000), x


def test_the_interval_holds_the_truth_nineteen_times_in_twenty():
    y, x = population(1)
    rng = random.Random(2)
    inside, values = 0, []
    for _ in range(400):
        drawn = rng.sample(range(len(y)), 40)
        found = total([Part(y[drawn], x[drawn], float(x.sum()), False)])
        values.append(found.value)
        inside += found.holds(float(y.sum()))
    assert 0.90 <= inside / 400 <= 0.99
    assert abs(np.mean(values) / y.sum() - 1) < 0.01


def test_what_was_all_read_is_exact_and_strata_add_up():
    y, x = population(3)
    whole = Part(y, x, float(x.sum()), True)
    assert total([whole]) == Estimate(y.sum(), y.sum(), y.sum())
    half = Part(y[::2], x[::2], float(x.sum()), False)
    both = total([whole, half])
    alone = total([half])
    assert both.value == pytest.approx(y.sum() + alone.value)
    assert both.high - both.low == pytest.approx(alone.high - alone.low)


def test_more_of_the_corpus_narrows_the_interval():
    y, x = population(4)
    widths = [
        (found := total([Part(y[:n], x[:n], float(x.sum()), False)])).high - found.low
        for n in (30, 300, 2900)
    ]
    assert widths[0] > 2 * widths[1] > 6 * widths[2]


def test_a_mean_that_is_extrapolated_keeps_an_interval_though_all_was_read():
    y, x = population(5)
    found = mean([Part(y, x, float(x.sum()), True)], [Part(x, x, float(x.sum()), True)])
    assert found.value == pytest.approx(y.sum() / x.sum())
    assert found.low < found.value < found.high


def test_one_block_gives_no_interval_and_says_so():
    one = np.ones(1)
    with pytest.raises(InputError, match="raise --time-limit"):
        total([Part(one, one, 10.0, False)])


def test_quantiles_weigh_strata():
    values = [np.array([1, 2, 3, 4]), np.array([10])]
    assert quantiles(values, [1, 1], [0.0, 0.5, 1.0]) == [1, 3, 10]
    assert quantiles(values, [1, 100], [0.5]) == [10]


@pytest.mark.parametrize(("freedom", "exact"), [(4, 2.7764), (10, 2.2281), (29, 2.0452)])
def test_student_is_that_of_the_tables(freedom, exact):
    assert student(freedom) == pytest.approx(exact, rel=0.005)


def test_the_published_parameter_counts_follow_from_the_dimensions():
    millions = {name: round(shape.params / 1e6) for name, shape in MODELS.items()}
    assert millions == {"Nano": 100, "Small": 698, "Large": 3209}


def counted(run) -> int:
    # The fused kernels of the CPU are not in torch's counter; the plain one is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [1, 30, 200])
def test_encoder_operations_are_those_torch_counts(model_dir, length):
    files = checkpoint.resolve(str(model_dir))
    model = files.load_text_encoder(torch.device("cpu"), torch.float32)
    shape = Shape.of(model.config)
    found = counted(lambda: model(input_ids=torch.arange(10, 10 + length)[None]))
    # torch computes what a sliding layer hides, and masks it.
    everything = replace(shape, sliding_window=2 * length)
    assert encoder_flops(everything, np.array([length]))[0] == found
    hidden = encoder_flops(shape, np.array([length]))[0]
    assert hidden == found if length <= shape.sliding_window // 2 else hidden < found


def test_a_sliding_window_counts_the_pairs_its_mask_shows():
    shape = Shape(8, 8, 1, 1, 1, 8, 5, 0)
    n = 13
    shown = sum(-3 < j - i < 3 for i in range(n) for j in range(n))
    weights = 2 * n * shape.params
    assert encoder_flops(shape, np.array([n]))[0] == weights + 4 * 8 * shown


@pytest.mark.parametrize(("candidates", "states"), [(1, 7), (8, 33)])
def test_decoder_operations_are_those_torch_counts(decoder, candidates, states):
    shape = Shape.of(decoder.model.config)
    prompt = decoder.prompt("what is counted?")
    passage = np.ones((states, decoder.dim), np.float32)
    found = counted(lambda: decoder.forward([Pair(prompt, passage)] * candidates))
    assert decoder_flops(shape, len(prompt.ids), states, candidates) == found

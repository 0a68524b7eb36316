"""Blocks, totals with intervals, operations: against counting, simulation and torch's counter."""

import math
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
from kalm_encoder.model import checkpoint, onednn
from kalm_encoder.model.pairs import Pair
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.passages import FieldOptions
from pipeline.estimate.flops import MODELS, Dimensions, decoder_flops, encoder_flops
from pipeline.estimate.intervals import ratio_estimate
from pipeline.estimate.sources import open_sources


@given(
    lines=st.lists(st.integers(0, 90), max_size=40),
    block=st.integers(1, 64),
    ends=st.booleans(),
)
def test_every_line_is_in_exactly_one_block(tmp_path_factory, lines, block, ends):
    file = tmp_path_factory.mktemp("blocks") / "c.jsonl"
    raw = "\n".join(f'"{i}' + "x" * n + '"' for i, n in enumerate(lines)) + "\n" * ends
    file.write_text(raw)
    n = -(-file.stat().st_size // block) or 1
    (source,) = open_sources(*expand_inputs([str(file)], None), FieldOptions(), None)
    assert source.size == file.stat().st_size
    read = [source.read(k, n) for k in range(n)] if raw else []
    assert sum(share for share, _ in read) == pytest.approx(1.0 if raw else 0.0)
    assert sum(len(list(rows)) for _, rows in read) == len(lines)


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
        found = ratio_estimate(y[drawn], x[drawn], x.sum(), covered=x[drawn].sum() / x.sum())
        values.append(found.value)
        inside += found.low <= y.sum() <= found.high
    assert 0.90 <= inside / 400 <= 0.99
    assert abs(np.mean(values) / y.sum() - 1) < 0.01


def test_more_of_the_corpus_narrows_the_interval():
    y, x = population(4)
    widths = []
    for n in (30, 300, 2900):
        found = ratio_estimate(y[:n], x[:n], x.sum(), covered=x[:n].sum() / x.sum())
        widths.append(found.high - found.low)
    assert widths[0] > 2 * widths[1] > 6 * widths[2]


def test_a_mean_that_is_extrapolated_keeps_an_interval_though_all_was_read():
    y, x = population(5)
    found = ratio_estimate(y, x, 1.0, covered=0)
    assert found.value == pytest.approx(y.sum() / x.sum())
    assert found.low < found.value < found.high


def test_one_block_gives_no_interval_and_says_so():
    one = np.ones(1)
    with pytest.raises(InputError, match="raise --time-limit"):
        ratio_estimate(one, one, 10.0, covered=0.1)


def test_the_published_parameter_counts_follow_from_the_dimensions():
    millions = {name: round(dimensions.params / 1e6) for name, dimensions in MODELS.items()}
    assert millions == {"Nano": 100, "Small": 698, "Large": 3209}


def product_flops(x, weight, *rest, **more) -> int:
    return 2 * math.prod(x) * weight[0]


def counted(run) -> int:
    # The fused kernels of the CPU are not in torch's counter; the plain one is. Nor is oneDNN.
    mapping = {torch.ops.mkldnn._linear_pointwise: product_flops} if onednn.AVAILABLE else {}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [1, 30, 200])
def test_encoder_operations_are_those_torch_counts(model_dir, length):
    files = checkpoint.resolve(str(model_dir))
    model = files.load_text_encoder(torch.device("cpu"), torch.float32)
    dimensions = Dimensions.of(model.config)
    found = counted(lambda: model(input_ids=torch.arange(10, 10 + length)[None]))
    # torch computes what a sliding layer hides, and masks it.
    everything = replace(dimensions, sliding_window=2 * length)
    assert encoder_flops(everything, np.array([length]))[0] == found
    hidden = encoder_flops(dimensions, np.array([length]))[0]
    assert hidden == found if length <= dimensions.sliding_window // 2 else hidden < found


def test_a_sliding_window_counts_the_pairs_its_mask_shows():
    dimensions = Dimensions(8, 8, 1, 1, 8, 5, 0, 0)
    n = 13
    shown = sum(-3 < j - i < 3 for i in range(n) for j in range(n))
    weights = 2 * n * dimensions.params
    assert encoder_flops(dimensions, np.array([n]))[0] == weights + 4 * 8 * shown


@pytest.mark.parametrize(("candidates", "states"), [(1, 7), (8, 33)])
def test_decoder_operations_are_those_torch_counts(decoder, candidates, states):
    dimensions = Dimensions.of(decoder.model.config)
    prompt = decoder.prompt("what is counted?")
    passage = np.ones((states, decoder.dim), np.float32)
    found = counted(lambda: decoder.forward([Pair(prompt, passage)] * candidates))
    assert decoder_flops(dimensions, len(prompt.ids), states, candidates) == found

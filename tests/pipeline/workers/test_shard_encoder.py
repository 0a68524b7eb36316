"""What becomes of a batch that the encoder cannot take."""

import weakref

import torch

from kalm_encoder.model.in_flight import BatchInFlight, PassageTokens
from pipeline.workers.shard_encoder import start_isolated

PASSAGES = [PassageTokens([i], False) for i in range(8)]


def batch_of(passages):
    return BatchInFlight(passages, 1, 4, None, (0.0,) * 4)


def test_a_passage_that_fails_is_found_and_the_others_are_encoded():
    def start(passages):
        if PASSAGES[5] in passages:
            raise RuntimeError("a kernel failed\nwith a second line")
        return [batch_of(passages)]

    *others, last = start_isolated(start, PASSAGES)
    first, second, failed = others
    assert failed == "the encoder failed: RuntimeError: a kernel failed"
    assert [*first.tokens, *second.tokens] == PASSAGES[:5]
    assert list(last.tokens) == PASSAGES[6:]


def test_a_failed_batch_holds_no_tensor_while_its_halves_run():
    made = []

    def start(passages):
        assert all(tensor() is None for tensor in made)
        activations = torch.zeros(len(passages))
        made.append(weakref.ref(activations))
        if len(passages) > 1:
            raise torch.OutOfMemoryError("no room for the activations")
        return [batch_of(passages)]

    started = start_isolated(start, PASSAGES)
    assert [list(batch.tokens) for batch in started] == [[one] for one in PASSAGES]
    assert len(made) == 15

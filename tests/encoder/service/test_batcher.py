import threading
import time

import pytest

from kalm_encoder.errors import NonFiniteError
from kalm_encoder.model.pairs import Pair
from kalm_encoder.service.batcher import BatchingDecoder
from tests.conftest import make_texts


@pytest.fixture(scope="module")
def states(encoder):
    return [p.states for p in encoder.encode(make_texts(30, seed=4), ratio=2)]


@pytest.fixture
def batching(decoder):
    sizes = []
    made = BatchingDecoder(decoder, sizes.append)
    made.sizes = sizes
    yield made
    made.close()


def hold(batching):
    """Keep the device thread busy; returns what lets it go."""
    held, let_go = threading.Event(), threading.Event()
    threading.Thread(target=batching.call, args=(lambda: held.set() or let_go.wait(),)).start()
    held.wait()
    return let_go.set


def ask(batching, pairs, answers, key):
    def work():
        try:
            answers[key] = batching.score_pairs(pairs)
        except Exception as error:
            answers[key] = error

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_callers_share_batches_and_get_their_own_scores(batching, decoder, states):
    let_go, answers = hold(batching), {}
    queries = ["alpha", "beta gamma", "alpha", "delta"]
    threads = [
        ask(batching, [Pair(decoder.prompt(q), s) for s in states[i : i + 7]], answers, i)
        for i, q in enumerate(queries)
    ]
    while len(batching._queue) < 4 * 7:
        time.sleep(0.001)
    let_go()
    for thread in threads:
        thread.join()
    for i, query in enumerate(queries):
        for (got, _), (right, _) in zip(
            answers[i], decoder.score(query, states[i : i + 7]), strict=True
        ):
            assert abs(got - right) <= 1e-5
    assert max(batching.sizes) > 7, "no batch held pairs of two callers"


def test_a_large_request_comes_in_parts(batching, decoder, states):
    pairs = [Pair(decoder.prompt("q"), s) for s in states * 4]
    assert len(batching.score_pairs(pairs)) == 120
    assert len(batching.sizes) > 1
    budget = decoder.token_budget
    assert max(batching.sizes) <= budget / len(pairs[0].prompt.ids)


def test_one_callers_fault_is_its_own(batching, decoder, states):
    let_go, answers = hold(batching), {}
    prompt = decoder.prompt("q")
    threads = [
        ask(batching, [Pair(prompt, states[0])], answers, "good"),
        ask(batching, [Pair(prompt, states[0] * float("nan"))], answers, "bad"),
        ask(batching, [Pair(prompt, states[1])], answers, "good too"),
    ]
    while len(batching._queue) < 3:
        time.sleep(0.001)
    let_go()
    for thread in threads:
        thread.join()
    assert isinstance(answers["bad"], NonFiniteError)
    assert abs(answers["good"][0][0] - decoder.score("q", states[:1])[0][0]) <= 1e-5
    assert abs(answers["good too"][0][0] - decoder.score("q", states[1:2])[0][0]) <= 1e-5
    assert len(batching.score_pairs([Pair(prompt, states[2])])) == 1


def test_closing_finishes_what_is_queued(decoder, states):
    batching = BatchingDecoder(decoder, lambda _: None)
    let_go, answers = hold(batching), {}
    thread = ask(batching, [Pair(decoder.prompt("q"), s) for s in states], answers, 0)
    while not batching._queue:
        time.sleep(0.001)
    let_go()
    batching.close()
    thread.join()
    assert len(answers[0]) == 30
    with pytest.raises(RuntimeError, match="shutdown"):
        batching.score_pairs([Pair(decoder.prompt("q"), states[0])])
    with pytest.raises(ZeroDivisionError):
        BatchingDecoder(decoder, lambda _: None).call(lambda: 1 // 0)

import threading
import time
from concurrent.futures import CancelledError
from itertools import pairwise

import numpy as np
import pytest

from kalm_encoder.errors import NonFiniteError
from kalm_encoder.model.pairs import Pair
from kalm_encoder.service.batcher import BatchingDecoder, BatchingEncoder, Caller
from tests.conftest import make_texts
from tests.support.serving import wait_until


@pytest.fixture(scope="module")
def states(encoder):
    return [p.states for p in encoder.encode(make_texts(30, seed=4), ratio=2)]


@pytest.fixture
def batching(decoder):
    sizes = []
    made = BatchingDecoder(decoder, sizes.append)
    made.sizes = sizes
    yield made
    made.device.close()


def hold(batching):
    """Keep the device thread busy; returns what lets it go."""
    held, let_go = threading.Event(), threading.Event()
    threading.Thread(
        target=batching.device.call, args=(lambda: held.set() or let_go.wait(),)
    ).start()
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
        ask(batching, [Pair(decoder.prompt(q), s) for s in states[i : i + 3]], answers, i)
        for i, q in enumerate(queries)
    ]
    while len(batching.queue) < 4 * 3:
        time.sleep(0.001)
    let_go()
    for thread in threads:
        thread.join()
    for i, query in enumerate(queries):
        for (got, _), (right, _) in zip(
            answers[i], decoder.score(query, states[i : i + 3]), strict=True
        ):
            assert abs(got - right) <= 1e-5
    assert max(batching.sizes) > 3, "no batch held pairs of two callers"


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
    while len(batching.queue) < 3:
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
    while not batching.queue:
        time.sleep(0.001)
    let_go()
    batching.device.close()
    thread.join()
    assert len(answers[0]) == 30
    with pytest.raises(RuntimeError, match="shutdown"):
        batching.score_pairs([Pair(decoder.prompt("q"), states[0])])
    with pytest.raises(ZeroDivisionError):
        BatchingDecoder(decoder, lambda _: None).device.call(lambda: 1 // 0)


def leaving(batching, work):
    """Run work for a caller in a thread; returns the caller, the thread and what came of it."""
    caller, came = Caller(), []

    def run():
        try:
            came.append(caller.run(work))
        except CancelledError as error:
            came.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return caller, thread, came


def test_nothing_is_computed_for_a_caller_who_has_left(batching, encoder, decoder, states):
    texts = []
    batching_encoder = BatchingEncoder(encoder, 2, batching.device, texts.append)
    let_go, answers = hold(batching), {}
    pairs = [Pair(decoder.prompt("q"), s) for s in states]
    gone = [
        leaving(batching, lambda: batching.score_pairs(pairs)),
        leaving(batching, lambda: batching_encoder.encode(make_texts(30))),
    ]
    wait_until(lambda: (len(batching.queue), len(batching_encoder.queue)) == (30, 30))
    stays = ask(batching, pairs[:1], answers, "stays")
    wait_until(lambda: len(batching.queue) == 31)
    for caller, thread, came in gone:
        caller.leave()
        thread.join()  # while the device is still held: the thread is free at once
        assert isinstance(came[0], CancelledError)
    assert (len(batching.queue), len(batching_encoder.queue)) == (1, 0)
    let_go()
    stays.join()
    batching.device.close()
    assert len(answers["stays"]) == 1
    assert (batching.sizes, texts) == ([1], [])


def test_a_caller_who_leaves_before_it_asks_is_refused(batching, decoder, states):
    caller = Caller()
    caller.leave()
    with pytest.raises(CancelledError):
        caller.run(lambda: batching.score_pairs([Pair(decoder.prompt("q"), states[0])]))
    batching.score_pairs([Pair(decoder.prompt("q"), states[0])])  # one without a caller is not
    assert batching.sizes == [1]


def test_leaving_in_the_midst_of_a_batch_ends_with_that_batch(batching, decoder, states):
    begun, go_on = threading.Event(), threading.Event()
    score_pairs = decoder.score_pairs

    def slow(pairs):
        begun.set()
        go_on.wait()
        return score_pairs(pairs)

    batching.queue._run = slow
    pairs = [Pair(decoder.prompt("q"), s) for s in states * 4]
    caller, thread, came = leaving(batching, lambda: batching.score_pairs(pairs))
    begun.wait()
    caller.leave()
    thread.join()
    assert isinstance(came[0], CancelledError)
    go_on.set()
    batching.device.close()
    assert len(batching.sizes) == 1


def test_pairs_wait_for_no_more_than_one_batch_of_texts(decoder, encoder, states):
    order = []
    batching = BatchingDecoder(decoder, lambda _: order.append("pairs"))
    texts = BatchingEncoder(encoder, 2, batching.device, lambda _: order.append("texts"))
    let_go, answers = hold(batching), {}
    many = leaving(batching, lambda: texts.encode(make_texts(60, longest=300)))
    wait_until(lambda: len(texts.queue) == 60)
    pairs = [Pair(decoder.prompt("q"), s) for s in states]
    asked = ask(batching, pairs, answers, 0)
    wait_until(lambda: len(batching.queue) == 30)
    let_go()
    asked.join()
    many[1].join()
    batching.device.close()
    assert order.count("pairs") >= 2
    last = len(order) - order[::-1].index("pairs")
    assert ("texts", "texts") not in pairwise(order[:last])
    assert order.count("texts") > order[:last].count("texts"), "the texts did not wait"


def test_texts_of_many_callers_share_batches_and_get_their_own_states(encoder, decoder):
    sizes = []
    batching = BatchingDecoder(decoder, lambda _: None)
    texts = BatchingEncoder(encoder, 2, batching.device, sizes.append)
    let_go = hold(batching)
    lists = [make_texts(5, seed=seed, longest=20) for seed in range(4)]
    callers = [leaving(batching, lambda some=some: texts.encode(some)) for some in lists]
    wait_until(lambda: len(texts.queue) == 20)
    let_go()
    for some, (_, thread, came) in zip(lists, callers, strict=True):
        thread.join()
        for got, right in zip(came[0], encoder.encode(some, ratio=2), strict=True):
            assert (got.num_tokens, got.truncated) == (right.num_tokens, right.truncated)
            np.testing.assert_allclose(got.states, right.states, atol=1e-4)
    batching.device.close()
    assert max(sizes) > 5, "no batch held texts of two callers"

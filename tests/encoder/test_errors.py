import pickle

import pytest

from kalm_encoder import errors

MADE = [
    errors.MismatchError("ratios", "differ"),
    errors.MissingIdsError(["a", "b"], "t.lance"),
    errors.MissingTextsError(["a", "b"], "t.lance"),
    *(
        kind("message")
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and issubclass(kind, errors.KalmError)
        and kind not in (errors.MismatchError, errors.MissingIdsError, errors.MissingTextsError)
    ),
]


@pytest.mark.parametrize("error", MADE, ids=lambda e: type(e).__name__)
def test_errors_survive_the_way_from_worker_to_driver(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_the_docstring_draws_every_error():
    assert all(type(error).__name__ in errors.__doc__ for error in MADE)


def test_exit_codes_tell_bad_input_from_failure():
    assert errors.InputError("x").exit_code == errors.MissingIdsError([], "").exit_code == 2
    assert errors.KalmError("x").exit_code == errors.IncompleteError("x").exit_code == 1

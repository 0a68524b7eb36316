"""Requests made up from the OpenAPI schema, valid and not: nothing may break the service."""

import json
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from tests.support.serving import serving

KEYS = {"one": "num_tokens > 20", "two": "id LIKE 'p1%' AND truncated = FALSE"}


@pytest.fixture(scope="module")
def url(small_table, tmp_path_factory):
    """A service that two keys may ask, each of them for some of the rows."""
    file = tmp_path_factory.mktemp("fuzz") / "keys.json"
    file.write_text(json.dumps(KEYS))
    with serving(small_table, "--filter-columns", "id,num_tokens", "--keys", file) as client:
        yield str(client.base_url).rstrip("/")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_is_a_server_error(url, mode):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {"/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"} <= {
        o.path for o in operations
    }
    codes = Counter()
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing in it can be wrong

        # Each example asks a real service: no more of them with the profile `thorough`.
        @settings(max_examples=25, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            key = list(KEYS)[codes.total() % 2]
            reply = case.call(headers={"Authorization": f"Bearer {key}"})
            # A negative case may have a wrong key of its own.
            assert reply.status_code != 401 or mode is GenerationMode.NEGATIVE
            case.validate_response(reply, checks=[not_a_server_error])
            codes[reply.status_code] += 1

        ask()
    assert codes[422] > 10, codes

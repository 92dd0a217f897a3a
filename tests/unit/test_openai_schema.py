"""`schemathesis` on our own OpenAPI file, over HTTP against the real application."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.config import (
    ChecksConfig,
    PositiveDataAcceptanceConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
)
from support.serving import MODEL, Server, make_engine, serving

EXAMPLES = 25  # of each operation and mode
OPERATIONS = [
    ("post", "/v1/completions"),
    ("post", "/v1/chat/completions"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model_id}"),
    ("post", "/tokenize"),
    ("post", "/detokenize"),
    ("get", "/health"),
    ("get", "/ready"),
    ("get", "/metrics"),
]

# Only what has a body can be malformed.
CASES = [
    pytest.param(method, path, mode, id=f"{path}-{mode.value}")
    for method, path in OPERATIONS
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or method == "post"
]

# What a schema cannot say (a prompt longer than the context, a token outside the vocabulary) is a
# 400, so 400 is among the answers that well-formed data may have.
CONFIG = SchemathesisConfig(
    projects=ProjectsConfig(
        default=ProjectConfig(
            checks=ChecksConfig(
                positive_data_acceptance=PositiveDataAcceptanceConfig(
                    expected_statuses=["2xx", "400", "404"]
                )
            )
        )
    )
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with make_engine() as engine, serving(engine) as server:
        yield server
        assert not engine.state.has_work, "a request outlived its client"


@pytest.fixture(scope="module")
def api_schema(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=CONFIG)


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_api(api_schema: Any, method: str, path: str, mode: GenerationMode) -> None:
    """Every check of schemathesis on well-formed and on malformed calls of one operation."""
    operation = api_schema[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        body = case.body
        if isinstance(body, dict) and isinstance(body.get("model"), str):
            body["model"] = MODEL  # else nearly every example would end in 404
        case.call_and_validate()

    check()


def test_openapi_names_every_route_and_its_errors(server: Server) -> None:
    assert server.app is not None
    document = server.app.openapi()
    paths = {path for path in document["paths"] if not path.startswith("/v1/ep/")}
    assert {path for _, path in OPERATIONS} == paths
    responses = document["paths"]["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "415", "429", "500", "503", "504"} <= set(responses)
    error = responses["429"]["content"]["application/json"]["schema"]
    assert error == {"$ref": "#/components/schemas/ErrorBody"}

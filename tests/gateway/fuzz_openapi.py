"""Requests made out of the gateway's own OpenAPI description, right and wrong ones: none may break it, and every answer
must be as described."""

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from gorgon_gateway.app import create_app
from gorgon_gateway.settings import GatewaySettings
from support.fake_engine import FakeEngine
from support.services import Service, gateway_service

MAX_EXAMPLES = 40  # of each route, right and wrong
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

description = schemathesis.openapi.from_dict(create_app(GatewaySettings(), {}).openapi())
OPERATIONS = [found.ok() for found in description.get_all_operations()]


@pytest.fixture(scope="module")
def gateway() -> Iterator[Service]:
    # Answers without an end of their own end with the context.
    with FakeEngine(context=64, num_slots=64) as engine, gateway_service(engines=engine.url) as gateway:
        yield gateway
        gateway.wait_until_ready(5.0)


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_no_request_breaks_the_gateway(
    operation: Any,
    mode: schemathesis.GenerationMode,
    gateway: Service,
    session: requests.Session,
) -> None:
    if not operation.body:
        mode = schemathesis.GenerationMode.POSITIVE  # nothing of it can be wrong: any text is a name

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=MAX_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=gateway.url, session=session, timeout=30.0, checks=CHECKS)

    ask()

"""A gateway process in front of an engine without a model, and OpenAI's own clients."""

from collections.abc import Iterator

import pytest
from openai import DefaultHttpxClient, OpenAI

from support.fake_engine import FakeEngine, Faults
from support.services import Service, gateway_service


@pytest.fixture(scope="module")
def engine_server() -> Iterator[FakeEngine]:
    with FakeEngine(step_seconds=0.002) as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(engine_server: FakeEngine) -> Iterator[Service]:
    with gateway_service(engines=engine_server.url, max_choices=4, poll_seconds=0.1, max_resumptions=0) as service:
        yield service


@pytest.fixture
def engine(engine_server: FakeEngine) -> Iterator[FakeEngine]:
    """Nothing is wrong with it, and it remembers nothing."""
    engine_server.requests.clear()
    yield engine_server
    engine_server.faults = Faults()


@pytest.fixture
def client(gateway: Service) -> Iterator[OpenAI]:
    gateway.wait_until_ready()  # an engine that would not serve in the last test
    http = DefaultHttpxClient(trust_env=False)  # a proxy of the environment does not lead to this machine
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0, http_client=http) as client:
        yield client

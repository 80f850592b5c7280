"""What waits for a service fails with the log of the one that died, and not with its own patience at an end."""

import pytest

from support.services import engine_service, fake_engine_process, gateway_service


def test_a_gateway_that_is_waited_for_names_the_engine_that_died() -> None:
    with (
        engine_service(model="/nonexistent/model", ready=False) as engine,
        pytest.raises(AssertionError, match=r"gorgon_engine ended with 1:[^$]*/nonexistent/model"),
        gateway_service(engine),
    ):
        pass


def test_a_service_that_cannot_start_is_named_with_its_reason() -> None:
    with (
        pytest.raises(AssertionError, match=r"gorgon_gateway ended with 1:[^$]*no.such.host.invalid"),
        gateway_service(host="no.such.host.invalid"),
    ):
        pass


def test_an_engine_that_the_test_has_ended_is_none_that_died() -> None:
    with fake_engine_process() as engine, fake_engine_process() as other, gateway_service(engine, other) as gateway:
        engine.kill()
        gateway.wait_until_ready()

"""The port of a job's metrics: there while the job is, one line where it cannot be had, and read a last time."""

import socket
import threading
import urllib.error
import urllib.request
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from gorgon_protocol.errors import BadRequestError
from gorgon_trainer.metrics import CONTENT_TYPE, TrainerMetrics
from gorgon_trainer.metrics_server import MetricsServer

LOCAL = "127.0.0.1"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read(url: str) -> tuple[str, str]:
    """(content type, text)."""
    with _DIRECT.open(url, timeout=10.0) as response:
        return response.headers["Content-Type"], response.read().decode()


def test_it_answers_while_it_is_open() -> None:
    metrics = TrainerMetrics()
    with MetricsServer(metrics, LOCAL, 0) as server:
        kind, text = read(server.url)
        assert kind == CONTENT_TYPE
        assert 'gorgon_trainer:stage{stage="train"} 0.0' in text
        metrics.begin("train")
        assert 'gorgon_trainer:stage{stage="train"} 1.0' in read(server.url)[1]
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            read(server.url + "/else")
        refused.value.close()
        url = server.url
    with pytest.raises(urllib.error.URLError, match="refused"):
        read(url)


def test_a_client_that_hangs_up_or_says_nothing_harms_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    with MetricsServer(TrainerMetrics(), LOCAL, 0) as server:
        address = (LOCAL, urlsplit(server.url).port or 0)
        with closing(socket.create_connection(address)) as silent, socket.create_connection(address) as rude:
            rude.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, not closed
            rude.close()
            assert "gorgon_trainer:stage" in read(server.url)[1]
            silent.sendall(b"")
    assert capfd.readouterr() == ("", ""), "and nothing of it in the job's output"


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        (LOCAL, None, "is in use: end what listens there, or choose another with --metrics-port"),
        ("no.such.host.invalid", 0, "--metrics-host no.such.host.invalid: no such address"),
        ("", 0, "--metrics-host : no such address"),
        ("192.0.2.1", 0, "cannot listen on 192.0.2.1 port 0 "),
    ],
)
def test_what_cannot_be_listened_on_is_named(host: str, port: int | None, message: str) -> None:
    with socket.create_server((LOCAL, 0)) as taken:
        wanted = taken.getsockname()[1] if port is None else port
        with pytest.raises(BadRequestError) as refused:
            MetricsServer(TrainerMetrics(), host, wanted)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert port is not None or str(wanted) in str(refused.value)


def test_the_last_word_is_waited_for() -> None:
    metrics = TrainerMetrics()
    with MetricsServer(metrics, LOCAL, 0) as server:
        read(server.url)  # too early to count
        assert not server.wait_for_scrape(0.0)
        metrics.ended("failed")
        heard: list[str] = []

        def scrape() -> None:
            while not heard:
                heard.append(read(server.url)[1])

        scraper = threading.Thread(target=scrape)
        scraper.start()
        assert server.wait_for_scrape(60.0)
        scraper.join()
    assert 'gorgon_trainer:outcome{result="failed"} 1.0' in heard[0]


def test_only_a_reading_of_the_metrics_counts() -> None:
    with MetricsServer(TrainerMetrics(), LOCAL, 0) as server:
        assert not server.wait_for_scrape(0.0)
        with pytest.raises(urllib.error.HTTPError) as refused:
            read(server.url + "/else")
        refused.value.close()
        assert not server.wait_for_scrape(0.05)
        read(server.url)
        assert server.wait_for_scrape(10.0)

"""The page: where its files come from, how long browsers keep them, and the policy that it runs under."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gorgon_gateway import page
from gorgon_gateway.app import create_app
from gorgon_protocol.errors import BadRequestError
from support.gateways import running_gateway, settings_for

NOWHERE = "http://127.0.0.1:9"
INDEX = '<!doctype html><title>Gorgon</title><script type="module" src="/assets/index-1a2b.js"></script>'
SCRIPT = "export const answer = 42; // ~\n" * 100
SOURCE = Path(__file__).parents[2] / "web"


@pytest.fixture(scope="module")
def web_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    (folder / "index.html").write_text(INDEX)
    (folder / "secret.txt").write_text("beside the page, not of it")
    assets = folder / "assets"
    assets.mkdir()
    (assets / "index-1a2b.js").write_text(SCRIPT)
    (assets / "index-1a2b.js.gz").write_bytes(gzip.compress(SCRIPT.encode()))
    (assets / "index-3c4d.css").write_text("body { margin: 0 }")
    return folder


@pytest.fixture(scope="module")
def client(web_root: Path) -> Iterator[httpx.Client]:
    with (
        running_gateway(NOWHERE, ready=False, web_root=web_root) as gateway,
        httpx.Client(base_url=gateway.url, trust_env=False) as client,
    ):
        yield client


def test_the_page_is_asked_for_each_time(client: httpx.Client) -> None:
    response = client.get("/")
    assert (response.status_code, response.text) == (200, INDEX)
    assert response.headers["Content-Type"].startswith("text/html")
    assert response.headers["Cache-Control"] == "no-cache"
    assert client.head("/").status_code == 200


@pytest.mark.parametrize(
    ("path", "media_type"), [("/assets/index-1a2b.js", "text/javascript"), ("/assets/index-3c4d.css", "text/css")]
)
def test_assets_are_kept_for_good(client: httpx.Client, path: str, media_type: str) -> None:
    response = client.get(path, headers={"Accept-Encoding": "gzip, deflate, br"})
    assert response.status_code == 200
    assert response.headers["Content-Type"].split(";")[0] == media_type
    assert response.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert response.headers["Vary"] == "Accept-Encoding"
    again = client.get(path, headers={"Accept-Encoding": "gzip", "If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.headers["Cache-Control"]) == (304, response.headers["Cache-Control"])


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip", "gzip"),
        ("br, GZIP;q=0.5", "gzip"),
        ("br", None),
        ("", None),
        ("gzip;q=0", None),
        ("gzip; q=0.00", None),
    ],
)
def test_compressed_where_the_browser_takes_it(client: httpx.Client, accepted: str, encoding: str | None) -> None:
    response = client.get("/assets/index-1a2b.js", headers={"Accept-Encoding": accepted})
    assert response.text == SCRIPT
    assert response.headers.get("Content-Encoding") == encoding
    assert (response.num_bytes_downloaded < len(SCRIPT)) == (encoding is not None)


@pytest.mark.parametrize("path", ["/assets/", "/assets/../secret.txt", "/assets/%2e%2e/secret.txt", "/secret.txt"])
def test_nothing_else_is_served(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_the_policy_lets_in_nothing_of_elsewhere(client: httpx.Client) -> None:
    for path in ("/", "/assets/index-1a2b.js"):
        headers = client.get(path).headers
        policy = dict(rule.strip().split(" ", 1) for rule in headers["Content-Security-Policy"].split(";"))
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "img-src": "'self' data: blob:",
            "font-src": "'self'",
            "connect-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"


def test_the_page_keeps_to_its_policy() -> None:
    """Vite adds scripts and styles of /assets to this file, and no inline ones."""
    source = (SOURCE / "index.html").read_text()
    assert "<style" not in source
    assert " style=" not in source
    assert " on" not in source.replace(" one", "").replace(" only", "")
    assert source.count("<script") == source.count('<script type="module" src="/src/') == 1


def test_a_page_that_was_not_built_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be built while the gateway runs."""
    monkeypatch.setattr(page, "BUILT", tmp_path / "static")
    with running_gateway(NOWHERE, ready=False) as gateway:
        response = httpx.get(gateway.url, trust_env=False)
        assert (response.status_code, response.headers["Cache-Control"]) == (200, "no-cache")
        assert "make web" in response.text
        assert httpx.get(f"{gateway.url}/assets/a.js", trust_env=False).status_code == 404
        (tmp_path / "static" / "assets").mkdir(parents=True)
        (tmp_path / "static" / "assets" / "a.js").write_text("export {};")
        (tmp_path / "static" / "index.html").write_text(INDEX)
        assert httpx.get(gateway.url, trust_env=False).text == INDEX
        assert httpx.get(f"{gateway.url}/assets/a.js", trust_env=False).status_code == 200


def test_a_folder_without_a_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match=r"GORGON_GATEWAY_WEB_ROOT: .*: holds no index.html: build the page"):
        create_app(settings_for(NOWHERE, web_root=tmp_path), {})

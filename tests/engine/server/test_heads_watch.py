"""Draft heads of a store: followed while streams run; what does not fit is refused, and the old ones stay."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gorgon_engine.engine import Engine
from gorgon_engine.prepared import PreparedHeads
from gorgon_engine.server.loader import load_engine
from gorgon_engine.server.settings import EngineSettings
from gorgon_engine.server.worker import LoadProgress
from gorgon_protocol.messages import MESSAGE, FinishedMessage, HeadsInfo, Message, TokenMessage
from gorgon_trainer.publish import publish

BODY = {"prompt": "the cat sat", "request_id": "mine", "seed": 3, "max_tokens": 100, "ignore_eos": True}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


@pytest.fixture
def following(serve: Any, store: Path) -> Iterator[Any]:
    """An engine that follows the store, looking often."""
    with serve(store=str(store), heads_poll_seconds=0.05) as running:
        running.wait_until_ready()
        yield running


def heads(running: Any) -> HeadsInfo:
    return HeadsInfo.model_validate(running.client.get("/heads").json())


def generate(running: Any, **fields: Any) -> list[Message]:
    response = running.client.post("/generate", json=BODY | fields)
    assert response.status_code == 200, response.text
    return [MESSAGE.validate_json(line) for line in response.text.splitlines()]


def ids(messages: list[Message]) -> list[int]:
    return [token for message in messages if isinstance(message, TokenMessage) for token in message.token_ids]


def metric(running: Any, name: str) -> float:
    for line in running.client.get("/metrics").text.splitlines():
        if line.startswith(f"gorgon:{name} "):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no metric {name}")


def test_an_engine_starts_with_what_the_store_names(serve: Any, store: Path, make_heads: Any) -> None:
    publish(make_heads("1"), store)
    with serve(store=str(store)) as running:
        running.wait_until_ready()
        info = heads(running)
        assert (info.current, info.family, info.num_heads) == ("tiny@1", "medusa", 3)
        assert running.info()["heads"]["current"] == "tiny@1"
        finished = generate(running)[-1]
        assert isinstance(finished, FinishedMessage)
        assert finished.metrics.heads == "tiny@1"
        assert metric(running, 'heads_info{family="medusa",name="tiny",version="1"}') == 1


def test_new_heads_are_taken_up_while_streams_run(following: Any, store: Path, make_heads: Any) -> None:
    before = ids(generate(following))
    assert heads(following).current is None
    stop = threading.Event()
    said: list[list[int]] = []
    errors: list[BaseException] = []

    def stream() -> None:
        try:
            while not stop.is_set():
                said.append(ids(generate(following)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=stream) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for version in range(1, 6):
            publish(make_heads(str(version), seed=version), store)
            following.wait_for(lambda v=version: heads(following).current == f"tiny@{v}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert said
    assert all(tokens == before for tokens in said)
    assert heads(following).num_swaps == 5
    assert metric(following, 'heads_swaps_total{result="taken"}') == 5
    assert metric(following, 'heads_swaps_total{result="refused"}') == 0


def damage_weights(version: Path) -> None:
    file = version / "heads.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut_weights(version: Path) -> None:
    file = version / "heads.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_weights(version: Path) -> None:
    (version / "heads.safetensors").unlink()


def lose_manifest(version: Path) -> None:
    (version / "manifest.json").unlink()


def break_manifest(version: Path) -> None:
    (version / "manifest.json").write_bytes(b'{"schema_version": 1')


def rename(version: Path) -> None:
    other = version.with_name("other@7")
    shutil.copytree(version, other)
    version.with_name("latest").write_text("other@7\n")


def lead_outside(version: Path) -> None:
    elsewhere = version.parents[1].with_name("elsewhere")
    shutil.move(version, elsewhere)
    version.symlink_to(elsewhere)


def name_a_path(version: Path) -> None:
    version.with_name("latest").write_text("../../elsewhere\n")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (damage_weights, ["heads.safetensors", "damaged"]),
        (cut_weights, ["heads.safetensors", "bytes long"]),
        (lose_weights, ["heads.safetensors", "missing"]),
        (lose_manifest, ["tiny@2", "manifest.json"]),
        (break_manifest, ["manifest.json", "JSON"]),
        (rename, ["other@7", "tiny@2"]),
        (lead_outside, ["tiny@2", "outside the store"]),
        (name_a_path, ["latest", "../../elsewhere", "not the name of a version"]),
    ],
)
def test_bad_heads_are_refused_once_and_the_old_ones_stay(
    harm: Callable[[Path], None], words: list[str], following: Any, store: Path, make_heads: Any
) -> None:
    publish(make_heads("1"), store)
    following.wait_for(lambda: heads(following).current == "tiny@1")
    place = Path(publish(make_heads("2", seed=2), store, move_latest=False))
    (place.parent / "latest.new").write_text("tiny@2\n")
    harm(place)
    if harm not in (rename, name_a_path):
        (place.parent / "latest.new").replace(place.parent / "latest")
    following.wait_for(lambda: heads(following).last_error is not None)
    info = heads(following)
    assert info.current == "tiny@1"
    assert info.last_error is not None
    assert "\n" not in info.last_error
    assert all(word in info.last_error for word in words), info.last_error
    looks = _looks(following)
    following.wait_for(lambda: looks.count >= 5)
    assert metric(following, 'heads_swaps_total{result="refused"}') == 1, "not tried again, not told again"
    assert ids(generate(following))

    publish(make_heads("3", seed=3), store)
    following.wait_for(lambda: heads(following).current == "tiny@3")
    assert (heads(following).last_error, heads(following).refused) == (None, None)


class _Looks:
    count = 0


def _looks(running: Any) -> _Looks:
    """Counts how often the store is looked at from now on."""
    source = running.service._keeper._source
    look, looks = source.look, _Looks()

    def counted() -> Any:
        looks.count += 1
        return look()

    source.look = counted
    return looks


def test_heads_of_another_backbone_are_refused_by_name(serve: Any, store: Path, make_heads: Any) -> None:
    stranger = make_heads("1", backbone={"identity": "ab" * 32, "name": "org/Stranger"})
    publish(stranger, store, "Mine")
    with serve(store=str(store), store_backbone="Mine") as running:
        running.wait_until_ready()
        info = heads(running)
        assert info.current is None
        assert info.refused == "tiny@1"
        assert "org/Stranger" in str(info.last_error)


def test_the_backbones_folder_is_found_among_others(serve: Any, store: Path, make_heads: Any) -> None:
    publish(make_heads("1", name="alien", backbone={"identity": "ab" * 32, "name": "org/Alien"}), store)
    (store / "Broken").mkdir()
    (store / "Broken" / "latest").write_text("what?\n")
    publish(make_heads("1"), store, "Other-name")
    with serve(store=str(store)) as running:
        running.wait_until_ready()
        assert heads(running).current == "tiny@1"


@pytest.mark.parametrize("there", [True, False])
def test_a_store_may_be_empty_or_come_later(there: bool, serve: Any, tmp_path: Path, make_heads: Any) -> None:
    store = tmp_path / "later"
    if there:
        store.mkdir()
    with serve(store=str(store), heads_poll_seconds=0.05) as running:
        running.wait_until_ready()
        info = heads(running)
        assert info.current is None
        assert (info.last_error is None) == there
        publish(make_heads("1"), store)
        running.wait_for(lambda: heads(running).current == "tiny@1")
        assert heads(running).last_error is None


def test_a_store_that_vanishes_changes_nothing_until_it_is_back(following: Any, store: Path, make_heads: Any) -> None:
    publish(make_heads("1"), store)
    following.wait_for(lambda: heads(following).current == "tiny@1")
    away = store.with_name("away")
    store.rename(away)
    following.wait_for(lambda: heads(following).last_error is not None)
    assert heads(following).current == "tiny@1"
    assert ids(generate(following))
    away.rename(store)
    following.wait_for(lambda: heads(following).last_error is None)
    assert heads(following).num_swaps == 1, "the same latest: nothing to take up"


def test_a_refusal_is_still_told_when_a_store_has_vanished_and_come_back(
    following: Any, store: Path, make_heads: Any
) -> None:
    place = Path(publish(make_heads("1"), store, move_latest=False))
    damage_weights(place)
    (place.parent / "latest").write_text("tiny@1\n")
    following.wait_for(lambda: heads(following).refused == "tiny@1")
    reason = heads(following).last_error
    away = store.with_name("away")
    store.rename(away)
    following.wait_for(lambda: heads(following).last_error != reason)
    assert heads(following).refused == "tiny@1"
    away.rename(store)
    following.wait_for(lambda: heads(following).last_error == reason)
    assert heads(following).refused == "tiny@1"
    assert metric(following, 'heads_swaps_total{result="refused"}') == 2, "the heads, and the store that was away"


def test_the_same_words_written_again_are_looked_at_again(following: Any, store: Path, make_heads: Any) -> None:
    """A version that was copied in halves is mended by publishing it again."""
    made = make_heads("1")
    place = Path(publish(made, store, move_latest=False))
    whole = (place / "heads.safetensors").read_bytes()
    (place / "heads.safetensors").write_bytes(whole[:100])
    (place.parent / "latest").write_text("tiny@1\n")
    following.wait_for(lambda: heads(following).refused == "tiny@1")
    (place / "heads.safetensors").write_bytes(whole)
    publish(made, store)
    following.wait_for(lambda: heads(following).current == "tiny@1")


def test_reloading_takes_any_published_version(serve: Any, store: Path, make_heads: Any) -> None:
    publish(make_heads("1"), store)
    publish(make_heads("2", seed=2), store, move_latest=False)
    with serve(store=str(store), heads_poll_seconds=3600) as running:
        running.wait_until_ready()
        assert heads(running).current == "tiny@1"
        answer = running.client.post("/heads/reload", json={"version": "tiny@2"})
        assert (answer.status_code, answer.json()["current"]) == (200, "tiny@2")
        answer = running.client.post("/heads/reload")
        assert (answer.status_code, answer.json()["current"]) == (200, "tiny@1")
        answer = running.client.post("/heads/reload", json={"version": "tiny@9"})
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "heads_error"
        assert "tiny@9" in answer.json()["error"]["message"]
        assert heads(running).current == "tiny@1"
        assert heads(running).refused == "tiny@9"
        assert ids(generate(running))


def test_chosen_heads_are_read_again_when_asked(serve: Any, make_heads: Any) -> None:
    folder = make_heads("1")
    with serve(heads=str(folder)) as running:
        running.wait_until_ready()
        assert heads(running).current == "tiny@1"
        assert running.client.post("/heads/reload").json()["num_swaps"] == 1
        assert running.client.post("/heads/reload", json={"version": "tiny@2"}).status_code == 400
        damage_weights(folder)
        assert running.client.post("/heads/reload").status_code == 409
        assert heads(running).current == "tiny@1"


def test_chosen_heads_that_do_not_fit_end_the_start(serve: Any, make_heads: Any) -> None:
    folder = make_heads("1", backbone={"identity": "ab" * 32, "name": "org/Stranger"})
    with serve(heads=str(folder)) as running:
        running.wait_for(lambda: running.service.state == "failed")
        assert "org/Stranger" in running.service.failure


def test_a_refusal_upon_request_is_told_until_there_is_something_else(
    following: Any, store: Path, make_heads: Any
) -> None:
    place = Path(publish(make_heads("1"), store, move_latest=False))
    damage_weights(place)
    (place.parent / "latest").write_text("tiny@1\n")
    following.wait_for(lambda: heads(following).refused == "tiny@1")
    assert following.client.post("/heads/reload").status_code == 409
    looks = _looks(following)
    following.wait_for(lambda: looks.count >= 3)
    info = heads(following)
    assert info.refused == "tiny@1"
    assert "heads.safetensors" in str(info.last_error)


def test_heads_that_are_long_in_coming_are_taken_up_when_they_are_there(
    serve: Any, store: Path, make_heads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is ready without them: a store may be far away."""
    publish(make_heads("1"), store)
    monkeypatch.setattr("gorgon_engine.server.service._FIRST_LOOK_SECONDS", 0.1)
    arrived = threading.Event()

    def load(settings: EngineSettings, progress: LoadProgress) -> Engine:
        engine = load_engine(settings, progress)
        prepare = engine.prepare_heads

        def prepare_late(heads: Path | None) -> PreparedHeads:
            assert arrived.wait(60.0)
            return prepare(heads)

        engine.prepare_heads = prepare_late  # type: ignore[method-assign]
        return engine

    with serve(load, store=str(store), heads_poll_seconds=0.05) as running:
        try:
            running.wait_until_ready()
            assert heads(running).current is None
            assert ids(generate(running))
        finally:
            arrived.set()
        running.wait_for(lambda: heads(running).current == "tiny@1")
        assert heads(running).num_swaps == 1


def test_the_password_of_a_store_is_never_shown(serve: Any) -> None:
    with serve(store="memory://me:hush@far-away") as running:
        running.wait_until_ready()
        answer = running.client.post("/heads/reload")
        assert answer.status_code == 409
        assert "memory://far-away: holds no heads" in answer.json()["error"]["message"]
        assert "hush" not in answer.text + running.client.get("/heads").text


def test_a_store_behind_a_url_is_followed(
    serve: Any, make_heads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GORGON_CACHE", str(tmp_path / "cache"))  # what lies elsewhere is copied there
    url = f"memory://{tmp_path.name}"
    publish(make_heads("1"), url)
    with serve(store=url, heads_poll_seconds=0.05) as running:
        running.wait_until_ready()
        assert heads(running).current == "tiny@1"
        publish(make_heads("2", seed=2), url)
        running.wait_for(lambda: heads(running).current == "tiny@2")
        assert ids(generate(running))


def test_heads_that_came_otherwise_may_bear_the_same_name(serve: Any, store: Path, make_heads: Any) -> None:
    """As those that come with the program and the first ones of a store: the store's are taken up."""
    own = make_heads("1", seed=8)
    publish(make_heads("1", seed=9), store)

    def load(settings: EngineSettings, progress: LoadProgress) -> Engine:
        return load_engine(settings.model_copy(update={"store": None, "heads": str(own)}), progress)

    with serve(load, store=str(store), heads_poll_seconds=0.05) as running:
        running.wait_until_ready()
        assert (heads(running).current, heads(running).num_swaps) == ("tiny@1", 1)
        looks = _looks(running)
        running.wait_for(lambda: looks.count >= 3)
        assert heads(running).num_swaps == 1

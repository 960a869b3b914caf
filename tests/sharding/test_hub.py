"""A hub that never answers costs seconds, and files of an earlier download are used."""

import time
from collections.abc import Callable

import pytest

from sharding.hub import ask_hub, fetch_folder, hub_errors, in_hub_cache
from sharding.pairs.decoder import DecoderError, find_decoder
from tests.servers import HANG_S, MODEL, NEW, Server

FILES = {"config.json": b"{}", "a.bin": b"pickled"}


def test_files_of_an_earlier_download_are_used(silence: Callable[[], None], server: Server) -> None:
    server.publish_model(FILES, NEW)
    folder = fetch_folder(MODEL, None, ["*.json"])
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert in_hub_cache(MODEL, "config.json", NEW) == folder / "config.json"
    silence()
    began = time.monotonic()
    assert fetch_folder(MODEL, None, ["*.json"]) == folder
    assert time.monotonic() - began < HANG_S


def test_without_them_the_error_names_the_hub(silence: Callable[[], None]) -> None:
    silence()
    began = time.monotonic()
    with pytest.raises(hub_errors(), match=r"no answer within 0\.1 s|timed out"):
        fetch_folder(MODEL, None, ["*.json"])
    with pytest.raises(DecoderError, match=r"did not come from the hub \((no answer|timed out)"):
        find_decoder(MODEL)
    assert time.monotonic() - began < HANG_S


def test_what_the_hub_answers_is_an_error_of_the_hub(server: Server) -> None:
    server.publish_model(FILES, NEW)
    assert ask_hub(MODEL, "a.bin", NEW) == len(FILES["a.bin"])
    for repository, file in ((MODEL, "none.bin"), ("owner/a/b", "a.bin")):
        with pytest.raises(hub_errors()):
            ask_hub(repository, file, NEW)
    server.status[f"/api/models/{MODEL}/revision/main"] = 403
    with pytest.raises(hub_errors(), match="403"):
        fetch_folder(MODEL, None, ["*.json"])

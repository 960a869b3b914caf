"""Tests of one download into a folder that a stranger may have made."""

import functools
from pathlib import Path

import requests

import console
from sharding.http import ask, download
from tests.servers import BODY, Server


def test_a_link_in_place_of_the_partial_file_is_replaced(server: Server, tmp_path: Path) -> None:
    server.bodies["/p/photos.bin"] = BODY
    (tmp_path / "mine").write_text("mine")
    progress = functools.partial(console.progress, shown=False)
    (tmp_path / "photos.bin.partial").symlink_to("mine")
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"
        remote = ask(session, f"{server.url}/p/photos.bin", tmp_path / "photos.bin", "")
        download(session, remote, progress)
    assert (tmp_path / "photos.bin").read_bytes() == BODY
    assert (tmp_path / "mine").read_text() == "mine"

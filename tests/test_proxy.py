"""Addresses are read through the proxy that HTTP_PROXY names, and directly if NO_PROXY says so."""

import functools
import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from upath import UPath

from model.c2pa import trust_list
from model.shipped import fetch
from model.shipped.backbone import BackboneFile, HubPlace
from sharding.format import open_shards
from storage import any_path
from tests.servers import FILES, OLD, REPO, Proxy, Server, fetched

# aiobotocore does not close its sessions when a test ends; the garbage collector does.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:Unclosed:ResourceWarning",
    "ignore:unclosed:ResourceWarning", "ignore:datetime.datetime.utcnow:DeprecationWarning",
)  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """`environment(variables)` sets these variables, and no others of proxies."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for variable in (name, name.upper()):
            monkeypatch.delenv(variable, raising=False)
    return lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]


@pytest.fixture
def proxied(environment: Callable) -> Iterator[Callable[[str], Proxy]]:
    """`proxied(upstream)` starts a proxy to this server and sets HTTP_PROXY."""
    started = []

    def start(upstream: str) -> Proxy:
        proxy = Proxy(upstream)
        started.append(proxy)
        environment({"HTTP_PROXY": proxy.url})
        return proxy

    yield start
    for proxy in started:
        proxy.shutdown()
        proxy.server_close()


@pytest.fixture
def web(data: Path) -> Iterator[str]:
    """Address of a server of the folder of sets."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(data))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_web_address_is_read_through_the_proxy(
    web: str, data: Path, proxied: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, expected = proxied(web), open_shards([data / "old"]).sha256
    assert open_shards(["http://shards.invalid/old"]).sha256 == expected
    assert "GET http://shards.invalid/old/index.json" in proxy.asked
    proxy.asked.clear()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert open_shards([f"{web}/old"]).sha256 == expected
    assert not proxy.asked


def test_an_address_that_does_not_answer_is_named(
    proxied: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^http://nobody\.invalid/s cannot be read: .* network$"):
        open_shards(["http://nobody.invalid/s"])
    monkeypatch.setenv("HTTP_PROXY", "127.0.0.1:9")
    said = r"^http://nobody\.invalid/t cannot .* 127\.0\.0\.1:9 .* the network and its proxy$"
    with pytest.raises(ValueError, match=said):
        open_shards(["http://nobody.invalid/t"])


def test_the_options_of_a_web_address_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own = UPath("http://host/sets", headers={"a": "b"}, client_kwargs={"trust_env": False})
    assert any_path(own).storage_options == own.storage_options
    for proxy in ("", "http://proxy:3128"):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        assert any_path("http://host/sets") == any_path(any_path("http://host/sets"))


@pytest.mark.parametrize(
    ("variables", "proxy"),
    [({"HTTP_PROXY": "proxy:3128"}, "http://proxy:3128"),
     ({"ALL_PROXY": "http://u:p@proxy:3128"}, "http://u:p@proxy:3128"),
     ({"ALL_PROXY": "socks5://other", "HTTP_PROXY": "https://proxy"}, "https://proxy"),
     ({"HTTPS_PROXY": "http://proxy:3128"}, None), ({"HTTP_PROXY": ""}, None),
     ({"HTTP_PROXY": "socks5://proxy", "NO_PROXY": "10.1.2.0/24"}, None),
     ({"ALL_PROXY": "http://proxy:3128", "NO_PROXY": "10.1.2.3"}, None)],
)  # fmt: skip
def test_a_web_address_has_the_proxy_that_downloads_have(
    variables: dict[str, str], proxy: str | None, environment: Callable
) -> None:
    environment(variables)
    options = any_path("http://10.1.2.3/sets").storage_options
    assert options.get("proxy") == proxy
    # With it, aiohttp would look for a proxy itself. It knows no networks in NO_PROXY.
    assert options["client_kwargs"]["trust_env"] == ("/24" not in variables.get("NO_PROXY", ""))


@pytest.mark.parametrize(
    ("proxy", "said"),
    [("socks5h://proxy:1080", "SOCKS proxy, which ALL_PROXY names; set HTTP_PROXY to one such as"),
     ("http://u:p#secret@proxy:3128", "^ALL_PROXY is no address of a proxy, expected one such as"),
     ("http://", "^ALL_PROXY is no address")],
)  # fmt: skip
def test_a_proxy_that_cannot_be_used_is_named_by_its_variable(
    proxy: str, said: str, environment: Callable
) -> None:
    environment({"ALL_PROXY": proxy})
    with pytest.raises(ValueError, match=said) as refused:
        any_path("http://host/sets")
    assert "secret" not in str(refused.value)


def test_a_bucket_is_read_through_the_proxy(
    s3: dict[str, str], client, data: Path, proxied: Callable
) -> None:
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    for file in (data / "old").iterdir():
        client.upload_file(str(file), bucket, f"old/{file.name}")
    proxy = proxied(s3["AWS_ENDPOINT_URL"])
    place = UPath(f"s3://{bucket}/old", endpoint_url="http://s3.invalid", key="a", secret="b")
    assert open_shards([place]).sha256 == open_shards([data / "old"]).sha256
    assert f"GET http://s3.invalid/{bucket}/old/index.json" in proxy.asked


def test_downloads_go_through_the_proxy(
    proxied: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server() as server:
        proxy = proxied(server.url)
        server.publish(FILES, OLD)
        server.bodies["/a.bin"] = b"body"
        huggingface_hub.close_session()  # it read the variables when it was opened
        hub = huggingface_hub.HfApi("http://hub.invalid", token=False)  # also of hf:// addresses
        assert hub.dataset_info(REPO).sha == OLD
        huggingface_hub.close_session()
        fetched(tmp_path, urls=["http://files.invalid/a.bin"])
        place = HubPlace(repository="someone/clip", revision="1" * 40, file="a.bin")
        server.bodies[f"/someone/clip/resolve/{'1' * 40}/a.bin"] = b"body"
        template = "http://model.invalid/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("DETECTOR_CACHE", str(tmp_path))
        file = BackboneFile(sha256=hashlib.sha256(b"body").hexdigest(), hub=place)
        assert fetch._from_hub(file).read_bytes() == b"body"
        huggingface_hub.close_session()
        assert trust_list._read("http://list.invalid/a.bin") == b"body"
        hosts = {line.split("/")[2] for line in proxy.asked}
        assert hosts == {"hub.invalid", "files.invalid", "model.invalid", "list.invalid"}
        server.shutdown()

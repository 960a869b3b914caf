"""What is exported names no path and no secret of this machine."""

import json
import shutil
from pathlib import Path

import pytest

from model import checkpoint, load_detector
from model.export import hub
from model.export.onnx import META_KEYS, _metadata
from tests.builders import CALIBRATION, encode, photo
from tests.model.export.test_hub import report_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_no_path_of_this_machine_reaches_the_folder(
    tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """Paths in the record are cut to file names, and secrets in URLs are removed."""
    source = tmp_path / "runs" / "tiny" / "step_0000007"
    shutil.copytree(tiny_checkpoint, source)
    meta = checkpoint.read_meta(source)
    sets = [f"{tmp_path}/a/val", f"{tmp_path}/b/val"]
    used = meta["data"] | {"train": sets, "set_sha256": dict(zip(sets, "ab", strict=True))}
    recipe = meta["recipe"] | {"run": meta["recipe"]["run"] | {"init_from": "/home/me/runs/first"}}
    places = {"a": ["~/x/y", "C:\\Users\\me\\z"], "b": "s3://me:secret@bucket/sets?sig=hidden"}
    changes = {"recipe": recipe, "metrics": places, "selection": 0.5, "data": used}
    changes["calibration"] = CALIBRATION | {"fitted_on": sets}
    checkpoint.annotate(source, changes)
    report = report_of(checkpoint.read_meta(source))
    report["sets"] = {sets[0]: report["sets"]["evalgen"]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    out = hub.write_hub(source, tmp_path / "hub", data=data, report=tmp_path / "report.json")
    written = json.loads((out / "meta.json").read_text())
    assert written["recipe"]["run"]["init_from"] == "first"
    assert written["metrics"] == {"a": ["y", "z"], "b": "s3://***@bucket/sets?***"}
    assert written["data"]["set_sha256"] == {"val": "a", "val (2)": "b"}
    assert written["selection"] == 0.5 and written["classes"] == meta["classes"]
    for path in out.rglob("*"):
        text = path.read_bytes() if path.is_file() else b""
        for private in (str(tmp_path), str(data), "/home/me", "secret", "hidden"):
            assert private.encode() not in text, (path, private)
    (prediction,) = load_detector(out).predict([encode(photo(1))])
    assert prediction.probability is not None
    graph = _metadata(checkpoint.read_meta(source), "fp32")
    assert str(tmp_path) not in json.dumps(graph) and graph.keys() == set(META_KEYS)

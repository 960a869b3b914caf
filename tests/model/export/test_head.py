"""A shipped head gives, with its backbone, the same scores as its checkpoint."""

import errno
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import evaluate
import predict
from model import checkpoint, load_detector
from model.__main__ import main
from model.checkpoint import CheckpointError
from model.export import head, hub
from model.export.average import average
from model.export.license import license_of
from model.network import build, load_backbone_file
from model.shipped import backbone
from model.shipped.backbone import BackboneError, BackboneFile, BackboneSpec, HubPlace, cached_path
from storage import sha256_of
from tests.builders import CALIBRATION, PREPROCESS, TINY, encode, photo, small_disk, small_recipe

IMAGES = [encode(photo(seed), "PNG") for seed in range(3)]
HUB = HubPlace(repository="someone/tiny", revision="1" * 40, file="model.safetensors")
NAME = "clip"


def frozen(folder: Path, path: Path, seed: int = 3, **changes: object) -> Path:
    """Write a checkpoint of a head on the backbone file `path`, both with seeded weights."""
    torch.manual_seed(seed)
    network = replace(TINY, freeze_backbone=True, **changes)
    net = build(network, pretrained=False)
    load_backbone_file(net, path)
    for name, weight in net.backbone.named_parameters():
        if name.startswith(head.head_prefixes(net)):
            torch.nn.init.normal_(weight)
    digest = sha256_of(path)
    checkpoint.save(
        folder, net, state=None,
        recipe=small_recipe(name="tiny", preprocess=PREPROCESS, network=network),
        record=checkpoint.Record(
            step=7, epoch=1, metrics={}, selection=0.5, data={"train": ["old"], "replay": []},
            first_weights={"kind": "file", "name": "/home/me/b.safetensors", "sha256": digest,
                           "license": None, "first_weights": None},
        ),
    )  # fmt: skip
    checkpoint.annotate(folder, {"temperature": 1.7, "threshold": 0.6, "calibration": CALIBRATION})
    return folder


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a backbone file in an otherwise empty cache; there is no shipped detector."""
    monkeypatch.setenv("DETECTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backbone, "DETECTORS", tmp_path / "detectors")
    return backbone_file(tmp_path, 11)


def backbone_file(tmp_path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    weights = build(replace(TINY, name=TINY.name), pretrained=False).backbone.state_dict()
    path = tmp_path / "x.safetensors"
    save_file({n: w.contiguous() for n, w in weights.items() if not n.startswith("head.fc")}, path)
    (tmp_path / "cache").mkdir(exist_ok=True)
    return path.rename(cached_path(sha256_of(path)))


def spec_of(*files: Path, **changes: object) -> BackboneSpec:
    places = [BackboneFile(sha256=file.stem, hub=HUB) for file in files]
    return BackboneSpec(name="tiny.made_up", license="mit", files=places, **changes)


@pytest.fixture
def trained(file: Path, tmp_path: Path) -> Path:
    return frozen(tmp_path / "runs" / "tiny" / "step_0000007", file)


@pytest.fixture
def shipped(trained: Path, file: Path, tmp_path: Path) -> Path:
    """Return a shipped detector with the default name; `tmp_path / none` has no runs."""
    (tmp_path / "none").mkdir()
    return head.save_head(trained, tmp_path / "detectors" / NAME, spec_of(file))


def scores(place: Path | str | None, **options: object) -> list[float | None]:
    detector = load_detector(place, device="cpu", backend="pil", **options)
    return [one.probability for one in detector.predict(IMAGES)]


def test_a_full_disk_is_one_error(trained: Path, file: Path, tmp_path: Path) -> None:
    with small_disk(50), pytest.raises(head.HeadError, match=r"out could not be written .*; free"):
        head.save_head(trained, tmp_path / "out", spec_of(file))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["timm", "stages"])
def test_the_head_is_small_and_gives_the_same_scores(kind: str, file: Path, tmp_path: Path) -> None:
    trained = frozen(tmp_path / "runs" / kind / "step_0000001", file, head=kind)
    folder = head.save_head(trained, tmp_path / kind, spec_of(file))
    names = set(load_file(folder / "weights.safetensors"))
    assert {"head.fc.weight", "head.fc.bias"} <= names
    assert all(name.startswith(("head.fc.", "stage_head.")) for name in names)
    assert (kind == "stages") == any(name.startswith("stage_head.") for name in names)
    assert scores(folder) == scores(trained)
    checkpoint.check(folder)
    assert len(set(scores(folder))) == len(IMAGES)


def test_without_a_run_the_shipped_head_is_used(
    shipped: Path, trained: Path, tmp_path: Path, logged: list[str]
) -> None:
    none = tmp_path / "none"
    assert scores(None, runs=none) == scores(trained)
    assert logged == [f"no trained run below {none}: using shipped detector {NAME}"]
    assert load_detector(NAME, runs=none).checkpoint == shipped  # by its name
    assert load_detector(shipped, runs=none).band == (0.3, 0.6)
    assert load_detector(runs=tmp_path / "runs").checkpoint == trained  # a run comes first
    assert len(logged) == 1
    with pytest.raises(CheckpointError, match=rf"nor a detector that ships \({NAME}\)"):
        load_detector("nobody")
    with pytest.raises(CheckpointError, match="no checkpoint below"):
        checkpoint.find(none)  # training and evaluation do not use the shipped detector


def test_a_path_has_priority_over_a_name(
    shipped: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_detector(NAME).checkpoint == shipped
    own = frozen(tmp_path / NAME / "step_0000001", file, seed=5)
    assert load_detector(NAME).checkpoint == own.relative_to(tmp_path)


class Refused(type(Path())):
    """Path below a folder of another user."""

    def is_file(self) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))


def test_predict_uses_the_shipped_head_or_names_the_fetch_command(
    shipped: Path, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(IMAGES[0])
    line = [str(tmp_path / "photo.png"), "--runs", str(tmp_path / "none")]
    result = CliRunner().invoke(predict.main, line)
    assert result.exit_code == 0, result.output
    assert f"using shipped detector {NAME}" in result.output
    file.unlink()
    result = CliRunner().invoke(predict.main, line)
    assert result.exit_code == 2
    assert "is not on this machine; type `python -m model fetch`" in result.output
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "cached_path", lambda _sha256: Refused("/root/x"))
        result = CliRunner().invoke(predict.main, line)
    assert result.exit_code == 2
    assert "/root/x: Permission denied. Set DETECTOR_CACHE to a folder of yours" in result.output
    other = shipped.rename(shipped.with_name("other"))
    with pytest.raises(BackboneError, match="type `python -m model fetch other`"):
        checkpoint.load_network(other)
    logging.getLogger("ai_images_detector").handlers.clear()


def test_a_damaged_or_untested_backbone_is_refused(
    trained: Path, shipped: Path, file: Path, tmp_path: Path
) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:-4] + b"\0\0\0\1")
    with pytest.raises(BackboneError, match=r"is damaged: its .* delete it, then type `python -m"):
        load_detector(NAME)
    file.write_bytes(data)
    other = backbone_file(tmp_path, 12)
    folder = head.save_head(trained, tmp_path / "two", spec_of(other, file))
    assert scores(folder) == scores(NAME)  # the untested file is first in the list and is skipped
    file.unlink()
    with pytest.raises(BackboneError, match="a backbone that two was not tested with, so it is"):
        load_detector(folder)


def test_each_backbone_file_may_have_its_own_calibration(
    trained: Path, file: Path, tmp_path: Path
) -> None:
    other = backbone_file(tmp_path, 12)
    own = {"temperature": 3.0, "threshold": 0.8, "calibration": None}
    tested = {other.stem: own}
    folder = head.save_head(trained, tmp_path / "two", spec_of(file, other, tested=tested))
    assert load_detector(folder).band == (0.3, 0.6)
    file.rename(tmp_path / "away")
    detector = load_detector(folder)
    assert (detector.band, detector.meta["temperature"]) == ((0.8, 0.8), 3.0)
    assert checkpoint.check(folder)["threshold"] == 0.8
    # A new calibration applies only to the file that was used for it.
    checkpoint.annotate(folder, {"temperature": 2.0, "threshold": 0.7, "calibration": CALIBRATION})
    assert load_detector(folder).meta["temperature"] == 2.0
    (tmp_path / "away").rename(file)
    assert (load_detector(folder).meta["temperature"], load_detector(folder).threshold) == (
        1.7,
        0.6,
    )


def test_a_new_calibration_keeps_the_rates_that_were_measured_with_the_same_backbone_file(
    trained: Path, file: Path, tmp_path: Path
) -> None:
    def left_out(name: str) -> dict[str, object]:
        rates = {"reals": 9, "fakes": 0, "false_positive_rate": 0.4, "recall": None, "uncertain": 0}
        return CALIBRATION | {"method": "sources left out, pooled", "sources": {name: rates}}

    checkpoint.annotate(trained, {"calibration": left_out("faces")})
    other = backbone_file(tmp_path, 12)
    own = {"temperature": 3.0, "threshold": 0.6, "calibration": left_out("pets")}
    folder = head.save_head(
        trained, tmp_path / "two", spec_of(file, other, tested={other.stem: own})
    )
    for name, temperature in (("faces", 1.7), ("pets", 3.0)):
        checkpoint.annotate(folder, {"calibration": CALIBRATION | {"method": "validation"}})
        kept = load_detector(folder).meta["calibration"]["left_out"]
        assert (list(kept["sources"]), kept["temperature"]) == ([name], temperature)
        file.unlink(missing_ok=True)  # so that the other file is used


def test_an_impossible_calibration_of_a_backbone_file_is_refused(
    trained: Path, file: Path, tmp_path: Path
) -> None:
    wrong = {file.stem: {"temperature": 0, "threshold": 0.8, "calibration": None}}
    folder = head.save_head(trained, tmp_path / "two", spec_of(file, tested=wrong))
    with pytest.raises(BackboneError, match="temperature takes a finite number above 0, got 0"):
        load_detector(folder)


def test_only_the_backbone_of_the_training_is_accepted(
    trained: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = backbone_file(tmp_path, 12)
    with pytest.raises(head.HeadError, match="is not the one that would be downloaded"):
        head.save_head(trained, tmp_path / "x", spec_of(other))
    spec = spec_of(other)
    other.unlink()
    with pytest.raises(head.HeadError, match="export on the machine that trained it"):
        head.save_head(trained, tmp_path / "x", spec)
    monkeypatch.setattr(head, "KNOWN", (spec,))
    with pytest.raises(head.HeadError, match=r"type `python -m model fetch tiny.made_up`"):
        head.save_head(trained, tmp_path / "x", spec)
    whole = tmp_path / "runs" / "whole" / "step_0000001"
    net = build(TINY, pretrained=False)
    record = checkpoint.Record(step=1, epoch=1, metrics={}, selection=None, data={"train": []})
    checkpoint.save(whole, net, recipe=small_recipe(), record=record, state=None)
    with pytest.raises(head.HeadError, match="trained its backbone too"):
        head.save_head(whole, tmp_path / "x", spec_of(file))
    assert not (tmp_path / "x").exists()


def test_the_command_identifies_the_backbone_by_its_hash(
    trained: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "detectors" / NAME
    line = ["export", "--head", str(target), "--runs", str(tmp_path / "runs"), "--data",
            str(tmp_path), "--hub-place", "a/b@main:x/y.safetensors"]  # fmt: skip
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 1 and "which cannot be downloaded" in result.output
    monkeypatch.setattr(head, "KNOWN", (spec_of(backbone_file(tmp_path, 12), file),))
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    meta = json.loads((target / "meta.json").read_text())
    place = {"repository": "a/b", "revision": "main", "file": "x/y.safetensors"}
    assert meta["backbone"] == {
        "name": "tiny.made_up", "license": "mit", "tested": {file.stem: {}},
        "files": [{"sha256": file.stem, "wheel": None, "hub": place}],
    }  # fmt: skip
    assert meta["first_weights"]["name"] == "b.safetensors"  # no path of this machine
    assert CliRunner().invoke(main, line).exit_code == 1  # the folder exists
    again = head.save_head(target, tmp_path / "again", head.backbone_of(target))
    assert scores(again) == scores(target)
    bad = [*line[:-1], "nothing"]
    assert "is not OWNER/NAME@REVISION:FILE" in CliRunner().invoke(main, bad).output
    logging.getLogger("ai_images_detector").handlers.clear()


def test_timms_file_is_identified_in_the_hub_cache(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = frozen(tmp_path / "runs" / "timm" / "step_0000001", file)
    name = "convnextv2_atto.fcmae_ft_in1k"
    first = {"kind": "timm", "name": name, "sha256": "", "license": None, "first_weights": None}
    checkpoint.annotate(folder, {"first_weights": first})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(head.HeadError, match="is not in the hub's cache"):
        head.backbone_of(folder)
    snapshots = tmp_path / "hub" / f"models--timm--{name}"
    path = snapshots / "snapshots" / ("a" * 40) / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(file.read_bytes())
    (snapshots / "refs").mkdir()
    (snapshots / "refs" / "main").write_text("a" * 40)
    spec = head.backbone_of(folder)
    place = HubPlace(repository=f"timm/{name}", revision="a" * 40, file="model.safetensors")
    assert spec.files == [BackboneFile(sha256=file.stem, hub=place)]
    assert (spec.name, spec.license) == (name, "cc-by-nc-4.0")
    file.unlink()  # not in this project's cache: the hub's file is compared
    shipped = head.save_head(folder, tmp_path / "from_hub", spec)
    assert checkpoint.read_meta(shipped)["backbone"]["tested"] == {file.stem: {}}
    path.write_bytes(b"")
    with pytest.raises(head.HeadError, match="is on this machine to compare with; export on"):
        head.save_head(folder, tmp_path / "again", spec)


def test_the_card_lists_the_tested_backbone_files(
    trained: Path, file: Path, shipped: Path, tmp_path: Path
) -> None:
    other = backbone_file(tmp_path, 12)
    folder = head.save_head(trained, tmp_path / "two", spec_of(other, file))
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit"
    assert "python -m model fetch FOLDER" in text and "timm.create_model" not in text
    assert f"| {file.stem} | yes |" in text and f"| {other.stem} | no |" in text
    assert "MIT, the license of the backbone tiny.made" in text
    assert "**No evaluation is attached.**" in text


def test_a_shipped_head_works_like_any_checkpoint(
    shipped: Path, trained: Path, tmp_path: Path, data: Path
) -> None:
    whole = hub.write_hub(shipped, tmp_path / "hub")
    meta = checkpoint.read_meta(whole)
    assert "backbone" not in meta and license_of(meta).id == "mit"
    assert scores(whole) == scores(trained)
    mean = average(shipped, trained, 0.5, tmp_path / "runs" / "mean")
    assert (
        license_of(checkpoint.read_meta(average(trained, shipped, 1, tmp_path / "mit"))).id == "mit"
    )
    assert mean.name == "step_0000007" and "backbone" not in checkpoint.read_meta(mean)
    back = average(trained, shipped, 0.5, tmp_path / "runs" / "back")
    assert back.name == "step_0000007"
    for name, weight in checkpoint.read_weights(back).items():
        torch.testing.assert_close(weight, checkpoint.read_weights(trained)[name])
    line = ["--shards", "val", "--data", str(data), "--runs", str(tmp_path / "none"),
            "--device", "cpu", "--backend", "pil"]  # fmt: skip
    for named in (NAME, str(trained)):
        result = CliRunner().invoke(evaluate.main, [*line, "--checkpoint", named])
        assert result.exit_code == 0, result.output
    report = tmp_path / "none" / NAME / "evaluation" / "val" / "report.json"
    assert json.loads(report.read_text())["step"] == 7  # nothing is written into the detector
    assert sorted(p.name for p in shipped.parent.iterdir()) == [NAME]
    with pytest.raises(hub.HubError, match="of another file of tiny step 7"):
        head.save_head(trained, tmp_path / "other", head.backbone_of(shipped), report=report)
    report = trained.parent / "evaluation" / "val" / "report.json"
    carded = head.save_head(trained, tmp_path / "carded", head.backbone_of(shipped), report=report)
    assert r"| val\: gamma |" in (carded / "README.md").read_text()
    logging.getLogger("ai_images_detector").handlers.clear()


@pytest.mark.parametrize(
    ("entry", "said"),
    [({"name": "x"}, "license"), ({"nmae": 1}, "unknown key 'nmae'"),
     ({"name": "x", "license": None, "files": [{"sha256": "../x"}], "tested": {}}, "no SHA-256"),
     ({"name": "x", "license": None, "files": [], "tested": {"a" * 64: {"heat": 1}}}, "heat")],
)  # fmt: skip
def test_a_bad_backbone_record_is_a_one_line_error(
    entry: dict, said: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        backbone.spec_of({"backbone": entry}, "meta.json")
    assert str(caught.value).startswith("meta.json: backbone") and "\n" not in str(caught.value)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert backbone.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DETECTOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert backbone.cache_folder() == Path("/caches/ai-images-detector/backbones")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert backbone.cache_folder() == Path("/home/me/.cache/ai-images-detector/backbones")


def test_a_report_of_other_weights_is_refused_before_anything_is_exported(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "model.export.onnx.export_onnx", lambda *_: pytest.fail("ONNX files were written")
    )
    report = tmp_path / "report.json"
    report.write_text("{}")
    done = CliRunner().invoke(main, [
        "export", "--onnx", "--hub", str(tmp_path / "hub"), "--report", str(report),
        "--checkpoint", str(tiny_checkpoint),
    ])  # fmt: skip
    assert done.exit_code == 1 and "report.json is not a report.json of" in done.output
    assert not (tmp_path / "hub").exists()

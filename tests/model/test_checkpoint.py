"""Checkpoints: saving, loading, damage, finding and averaging."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner

from model import checkpoint
from model.__main__ import main
from model.checkpoint import CheckpointError
from model.device import choose_device, choose_precision
from model.export.average import average
from model.export.license import license_of
from model.network import (
    Detector,
    Network,
    NetworkError,
    build,
    load_backbone_file,
    load_weights,
)  # fmt: skip
from model.training.saving import prune
from tests.builders import ROOT, TINY, small_disk, small_recipe
from tests.servers import Server


def save(folder: Path, net=None, *, step: int = 1, selection: float | None = 0.5, state=None):
    net = net or build(TINY, pretrained=False)
    checkpoint.save(
        folder / f"step_{step:07d}",
        net,
        recipe=small_recipe(),
        state=state,
        record=checkpoint.Record(
            step=step, epoch=1, metrics={}, selection=selection, data={"train": ["x"]}
        ),
    )
    return folder / f"step_{step:07d}"


def test_a_loaded_network_computes_as_the_saved_one(tmp_path: Path) -> None:
    net = build(TINY, pretrained=False).eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    folder = save(tmp_path, net)
    loaded, preprocess, meta = checkpoint.load_network(folder)
    assert torch.equal(net(images), loaded(images))
    assert (preprocess.crop_size, preprocess.resize_size) == (32, 36)
    assert meta["classes"] == ["real", "fake"]
    assert {"commit", "versions", "recipe", "threshold", "temperature"} <= meta.keys()


def test_a_folder_with_its_temporary_name_is_no_checkpoint(tmp_path: Path) -> None:
    whole = save(tmp_path / "run", selection=0.1)
    left = save(tmp_path / "run", step=2, selection=0.9)
    left.rename(left.with_name(f"{left.name}.123.partial"))
    assert checkpoint.checkpoints_of(tmp_path / "run") == [whole]
    assert checkpoint.best_of(tmp_path / "run") == whole
    shutil.copytree(tmp_path / "run", tmp_path / "later.123.partial")
    assert checkpoint.find(tmp_path) == whole


SWIN = Network(
    name="swin_tiny_patch4_window7_224", pretrained=False,
    options={
        "img_size": 32, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
    },
)  # fmt: skip


@pytest.mark.parametrize("network", [TINY, SWIN], ids=["convnextv2", "swin"])
def test_skipping_initialization_gives_the_same_network(
    network: Network,
) -> None:
    """Swin creates buffers that are not stored in checkpoints."""
    net = build(network, pretrained=False).eval()
    empty = build(network, pretrained=False, empty=True).eval()
    load_weights(empty, net.backbone.state_dict(), "there", assign=True)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(net(images), empty(images))


@pytest.mark.slow
def test_timm_is_imported_without_torch_s_compiler_which_still_works() -> None:
    code = (
        "import sys, model.network; assert 'torch._dynamo' not in sys.modules; import torch;"
        "assert 'wandb' not in sys.modules; import wandb;"
        "f = torch.compile(lambda x: x + 1, backend='eager'); assert f(torch.ones(1)) == 2;"
        "assert 'torch._dynamo' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_weights_have_plain_timm_names(tmp_path: Path) -> None:
    names = checkpoint.read_weights(save(tmp_path)).keys()
    assert {"stem.0.weight", "head.fc.weight"} <= names


def test_the_state_is_read_without_running_code(tmp_path: Path) -> None:
    state = {"optimizer": {"state": {}}, "order": {"seed": 1}, "rng": torch.get_rng_state()}
    folder = save(tmp_path, state=state)
    assert checkpoint.load_state(folder)["order"] == {"seed": 1}
    torch.save({"evil": time.sleep}, folder / "state.pt")
    checkpoint.seal(folder, checkpoint.read_meta(folder))  # as an attacker would
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        checkpoint.load_state(folder)


def test_without_meta_there_is_no_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path)
    (folder / "meta.json").unlink()
    assert checkpoint.checkpoints_of(tmp_path) == []
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        checkpoint.load_network(folder)


def test_a_crash_while_saving_keeps_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path)

    def full_disk(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.checkpoint.torch.save", full_disk)
    with pytest.raises(checkpoint.CheckpointError, match=r"No space left.*, if there is one$"):
        save(tmp_path, step=2, state={"a": 1})
    assert checkpoint.checkpoints_of(tmp_path) == [good]
    assert checkpoint.load_network(good)


def test_find_returns_the_best_checkpoint_of_the_newest_run(tmp_path: Path) -> None:
    net = build(TINY, pretrained=False)
    save(tmp_path / "one", net, step=5, selection=0.9)
    save(tmp_path / "two", net, step=1, selection=0.8)
    save(tmp_path / "two", net, step=2, selection=0.7)
    assert checkpoint.find(tmp_path) == tmp_path / "two" / "step_0000001"
    assert checkpoint.find(tmp_path, tmp_path / "one") == tmp_path / "one" / "step_0000005"
    with pytest.raises(CheckpointError, match=r"python train\.py --phase 1.*make demo"):
        checkpoint.find(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"neither a checkpoint nor a run[^;]*$"):
        checkpoint.find(tmp_path, tmp_path / "nothing")


def test_another_version_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    checkpoint.annotate(folder, {"format_version": 7})
    expected = f"checkpoint version 7, expected {checkpoint.FORMAT_VERSION}; train it again, as"
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.load_network(folder)


STATE = {"optimizer": {"state": {}}, "order": {"seed": 1}, "rng": torch.get_rng_state()}


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "meta.json", "replayed.csv"])
def test_a_flipped_bit_is_detected_at_any_position(tmp_path: Path, name: str) -> None:
    """At the start, in the middle and at the end. The error names the file and an undamaged
    checkpoint.
    """
    older = save(tmp_path, state=STATE)
    folder = save(tmp_path, step=2, state=STATE)
    (folder / "replayed.csv").write_text("key,count\na,1\n")
    checkpoint.seal(folder, checkpoint.read_meta(folder))
    assert checkpoint.verify(folder)["step"] == 2
    path = folder / name
    data = path.read_bytes()
    # The last byte of meta.json is a newline, which carries no information.
    for place in (0, len(data) // 3, len(data) // 2, len(data) - 2):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        whole, (reason,) = checkpoint.whole_checkpoints(tmp_path)
        assert whole == [older]
        assert str(path) in reason and "damaged" in reason, reason
        load = {
            "weights.safetensors": checkpoint.load_network, "state.pt": checkpoint.load_state,
            "meta.json": checkpoint.read_meta, "replayed.csv": checkpoint.verify,
        }[name]  # fmt: skip
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        if name != "replayed.csv":
            assert f"{older} is undamaged: use it instead" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        ("weights.safetensors", None), ("state.pt", b""), ("meta.json", b""),
        ("meta.json", b"\0" * 900), ("meta.json", b"[1]"), ("meta.json", b'{"format_version": 2}'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line_that_names_it(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    folder = save(tmp_path, state=STATE)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    load = checkpoint.load_state if name == "state.pt" else checkpoint.load_network
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    said = str(caught.value)
    assert str(folder / name) in said and "\n" not in said
    assert "no undamaged checkpoint in" in said


def test_a_file_missing_from_a_copy_is_reported_on_use(tmp_path: Path) -> None:
    folder = save(tmp_path, state=STATE)
    (folder / "state.pt").unlink()
    assert checkpoint.load_network(folder)
    assert checkpoint.whole_checkpoints(tmp_path) == ([folder], [])
    with pytest.raises(CheckpointError, match=r"has no state\.pt, so training cannot resume"):
        checkpoint.load_state(folder)


def test_an_unreadable_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal is simulated, because root may read every file."""
    folder = save(tmp_path)

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("model.checkpoint.sha256_of", refuse)
    with pytest.raises(OSError, match=r"Permission denied: .*weights\.safetensors"):
        checkpoint.load_network(folder)


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, state=STATE)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o640"}


def test_folders_with_other_names_are_no_checkpoints_and_are_kept(tmp_path: Path) -> None:
    one, two = save(tmp_path, selection=0.1), save(tmp_path, step=2, selection=0.2)
    names = ["step_0000002.bak", "step_0000002-keep", "step_3", "step_0000009 (copy)", "best"]
    copies = [shutil.copytree(two, tmp_path / name) for name in names]
    (tmp_path / "step_0000004").mkdir()
    (tmp_path / "step_0000004/notes.txt").write_text("mine")
    assert checkpoint.checkpoints_of(tmp_path) == [one, two]
    assert checkpoint.best_of(tmp_path) == two
    prune(tmp_path, {two})
    assert not one.exists()
    assert all((copy / "weights.safetensors").exists() for copy in copies)
    assert (tmp_path / "step_0000004/notes.txt").exists()


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    few, many = save(tmp_path, step=9_999_999), save(tmp_path, step=10_000_000)
    assert checkpoint.checkpoints_of(tmp_path) == [few, many]


def test_a_run_with_a_slash_in_its_name_is_found(tmp_path: Path) -> None:
    save(tmp_path / "old")
    inner = save(tmp_path / "exp/one")
    (tmp_path / "circle").symlink_to(tmp_path)
    assert checkpoint.find(tmp_path) == inner
    assert checkpoint.find(tmp_path, tmp_path / "exp/one") == inner


def test_a_refused_checkpoint_is_used_only_by_name(tmp_path: Path, logged: list[str]) -> None:
    good, refused = save(tmp_path / "good"), save(tmp_path / "bad")
    checkpoint.annotate(refused, {"refused": ["40 % false positives"]})
    assert checkpoint.find(tmp_path) == good
    assert checkpoint.find(tmp_path, tmp_path / "bad") == refused
    assert [line.endswith("was refused: 40 % false positives") for line in logged] == [True, True]
    shutil.rmtree(tmp_path / "good")
    with pytest.raises(CheckpointError, match="no usable checkpoint below"):
        checkpoint.find(tmp_path)


def test_normalization_is_applied_once_inside_the_network() -> None:
    net = Detector(torch.nn.Identity(), Network())
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(net(images), (images / 255 - mean) / std, rtol=1e-4, atol=1e-5)


def test_an_imagenet_file_fills_all_but_the_classifier(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net = build(TINY, pretrained=False).backbone
    wide = {name: value.contiguous() for name, value in net.state_dict().items()}
    wide |= {"head.fc.weight": torch.zeros(1000, 16), "head.fc.bias": torch.zeros(1000)}
    save_file(wide, tmp_path / "w.safetensors")
    head = (net := build(TINY, pretrained=False)).backbone.head.fc.weight.clone()
    load_backbone_file(net, tmp_path / "w.safetensors")
    assert torch.equal(net.backbone.stem[0].weight, wide["stem.0.weight"])
    assert torch.equal(net.backbone.head.fc.weight, head)
    save_file({"stem.0.weight": wide["stem.0.weight"]}, tmp_path / "half.safetensors")
    with pytest.raises(NetworkError, match="parameters are missing"):
        load_backbone_file(net, tmp_path / "half.safetensors")


def test_a_network_that_timm_does_not_know_is_named() -> None:
    with pytest.raises(NetworkError, match="timm cannot build 'convnextv9'"):
        build(Network(name="convnextv9"), pretrained=True)


def test_without_internet_the_error_says_how_to_get_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """huggingface_hub's offline mode raises the same errors as a machine without internet."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ways = r"--init-from weights\.safetensors.*--no-pretrained or --set network\.pretrained=false$"
    with pytest.raises(NetworkError, match=ways):
        build(Network(name="convnextv2_atto.fcmae_ft_in1k"), pretrained=True)


WEIGHTS = "convnextv2_atto.fcmae_ft_in1k"


def test_an_unreachable_hub_is_asked_only_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """timm's own download would wait and retry for a minute."""
    nobody = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", nobody)

    def never(seconds: float) -> None:
        raise AssertionError(f"it waits {seconds} s to try again")

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", never)
    with pytest.raises(NetworkError, match=r"could not be fetched \(.*refused.*--no-pretrained"):
        build(Network(name=WEIGHTS), pretrained=True)


def test_a_broken_download_and_a_wrong_option_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub.errors import HTTPError

    def broken(*_args: object, **_options: object) -> None:
        raise HTTPError("peer closed connection")

    monkeypatch.setattr("model.network.check_pretrained", lambda _network: None)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", broken)
    with pytest.raises(NetworkError, match=r"could not be fetched \(peer closed connection\)"):
        build(Network(name=WEIGHTS), pretrained=True)
    with pytest.raises(NetworkError, match=r"timm cannot build .* with the options .*'depth'"):
        build(Network(name=WEIGHTS, options={"depth": 3}), pretrained=True)
    smaller = timm.create_model(WEIGHTS, pretrained=False).state_dict
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_args, **_options: smaller()
    )
    with pytest.raises(NetworkError, match=r"do not fit network\.options"):
        build(Network(name=WEIGHTS, options={"dims": [8] * 4}), pretrained=True)


def test_weights_from_the_hub_log_their_license_once(
    server: Server, logged: list[str]
) -> None:  # fmt: skip
    """The second time they come from the hub's cache, without a request."""
    from safetensors.torch import save

    torch.manual_seed(1)
    published = timm.create_model(WEIGHTS, pretrained=False).state_dict()
    place = f"/timm/{WEIGHTS}/resolve/main/model.safetensors"
    server.bodies[place] = save(published)
    digest = hashlib.sha256(server.bodies[place]).hexdigest()
    server.headers[place] = {"ETag": f'"{digest}"', "X-Repo-Commit": "c" * 40}
    for _ in range(2):
        net = build(Network(name=WEIGHTS), pretrained=True)
        assert torch.equal(net.backbone.stem[0].weight, published["stem.0.weight"])
        said = [line for line in logged if "license cc-by-nc-4.0" in line]
        assert len(said) == 1
        logged.clear()
    assert len(server.got("model.safetensors")) == 1


def test_device_and_precision_are_chosen_with_a_reason() -> None:
    cpu = choose_device("cpu")
    assert choose_precision("auto", cpu) == (torch.float32, "no mixed precision on cpu")
    assert choose_precision("bf16", cpu) == (torch.bfloat16, "asked for")
    with pytest.raises(ValueError, match="no such device: gpu"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no CUDA device here"):
            choose_device("cuda")


def test_average_interpolates_between_two_checkpoints(tmp_path: Path) -> None:
    first, last = save(tmp_path / "one"), save(tmp_path / "two", step=2)
    checkpoint.annotate(last, {"threshold": 0.9, "temperature": 2.0})
    averaged = average(first, last, 0.25, tmp_path / "quarter")
    one, two, mixed = map(checkpoint.read_weights, (first, last, averaged))
    for name, weight in mixed.items():
        wanted = 0.75 * one[name] + 0.25 * two[name]
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-6)
    meta = checkpoint.read_meta(checkpoint.find(tmp_path, tmp_path / "quarter"))
    assert (meta["recipe"]["name"], meta["selection"]) == ("quarter", None)
    assert (meta["threshold"], meta["temperature"], meta["calibration"]) == (0.5, 1.0, None)
    assert meta["average"] == {"first": str(first), "last": str(last), "weight": 0.25}
    checkpoint.load_network(averaged)
    arguments = [str(tmp_path / "one"), str(tmp_path / "two"), "--run", "half"]
    said = CliRunner().invoke(main, ["average", *arguments, "--runs", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert checkpoint.read_meta(tmp_path / "half" / last.name)["average"]["weight"] == 0.5


def test_an_average_keeps_the_first_weights_that_both_began_from(tmp_path: Path) -> None:
    first, last = save(tmp_path / "one"), save(tmp_path / "two", step=2)
    nothing = {"sha256": "", "license": None, "first_weights": None}
    file = nothing | {"kind": "file", "name": "a.safetensors", "sha256": "a"}
    later = nothing | {"kind": "checkpoint", "name": "one/step_0000001", "first_weights": file}
    network = checkpoint.read_meta(last)["recipe"]["network"] | {"name": WEIGHTS}
    recipe = checkpoint.read_meta(last)["recipe"] | {"network": network | {"pretrained": True}}
    for number, (one, other, kind) in enumerate(
        ((file, later, "file"), (None, None, "average"), (file, None, "average"),
         (file, file | {"sha256": "b"}, "average"))
    ):  # fmt: skip
        checkpoint.annotate(first, {"first_weights": one})
        checkpoint.annotate(last, {"first_weights": other})
        meta = checkpoint.read_meta(average(first, last, 0.5, tmp_path / f"mean{number}"))
        assert meta["first_weights"]["kind"] == kind
        for record in (meta["first_weights"], None):  # None: an average of an earlier version
            license = license_of(meta | {"recipe": recipe, "first_weights": record})
            assert not license.base and " if training started from timm's" in license.text


def test_only_weights_of_one_network_can_be_averaged(tmp_path: Path) -> None:
    first, last = save(tmp_path / "one"), save(tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"between 0 and 1, got 1\.5"):
        average(first, last, 1.5, tmp_path / "new")
    with pytest.raises(CheckpointError, match="exists; name another run"):
        average(first, last, 0.5, tmp_path / "one")
    with (
        small_disk(1000),
        pytest.raises(CheckpointError, match=r"full could not be written .*free"),
    ):
        average(first, last, 0.5, tmp_path / "full")
    assert not (tmp_path / "full").exists()
    options = TINY.options | {"dims": [8, 8, 16, 24]}
    wider = build(replace(TINY, options=options), pretrained=False)
    with pytest.raises(CheckpointError, match="differ in names or shapes"):
        average(first, save(tmp_path / "wide", wider), 0.5, tmp_path / "new")
    before = checkpoint.read_meta(last)
    for part, key, value in (("network", "mean", [0.1] * 3), ("network", "crops", 2)):
        recipe = before["recipe"] | {part: before["recipe"][part] | {key: value}}
        checkpoint.annotate(last, {"recipe": recipe})
        with pytest.raises(CheckpointError, match=rf"{key} = .* only weights of the same network"):
            average(first, last, 0.5, tmp_path / "new")
    other = before["preprocess"] | {"interpolation": "bicubic"}
    checkpoint.annotate(last, {"recipe": before["recipe"], "preprocess": other})
    with pytest.raises(CheckpointError, match=r"preprocess.interpolation = bilinear, .* bicubic"):
        average(first, last, 0.5, tmp_path / "new")
    checkpoint.annotate(last, {"preprocess": before["preprocess"]})
    meta = checkpoint.read_meta(last)
    meta["recipe"]["network"]["name"] = "resnet18"
    checkpoint.annotate(last, {"recipe": meta["recipe"]})
    with pytest.raises(CheckpointError, match=r"is a convnextv2_atto, .* a resnet18"):
        average(first, last, 0.5, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["/up", "a/../b", "", ".up", "step_0000001", "a//b", "a\u202eb"])
def test_commands_refuse_bad_run_names(tmp_path: Path, name: str) -> None:
    runs, first = tmp_path / "in/runs", save(tmp_path / "one")
    (tmp_path / "original.pth").touch()
    lines = [["average", str(first), str(first)], ["import", str(tmp_path / "original.pth")]]
    before = sorted(tmp_path.rglob("*"))
    for line in [*lines, ["fetch"]]:
        said = CliRunner().invoke(main, [*line, "--run", name, "--runs", str(runs)])
        assert said.exit_code == 2, said.output
        assert f"a run cannot be called {name!r}" in said.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_loaded_state_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    """A resumed run must save the same bytes as an uninterrupted one. In Python code equal keys are
    one object, which torch writes once.
    """
    state = {
        "optimizer": {0: {"step": torch.zeros(())}, "betas": (0.9, 0.99), "groups": [{"step": 1}]},
        "order": {"step": 3},
    }
    first = save(tmp_path / "one", state=state)
    again = save(tmp_path / "two", state=checkpoint.load_state(first))
    one, two = ((folder / checkpoint.STATE_FILE).read_bytes() for folder in (first, again))
    order = {"order": {sys.intern("step"): 3}}
    state = {"optimizer": checkpoint.load_state(first)["optimizer"], **order}
    third = save(tmp_path / "three", state=state)
    assert one == two == (third / checkpoint.STATE_FILE).read_bytes()

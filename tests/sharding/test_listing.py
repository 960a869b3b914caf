"""Tests of `catalog.toml`: each source is packed from a small raw copy in its documented layout.

The copies contain the difficulties of the real data: doubled folders, upper-case extensions,
reversed labels, wrong extensions, missing files. Each test packs a copy and reads the packed set.
"""

import io
import json
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding.build import Tolerance, build
from sharding.catalog import BUILT_IN, CatalogError, read_catalog
from sharding.format import CLASSES, open_shards, read_index, table_from
from sharding.listing import list_source
from tests.builders import write_split_zip
from tests.raw_copies import Row, image, parquet, put


def pack(tmp_path: Path, *, expected: bool = False, changes: str = "", max_bad: float = 0.01):
    """Build everything in `tmp_path/raw`; return the packed rows by origin."""
    mine = tmp_path / "mine.toml"
    names = [] if expected else ["dda", "defactify", "coco_ai", "tiny_genimage", "art_artai",
                                 "dfk_oldmonk", "evalgen", "coco_val2017"]  # fmt: skip
    mine.write_text("".join(f"[sources.{n}]\nexpected = {{}}\n" for n in names) + changes)
    catalog = read_catalog([BUILT_IN, mine])
    _, built = build(
        catalog,
        tmp_path / "raw",
        tmp_path / "out",
        jobs=1,
        tolerance=Tolerance(max_bad, allow_incomplete=True),
    )
    rows = {}
    for one in built:
        for row in open_shards([tmp_path / "out" / one.name]).table.to_pylist():
            rows[row["origin"]] = Row(
                one.name, CLASSES[row["label"]], row["generator"], row["group"]
            )
    return rows


@pytest.mark.parametrize(
    ("real", "fake"),
    [("COCO-SD-2/0_real", "COCO-SD-2/1_fake"), ("DDA-COCO_TrainSet/real", "DDA-COCO_TrainSet/fake"),
     ("x/real", "x/sd2.0")],
)  # fmt: skip
def test_dda_pairs_stay_together_in_every_known_layout(
    tmp_path: Path, real: str, fake: str
) -> None:
    names = [f"{n:012d}.png" for n in (9, 25, 30, 34)]
    put(tmp_path / "raw/dda" / real, *names, kind="PNG")
    put(tmp_path / "raw/dda" / fake, *names[:3], kind="PNG")  # one partner is missing
    rows = pack(tmp_path)
    assert rows[f"dda/{real}/{names[0]}"] == Row("phase1", "real", "coco", "dda/000000000009")
    assert rows[f"dda/{fake}/{names[0]}"] == Row("phase1", "fake", "sd2.1-vae", "dda/000000000009")
    assert Counter(row.label for row in rows.values()) == {"real": 4, "fake": 3}
    index = read_index(tmp_path / "out/phase1")
    assert index["sources"]["dda"]["policy"] == "dda"
    assert index["sources"]["dda"]["read_as"] == {  # the layout of this copy
        f"real: **/{real.split('/')[1]}": 4, f"fake: **/{fake.split('/')[1]}": 3,
    }  # fmt: skip


def test_dda_is_read_from_its_split_archive(tmp_path: Path) -> None:
    members = {}
    for n in range(6):
        for kind in ("0_real", "1_fake"):
            members[f"COCO-SD-2/{kind}/{n:012d}.png"] = image("PNG")
    write_split_zip(tmp_path / "raw/dda/DDA-Training-Set_split.zip", members, volumes=4)
    rows = pack(tmp_path)
    assert len(rows) == 12
    assert {row.group for row in rows.values()} == {f"dda/{n:012d}" for n in range(6)}
    origin = "dda/DDA-Training-Set_split.zip/COCO-SD-2/1_fake/000000000003.png"
    assert rows[origin].label == "fake"


def test_dda_with_a_missing_volume_is_refused(tmp_path: Path) -> None:
    members = {f"COCO-SD-2/0_real/{n}.png": image("PNG") for n in range(4)}
    path = tmp_path / "raw/dda/DDA-Training-Set_split.zip"
    write_split_zip(path, members, volumes=4)
    path.with_suffix(".z02").unlink()
    with pytest.raises(ValueError, match="has 4 volumes, found 3"):
        pack(tmp_path)


def test_defactify_labels_by_both_columns_and_groups_by_caption(tmp_path: Path) -> None:
    data = tmp_path / "raw/defactify/data"
    for split in ("train", "validation", "test"):
        parquet(
            data / f"{split}-00000-of-00001.parquet",
            {
                "Caption": [f"{split} a"] * 6 + [f"{split} b"],
                "Image": [image() for _ in range(7)],
                "Label_A": pa.array([0, 1, 1, 1, 1, 1, 0], pa.int32()),
                "Label_B": pa.array(
                    [0, 1, 2, 3, 4, 5, 3], pa.int32()
                ),  # the last row contradicts itself
            },
        )
    rows = pack(tmp_path)
    train = {o: row for o, row in rows.items() if "/train-" in o}
    assert [row.generator for _, row in sorted(train.items())] == [
        "coco", "sd2.1", "sdxl", "sd3", "dalle3", "midjourney6",
    ]  # fmt: skip
    assert {row.label for o, row in train.items() if ":0:" in o} == {"real"}
    assert len({row.group for row in train.values()}) == 1
    assert {row.set for row in train.values()} == {"phase1"}
    assert {row.set for o, row in rows.items() if "/validation-" in o} == {"val"}
    tests = {row.label: row.set for o, row in rows.items() if "/test-" in o}
    assert tests["fake"] == "test"
    assert tests["real"] in ("evalgen", "test")
    about = read_index(tmp_path / "out/phase1")["sources"]["defactify"]
    (reason,) = about["excluded"]
    assert reason.startswith("no rule for such a row")


def test_coco_ai_labels_by_column(tmp_path: Path) -> None:
    columns = ["coco_image", "sd35_image", "sd3_image", "sd21_image", "sdxl_image", "dalle_image",
               "midjourney_image"]  # fmt: skip
    cells = {column: [image() for _ in range(5)] for column in columns}
    parquet(
        tmp_path / "raw/coco_ai/data/train-00000-of-00002.parquet",
        {"caption": [f"caption {i}" for i in range(5)], **cells},
    )
    rows = pack(tmp_path, changes="[sources.coco_ai.cap]\nfake = 24\n")
    assert Counter(row.label for row in rows.values()) == {"fake": 24, "real": 4}  # whole groups
    assert len({row.group for row in rows.values()}) == 4
    generators = {o.rpartition(":")[2]: row.generator for o, row in rows.items()}
    assert generators["sd35_image"] == "sd3.5"
    assert generators["coco_image"] == "coco"
    assert read_index(tmp_path / "out/phase1")["sources"]["coco_ai"]["replay"] is False


def test_tiny_genimage_has_generator_folders_and_wrong_extensions(tmp_path: Path) -> None:
    root = tmp_path / "raw/tiny-genimage/tiny-genimage"  # some mirrors have this extra folder
    folders = {
        "imagenet_ai_0419_biggan": "biggan", "imagenet_ai_0419_vqdm": "vqdm",
        "imagenet_ai_0424_sdv5": "sd1.5", "imagenet_ai_0424_wukong": "wukong",
        "imagenet_ai_0508_adm": "adm", "imagenet_glide": "glide",
        "imagenet_midjourney": "midjourney",
    }  # fmt: skip
    for folder in folders:
        put(root / folder / "train/nature", "n01440764_5969.JPEG")
        put(root / folder / "train/ai", "001_x_00094.png", kind="PNG")
        put(root / folder / "val/nature", "ILSVRC2012_val_00000001.JPEG")
        put(root / folder / "val/ai", "002_x_00001.PNG")  # a JPEG by its bytes
    rows = pack(tmp_path)
    assert Counter(row.label for row in rows.values()) == {"real": 14, "fake": 14}
    fakes = {row.generator for row in rows.values() if row.label == "fake"}
    assert fakes == set(folders.values())
    assert {row.set for row in rows.values()} <= {"phase1", "val"}


def test_cashbowman_has_doubled_folders_and_reversed_order(tmp_path: Path) -> None:
    root = tmp_path / "raw/ai-generated-images-vs-real-images"
    put(root / "AiArtData/AiArtData", "a.jpg", "b.jpeg")
    put(root / "RealArt/RealArt", "c.PNG", kind="PNG")
    (root / "RealArt/RealArt/odd.ini").write_text("x")
    rows = pack(tmp_path)
    assert {o.rpartition("/")[2]: row.label for o, row in rows.items()} == {
        "a.jpg": "fake", "b.jpeg": "fake", "c.PNG": "real",
    }  # fmt: skip


def test_midjourney_small(tmp_path: Path) -> None:
    root = tmp_path / "raw/midjourney-imagenet-real-vs-synth/Midjourney_Exp2"
    for split in ("train", "valid", "test"):
        put(root / split / "FAKE", "1.jpg")
        put(root / split / "REAL", "1.JPEG", "2.JPEG")
    rows = pack(tmp_path)
    assert Counter((row.label, row.generator) for row in rows.values()) == {
        ("fake", "midjourney"): 3, ("real", "imagenet"): 6,
    }  # fmt: skip


def test_df40_frames_go_with_their_video_across_methods(tmp_path: Path) -> None:
    root = tmp_path / "raw/df40"
    frames = ["000.png", "030.png"]
    put(root / "DF40_train/simswap/ff/000_003", *frames, kind="PNG")
    put(root / "DF40_train/danet/ff/000_003", *frames, kind="PNG")
    put(root / "DF40_train/danet/cdf/id0_id1_0001", *frames, kind="PNG")
    put(
        root / "DF40_train/ddim/ff", "000.png", kind="PNG"
    )  # entire-face synthesis: no folder per video
    put(root / "DF40/heygen/fake/clip1", *frames, kind="PNG")
    put(root / "DF40/heygen/real/clip2", *frames, kind="PNG")
    put(root / "FaceForensics++/original_sequences/youtube/c23/frames/000", *frames, kind="PNG")
    put(root / "Celeb-DF/Celeb-real/frames/id0_0001", *frames, kind="PNG")
    rows = pack(tmp_path)
    by_group: dict[str, set[str]] = {}
    for row in rows.values():
        by_group.setdefault(row.group, set()).add(f"{row.label} {row.generator}")
    assert by_group["df40/000"] == {"fake simswap", "fake danet", "real ff++"}
    assert by_group["df40/id0"] == {"fake danet", "real celeb-df"}
    assert {frozenset(v) for v in by_group.values()} >= {
        frozenset({"fake heygen"}), frozenset({"real unknown"}), frozenset({"fake ddim"}),
    }  # fmt: skip
    sets = {group: {r.set for r in rows.values() if r.group == group} for group in by_group}
    assert all(len(names) == 1 for names in sets.values())


def gravex(root: Path) -> Path:
    inner = root / "raw/200k-real-vs-ai-visuals-by-mbilal"
    put(inner / "my_real_vs_ai_dataset/my_real_vs_ai_dataset/real",
        "03933.jpg", "real_000_12.jpg", "real_000_13.jpg", "wrong.jpg")  # fmt: skip
    put(inner / "my_real_vs_ai_dataset/my_real_vs_ai_dataset/ai_images",
        "1RRS1WIOD3.jpg", "256_woman_SD_7.jpg", "512_woman_SD_7.jpg", "768_woman_SD_7.jpg",
        "512_man_men_7.jpg", "aug_ai_1.jpg", "Aumented_2.jpg", "dfdc_abc_3.jpg",
        "fake_Deepfakes_001_9.jpg", "unlisted.jpg")  # fmt: skip
    real = ["03933.jpg", "real_000_12.jpg", "real_000_13.jpg"]
    fake = ["1RRS1WIOD3.jpg", "256_woman_SD_7.jpg", "512_woman_SD_7.jpg", "768_woman_SD_7.jpg",
            "512_man_men_7.jpg", "aug_ai_1.jpg", "Aumented_2.jpg", "dfdc_abc_3.jpg",
            "fake_Deepfakes_001_9.jpg", "gone.jpg", "wrong.jpg"]  # fmt: skip
    lines = [f"{name},1" for name in real] + [f"{name},0" for name in fake]
    (inner / "train_labels.csv").write_text("filename,label\n" + "\n".join(lines[:8]) + "\n")
    (inner / "val_labels.csv").write_text("filename,label\n" + "\n".join(lines[8:]) + "\n")
    return inner


def test_gravex_uses_its_tables_names_and_triplets(tmp_path: Path) -> None:
    gravex(tmp_path)
    rows = pack(tmp_path)
    named = {o.rpartition("/")[2]: row for o, row in rows.items()}
    assert named["03933.jpg"][1:3] == ("real", "ffhq")  # 1 is real in these tables
    assert named["1RRS1WIOD3.jpg"][1:3] == ("fake", "stylegan")
    assert named["512_man_men_7.jpg"].generator == "stable-diffusion"
    assert named["fake_Deepfakes_001_9.jpg"].generator == "deepfakes"
    assert named["dfdc_abc_3.jpg"].generator == "dfdc"
    triplet = {named[f"{size}_woman_SD_7.jpg"].group for size in (256, 512, 768)}
    assert triplet == {"gravex200k/woman_sd_7"}
    assert named["real_000_12.jpg"].group == named["real_000_13.jpg"].group
    assert "wrong.jpg" not in named  # real by folder, fake by table: excluded
    assert not {"aug_ai_1.jpg", "Aumented_2.jpg"} & named.keys()
    about = read_index(tmp_path / "out/phase1")["sources"]["gravex200k"]
    assert about["excluded"] == {
        "the catalog ignores it": 2, "its folder and its row in the table disagree": 1,
    }  # fmt: skip
    assert about["read_as"]["no row in the table: labeled by folder"] == 1


def test_gravex_without_its_tables_is_labeled_by_folder(tmp_path: Path) -> None:
    for path in gravex(tmp_path).glob("*.csv"):
        path.unlink()
    rows = pack(tmp_path)
    assert rows and any(o.endswith("wrong.jpg") for o in rows)
    about = read_index(tmp_path / "out/phase1")["sources"]["gravex200k"]
    assert "no table *_labels.csv: labels by folder" in about["read_as"]


def test_stylegan2_has_a_space_in_its_folder(tmp_path: Path) -> None:
    root = tmp_path / "raw/deepfake-face-images"
    put(root / "Final Dataset/Fake", "1RRS1WIOD3.jpg")
    put(root / "Final Dataset/Real", "03933.jpg")
    (root / "dataset.csv").write_text("a,b\n")
    rows = pack(tmp_path)
    assert {(row.label, row.generator) for row in rows.values()} == {
        ("fake", "stylegan"), ("real", "ffhq"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("real", "fake"),
    [("Human Faces Dataset/Real Images", "Human Faces Dataset/AI-Generated Images"),
     ("real", "fake"), ("archive/Real Faces", "archive/AI Faces")],
)  # fmt: skip
def test_human_faces_in_any_layout_that_names_its_classes(
    tmp_path: Path, real: str, fake: str
) -> None:
    root = tmp_path / "raw/human-faces-data-set"
    put(root / real, "1.jpg", "2.jpg")
    put(root / fake, "1.jpg")
    rows = pack(tmp_path)
    assert Counter(row.label for row in rows.values()) == {"real": 2, "fake": 1}


def test_human_faces_in_a_folder_named_for_both_classes_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "raw/human-faces-data-set/real and fake", "1.jpg")
    with pytest.raises(CatalogError, match=r"matches the real rule .* and the fake rule"):
        pack(tmp_path)


def test_oldmonk_ignores_its_sample_folder_and_reads_both_splits(tmp_path: Path) -> None:
    root = tmp_path / "raw/deepfake-image-detection"
    put(root / "Sample_fake_images", "s.jpg")
    put(root / "train-20250112T065955Z-001/train/real", "a.jpg")
    put(root / "train-20250112T065955Z-001/train/fake", "b.png", kind="PNG")
    put(root / "test-20250112T065939Z-001/test/fake", "c.jpg", "d.jpg")
    twice = image()
    for label in ("real", "fake"):  # one image under both labels, as in the real set
        put(root / "test-20250112T065939Z-001/test" / label)
        path = root / "test-20250112T065939Z-001/test" / label / "both.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(twice)
    rows = pack(tmp_path)
    assert Counter(row.label for row in rows.values()) == {"real": 1, "fake": 3}
    index = read_index(tmp_path / "out/phase1")
    assert index["excluded"] == {"the same bytes are labeled real and fake": 2}
    assert "both.jpg" in (tmp_path / "out/phase1/excluded.csv").read_text()


def test_super_genai_takes_only_its_folder(tmp_path: Path) -> None:
    root = tmp_path / "raw/sut-project"
    put(root / "Super_GenAI_Dataset/Super_GenAI_Dataset/Fake", "1.jpg", "2.PNG")
    put(root / "Super_GenAI_Dataset/Super_GenAI_Dataset/Real", "1.jpeg")
    put(root / "Other_Dataset/Real", "3.jpg")
    rows = pack(tmp_path)
    assert Counter(row.label for row in rows.values()) == {"fake": 2, "real": 1}
    assert {row.set for row in rows.values()} <= {"phase2", "val-phase2"}


def test_julienlucas_zero_is_fake(tmp_path: Path) -> None:
    data = tmp_path / "raw/julienlucas/data"
    for name, labels in (
        ("train-00000-of-00009", [0, 0, 0, 1, 1]),
        ("test-00000-of-00001", [1, 0]),
    ):
        parquet(
            data / f"{name}.parquet",
            {"image": [image() for _ in labels], "label": labels},
            {"label": ["fake", "real"]},
        )
    rows = pack(tmp_path)
    assert [row.label for o, row in sorted(rows.items()) if "train" in o] == [
        "fake", "fake", "fake", "real", "real",
    ]  # fmt: skip
    tests = {row.label: row.set for o, row in rows.items() if "/test-" in o}
    assert tests["real"] in ("evalgen", "test")
    assert tests["fake"] == "test"


def test_class_numbers_without_names_are_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "raw/julienlucas/data/train-0.parquet"
    parquet(path, {"image": [image()], "label": [0]})
    with pytest.raises(CatalogError, match="labels are not guessed"):
        pack(tmp_path)
    parquet(path, {"picture": [image()], "label": [0]})
    with pytest.raises(
        CatalogError, match="has columns picture, label, but the catalog also expects im"
    ):
        pack(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    ["{", "[]", '{"info": null}', '{"info": {"features": {"label": {"names": 2}}}}', b"\xff"],
)
def test_damaged_class_names_are_named(tmp_path: Path, metadata: str | bytes) -> None:
    path = tmp_path / "raw/julienlucas/data/train-0.parquet"
    path.parent.mkdir(parents=True)
    table = pa.table({"image": [image()], "label": [0]})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), path)
    with pytest.raises(CatalogError, match=r"data/train-0\.parquet: its `huggingface` metadata is"):
        pack(tmp_path)


def test_a_generator_is_the_name_of_its_class_number(tmp_path: Path) -> None:
    """-1 stands for no label in Hugging Face; Python would take the last class for it."""
    (tmp_path / "catalog.toml").write_text(
        '[sets]\nt = "train"\n[sources.s]\nlicense = "x"\nset = "t"\n'
        'fake = [{ column = "image", generator = "<model>" }]\n'
    )
    source = read_catalog([tmp_path / "catalog.toml"]).sources["s"]
    path, names = tmp_path / "raw/s/a.parquet", {"model": ["GAN", "Flux"]}
    parquet(path, {"image": [image() for _ in range(3)], "model": [1, -1, 0]}, names)
    items = list_source("s", source, tmp_path / "raw").items
    assert [item.generator for item in items] == ["flux", "fake", "gan"]
    parquet(path, {"image": [image()], "model": [2]}, names)
    with pytest.raises(CatalogError, match=r"a\.parquet: column model has the value 2, expected a"):
        list_source("s", source, tmp_path / "raw")


def test_a_column_of_booleans_may_decide_the_class(tmp_path: Path) -> None:
    (tmp_path / "catalog.toml").write_text(
        '[sets]\nt = "train"\n[sources.s]\nlicense = "x"\nset = "t"\n'
        'real = [{ column = "image", where = { ai = false } }]\n'
        'fake = [{ column = "image", where = { ai = true } }]\n'
    )
    source = read_catalog([tmp_path / "catalog.toml"]).sources["s"]
    pixels = [image() for _ in range(3)]
    parquet(tmp_path / "raw/s/a.parquet", {"image": pixels, "ai": [True, False, True]})
    assert [item.label for item in list_source("s", source, tmp_path / "raw").items] == [1, 0, 1]


def test_evalgen_zip_and_its_reals(tmp_path: Path) -> None:
    generators = ["Flux", "GoT", "Infinity", "NOVA", "OmniGen"]
    archive = tmp_path / "raw/evalgen/EvalGEN.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as opened:
        for generator in generators:
            for index in range(3):
                name = f"GenEval-JPEG/{generator}/a photo of a bench_{index}.jpg"
                opened.writestr(name, image())
        with pytest.warns(UserWarning, match="Duplicate name"):
            opened.writestr("GenEval-JPEG/Flux/a photo of a bench_0.jpg", image())
        opened.writestr("__MACOSX/GenEval-JPEG/Flux/._a photo.jpg", b"x")
    put(tmp_path / "raw/coco/val2017", "000000000139.jpg", "000000000285.jpg")
    rows = pack(tmp_path)
    assert {row.set for row in rows.values()} == {"evalgen"}
    assert Counter(row.generator for row in rows.values()) == {
        **dict.fromkeys(map(str.lower, generators), 3), "coco": 2,
    }  # fmt: skip
    prompts = {row.group for row in rows.values() if row.label == "fake"}
    assert prompts == {"evalgen/a photo of a bench"}
    passed = read_index(tmp_path / "out/evalgen")["sources"]["evalgen"]["excluded"]
    assert passed == {}


def test_a_half_download_is_refused_before_anything_is_packed(tmp_path: Path) -> None:
    put(tmp_path / "raw/ai-generated-images-vs-real-images/AiArtData/AiArtData", "a.jpg", "b.jpg")
    with pytest.raises(CatalogError, match="source art_artai has 0 real images, the catalog expe"):
        pack(tmp_path, expected=True)
    assert not (tmp_path / "out").exists()
    pack(tmp_path, expected=True, max_bad=1.0)  # allowed by max_bad


def test_an_unknown_layout_is_one_error_with_the_expected_folders(tmp_path: Path) -> None:
    put(tmp_path / "raw/deepfake-face-images/Final/Fake", "a.jpg")
    with pytest.raises(CatalogError, match=r"none matches the catalog .*Final Dataset/Real"):
        pack(tmp_path)


def test_every_source_of_the_catalog_is_tested_here() -> None:
    text = Path(__file__).read_text()
    for name, source in read_catalog([BUILT_IN]).sources.items():
        assert f"raw/{source.root or name}" in text, name
        assert source.fetch and source.license and source.homepage, name


def test_images_in_a_parquet_table_may_be_plain_bytes_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "raw/julienlucas/data/train-0.parquet"
    path.parent.mkdir(parents=True)
    stream = io.BytesIO()
    features = {"label": {"names": ["fake", "real"], "_type": "ClassLabel"}}
    table = pa.table({"image": [image(), None, image()], "label": [0, 1, 1]})
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, stream)
    path.write_bytes(stream.getvalue())
    rows = pack(tmp_path, max_bad=0.5)
    assert Counter(row.label for row in rows.values()) == {"real": 1, "fake": 1}


def test_only_the_calling_thread_reads_a_parquet_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of Arrow may hold a Python stream for longer than the reader, and then free it."""
    path = tmp_path / "raw/julienlucas/data/train-0.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"image": [image(), image()], "label": ["real", "fake"]}), path)
    readers, open_path = set[int](), Path.open

    class Stream(io.FileIO):
        def read(self, size: int | None = -1) -> bytes | None:
            readers.add(threading.get_ident())
            return super().read(size)

    def opened(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".parquet":
            return Stream(path)
        return open_path(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    source = read_catalog([BUILT_IN]).sources["julienlucas"]
    assert len(list_source("julienlucas", source, tmp_path / "raw").items) == 2
    assert readers == {threading.get_ident()}


def test_threads_of_arrow_hold_no_memory_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread may free what it holds a moment after the read: memory of Python aborts the process
    if the interpreter exits just then.
    """
    stream = io.BytesIO()
    pq.write_table(pa.table({"number": range(9)}), stream, row_group_size=4)
    data, held = stream.getvalue(), []
    before, read = sys.getrefcount(data), pq.ParquetFile.read_row_group

    def watched(file: pq.ParquetFile, group: int) -> pa.Table:
        held.append(sys.getrefcount(data) - before)
        return read(file, group)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    assert table_from(data).column("number").to_pylist() == [*range(9)]
    assert held == [1] * 3  # the argument of table_from alone

"""Tests of `describe()`: the classes that it reads from folder names, and what it leaves open."""

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from sharding.__main__ import main
from sharding.catalog import SHIPPED, Catalog, CatalogError, read_catalog
from sharding.describe import describe
from sharding.listing import list_source
from sharding.scan import find_sources
from tests.builders import encode, photo, write_zip


def touch(folder: Path, *names: str) -> None:
    """Create empty files: `describe` reads only their names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("imagenet_ai_0419_biggan/train/nature", "?"),
        ("midjourney/nature", "?"),
        ("web/non_ai", "?"), ("web/not-ai", "?"), ("no ai", "?"), ("real/no_ai", "?"),
        ("no_ai/real", "real"),
        ("fake/real_esrgan", "?"), ("fake/original_prompts", "?"), ("real/fake_smiles", "?"),
        ("real_vs_fake/train/real", "real"), ("real_vs_fake/0_real", "real"),
        ("real_vs_fake/photos", "?"), ("real and fake", "?"),
        ("Human Faces/AI-Generated Images", "fake"), ("fake/human", "fake"),
        ("fake/flux portraits/human", "fake"), ("ai art/flux", "fake"), ("My Photos/2019", "real"),
        ("SD Card/DCIM", "?"), ("sd-karte", "?"), ("sd_1.5", "fake"), ("sd", "fake"),
        ("imagen", "?"), ("imagen3", "fake"), ("fake/imagen", "fake"), ("photos/imagen", "?"),
        ("photo_no_3", "real"), ("nature", "real"), ("misc", "?"),
    ],
)  # fmt: skip
def test_a_class_is_never_guessed_against_another_word_of_the_path(
    tmp_path: Path, path: str, kind: str
) -> None:
    touch(tmp_path / "d", f"{path}/a.png")
    description = describe(tmp_path / "d")
    assert ({entry.kind for entry in description.folders.values()} or {"?"}) == {kind}
    assert (path in description.undecided) == (kind == "?")


def test_nature_beside_ai_is_real_and_the_generator_is_no_split(tmp_path: Path) -> None:
    """The layout in which GenImage is published."""
    for part in ("train", "val"):
        for kind in ("nature", "ai"):
            touch(tmp_path / "g", f"imagenet_ai_0419_biggan/{part}/{kind}/a.png")
    description = describe(tmp_path / "g")
    assert {path: entry.kind for path, entry in description.folders.items()} == {
        f"imagenet_ai_0419_biggan/{part}/{name}": kind
        for part in ("train", "val")
        for name, kind in (("nature", "real"), ("ai", "fake"))
    }
    assert 'generator = "train"' not in description.text
    assert 'generator = "imagenet-0419-biggan"' in description.text


@pytest.mark.parametrize(
    ("path", "generator"),
    [
        ("fake/kandinsky", "<generator>"), ("fake.zip/写真", "<generator>"),
        ("fake/test/kandinsky", "<generator>"), ("StyleGAN2/cdf", "stylegan2"),
        ("MidJourney/cdf/frames/id0_0001", "midjourney"),
        ("manipulated_sequences/Deepfakes/c23/frames/000_003", "unknown"), ("FAKE", "unknown"),
        ("fake/0001", "unknown"), ("fake/sdxl/test", "sdxl"), ("fake/test", "unknown"),
        ("real_vs_fake/real-vs-fake/test/fake", "unknown"), ("progan/cat/1_fake", "progan"),
        ("sd_1_5", "sd-1-5"), ("stable_diffusion_v_1_4/ai", "stable-diffusion-v-1-4"),
        ("1_fake_flux-dev", "flux-dev"), ("Human Faces/AI-Generated Images", "human-faces"),
    ],
)  # fmt: skip
def test_the_generator_is_no_kind_of_file_split_or_content(
    tmp_path: Path, path: str, generator: str
) -> None:
    touch(tmp_path / "d", f"{path}/a.png")
    (entry,) = describe(tmp_path / "d").folders.values()
    assert entry.generator == generator


@pytest.mark.parametrize(
    ("names", "divided"),
    [
        ("train test", {"d", "d-val"}), ("train val", {"d", "d-test"}),
        ("train2017", {"d", "d-val", "d-test"}), ("training_set valid testing.zip", {"d"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "layout", ["{split}/{kind}", "gan_a/{split}/{kind}", "{kind}/{split}/kandinsky"]
)
def test_published_splits_stay_apart(
    tmp_path: Path, layout: str, names: str, divided: set[str]
) -> None:
    """Most images of a published test set were in the training set."""
    paths = [layout.format(split=s, kind=kind) for s in names.split() for kind in ("real", "fake")]
    touch(tmp_path / "d", *(f"{path}/{number}.png" for path in paths for number in range(3)))
    description = describe(tmp_path / "d")
    (tmp_path / "c.toml").write_text(description.text)
    catalog = read_catalog([tmp_path / "c.toml"])
    listing = list_source("d", catalog.sources["d"], tmp_path)
    assert len(listing.items) == 3 * len(paths)
    assert not listing.unmatched
    goes = {
        item.origin.rpartition("/")[0]: {*json.loads(item.destination)} for item in listing.items
    }
    for path, sets in goes.items():
        assert sets == ({"d-test"} if "test" in path else {"d-val"} if "val" in path else divided)
    held = {"d-val", "d-test"} - divided
    assert {f"d-{split}" for split in description.published} == held
    assert all(
        f"named like {name[2:]}: only they go to {name}." in description.text for name in held
    )
    generators = {item.generator for item in listing.items if item.label}
    assert generators == {
        "kandinsky" if "kand" in layout else "gan-a" if "gan" in layout else "unknown"
    }


def listed(tmp_path: Path, text: str) -> dict[str, tuple[int, str, set[str]]]:
    """Return label, generator and sets of each image by a proposed catalog."""
    (tmp_path / "c.toml").write_text(text)
    listing = list_source("d", read_catalog([tmp_path / "c.toml"]).sources["d"], tmp_path)
    assert not listing.unmatched
    return {
        item.origin: (item.label, item.generator, {*json.loads(item.destination)})
        for item in listing.items
    }


def test_a_table_tells_classes_and_splits(tmp_path: Path) -> None:
    """The table was ignored: all images were undecided, and the test set was divided."""
    kinds = ("photo", "SDXL", "flux")
    names = [f"images/{number}.png" for number in range(9)]
    touch(tmp_path / "d", *names, "images/none.png")
    rows = [
        f"{name[7:]},{kinds[at % 3]},{'Test' if at < 3 else 'train'},a cat\n"
        for at, name in enumerate(names)
    ]
    (tmp_path / "d/labels.csv").write_text("file,kind,split,prompt\n" + "".join(rows))
    description = describe(tmp_path / "d")
    assert description.published == {"test": 3} and not description.undecided
    reason = "no row in labels.csv for its name (key column 'file', such as '0.png')"
    assert description.unread == {reason: 1}
    assert description.notes == [
        "table labels.csv: 'kind' and 'split' decide",
        "table labels.csv: not used: 'prompt'",
    ]
    divided = {"d", "d-val"}
    assert listed(tmp_path, description.text) == {
        f"d/{name}": (
            int(at % 3 > 0), ("camera", "sdxl", "flux")[at % 3], {"d-test"} if at < 3 else divided
        )
        for at, name in enumerate(names)
    }  # fmt: skip


def test_a_table_divides_what_folders_label(tmp_path: Path) -> None:
    names = [f"{kind}/{number}.png" for kind in ("real", "fake/sdxl") for number in range(4)]
    touch(tmp_path / "d", *names, "fake/sdxl/val/9.png")
    rows = [f"{name},{'test' if '0' in name else ''},{name[:4]}\n" for name in names]
    (tmp_path / "d/m.csv").write_text("path,part,class\n" + "".join(rows))
    description = describe(tmp_path / "d")
    assert description.notes == [
        "table m.csv: 'part' decides",
        "table m.csv: not used: 'class': folders give the classes",
    ]
    assert description.published == {"val": 1, "test": 2}
    assert {name: sets for name, (_, _, sets) in listed(tmp_path, description.text).items()} == {
        **{f"d/{name}": {"d-test"} if "0" in name else {"d"} for name in names},
        "d/fake/sdxl/val/9.png": {"d-val"},
    }


def test_a_table_takes_images_out_of_the_folder_train(tmp_path: Path) -> None:
    """Images of its validation set were trained on: the name of the folder counted."""
    kinds = ("real", "fake", "fake/sdxl")
    names = [f"{of}/{kind}/{n}.png" for of in ("train", "test") for kind in kinds for n in range(3)]
    touch(tmp_path / "d", *names)
    rows = [f"{name},{('val', 'train')[name[-5] > '0']}\n" for name in names if "/2" not in name]
    rows += ["train/real/2.png,train\n", "train/real/2.png,val\n"]
    (tmp_path / "d/splits.csv").write_text("file,split\n" + "".join(rows))
    description = describe(tmp_path / "d")
    assert description.notes == [
        "table splits.csv: 'split' decides",
        "table splits.csv: 'split' and the folder name different splits of 9 images: test counts "
        "before val, and val before train",
    ]
    assert description.published == {"val": 3, "test": 9}
    assert description.unread == {"its rows in the table contradict each other": 1}
    goes = {name: sets for name, (_, _, sets) in listed(tmp_path, description.text).items()}
    assert goes == {
        f"d/{name}": {"d-test"} if "test/" in name else {"d-val"} if "/0" in name else {"d"}
        for name in names
        if name != "train/real/2.png"
    }


def test_a_table_that_folders_overrule_is_said_not_to_decide(tmp_path: Path) -> None:
    touch(tmp_path / "d", "test/real/0.png", "test/fake/1.png")
    (tmp_path / "d/m.csv").write_text("file,split\n0.png,test\n1.png,test\n")
    description = describe(tmp_path / "d")
    assert description.notes == ["table m.csv: not used: 'split': folders give the splits"]
    assert "table =" not in description.text


@pytest.mark.parametrize(
    ("csv", "said"),
    [
        ("file,split\n0.png,1\n1.png,2\n", "column 'split' is not used: '1' is not the name of a"),
        (
            "file;split\n0.png;test\n",
            "t.csv separates its columns by semicolons (file;split), expected commas",
        ),
        (
            "file,label,split\n0.png,a castle, real photo,test\n",
            "line 2 has 4 cells, the heading 3",
        ),
        ("file,split,split\n0.png,val,test\n", "has two columns 'split', expected one"),
        (
            "file,split\n/x/y/0.png,val\n",
            "no image has such a path as '/x/y/0.png'; write paths below d ",
        ),
        ("file,prompt\n0.png,a cat\n0.png,a dog\n", "nor splits of images (prompt)"),
        ("file,prompt\n0.png,a cat\n", "neither classes nor splits of images (prompt)"),
        ("file,split\n0.png,\xe9\n", "t.csv is in another encoding"),
    ],
)
def test_a_table_that_is_not_used_is_named(tmp_path: Path, csv: str, said: str) -> None:
    touch(tmp_path / "d", "real/0.png", "fake/1.png")
    (tmp_path / "d/t.csv").write_text(csv, encoding="latin-1")
    description = describe(tmp_path / "d")
    assert said in "; ".join(description.notes)
    assert "table =" not in description.text and not description.published
    assert len(listed(tmp_path, description.text)) == 2


def test_names_that_several_images_have_divide_none(tmp_path: Path) -> None:
    touch(tmp_path / "d", "real/0.png", "fake/0.png")
    (tmp_path / "d/t.csv").write_text("file,split\n0.png,test\n")
    said = "table t.csv is not used: several images have each of its names, such as '0.png'; write"
    assert said in describe(tmp_path / "d").notes[0]


@pytest.mark.parametrize("name", ["labels[1].csv", "m.csv"])
def test_rows_that_agree_in_the_split_are_one(tmp_path: Path, name: str) -> None:
    """Two captions of an image made its split a contradiction; a name was read as a pattern."""
    touch(tmp_path / "d", "real/0.png", "fake/1.png")
    rows = ["0.png,val,a\n", "0.png,val,b\n", "1.png,train,c\n"]
    (tmp_path / "d" / name).write_text("file,split,text\n" + "".join(rows))
    description = describe(tmp_path / "d")
    assert description.published == {"val": 1} and not description.unread
    goes = {image: sets for image, (_, _, sets) in listed(tmp_path, description.text).items()}
    assert goes == {"d/real/0.png": {"d-val"}, "d/fake/1.png": {"d", "d-test"}}


def test_classes_that_are_numbers_are_left_to_the_user(tmp_path: Path) -> None:
    touch(tmp_path / "d", "x/0.png", "x/1.png")
    (tmp_path / "d/t.csv").write_text("file,label\n0.png,0\n1.png,1\n")
    description = describe(tmp_path / "d")
    assert description.undecided == {"label=0": 1, "label=1": 1}
    assert '    # { where = { "label" = "0" } },  # 1 image: real?' in description.text
    real, fake = (f'# {{ where = {{ "label" = "{value}" }} }}' for value in "01")
    above, below = description.text.split("fake = [")
    text = above.replace(real, real[2:]) + "fake = [" + below.replace(fake, fake[2:])
    goes = listed(tmp_path, text)
    assert [goes[f"d/x/{number}.png"][0] for number in (0, 1)] == [0, 1]


def test_tables_named_like_splits_are_refused(tmp_path: Path) -> None:
    """All images were divided at random, or only those of train.csv were used."""
    touch(tmp_path / "d", *(f"img/{number}.png" for number in range(3)))
    for number, name in enumerate(("train", "val_labels", "test")):
        (tmp_path / f"d/{name}.csv").write_text(f"file,label\n{number}.png,{number % 2}\n")
    said = (
        r"test\.csv and train\.csv and val_labels\.csv in .*join them into one table with a column"
    )
    with pytest.raises(CatalogError, match=said):
        describe(tmp_path / "d")
    (tmp_path / "d/val_labels.csv").unlink()
    (tmp_path / "d/test").mkdir()
    (tmp_path / "d/img/2.png").rename(tmp_path / "d/test/2.png")
    assert describe(tmp_path / "d").published == {"test": 1}  # the folder says the same as test.csv


def test_tables_of_other_formats_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "d", "real/0.png", "real/metadata.jsonl", "fake/metadata.jsonl", "splits.tsv")
    notes = describe(tmp_path / "d").notes
    assert [note.partition(":")[0] for note in notes] == [
        "2 tables not read, such as fake/metadata.jsonl",
        "1 table not read, such as splits.tsv",
    ]


def test_other_names_of_splits(tmp_path: Path) -> None:
    folders = ("train/real", "dev/real", "eval/fake", "holdout/real", "testset/fake", "fake/dev")
    touch(tmp_path / "d", *(f"{folder}/0.png" for folder in folders))
    description = describe(tmp_path / "d")
    assert description.published == {"val": 1, "test": 3}
    assert {path: (f.split, f.generator) for path, f in description.folders.items()} == {
        "dev/real": ("val", "camera"), "eval/fake": ("test", "unknown"),
        "fake": ("", "<generator>"), "holdout/real": ("test", "camera"),
        "testset/fake": ("test", "unknown"), "train/real": ("train", "camera"),
    }  # fmt: skip
    assert [note.partition(";")[0] for note in description.notes] == [
        "not taken for a published split: fake/dev"
    ]


def test_a_folder_named_almost_like_a_split_is_said_to_be_none(tmp_path: Path) -> None:
    """Such as those of ForenSynths. The published test set was divided without a word."""
    touch(tmp_path / "d", *(f"progan_{of}/cat/{k}/0.png" for of in ("train", "val", "test")
                            for k in ("0_real", "1_fake")), "flux-dev/0.png")  # fmt: skip
    assert describe(tmp_path / "d").notes == [
        "not taken for a published split: progan_test, progan_val; if it is one, name the folder "
        "test or val, or give its rules `set`"
    ]


@pytest.mark.parametrize(
    "path", ["flux-dev", "fake/dev", "fake/latest", "ai/test prompts", "fake/train_val"]
)
def test_a_name_that_says_more_is_no_split(tmp_path: Path, path: str) -> None:
    touch(tmp_path / "d", f"{path}/a.png")
    assert describe(tmp_path / "d").published == {}


def test_an_undecided_folder_in_one_with_a_class_is_ignored_until_it_is_decided(
    tmp_path: Path,
) -> None:
    """A rule for a folder labels those below it too."""
    touch(tmp_path / "d", "fake/a.png", "fake/real_esrgan/b.png", "real/c.png")
    description = describe(tmp_path / "d")
    assert description.undecided == {"fake/real_esrgan": 1}
    (tmp_path / "c.toml").write_text(description.text)
    catalog = read_catalog([tmp_path / "c.toml"])
    listing = list_source("d", catalog.sources["d"], tmp_path)
    assert [(item.origin, item.label) for item in listing.items] == [
        ("d/fake/a.png", 1), ("d/real/c.png", 0),
    ]  # fmt: skip


def test_what_is_ignored_with_an_undecided_folder_is_counted(tmp_path: Path) -> None:
    touch(tmp_path / "d", "fake/a.png", "fake/real_esrgan/b.png", "fake/real_esrgan/fake/c.png")
    text = describe(tmp_path / "d").text
    assert '"fake/real_esrgan",  # 1 image, and 1 below with a class: remove this' in text


def test_files_that_may_hold_images_are_counted(tmp_path: Path) -> None:
    touch(tmp_path / "d", "fake.tar", "train.parquet", "notes.txt", "a", "b", "c.NEF")
    write_zip(tmp_path / "d/fake.zip", {"inner.zip": b"", "deep/inner.ZIP": b""})
    (tmp_path / "d/real").symlink_to(tmp_path)
    found = r"no image .*, found 2 files: not .* \(no extension\); .* 2 files: an archive in an arc"
    with pytest.raises(CatalogError, match=found):
        describe(tmp_path / "d")
    touch(tmp_path / "d", "photos/a.png")
    assert describe(tmp_path / "d").unread == {
        "an archive in an archive, which is not read; unpack it": 2,
        "a symbolic link, which is not followed": 1,
        "not an image by its name (.nef)": 1,
        "not an image by its name (no extension)": 2,
        "not an image by its name (.tar)": 1,
        "not an image by its name (.parquet)": 1,
    }


def name_of(folder: Path) -> str:
    touch(folder, "real/a.png")
    (name,) = tomllib.loads(describe(folder).text)["sources"]
    return name


def test_folders_have_names_of_their_own(tmp_path: Path) -> None:
    """Two folders of one name are one source, whose packed images the later folder replaced."""
    names = {
        "Katzen & Hunde": "katzen_hunde", "__": "mine", "raid": "my-raid", "x" * 99: "x" * 70,
        "Größe": "grosse", "Grüße": "grusse", "Gru\u0308ße (2)": "grusse_2", "Łódź": "odz-4622385b",
        "写真": "mine-9c3250ff", "絵": "mine-99369fd9", "Łódź" * 20: "odz_" * 14 + "odz-56041dff",
    }  # fmt: skip
    assert {folder: name_of(tmp_path / folder) for folder in names} == names


def test_a_folder_named_like_a_shipped_source_is_read_by_its_own_catalog_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The shipped source found no image of its rules there, or divided the images with the own."""
    catalogs = []
    for root in ("raid", "genimage", "coco"):  # the source of the last has another name
        touch(tmp_path / "raw" / root, "val/nature/0.png", "val/ai/0.png")  # genimage has rules for
        catalogs.append(tmp_path / f"{root}.toml")
        catalogs[-1].write_text(describe(tmp_path / "raw" / root).text)
    catalog = read_catalog([*SHIPPED, *catalogs])
    with caplog.at_level("INFO"):
        scan = find_sources(catalog, tmp_path / "raw", tmp_path / "out")
    assert scan.items.keys() == {"my-raid", "my-genimage", "coco"}
    assert {table.num_rows for table in scan.items.values()} == {2}
    assert "raid is source my-raid of your catalog, not the built-in source raid" in caplog.text
    catalogs.append(tmp_path / "changed.toml")
    catalogs[-1].write_text('[sources.raid]\nhomepage = "changed"\n')
    with pytest.raises(CatalogError, match=r"source raid: .* contains images, but none"):
        find_sources(read_catalog([*SHIPPED, *catalogs]), tmp_path / "raw", tmp_path / "out")


def test_the_folders_that_hold_the_images_are_printed(tmp_path: Path) -> None:
    touch(tmp_path / "d", "sdxl/a/1.png", "sdxl/b/2.png", "sdxl/3.png", "real/test/4.png")
    touch(tmp_path / "d", *(f"flux/{number}/1.png" for number in range(9)))
    arguments = ["describe", str(tmp_path / "d"), "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")] for line in result.output.splitlines()]
    assert ["", "sdxl", "fake", "sdxl", "-", "3", "., a, b", ""] in rows
    assert ["", "flux", "fake", "flux", "-", "9", "0, 1, 2 and 6 more", ""] in rows
    assert ["", "real/test", "real", "camera", "test", "1", ".", ""] in rows
    assert "1 image of a published test split: only they go to the test set" in result.output
    assert "by its name: training" not in result.output
    arguments = ["describe", str(tmp_path / "d/real"), "--out", str(tmp_path / "o2")]
    assert "without a class" in CliRunner().invoke(main, arguments).output
    touch(tmp_path / "d/real", "photos/1.png")
    arguments[-1] += ".toml"
    output = CliRunner().invoke(main, arguments).output
    assert "no folder of fake images by its name: training needs both classes" in output


def test_a_word_for_content_below_fakes_makes_no_real_images(tmp_path: Path) -> None:
    for name in ("fake/human/a.jpg", "real/human/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(encode(photo(1)))
    kinds = {path: entry.kind for path, entry in describe(tmp_path).folders.items()}
    assert kinds == {"fake": "fake", "real/human": "real"}


@pytest.fixture(scope="module")
def shipped() -> Catalog:
    return read_catalog(SHIPPED)


@pytest.mark.parametrize("name", ["dda", "Raid", "val", "test", "stylegan2"])
def test_describe_takes_no_name_of_the_shipped_catalogs(
    tmp_path: Path, shipped: Catalog, name: str
) -> None:
    """The source would inherit the other keys of the shipped one."""
    (tmp_path / name / "real").mkdir(parents=True)
    (tmp_path / name / "real/a.jpg").write_bytes(encode(photo(1)))
    text = describe(tmp_path / name).text
    assert f'[sources.my-{name.lower()}]\nroot = "{name}"' in text
    (tmp_path / "x.toml").write_text(text)
    catalog = read_catalog([*SHIPPED, tmp_path / "x.toml"])
    assert catalog.sources.items() >= shipped.sources.items()
    assert catalog.sets.keys() - shipped.sets.keys() == {
        f"my-{name.lower()}{end}" for end in ("", "-val", "-test")
    }


def test_describe_says_that_a_line_also_labels_the_folders_below(tmp_path: Path) -> None:
    for path in ("a.jpg", "x/b.jpg", "x/c.jpg", "x/y/d.jpg", "x/z/e.jpg", "x/z/real/f.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(encode(photo(1)))
    text = describe(tmp_path).text
    listed = "in folders below that are listed too"
    for kind in ("real", "fake"):
        assert f'# {{ folder = "." }},  # 5 images, 4 of them {listed}: {kind}?' in text
        assert f'# {{ folder = "x" }},  # 4 images, 2 of them {listed}: {kind}?' in text
        assert f'# {{ folder = "x/y" }},  # 1 image: {kind}?' in text
    ignored = text[text.index("ignore = [") :]
    assert ignored == 'ignore = [\n    # "x/y",  # 1 image that no rule may label?\n]\n'
    (tmp_path / "c.toml").write_text(text.replace('    # "x/y"', '    "x/y"'))
    (source,) = read_catalog([tmp_path / "c.toml"]).sources.values()
    assert source.ignore == ["x/y"]


def test_a_shipped_source_is_replaced_on_a_disk_that_ignores_case(tmp_path: Path) -> None:
    touch(tmp_path / "raw/RAID", "val/nature/0.png", "val/ai/0.png")
    (tmp_path / "raw/raid").symlink_to("RAID")  # two names of one folder, as on macOS
    (tmp_path / "c.toml").write_text(describe(tmp_path / "raw/RAID").text)
    catalog = read_catalog([*SHIPPED, tmp_path / "c.toml"])
    assert find_sources(catalog, tmp_path / "raw", tmp_path / "out").items.keys() == {"my-raid"}

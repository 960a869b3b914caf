"""Built-in recipes are valid and have the original values; a wrong recipe is one clear error."""

import re
import subprocess
import tomllib
import tracemalloc
from pathlib import Path

import pytest

import recipes
from model.checkpoint import read_meta
from model.recipe import STEP_FOLDER, Recipe, check_run_name, step_folder
from tests.builders import ROOT

BUILT_IN = sorted(
    path for path in recipes.FOLDER.glob("*.toml") if "name" in tomllib.loads(path.read_text())
)


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.stem)
def test_built_in_recipes_are_valid(path: Path) -> None:
    assert recipes.load(Recipe, path).name == path.stem


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.stem)
def test_a_recipe_begins_with_its_command_hardware_and_result(path: Path) -> None:
    head = path.read_text().partition("\n\n")[0]
    phase = path.stem.removeprefix("phase")
    own = [f"--recipe recipes/{path.name}", *([f"--phase {phase}"] if phase in "12" else [])]
    assert any(f"python train.py {words}" in head for words in own), "no command that runs it"
    assert "# Hardware: " in head
    said = (
        ("Minutes" in head and "Reached" in head)
        or "not measured yet" in head.lower()
        or "docs/log.md" in head
    )
    assert said, "states neither minutes and result, nor `not measured yet`, nor docs/log.md"


def test_the_detector_that_ships_says_how_to_fetch_its_sources() -> None:
    head = (recipes.FOLDER / "clip-all.toml").read_text().partition("\n\n")[0]
    lines = re.search(r"(catalog=\S+)\n.* fetch --catalog \$catalog \$\((.*)\)\n", head)
    assert lines
    listed = subprocess.check_output(["bash", "-c", f"{lines[1]}; {lines[2]}"], cwd=ROOT, text=True)
    catalog = ROOT / lines[1].removeprefix("catalog=")
    assert listed.split() == list(tomllib.loads(catalog.read_text(encoding="utf-8"))["sources"])


def test_the_detector_that_ships_has_the_precision_of_its_command() -> None:
    """Features of another precision are other ones, and so is the head."""
    path = recipes.FOLDER / "clip-all.toml"
    (command,) = re.findall(r"^# +(python train\.py .*)", path.read_text(), re.M)
    recipe = recipes.load(Recipe, path, re.findall(r"--set (\S+)", command))
    assert recipe.run.precision == read_meta(ROOT / "detectors/clip")["recipe"]["run"]["precision"]


@pytest.mark.parametrize("step", [0, 7, 1_000_000, 12_345_678])
def test_the_folder_of_a_step_is_one_of_a_checkpoint(step: int) -> None:
    match = STEP_FOLDER.fullmatch(step_folder(step))
    assert match and int(match[1]) == step


def test_phase_1_has_the_original_values() -> None:
    """Values of the original training code; change them only on purpose."""
    recipe = recipes.load(Recipe, recipes.FOLDER / "phase1.toml")
    assert (recipe.run.epochs, recipe.loading.batch_size) == (8, 30)
    optim = recipe.optim
    assert (optim.lr, optim.weight_decay, optim.layer_decay) == (2e-4, 0.02, 0.8)
    assert (optim.warmup_ratio, optim.warmup_start_factor, optim.min_lr) == (0.05, 0.01, 0)
    assert (optim.label_smoothing, optim.clip_grad_norm) == (0.05, 1.0)
    policy = recipe.augment["train"]
    assert (policy.scale, policy.ratio, policy.hflip) == ((0.6, 1.0), (0.85, 1.15), 0.5)
    assert (policy.color_jitter, policy.brightness, policy.contrast) == (0.3, 0.06, 0.06)
    assert (policy.saturation, policy.hue, policy.grayscale) == (0.06, 0.02, 0.03)
    assert (policy.resample, policy.resample_scale) == (0.3, (0.8, 0.95))
    assert (policy.jpeg, policy.jpeg_quality) == (0.3, (80, 95))
    assert (policy.blur, policy.blur_sigma) == (0.2, (0.1, 0.5))
    dda = recipe.augment["dda"]
    assert (dda.scale, dda.ratio, dda.hflip) == ((0.75, 1.0), (0.9, 1.1), 0.5)
    assert (dda.jpeg, dda.resample, dda.color_jitter, dda.blur, dda.grayscale) == (0, 0, 0, 0, 0)
    assert (recipe.preprocess.crop_size, recipe.preprocess.resize_size) == (256, 288)


def test_phase_2_has_the_original_values() -> None:
    recipe = recipes.load(Recipe, recipes.FOLDER / "phase2.toml")
    assert (recipe.run.epochs, recipe.loading.batch_size, recipe.run.init_from) == (5, 28, "phase1")
    optim = recipe.optim
    assert (optim.lr, optim.weight_decay, optim.layer_decay) == (7.5e-5, 0.02, 0.85)
    assert (optim.warmup_ratio, optim.warmup_start_factor, optim.min_lr) == (0.07, 0.01, 1e-7)
    assert recipe.replay.sets == ["phase1"]
    assert recipe.replay.fraction * 20_000 == 2_500
    policy = recipe.augment[recipe.data.policy]
    assert (policy.scale, policy.ratio, policy.hflip) == ((0.85, 1.0), (0.95, 1.05), 0.5)
    assert (policy.color_jitter, policy.brightness, policy.hue) == (0.2, 0.03, 0.01)
    assert (policy.resample, policy.resample_scale) == (0.1, (0.9, 0.97))
    assert (policy.jpeg, policy.jpeg_quality) == (0.1, (88, 98))
    assert (policy.blur, policy.grayscale) == (0.1, 0.03)


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.stem)
def test_the_views_of_frozen_backbones_are_augmented_as_by_web_sites(path: Path) -> None:
    """Also in phase 2, whose recipe names another policy."""
    recipe = recipes.load(Recipe, path)
    if recipe.network.freeze_backbone and recipe.features:
        policy = recipe.augment[recipe.data.policy]
        assert policy.whole_resize and policy.whole_jpeg and policy.whole_webp


def test_overrides_take_toml_values_and_plain_text() -> None:
    path = recipes.FOLDER / "phase2.toml"
    recipe = recipes.load(
        Recipe, path, ["optim.lr=1e-4", "replay.ratio=1:16", "augment.continual.hflip=0"]
    )
    assert recipe.optim.lr == 1e-4
    assert recipe.replay.fraction * 16 == 1
    assert recipe.augment["continual"].hflip == 0


def test_whole_numbers_and_floats_may_be_written_as_each_other() -> None:
    """A run of 1e2 epochs at a learning rate of 1."""
    path = recipes.FOLDER / "phase1.toml"
    recipe = recipes.load(Recipe, path, ["run.epochs=1e2", "optim.lr=1", "network.mean=[0, 1, 0]"])
    assert (recipe.run.epochs, recipe.optim.lr, recipe.network.mean) == (100, 1.0, (0, 1, 0))
    recipe = recipes.load(Recipe, path, ["optim.lr=.5", "optim.weight_decay=5.e-2",
                                         "data.allow_one_class=True", "name=007"])  # fmt: skip
    assert (recipe.optim.lr, recipe.optim.weight_decay) == (0.5, 0.05)
    assert (recipe.data.allow_one_class, recipe.name) == (True, "007")
    with pytest.raises(recipes.RecipeError, match=r"run\.epochs takes a whole number, got 1\.5"):
        recipes.load(Recipe, path, ["run.epochs=1.5"])


def test_keys_inside_a_table_are_changed_too() -> None:
    changed = recipes.changed_keys(['data={train=["a"], repeats={x=1}}', " optim.lr = 1", "name=b"])
    assert changed == {"data", "data.train", "data.repeats", "data.repeats.x", "optim.lr", "name"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean lr?"),
        (
            "augment.train.flip=1",
            "unknown key 'augment.train.flip'; did you mean vflip or hflip?",
        ),
        ("loading.cach_gb=1", "unknown key 'loading.cach_gb'; did you mean cache_gb or cache?"),
        ("run.width=1", "unknown key 'run.width'; known: compile, epochs, grad_accum_steps, init"),
        ("optimm.lr=1", "unknown key 'optimm'; did you mean optim?"),
        ("optim.lr=-1", "optim: lr must be above 0 and min_lr from 0 to lr"),
        ("optim.lr=inf", "optim.lr must be a finite number, got inf"),
        ('optim.lr="inf"', 'optim.lr takes a number, got "inf"'),
        ("optim.lr=[2026-01-01]", 'optim.lr takes a number, got ["2026-01-01"]'),
        ("optim.lr={a = [07:30:00]}", 'optim.lr takes a number, got {"a": ["07:30:00"]}'),
        ("network.options.day=2026-01-01", "network.options.day takes no date or time, got 2026"),
        ('network.options.checkpoint_path="x"', "network: options takes no checkpoint_path, which"),
        ('network.options.cache_dir="x"', "network: options takes no cache_dir, which names files"),
        ("optim.lr=true", "optim.lr takes a number, got true"),
        ("run.epochs=true", "run.epochs takes a whole number, got true"),
        ('run.epochs="3"', 'run.epochs takes a whole number, got "3"'),
        ("data.allow_one_class=1", "data.allow_one_class takes true or false, got 1"),
        ('loading.verify_checksums="yes"', 'verify_checksums takes true or false, got "yes"'),
        ('network.mean=[0.5, "0.5", 0.5]', 'network.mean takes a number, got "0.5"'),
        ("data.repeats.a=true", "data.repeats.a takes a number, got true"),
        ("augment.train.hflip=true", "augment.train.hflip takes a number, got true"),
        ('replay={ratio=true, sets=["a"]}', "replay.ratio takes a number, got true"),
        ("optim.weight_decay=nan", "clip_grad_norm must be above 0 and weight_decay at least 0"),
        ("optim.weight_decay=inf", "optim.weight_decay must be a finite number"),
        ("optim.weight_decay=-1", "weight_decay at least 0, got 1.0 and -1.0"),
        ("optim.clip_grad_norm=-1", "clip_grad_norm must be above 0 and"),
        ("optim.clip_grad_norm=0", "clip_grad_norm must be above 0 and"),
        ("optim.min_lr=nan", "optim: lr must be above 0 and min_lr from 0 to lr"),
        ("optim.label_smoothing=2", "label_smoothing are shares, from 0 to 1"),
        ("network.drop_path_rate=nan", "network.drop_path_rate must be a finite number"),
        ("network.drop_path_rate=1", "drop_path_rate is a share, at least 0 and below 1, got 1.0"),
        ("network.std=[0.5, 0, 0.5]", "std must be above 0 in each channel, got [0.5, 0.0, 0.5]"),
        ("augment.train.brightness=-0.1", "brightness must be from 0 to 1, got -0.1"),
        ("augment.train.hue=2", "hue must be from 0 to 1, got 2.0"),
        ("network.mean=[0.5, nan, 0.5]", "network.mean must be a finite number"),
        ("data.repeats.a=nan", "data.repeats.a must be a finite number"),
        (
            "replay={distill_weight=inf, sets=['a'], ratio=1}",
            "replay.distill_weight must be a finite number",
        ),
        ("replay={weight=0, sets=['a'], ratio=1}", "replay: weight must be above 0, got 0"),
        ("loading.stall_error_s=inf", "loading.stall_error_s must be a finite number"),
        ("loading.stall_error_s=-1", "stall_error_s must be more than 0, got -1"),
        ("gate.max_fpr=nan", "max_forgetting and max_fpr are shares"),
        ("gate.max_newly_wrong=-1", "max_newly_wrong must not be negative, got -1"),
        ("augment.train.jpeg=1.5", "jpeg must be from 0 to 1, got 1.5"),
        ("replay.ratio=much", "ratio must look like 1:8"),
        ("run.epochs=many", 'run.epochs takes a whole number, got "many"'),
        ("data.train=phase1", """got "phase1": --set 'data.train=["phase1"]'"""),
        ("data.repeats=3", "data.repeats takes a table, got 3"),
        ("network.pretrained=7", "network.pretrained takes true or false, got 7"),
        ("network.mean=[1, 2]", "network.mean has 2 values, which is too few"),
        ("data.train=[a, b]", """takes a list, got "[a, b]": --set 'data.train=["a", "b"]'"""),
        ("data.train=a,2 b", """takes a list, got "a,2 b": --set 'data.train=["a", "2 b"]'"""),
        ("data.train=['a', b]", """--set 'data.train=["a", "b"]'"""),
        ("network.blocks=5,6", "--set 'network.blocks=[5, 6]'"),
        ("network.mean=0.5, .5,0.5", "--set 'network.mean=[0.5, 0.5, 0.5]'"),
        ("augment.train.scale=[0.5 1.0]", "--set 'augment.train.scale=[0.5, 1.0]'"),
        ("run.epochs", "--set takes KEY=VALUE"),
        (
            'calibration.together={a=["x", "y"], b=["x"]}',
            "together names x in more than one group",
        ),
        ("name.x=1", "name is a value, not a table"),
    ],
)
def test_a_bad_override_is_one_clear_error(override: str, said: str) -> None:
    with pytest.raises(recipes.RecipeError, match=r"(?s).*") as caught:
        recipes.load(Recipe, recipes.FOLDER / "phase1.toml", [override])
    assert said in str(caught.value)


def test_a_missing_recipe_lists_the_built_in_recipes(tmp_path: Path) -> None:
    with pytest.raises(recipes.RecipeError, match=r"built-in recipes: .*demo.*phase1.*phase2"):
        recipes.load(Recipe, tmp_path / "none.toml")


def test_broken_toml_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("name = ")
    with pytest.raises(recipes.RecipeError, match=r"broken\.toml is not valid TOML"):
        recipes.load(Recipe, path)
    path.write_bytes(b"\xff\xfename")
    with pytest.raises(recipes.RecipeError, match=r"broken\.toml is not UTF-8 \(byte 0 is 0xff"):
        recipes.load(Recipe, path)
    path.write_bytes(b"")
    with pytest.raises(recipes.RecipeError, match=r"broken\.toml: name is missing; add it"):
        recipes.load(Recipe, path)


def test_a_byte_order_mark_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "marked.toml"
    path.write_bytes(b"\xef\xbb\xbf" + b'extends = ["other.toml"]')
    (tmp_path / "other.toml").write_text('name = "a"')
    assert recipes.read(path) == {"name": "a"}


def test_a_built_in_recipe_is_found_by_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed wheel needs this: the current folder has no recipes/."""
    monkeypatch.chdir(tmp_path)
    expected = recipes.read(recipes.FOLDER / "demo-phase1.toml")
    for name in ("demo-phase1", "demo-phase1.toml", "recipes/demo-phase1.toml"):
        assert recipes.read(Path(name)) == expected
    (tmp_path / "mine.toml").write_text('extends = ["demo-phase1.toml"]\nname = "mine"')
    assert recipes.read(Path("mine.toml")) == {**expected, "name": "mine"}
    assert recipes.read(tmp_path / "mine.toml") == {**expected, "name": "mine"}
    for path in (Path("elsewhere/demo-phase1.toml"), tmp_path / "demo-phase1.toml"):
        with pytest.raises(recipes.RecipeError, match="no recipe at"):
            recipes.read(path)
    (tmp_path / "demo-phase1.toml").write_text('name = "own"')
    assert recipes.read(Path("demo-phase1.toml")) == {"name": "own"}


@pytest.mark.parametrize("base", ["phase1", "phase1.toml", "recipes/phase1", "recipes/phase1.toml"])
def test_what_a_recipe_extends_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """Built-in recipes and those beside the recipe, with `.toml` and without."""
    (tmp_path / "phase1").mkdir()  # no recipe
    mine = tmp_path / "mine/mine.toml"
    mine.parent.mkdir()
    mine.write_text(f'extends = ["{base}"]')
    for folder, path in ((tmp_path, mine), (mine.parent, Path("mine.toml")), (tmp_path, "mine")):
        monkeypatch.chdir(folder)
        if path == "mine":  # another recipe of that name, which is not beside the one that is read
            (tmp_path / "phase1.toml").write_text('name = "other"')
            path = mine
        assert recipes.read(Path(path)) == recipes.read(recipes.FOLDER / "phase1.toml")
    monkeypatch.chdir(tmp_path)
    assert recipes.read(Path("phase1")) == recipes.read(recipes.FOLDER / "phase1.toml")
    beside = mine.parent / base
    beside.parent.mkdir(exist_ok=True)
    beside.with_suffix(".toml").write_text('name = "beside"')
    assert recipes.read(mine) == {"name": "beside"}
    beside.with_suffix(".toml").unlink()
    mine.write_text('extends = ["nosuch"]')
    with pytest.raises(recipes.RecipeError, match=r"no recipe at .*mine/nosuch; built-in"):
        recipes.read(mine)


def test_a_recipe_may_extend_the_built_in_recipe_of_its_name(tmp_path: Path) -> None:
    own = tmp_path / "phase1.toml"
    for name in ("phase1.toml", "phase1"):
        own.write_text(f'extends = ["{name}"]\n[optim]\nlr = 0.5\n')
        assert recipes.load(Recipe, own).optim.lr == 0.5
        assert recipes.read(own)["optim"].keys() > {"lr"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.toml": 'extends = ["b.toml"]', "b.toml": 'extends = ["a.toml"]'}, "extends itself"),
        ({"a.toml": 'extends = ["a.toml"]'}, "extends itself"),
        ({"a.toml": "extends = [1]"}, "extends takes a list"),
        ({"a.toml": "extends = 1"}, "extends takes a list"),
        ({"a.toml": 'extends = "phase1.toml"'}, "extends takes a list"),
        ({"a.toml": f"x = {'[' * 9000}"}, "nested too deeply"),
        ({"a.toml": f"x = {'[' * 900}{']' * 900}"}, "nested too deeply"),
        ({"a.toml": f"{'a.' * 3000}a = 1"}, "nested too deeply"),
        ({"a.toml": f"[{'a . ' * 3000}a]"}, "nested too deeply"),
        ({"a.toml": f"""x = {{y = \"\"\"z\"\"\"\", {"'a'." * 3000}a = 1}}"""}, "nested too deeply"),
        ({"a.toml": f"[{'a.' * 60}a]\n{'b.' * 60}b = 1"}, "nested too deeply"),
    ],
)
def test_recipes_that_cannot_be_read_are_one_line(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(recipes.RecipeError, match=said) as caught:
        recipes.read(tmp_path / "a.toml")
    assert "\n" not in str(caught.value)


def test_a_key_of_many_parts_takes_no_memory(tmp_path: Path) -> None:
    """40 kB took 1.6 GB, and what came of it ended programs with a traceback."""
    (tmp_path / "a.toml").write_text(f"{'a.' * 4000}a = 1")
    tracemalloc.start()
    with pytest.raises(recipes.RecipeError, match="nested too deeply"):
        recipes.read_toml(tmp_path / "a.toml")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20


def test_points_in_texts_numbers_and_comments_are_no_keys(tmp_path: Path) -> None:
    points = "." * 500
    text = f"""# {points}
[a.b]
"c{points}" = 'd{points}' # "{points}
e = [{"0.5, " * 200}]
f = \"\"\"
"g"{points}\\"{points}\"\"\"
h = \'\'\'
i{points}\'\'\'
"""
    (tmp_path / "a.toml").write_text(text)
    assert recipes.read_toml(tmp_path / "a.toml") == tomllib.loads(text)
    assert recipes.changed_keys([f"name={points}"]) == {"name"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (f"run.seed={'[' * 9000}", "nested too deeply"),
        (f"run.seed={{{'a.' * 3000}a = 1}}", "run.seed: the value cannot be used: it"),
        (f"{'a.' * 3000}a=1", "the key is nested too deeply"),
        (f"run.seed={2**64}", "seed must be below"),
    ],
)
def test_values_of_set_that_are_out_of_range(override: str, said: str) -> None:
    with pytest.raises(recipes.RecipeError, match=said):
        recipes.load(Recipe, recipes.FOLDER / "phase1.toml", [override])


def test_a_run_may_be_called_what_people_write() -> None:
    for name in (
        "写真\u3000まとめ",
        "\u0639\u06a9\u0633\u200c\u0647/क्\u200dष",
        "👨\u200d👩\u200d👧 photos",
    ):
        check_run_name(name)


def test_a_number_of_many_digits_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(f"name = {'9' * 5000}")
    said = r"a\.toml is not valid TOML: a number in it has too many digits"
    with pytest.raises(recipes.RecipeError, match=said):
        recipes.read_toml(tmp_path / "a.toml")
    with pytest.raises(recipes.RecipeError, match=r"--set run\.seed: the value .* many digits"):
        recipes.load(Recipe, recipes.FOLDER / "phase1.toml", [f"run.seed={'9' * 5000}"])
    recipes.load(Recipe, recipes.FOLDER / "phase1.toml", [f"name={'9' * 40}x"])


@pytest.mark.parametrize(
    "line",
    ['run.seed="{}"', 'data.train="{}"', 'run.{}="x"', "run.seed=['{}']", "run.precision='{}'",
     "data.repeats.'{}'='x'"],
)  # fmt: skip
def test_an_error_is_not_as_long_as_the_value(tmp_path: Path, line: str) -> None:
    override = line.format("k" * 500_000)
    base = (recipes.FOLDER / "phase1.toml").as_posix()
    (tmp_path / "a.toml").write_text(f"extends = ['{base}']\n{override}")
    with pytest.raises(recipes.RecipeError) as caught:
        recipes.load(Recipe, tmp_path / "a.toml")
    assert len(str(caught.value)) < 2000 + len(str(tmp_path))

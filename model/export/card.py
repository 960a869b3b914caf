"""Compose the model card of a checkpoint: the text of `README.md` for the Hugging Face Hub.

Main entry: `card_of(meta, report, sources, *, onnx, new_kinds)` takes these arguments:

- `meta`: the parsed `meta.json` of the checkpoint (a dict, from `read_meta(folder)`).
- `report`: the parsed `report.json` of an evaluation (a dict), or None: the card says that there is
  no evaluation.
- `sources`: a dict, training set -> its data sources. These are a dict, source name -> {"license":
  text, "homepage": address without `https://`}, or None if the set is not available.
  `sources_of(meta, data)` of `hub.py` makes it.
- `onnx`: True if the folder of the card also has ONNX files in `onnx/`.
- `new_kinds`: the `NewKinds` of heads that were trained without single sources, from
  `read_new_kinds(path)` of `new_kinds.py`, or None (default): the card has no section "Robustness
  and subjects".

It returns YAML and Markdown as one string, writes nothing and raises no errors of its own. Paths of
this machine are cut to the file name. `TAGS` are the search words on the hub; `LIMITS` is the
section on what the detector cannot do.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import ModelCardData

from escape import markdown, without_paths
from model.evaluation.bootstrap import wilson
from model.evaluation.report import on_subset, on_training_data
from model.export.license import License, license_of
from model.export.new_kinds import NewKinds
from model.inference.fitness import notices, sets_seen
from model.shipped.backbone import KEY
from model.verdict import (
    LeftOut,
    band_of,
    capital,
    describe_band,
    left_out_rates,
    left_out_sources,
)
from pipeline.preprocess import Preprocess
from sharding.format import CLASSES

TAGS = ["ai-generated-image-detection"]

LIMITS = """\
- A score is not a proof. Do not decide about a person from a score alone.
- The detector is made for images like its training images. With other kinds of images, cameras or
  generators, strong compression or resizing it makes more errors, in both directions.{figures}
- In public data sets, fakes and photographs also differ in format, size and compression, and a
  detector learns these differences. Before you rely on it, measure it on real and fake images that
  have the same format, size and compression.
- The network's input is the center of an image, scaled down: {share:.0%} of the shorter side as {size} x {size} pixels{detail}.
  A small edit, or an edit near the border, can be missed. The detector was not made for partly
  edited images.
- The detector knows only the generators of its training sets; it may miss images of newer ones.
"""  # noqa: E501


_BY_TIMM = """\
```python
import timm, torch
from PIL import Image, ImageOps

net = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
with torch.inference_mode():
    real, fake = net(transform(image)[None])[0]
print(torch.sigmoid((fake - real) / {temperature:g}))  # probability of fake
```

```python
from transformers import pipeline

print(pipeline("image-classification", model="OWNER/NAME")("photo.jpg"))
```
"""

_STAGES = """\
The head uses features from inside the backbone. timm and transformers cannot build such a network.
Download the folder and use the project that trained the detector:
"""

_HEAD = """\
These weights are only the head. The backbone is downloaded once, checked by its SHA-256 and stored:

```
python -m model fetch FOLDER
```

"""

_BY_PROJECT = """
```
python -m predict photo.jpg --checkpoint FOLDER
```

```python
from model import load_detector

print(load_detector("FOLDER").predict("photo.jpg"))
```
"""


def card_of(
    meta: Mapping[str, Any],
    report: Mapping[str, Any] | None,
    sources: Mapping[str, Mapping[str, Any] | None],
    *,
    onnx: bool,
    new_kinds: NewKinds | None = None,
) -> str:
    """Return the text of `README.md` for the hub: YAML, then Markdown.

    `report` is the parsed `report.json`. `sources` are the sources of each training set, from its
    index. `onnx`: the folder also contains an ONNX export in `onnx/`. `new_kinds` are figures on
    sources left out of training.
    """
    meta, report, sources = without_paths([meta, report, sources])
    license = license_of(meta)
    preprocess = Preprocess(**meta["preprocess"])
    by_source = left_out_rates(meta)
    has_new_kinds = bool(new_kinds or by_source)
    limits = LIMITS.format(
        share=preprocess.crop_size / preprocess.resize_size,
        size=preprocess.crop_size,
        detail=", and a crop of as many pixels at full resolution"
        if preprocess.detail_crop
        else "",
        figures=" The figures\n  above are valid only for the sets that they name."
        if report or has_new_kinds
        else "",
    )
    sections = [
        f"# {markdown(meta['recipe']['name'])}: real photograph or AI-generated?",
        _summary(meta),
        *(["## Known against it", _against(meta)] if notices(meta) else []),
        "## Use",
        _use(meta, onnx),
        *(["## Backbone", _backbone(meta)] if KEY in meta else []),
        *(
            ["## Sources left out of training", _left_out(meta, by_source, report)]
            if by_source
            else []
        ),
        *(["## Robustness and subjects", _new_kinds(meta, new_kinds)] if new_kinds else []),
        "## Evaluation",
        _evaluation(report) if report else _no_evaluation(has_new_kinds),
        "## Training data",
        _training(meta, sources),
        "## Limits",
        limits.strip(),
        "## Licenses",
        f"Weights: {markdown(license.text)}. The training images have their own licenses"
        f"{', see above' if sources else ''}. Neither this card nor the license of any code "
        "changes these licenses.",
    ]
    return f"---\n{_front(license, timm=is_plain(meta))}\n---\n\n" + "\n\n".join(sections) + "\n"


def is_plain(meta: Mapping[str, Any]) -> bool:
    """Return whether timm alone can build the network: not with a head that uses all stages, and
    not without the backbone's weights.
    """
    return meta["recipe"]["network"]["head"] == "timm" and KEY not in meta


def _front(license: License, *, timm: bool) -> str:
    """Return the YAML metadata that the hub reads."""
    data = ModelCardData(
        license=license.id,
        library_name="timm" if timm else None,
        pipeline_tag="image-classification",
        tags=TAGS,
        base_model=f"timm/{license.base}" if license.base else None,
        license_name="see-licenses-below" if license.id == "other" else None,
    )
    return data.to_yaml()


def _summary(meta: Mapping[str, Any]) -> str:
    size, step = meta["preprocess"]["crop_size"], meta["step"]
    trained = f"step {step:,}" if step else "imported from the original project's checkpoint"
    classes = ", ".join(f"{label} {name}" for label, name in enumerate(CLASSES))
    return (
        f"{markdown(meta['recipe']['network']['name'])} at {size} x {size}, two outputs "
        f"({classes}: AI-generated); {trained}."
    )


def _against(meta: Mapping[str, Any]) -> str:
    """Return one line for each reason not to rely on the detector."""
    return "\n".join(f"- {markdown(capital(notice.text))}." for notice in notices(meta))


def _use(meta: Mapping[str, Any], onnx: bool) -> str:
    """Return code examples, and the thresholds of the verdicts."""
    temperature, (low, high) = meta["temperature"], band_of(meta)
    text = _BY_TIMM.format(temperature=temperature)
    if not is_plain(meta):
        text = (_HEAD if KEY in meta else _STAGES) + _BY_PROJECT
    if onnx:
        height, width = Preprocess(**meta["preprocess"]).shape
        text += f"""
`onnx/detector.onnx` (fp32), `onnx/detector-fp16.onnx` and, where it is close enough,
`onnx/detector-int8.onnx` (linear layers in 8 bits) take `images`, uint8 (batch, {height},
{width}, 3) RGB, and return `probability`, that of
fake. Their metadata contains the preprocessing, the thresholds and this license.
`onnx/parity.json` contains the differences from PyTorch.
"""
    heated = temperature != 1 and is_plain(meta)
    heat = " (transformers' pipeline returns it without the temperature)" if heated else ""
    verdict = (
        f"The verdict is likely AI-generated from {high:.3g} on, and no sign of AI below"
        if low == high
        else f"The verdict is no sign of AI below {low:.3g}, likely AI-generated from {high:.3g} "
        "on, and uncertain in between"
    )
    return f"{text}\nThe probability is that of fake{heat}. {verdict}. {_calibrated(meta)}"


def _backbone(meta: Mapping[str, Any]) -> str:
    """Return the source of the backbone's weights, and the files on which the head was tested."""
    spec = meta[KEY]
    lines = [
        f"{markdown(spec['name'])}, frozen. The head was tested on the files marked as tested. Any "
        "other file is refused.",
        "",
        "| file (SHA-256) | tested | model hub | package index |",
        "|---|---|---|---|",
    ]
    for file in spec["files"]:
        hub, wheel = file["hub"], file["wheel"]
        on_hub = f"{hub['repository']}, {hub['file']} at {hub['revision']}" if hub else "-"
        in_wheel = (
            f"{wheel['package']} {wheel['version']}, {wheel['member']}, converted" if wheel else "-"
        )
        tested = "no"
        if file["sha256"] in spec["tested"]:
            own = spec["tested"][file["sha256"]]
            tested = "yes, with a calibration of its own" if own else "yes"
        cells = (file["sha256"], tested, on_hub, in_wheel)
        lines.append(f"| {' | '.join(map(markdown, cells))} |")
    return "\n".join(lines)


def _calibrated(meta: Mapping[str, Any]) -> str:
    calibration = meta["calibration"]
    if not calibration:
        return (
            "**Not calibrated**: the number is only a score; choose a threshold on your own images."
        )
    images = (
        f"{_names(calibration.get('fitted_on', ['?']))} ({_count(calibration, 'reals')} real, "
        f"{_count(calibration, 'fakes')} fake images)"
    )
    if left_out_sources(meta):
        # Only these scores are surely of the precision of the recipe: of the stored features.
        precision = meta["recipe"].get("run", {}).get("precision")
        half = {"bf16": "bfloat16", "fp16": "float16"}.get(precision)
        computed = (
            f" The scores were computed in {half}; in float32, as on a CPU, single verdicts near a "
            "threshold differ."
            if half
            else ""
        )
        return (
            "Temperature and thresholds were fitted on the scores that heads gave to sources which "
            f"they had not seen, of {images}.{computed}"
        )
    return f"Temperature and thresholds were fitted on {images}."


def _count(counts: Mapping[str, Any], name: str) -> str:
    return f"{counts[name]:,}" if name in counts else "?"


def _left_out(meta: Mapping[str, Any], by_source: LeftOut, report: Mapping[str, Any] | None) -> str:
    """Return the table of sources that were each scored by a head trained without that source."""
    rows = [
        "| source | images | called likely AI | uncertain |",
        "|---|---|---|---|",
    ]
    titles = (meta["data"] or {}).get("titles", {})
    for name, rates in by_source.sources.items():
        shown = markdown(name) + (f": {markdown(titles[name])}" if name in titles else "")
        for label, metric in (("real", "false_positive_rate"), ("fake", "recall")):
            if rates[metric] is not None:
                # That of detectors/clip has only the share of both classes together.
                both = rates.get("reals", 1) and rates.get("fakes", 1)
                alone = None if both else rates.get("uncertain")
                uncertain = rates.get(f"uncertain_{label}", alone)
                rows.append(
                    f"| {shown} ({label}) | {_count(rates, label + 's')} "
                    f"| {_of_images(rates[metric], rates.get(label + 's'))} "
                    f"| {'-' if uncertain is None else f'{uncertain:.3f}'} |"
                )
    compared = (
        " The rates are much worse than the figures below, which are for images of the same kinds "
        "as the training images."
        if report
        else ""
    )
    expect = (
        "Expect such rates, or somewhat worse ones, for new kinds of images: the thresholds were "
        "chosen on these scores."
        if left_out_sources(meta)
        else "The rates are those of an earlier calibration: "
        f"{describe_band(by_source.band)}. At this detector's thresholds they differ."
    )
    return (
        "Each source was scored by a head that was trained without that source. "
        f"{expect}{compared} In parentheses is the 95 % interval for so many independent images. "
        "Images of one source are alike, so the true intervals are wider.\n\n" + "\n".join(rows)
    )


def _of_images(share: float, count: int | None) -> str:
    """Format a share of `count` images with its 95 % interval, that of Wilson; without the interval
    if the number of images is not known.
    """
    if count is None:
        return f"{share:.3f}"
    low, high = wilson(share, count)
    return f"{share:.3f} ({max(0.0, low):.3f} to {min(1.0, high):.3f})"


def _new_kinds(meta: Mapping[str, Any], figures: NewKinds) -> str:
    """Return the metrics of the left-out sources together, within subjects, and after each
    perturbation.
    """
    pairs, inside = figures.pairs, figures.within_subjects
    images = "these images" if left_out_rates(meta) else "images of sources left out of training"
    text = f"Over all {images} the AUROC is {figures.pooled:.3f}."
    if pairs is not None:
        low, high = pairs.interval
        worst = ", ".join(f"{markdown(name)} {value:.2f}" for name, value in pairs.worst.items())
        text += (
            f" The mean over pairs of a real and a fake source is {pairs.mean:.3f} ({low:.3f} "
            f"to {high:.3f}); the lowest are {worst}."
        )
    if inside.auroc is not None:
        text += (
            f"\n\nWithin subjects (the mean over {inside.clusters} clusters of similar images "
            f"that hold both classes) it is {inside.auroc:.2f}: a detector that knows only the "
            "subject has 0.5 there."
        )
    if not figures.perturbed:
        return text
    most = max(figures.perturbed.values(), key=lambda after: after.reals + after.fakes)
    rows = ["| perturbation | AUROC | recall | reals called fake |", "|---|---|---|---|"]
    for name, after in figures.perturbed.items():
        rows.append(
            f"| {markdown(name)} | {after.auroc:.3f} | {after.recall:.2f} | "
            f"{after.false_positive_rate:.2f} |"
        )
    return (
        f"{text}\n\n{most.reals:,} real and {most.fakes:,} fake images, equally many of "
        "each source where it has them, changed before the detector sees them. AUROC is "
        "the mean over pairs of sources, the shares are means over sources, at the threshold of "
        "the verdict *likely AI*.\n\n" + "\n".join(rows)
    )


def _no_evaluation(new_kinds: bool) -> str:
    """Return which error rates a card without a report lacks. `new_kinds`: the card has error rates
    of sources left out of training.
    """
    if new_kinds:
        return (
            "**No evaluation is attached.** The error rates above are those of sources left out of "
            "training; those on new images of known kinds are not known here."
        )
    return "**No evaluation is attached.** The error rates of this detector are not known here."


def _evaluation(report: Mapping[str, Any]) -> str:
    """Return the metrics of each set, source and generator, with notes on them."""
    rows = [
        "| set | real | fake | fakes found (recall) | reals called fake | AUROC |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for name, set_report in report["sets"].items():
        overall, reference = set_report["overall"], set_report["reference"]
        rows.append(_row(name, overall))
        if reference:
            rows.append(
                _row(
                    f"{name}, with reference reals of {set_report['reference_reals']['set']}",
                    reference,
                )
            )
        if set_report["note"]:
            notes.append(f"{markdown(name)}: {markdown(set_report['note'])}")
    warnings = [f"**{markdown(sentence)}.**" for sentence in on_training_data(report)]
    if subset := report.get("subset"):
        warnings.append(f"**{markdown(on_subset(subset))}**")
    text = (
        f"An image is called fake from a probability of {report['threshold']:.3f} on. Always read "
        "recall together with the share of reals called fake.\n\n" + "\n".join(rows)
    )
    return "\n\n".join([*warnings, text, *notes, *_by_source(report)])


def _by_source(report: Mapping[str, Any]) -> list[str]:
    """Return the table of sources and generators, if the report has them."""
    rows = [
        _row(f"{name}: {line}", figures)
        for name, set_report in report["sets"].items()
        for kind in ("sources", "generators")
        for line, figures in set_report.get(kind, {}).items()
    ]
    head = "| source or generator | real | fake | recall | reals called fake | AUROC |"
    return ["\n".join([head, "|---|---|---|---|---|---|", *rows])] if rows else []


def _row(name: str, figures: Mapping[str, Any]) -> str:
    shown = [
        _share(figures, "recall"),
        _share(figures, "false_positive_rate", "not measured: no real images"),
        _share(figures, "auroc"),
    ]
    return (
        f"| {markdown(name)} | {figures['reals']:,} | {figures['fakes']:,} | {' | '.join(shown)} |"
    )


def _share(figures: Mapping[str, Any], name: str, missing: str = "-") -> str:
    """Format a metric, with its interval if the report has one."""
    if figures[name] is None:
        return missing
    interval = figures["intervals"].get(name)
    between = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    return f"{figures[name]:.3f}{between}"


def _training(meta: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any] | None]) -> str:
    data = meta["data"] or {}
    if "imported_from" in data:
        return (
            "The data of the original project (about 420,000 images of 13 public datasets, "
            "according to its card). Its checkpoint contains no list of the images."
        )
    lines = [f"Trained on: {_names(data.get('train', [])) or 'no set of images'}."]
    if replayed := data.get("replay"):
        lines.append(f"Replayed old images: {_names(replayed)}.")
    own = {*data.get("set_sha256", {}).values()}
    if earlier := [name for sha256, name in sets_seen(meta).items() if sha256 not in own]:
        lines.append(f"The weights that it began from were trained on: {_names(earlier)}.")
    lines += ["", "| set | source | license |", "|---|---|---|"]
    for name, facts_of_set in sources.items():
        if facts_of_set is None:
            lines.append(
                f"| {markdown(name)} | not listed: set not available | see the set's index |"
            )
            continue
        lines += [
            f"| {markdown(name)} | {_linked(key, facts)} | {markdown(facts['license'])} |"
            for key, facts in facts_of_set.items()
        ]
    return "\n".join(lines)


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(markdown, names))


def _linked(name: str, source: Mapping[str, Any]) -> str:
    """Return the name of a source, as a link if its homepage is only a host and a path."""
    plain = re.fullmatch(r"[\w.-]+(/[\w./~-]*)?", source["homepage"], re.ASCII)
    return f"[{markdown(name)}](https://{source['homepage']})" if plain else markdown(name)

"""Recognize image generators by the names and settings that they write into the metadata of files.

Main entries: five functions that take text from the metadata of one image.

- `is_named(field, text)`: whether `text` names a generator and `field`, the name of its metadata
  field, is one that programs write, such as "Software" or "CreatorTool". Upper and lower case do
  not matter. In "Comment" and "Make", which people also write, `text` counts only if
  `is_signature(text)`.
- `is_signature(text)`: whether `text` is a generator's name and nothing else but a version or words
  like "made with".
- `settings_in(text)`: looks for generator settings in the text of a field. It returns one text,
  "PROGRAM: PROMPT", such as "ComfyUI: a dog". If the prompt cannot be separated from the other
  settings, PROMPT is the whole `text`. It returns "" if there are no settings.
- `settings_of(value, text)`: the same for parsed JSON (any value; only a dict can be settings).
  `text` is the JSON text from which `value` was parsed (default ""): PROMPT where the settings have
  no separate prompt.
- `settings_across(texts)`: the same for metadata with each setting in its own field. `texts` is a
  dict, field -> text. PROMPT is "" if there is none.

The patterns were read in the source code of the generators where it is public:

- https://github.com/AUTOMATIC1111/stable-diffusion-webui
- https://github.com/Comfy-Org/ComfyUI, https://github.com/Kaharos94/ComfyUI-Saveaswebp
- https://github.com/filipstrand/mflux
- https://github.com/invoke-ai/InvokeAI
- https://github.com/lllyasviel/Fooocus
- https://github.com/mcmonkeyprojects/SwarmUI

and in programs that read such metadata:

- https://github.com/receyuki/stable-diffusion-prompt-reader (Draw Things, Easy Diffusion, NovelAI)
- https://github.com/enslo/sd-metadata (TensorArt)
- https://github.com/wiltodelta/remove-ai-watermarks (Ideogram, xAI, C2PA signers)
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from storage import parse_json

# --- generators by their names --------------------------------------------------------------------

# Products that only generate images, as they spell themselves in program fields. A word with other
# meanings ("Firefly", "Imagen", "dalle") counts only together with the name of its maker.
_NAMES = (
    r"Adobe Firefly", r"Google Imagen",
    r"DALL[-·•]E", r"DALL ?E ?[23]", r"ChatGPT", r"OpenAI[- ]API", r"GPT-4o", r"gpt-image",  # C2PA
    r"Bing Image Creator", r"Midjourney", r"NovelAI", r"Ideogram(?: AI|\.ai)", r"Leonardo\.ai",
    r"Stable[- ]?Diffusion", r"FLUX\.[12](?:[ -](?:dev|schnell|pro))?", r"Easy Diffusion",
    r"AUTOMATIC1111", r"ComfyUI", r"InvokeAI", r"(?:Ruined)?Fooocus(?:[- ]MRE)?",
    r"(?:Stable)?SwarmUI", r"Draw Things", r"DiffusionBee", r"Mochi Diffusion",
)  # fmt: skip
# Whole words only; a version may follow ("DALL-E-3", "v2").
_GENERATOR = re.compile(
    rf"(?<![\w-])(?:{'|'.join(_NAMES)})(?!-?(?!v?\d)\w)", re.IGNORECASE
)  # fmt: skip
_SIGNATURE = re.compile(
    rf"(?:(?:made|created|generated|produced) (?:with|by|using|in) )?{_GENERATOR.pattern}"
    r"[ -]?(?:v?\d[\w.]*)?\.?", re.IGNORECASE,
)  # fmt: skip

# Fields that only programs write. People write names, titles, captions and keywords elsewhere.
_PROGRAM_FIELDS = {
    "software", "processingsoftware", "creatortool", "softwareagent",  # EXIF and XMP
    "source",  # PNG: NovelAI writes it in addition to Software
    "claim_generator",  # C2PA
}  # fmt: skip
# Fields that programs and people both write: only a text that is nothing but a signature counts.
# Make: Ideogram writes "Ideogram AI" (remove-ai-watermarks, `exif_generator`).
_SIGNED_FIELDS = {"comment", "make"}


def is_named(field: str, text: str) -> bool:
    """Return whether `field` is a field that programs write and `text` names a generator."""
    field = field.lower()
    if field in _PROGRAM_FIELDS:
        return bool(_GENERATOR.search(text[:1000]))
    return field in _SIGNED_FIELDS and is_signature(text)


def is_signature(text: str) -> bool:
    """Return whether `text` is only a generator's name, maybe with "made with" and a version."""
    return len(text) < 200 and bool(_SIGNATURE.fullmatch(text.strip()))


# --- generators by their settings -----------------------------------------------------------------

# Stable Diffusion web UI (`create_infotext` in modules/processing.py) and programs with the same
# format; Draw Things writes "Guidance Scale".
_STEPS = re.compile(r"(?:^|[\s,.;])Steps: ?\d{1,5}\b")
_SETTING = re.compile(r"\b(Sampler|CFG scale|Guidance Scale|Seed): ?[\w-]", re.IGNORECASE)
# Midjourney's Description, as exiftool prints it: "a dog --ar 2:1 --v 6 Job ID: a7421d2f-b262-...".
_JOB = re.compile(r"\bJob ID: [0-9a-f]{8}-[0-9a-f]{4}-")
_PARAMETER = re.compile(
    r"(?:^|\s)--(?:ar|v|s|niji|stylize|style|chaos|raw|seed|q|iw|no|p|profile)\b"
)
# InvokeAI 2: `"a prompt" -s 50 -S 123 -W 512 -H 512 -C 7.5 -A k_lms`, in later versions without the
# quotes (`dream_prompt_str` in ldm/invoke/args.py).
_DREAM = re.compile(r"\s-s ?\d+ -S ?\d+ -W ?\d+ -H ?\d+ -C ?[\d.]+")
# ComfyUI in the EXIF of a WebP: "prompt:{...}" as the model, "workflow:{...}" as the make
# (comfy_api/latest/_ui.py). Third-party nodes write "Prompt:" as the make and "Workflow:" as the
# description (ComfyUI-Saveaswebp).
_PREFIX = re.compile(r"(?:prompt|workflow):\s*(?=\{)", re.IGNORECASE)
# A truncated graph is not valid JSON, but its nodes can still be recognized.
_NODE = re.compile(r'"class_type"\s*:\s*"\w[^"]*"')

# Program, and keys that its JSON always has. The first match wins.
_OBJECTS = (
    ("SwarmUI", {"sui_image_params"}),  # docs/Image Metadata Format.md
    ("Draw Things", {"c", "uc", "model", "steps"}),  # in XMP exif:UserComment
    ("NovelAI", {"uc", "scale", "sampler", "steps", "seed"}),  # PNG Comment
    ("InvokeAI", {"positive_prompt"}),  # invokeai_metadata
    ("InvokeAI", {"app_id", "model_weights", "image"}),  # sd-metadata of version 2
    ("mflux", {"mflux_version", "prompt"}),  # src/mflux/utils/generated_image.py
    ("Fooocus", {"base_model", "prompt", "steps"}),  # modules/meta_parser.py: parameters
    ("Fooocus", {"base_model", "prompt", "performance"}),
    ("Easy Diffusion", {"prompt", "num_inference_steps", "guidance_scale"}),
    ("Easy Diffusion", {"Prompt", "Steps", "Guidance Scale", "Stable Diffusion model"}),
    ("TensorArt", {"prompt", "steps", "cfgScale"}),  # sd-metadata: src/parsers/tensorart.ts
    ("an image generator", {"prompt", "seed", "steps", "sampler"}),
    ("an image generator", {"prompt", "seed", "steps", "guidance"}),
    ("an image generator", {"prompt", "seed", "steps", "cfg_scale"}),
)
_PROMPTS = ("prompt", "positive_prompt", "full_prompt", "c", "Prompt")


def settings_in(text: str) -> str:
    """Return the program whose settings `text` contains, with the prompt: "ComfyUI: a dog". Return
    "" if the text is not settings. The name of the field is not used.
    """
    if _has_settings(text):
        return f"Stable Diffusion settings: {text}"
    job = _JOB.search(text)
    if job and _PARAMETER.search(text, 0, job.start()):
        return f"Midjourney: {text}"
    if _DREAM.search(text):
        return f"InvokeAI: {text}"
    plain = text.strip("\0 \n\t")
    prefix = _PREFIX.match(plain)
    plain = plain[prefix.end() :] if prefix else plain
    if not plain.startswith("{"):
        return ""
    try:
        return settings_of(parse_json(plain, strict=False), plain)
    except ValueError:
        is_graph = _NODE.search(plain) and '"inputs"' in plain
        return f"ComfyUI: {plain}" if is_graph else ""


def _has_settings(text: str) -> bool:
    """Return whether `Steps: 20` is followed by two different settings, including a sampler or a
    guidance scale.
    """
    for steps in itertools.islice(_STEPS.finditer(text), 100):
        near = _SETTING.finditer(text, steps.end(), steps.end() + 1000)
        names = {setting[1].lower() for setting in near}
        if len(names) > 1 and names & {"sampler", "cfg scale", "guidance scale"}:
            return True
    return False


def settings_of(value: Any, text: str = "") -> str:
    """Return program and prompt of the settings in parsed JSON, or in its `prompt` or `workflow`;
    "" if it contains no settings. `text` is the JSON text.
    """
    if not isinstance(value, Mapping):
        return ""
    program = next((name for name, keys in _OBJECTS if keys <= value.keys()), "")
    if program:
        inner = value.get("sui_image_params")
        said = {**value, **inner} if isinstance(inner, Mapping) else value
        prompt = next((said[key] for key in _PROMPTS if isinstance(said.get(key), str)), text)
        return f"{program}: {prompt}"
    if _is_graph(value):
        return f"ComfyUI: {_prompt_in(value) or text}"
    if _is_workflow(value):
        return f"{'InvokeAI' if isinstance(value['nodes'], Mapping) else 'ComfyUI'}: {text}"
    return settings_of(value.get("prompt"), text) or settings_of(value.get("workflow"), text)


def settings_across(texts: Mapping[str, str]) -> str:
    """Return program and prompt of settings that are stored as one text per setting (Easy Diffusion
    in a PNG); "" if the texts are not settings.

    A match needs at least three known names and a number of steps: one name alone proves nothing.
    """
    steps = next(
        (texts[key] for key in ("steps", "Steps", "num_inference_steps") if key in texts), ""
    )
    for program, keys in _OBJECTS:
        if len(keys) > 2 and keys <= texts.keys() and steps.strip().isdecimal():
            return f"{program}: {texts.get('prompt') or texts.get('Prompt') or ''}"
    return ""


def _is_graph(value: Mapping[str, Any]) -> bool:
    """Return whether JSON is a graph that ComfyUI runs: node id -> class_type and inputs."""
    nodes = [node for node in value.values() if isinstance(node, Mapping)]
    return any(
        isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), Mapping)
        for node in nodes
    )


def _is_named(properties: Any) -> bool:
    """Return whether the properties of a node are those that ComfyUI writes."""
    return isinstance(properties, Mapping) and "Node name for S&R" in properties


def _is_workflow(value: Mapping[str, Any]) -> bool:
    """Return whether JSON is a graph of ComfyUI's editor (list of nodes with widgets, and links) or
    of InvokeAI (nodes by name, and edges).
    """
    nodes = value.get("nodes")
    if isinstance(nodes, list) and "links" in value:
        nodes = [node for node in nodes if isinstance(node, Mapping) and "type" in node]
        return any("widgets_values" in node or _is_named(node.get("properties")) for node in nodes)
    if isinstance(nodes, Mapping) and "edges" in value:
        return any(isinstance(node, Mapping) and "is_intermediate" in node
                   for node in nodes.values())  # fmt: skip
    return False


def _prompt_in(graph: Mapping[str, Any]) -> str:
    """Return the texts in a ComfyUI graph, joined by " | "."""
    inputs = [node.get("inputs") for node in graph.values() if isinstance(node, Mapping)]
    texts = [one.get("text") for one in inputs if isinstance(one, Mapping)]
    return " | ".join(text for text in texts if isinstance(text, str) and text.strip())

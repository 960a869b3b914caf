"""Image generators by what they write into files: their names, and the settings they leave.

What each writes was read in its own source where that is public (named beside it):

- https://github.com/AUTOMATIC1111/stable-diffusion-webui
- https://github.com/Comfy-Org/ComfyUI, https://github.com/Kaharos94/ComfyUI-Saveaswebp
- https://github.com/filipstrand/mflux
- https://github.com/invoke-ai/InvokeAI
- https://github.com/lllyasviel/Fooocus
- https://github.com/mcmonkeyprojects/SwarmUI

and elsewhere in readers of such metadata:

- https://github.com/receyuki/stable-diffusion-prompt-reader (Draw Things, Easy Diffusion, NovelAI)
- https://github.com/enslo/sd-metadata (TensorArt)
- https://github.com/wiltodelta/remove-ai-watermarks (Ideogram, xAI, C2PA signers)
"""

import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

# --- generators by their names --------------------------------------------------------------------

# Products that only make pictures, as they name themselves where a program signs. Words that are
# also a place, a plant or a camera ("Firefly", "Imagen", "dalle") are no names without their maker.
_NAMES = (
    r"Adobe Firefly", r"Google Imagen",
    r"DALL[-·•]E", r"DALL ?E ?[23]", r"ChatGPT", r"OpenAI[- ]API", r"GPT-4o", r"gpt-image",  # C2PA
    r"Bing Image Creator", r"Midjourney", r"NovelAI", r"Ideogram(?: AI|\.ai)", r"Leonardo\.ai",
    r"Stable[- ]?Diffusion", r"FLUX\.[12](?:[ -](?:dev|schnell|pro))?", r"Easy Diffusion",
    r"AUTOMATIC1111", r"ComfyUI", r"InvokeAI", r"(?:Ruined)?Fooocus(?:[- ]MRE)?",
    r"(?:Stable)?SwarmUI", r"Draw Things", r"DiffusionBee", r"Mochi Diffusion",
)  # fmt: skip
# Whole words: nothing of a word before it, and behind it a version at most ("DALL-E-3", "v2").
_GENERATOR = re.compile(
    rf"(?<![\w-])(?:{'|'.join(_NAMES)})(?!-?(?!v?\d)\w)", re.IGNORECASE
)  # fmt: skip
_SIGNATURE = re.compile(
    rf"(?:(?:made|created|generated|produced) (?:with|by|using|in) )?{_GENERATOR.pattern}"
    r"[ -]?(?:v?\d[\w.]*)?\.?", re.IGNORECASE,
)  # fmt: skip

# Fields that programs write. Nobody's name, title, caption or keyword is among them.
_PROGRAM_FIELDS = {
    "software", "processingsoftware", "creatortool", "softwareagent",  # EXIF and XMP
    "source",  # PNG: NovelAI fills it beside Software
    "claim_generator",  # C2PA
}  # fmt: skip
# Fields that programs sign and people write in: the signature must be all that stands there.
# Make: Ideogram writes "Ideogram AI" into it (remove-ai-watermarks, `exif_generator`).
_SIGNED_FIELDS = {"comment", "make"}


def is_named(field: str, text: str) -> bool:
    """Whether a field of this name is one that programs write, and names a generator."""
    field = field.lower()
    if field in _PROGRAM_FIELDS:
        return bool(_GENERATOR.search(text[:1000]))
    return field in _SIGNED_FIELDS and is_signature(text)


def is_signature(text: str) -> bool:
    """Whether a text is a generator's name with its version, or "made with" it, and no more."""
    return len(text) < 200 and bool(_SIGNATURE.fullmatch(text.strip()))


# --- generators by the settings they leave --------------------------------------------------------

# Stable Diffusion web UI (`create_infotext` in modules/processing.py) and all that write as it
# does; Draw Things says "Guidance Scale".
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
# ComfyUI's in the EXIF of a WebP: "prompt:{...}" as the model, "workflow:{...}" as the make
# (comfy_api/latest/_ui.py); nodes of others write "Prompt:" as the make and "Workflow:" as the
# description (ComfyUI-Saveaswebp).
_PREFIX = re.compile(r"(?:prompt|workflow):\s*(?=\{)", re.IGNORECASE)
# A graph cut short is no JSON; its nodes are still there.
_NODE = re.compile(r'"class_type"\s*:\s*"\w[^"]*"')

# Program, the keys that its JSON has at least. The first that fits is named.
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
    """The program whose settings a text is, and its prompt: "ComfyUI: a dog"; "" if it is none.

    Only the content is judged: what the field is called says nothing.
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
        return settings_of(json.loads(plain, strict=False), plain)
    except (ValueError, RecursionError):
        is_graph = _NODE.search(plain) and '"inputs"' in plain
        return f"ComfyUI: {plain}" if is_graph else ""


def _has_settings(text: str) -> bool:
    """Whether `Steps: 20` is followed by a sampler and another setting, or by guidance and seed."""
    for steps in itertools.islice(_STEPS.finditer(text), 100):
        near = _SETTING.finditer(text, steps.end(), steps.end() + 1000)
        names = {setting[1].lower() for setting in near}
        if len(names) > 1 and names & {"sampler", "cfg scale", "guidance scale"}:
            return True
    return False


def settings_of(value: Any, text: str = "") -> str:
    """The program and prompt in what JSON held (`text`), or in its `prompt` and `workflow`; "" if
    there is none.
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
    """The program and prompt of settings that stand in a text each, as Easy Diffusion writes them
    into a PNG; "" if they are none. One such name says nothing: at least three, and a number.
    """
    steps = next(
        (texts[key] for key in ("steps", "Steps", "num_inference_steps") if key in texts), ""
    )
    for program, keys in _OBJECTS:
        if len(keys) > 2 and keys <= texts.keys() and steps.strip().isdecimal():
            return f"{program}: {texts.get('prompt') or texts.get('Prompt') or ''}"
    return ""


def _is_graph(value: Mapping[str, Any]) -> bool:
    """Whether it is a graph that ComfyUI runs: number of a node -> its class_type and inputs."""
    nodes = [node for node in value.values() if isinstance(node, Mapping)]
    return any(
        isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), Mapping)
        for node in nodes
    )


def _is_workflow(value: Mapping[str, Any]) -> bool:
    """Whether it is a graph as ComfyUI's page draws it (nodes with widgets, and links), or one of
    InvokeAI's (nodes by their names, and edges).
    """
    nodes = value.get("nodes")
    if isinstance(nodes, list) and "links" in value:
        nodes = [node for node in nodes if isinstance(node, Mapping) and "type" in node]
        return any(
            "widgets_values" in node or "Node name for S&R" in (node.get("properties") or ())
            for node in nodes
        )
    if isinstance(nodes, Mapping) and "edges" in value:
        return any(isinstance(node, Mapping) and "is_intermediate" in node
                   for node in nodes.values())  # fmt: skip
    return False


def _prompt_in(graph: Mapping[str, Any]) -> str:
    """The texts in a graph of ComfyUI."""
    inputs = [node.get("inputs") for node in graph.values() if isinstance(node, Mapping)]
    texts = [one.get("text") for one in inputs if isinstance(one, Mapping)]
    return " | ".join(text for text in texts if isinstance(text, str) and text.strip())

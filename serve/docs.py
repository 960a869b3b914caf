"""Make the HTML page `/docs` that documents the HTTP API.

Main entry: `docs_page(document, limits)` returns the page as HTML text: the routes, the fields of
the answers and the limits, filled into the file `TEMPLATE`. The page has no scripts and loads
nothing from other hosts.

- `document`: the OpenAPI document of the API of `serve/api.py`, a dict:
  `make_app(service).openapi()`.
- `limits`: the limits of the server, a `Limits` of `serve/limits.py`: `service.limits`.
"""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from serve.limits import MAX_JSON_BYTES, MB, Limits

TEMPLATE = Path(__file__).with_name("docs.html")


def docs_page(document: dict[str, Any], limits: Limits) -> str:
    """Return the HTML page that describes an OpenAPI document and the limits of this server."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["code"] = _code
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    routes = [
        {"method": method.upper(), "path": path, **operation}
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    schemas = [
        (
            name,
            document["components"]["schemas"][name]["description"],
            {
                field: _type_of(schema)
                for field, schema in document["components"]["schemas"][name]["properties"].items()
            },
        )
        for name in ("Answer", "Row", "Statement", "Reason")
    ]
    return template.render(
        info=document["info"], routes=routes, schemas=schemas, limits=limits,
        megabytes=f"{limits.max_bytes / MB:g}",
        list_megabytes=f"{min(limits.max_bytes, MAX_JSON_BYTES) / MB:g}",
    )  # fmt: skip


def _code(text: str) -> Markup:
    """Return a text as HTML, with `code` in backticks marked as such."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _type_of(schema: dict[str, Any]) -> str:
    """Describe the type of a JSON schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(map(_type_of, schema["anyOf"]))
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    if "prefixItems" in schema:
        return f"[{', '.join(map(_type_of, schema['prefixItems']))}]"
    if schema["type"] == "array":
        return f"list of {_type_of(schema['items'])}"
    return str(schema["type"])

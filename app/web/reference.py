"""The description of the API as a page. The usual viewer loads scripts from elsewhere, which no page of ours may."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from app.web import render

router = APIRouter(include_in_schema=False)


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    description: dict[str, Any] = request.app.openapi()
    schemas = description["components"]["schemas"]
    calls = [
        {
            "method": method.upper(),
            "path": path,
            "tag": operation["tags"][0],
            "summary": operation["summary"],
            "description": operation.get("description", ""),
            "parameters": [
                {**parameter, "kind": _kind(parameter["schema"]), "default": parameter["schema"].get("default")}
                for parameter in operation.get("parameters", [])
            ],
            "fields": _fields(operation, schemas),
            "answers": operation["responses"],
        }
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    tags = list(dict.fromkeys(call["tag"] for call in calls))
    return render.page(
        "reference.html",
        caller=None,
        version=description["info"]["version"],
        groups={tag: [call for call in calls if call["tag"] == tag] for tag in tags},
    )


def _fields(operation: dict[str, Any], schemas: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of a call's body: their names, kinds and meanings."""
    content = operation.get("requestBody", {}).get("content", {})
    found = []
    for body in content.values():
        schema = body["schema"]
        schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        required = schema.get("required", [])
        for name, field in schema.get("properties", {}).items():
            about = {"description": field.get("description", ""), "default": field.get("default")}
            found.append({"name": name, "kind": _kind(field), "required": name in required, **about})
    return found


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(choice) for choice in field["anyOf"] if choice.get("type") != "null")
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if field.get("type") == "array":
        return f"{_kind(field['items'])}, one or more"
    return str(field.get("format") or field.get("type", "any")) + _limits(field)


def _limits(field: dict[str, Any]) -> str:
    if "minimum" in field and "maximum" in field:
        return f", {int(field['minimum']):,} to {int(field['maximum']):,}"
    return f", up to {field['maxLength']} characters" if "maxLength" in field else ""

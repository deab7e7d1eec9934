"""The OpenAPI description of the endpoints, as /openapi.json gives it."""

from __future__ import annotations

from typing import Any

from vitfast.version import __version__

_INPUT = {
    "oneOf": [
        {"type": "string", "description": "An image as data:image/png;base64,... or, for a CLIP or SigLIP, a text"},
        {
            "type": "object",
            "description": 'An object with such a URL or a text: {"image_url": {"url": "data:..."}}, {"text": "a cat"}',
        },
    ]
}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS = {
    "400": "The request or an image cannot be used.",
    "401": "The API key is missing or wrong.",
    "404": "There is no such model.",
    "406": "Answers come in none of the formats that Accept names.",
    "408": "The body came too slowly.",
    "413": "Too many bytes, images or texts.",
    "415": "Neither JSON nor a multipart form.",
    "429": "Too busy; Retry-After says when to come again.",
    "503": "Starting, ending, or no answer in time.",
}


def _post(summary: str, fields: dict[str, Any], answer: str) -> dict[str, Any]:
    fields = {"model": {"type": "string", "description": "The first by default."}, **fields}
    both = {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["input"],
                "properties": {"input": {"oneOf": [_INPUT, {"type": "array", "items": _INPUT}]}, **fields},
            }
        },
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    "text": _TEXTS,
                    **fields,
                },
            }
        },
    }
    refusals = {
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in _REFUSALS.items()
    }
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": both},
            "responses": {"200": {"description": answer}, **refusals},
        }
    }


def _get(summary: str) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": {"200": {"description": summary}}}}


def document() -> dict[str, Any]:
    """All of it."""
    embed = _post(
        "Embed images and texts",
        {"encoding_format": {"enum": ["float", "base64"]}, "dimensions": {"type": "integer"}},
        "In OpenAI's shape; raw float32 or an Arrow stream where Accept asks for it.",
    )
    classify = _post(
        "The likeliest classes: the model's own, or labels compared with the images",
        {"topk": {"type": "integer", "minimum": 1}, "labels": _TEXTS, "templates": _TEXTS},
        "Best first, for each image.",
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "vitfast", "version": __version__},
        "paths": {
            "/v1/embeddings": embed,
            "/embeddings": embed,
            "/classify": classify,
            "/similarity": _post("Cosines between images and texts", {}, "A matrix [N, N]."),
            "/dense": _post(
                "Features of patches", {}, "Rows, columns and float32 in base64; raw float32 where Accept asks for it."
            ),
            "/models": _get("The models there are"),
            "/v1/models": _get("The models there are"),
            "/health/live": _get("The process answers"),
            "/health/ready": _get("Requests are taken; 503 while starting and ending"),
            "/metrics": _get("Numbers for Prometheus"),
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }

"""Print the JSON schema of everything that the page sends and receives: the models themselves, so nothing can drift."""

import json
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gorgon_gateway.rest import ErrorAnswer, GatewayInfo, Health
from gorgon_protocol import messages, requests

_SENT = (requests.GenerateRequest, requests.CancelRequest)
_RECEIVED = (messages.StatusMessage, messages.TokenMessage, messages.FinishedMessage, messages.ErrorMessage)
_ANSWERED: dict[str, type[BaseModel]] = {"info": GatewayInfo, "health": Health, "refused": ErrorAnswer}  # over HTTP


def _untitled(schema: Any) -> Any:
    """Fields' titles repeat their names, and would each become a type of its own."""
    if isinstance(schema, list):
        return [_untitled(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    is_field = "title" in schema and isinstance(schema["title"], str)
    return {name: _untitled(value) for name, value in schema.items() if not (is_field and name == "title")}


def main() -> None:
    _, definitions = models_json_schema([(model, "validation") for model in _SENT], ref_template="#/$defs/{model}")
    models: list[type[BaseModel]] = [*_RECEIVED, *_ANSWERED.values()]
    _, received = models_json_schema([(model, "serialization") for model in models], ref_template="#/$defs/{model}")
    for name, model in received["$defs"].items():
        if name == Health.__name__:
            continue  # its defaults are left out
        model["required"] = list(model["properties"])  # as the page reads it: what was left out is null there
    schema = {
        "type": "object",
        "required": ["sent", "received", *_ANSWERED],
        "additionalProperties": False,
        "properties": {
            "sent": {"anyOf": [{"$ref": f"#/$defs/{model.__name__}"} for model in _SENT]},
            "received": {"anyOf": [{"$ref": f"#/$defs/{model.__name__}"} for model in _RECEIVED]},
            **{name: {"$ref": f"#/$defs/{model.__name__}"} for name, model in _ANSWERED.items()},
        },
        "$defs": _untitled({**definitions["$defs"], **received["$defs"]}),
    }
    print(json.dumps(schema))


if __name__ == "__main__":
    main()

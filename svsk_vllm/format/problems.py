# SPDX-License-Identifier: Apache-2.0
"""What pydantic found wrong, in this project's words."""

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["problem_text", "shown"]

_SHOWN_CHARACTERS: Final = 100

_EXPECTED: Final = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "mapping_type": "a mapping of keys",
    "missing": "a value",
    "model_type": "a mapping of keys",
    "multiple_of": "a multiple of {multiple_of}",
    "string_type": "text",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
    "tuple_type": "a list",
}
"""By pydantic's kinds of errors, with the values of their context."""


def shown(value: Any) -> str:
    """A value for a message: cut short where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def problem_text(item: Mapping[str, Any]) -> str:
    """What is wrong, what was expected and what was found; without where.

    Args:
        item: one of ``ValidationError.errors()``.
    """
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key (got {shown(item['input'])})"
    if kind == "missing":
        return "is missing"
    if kind in _EXPECTED:
        expected = _EXPECTED[kind].format(**context).replace("'", "")
        return f"expected {expected}, got {shown(item['input'])}"
    if kind == "json_invalid":
        return f"not valid JSON ({context['error']})"
    if kind != "value_error":
        text = str(item["msg"])
        return text[0].lower() + text[1:]
    text = str(context["error"])  # of the project's own validators
    given = item["input"]
    said = str(given) in text or not isinstance(given, str | int | float)
    return text if said else f"{text} (got {shown(given)})"

# SPDX-License-Identifier: Apache-2.0
"""Comparing and keeping the arguments that a model calls its decoder blocks with."""

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["Comparison", "containers"]


def containers(value: Any) -> Any:
    """A nest of dictionaries, lists and tuples built anew around the same leaves.

    A model may change a dictionary or a list between two blocks; what was noted of the first stays
    as it was.
    """
    if type(value) is dict:
        return {key: containers(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(containers(item) for item in value)
    return value


class Comparison:
    """Compares nests of values that hold tensors, and objects without equality such as caches.

    What was found equal is remembered by identity: all blocks of a model share one mask, which is
    compared once. So both sides must stay alive while the comparison does.
    """

    def __init__(self) -> None:
        # Keeps both alive, so that no id is used again.
        self._equal: dict[tuple[int, int], tuple[Any, Any]] = {}

    def difference(self, left: Any, right: Any) -> str | None:
        """Where two values differ, such as ``attention_mask`` or ``cache.layers[0].keys``.

        None if they are equal.

        Tensors are equal with the same dtype, shape and values (NaN equals NaN), numbers, strings,
        dtypes, devices and the like with the same type and value, containers item by item,
        functions with the same code and closure, and other objects of one class by their
        attributes.
        """
        args, kwargs = left
        other_args, other_kwargs = right
        return self._differ(list(args), list(other_args), "argument ") or self._differ(
            kwargs, other_kwargs, ""
        )

    def _differ(self, left: Any, right: Any, where: str) -> str | None:
        key = (id(left), id(right))
        if left is right or key in self._equal:
            return None
        if type(left) is not type(right):
            return where
        self._equal[key] = (left, right)  # before its parts: one may refer back to it
        difference = self._parts(left, right, where)
        if difference is not None:
            del self._equal[key]
        return difference

    def _parts(self, left: Any, right: Any, where: str) -> str | None:
        if isinstance(left, torch.Tensor):
            return None if _equal_tensors(left, right) else where
        if isinstance(left, Mapping):
            if left.keys() != right.keys():
                return where or "its keywords"
            dot = f"{where}." if where else ""
            return _first(self._differ(left[key], right[key], f"{dot}{key}") for key in left)
        if isinstance(left, list | tuple):
            if len(left) != len(right):
                return where
            inside = (
                f"{where}{i}" if where.endswith(" ") else f"{where}[{i}]" for i in range(len(left))
            )
            return _first(
                self._differ(a, b, name) for a, b, name in zip(left, right, inside, strict=True)
            )
        if isinstance(left, types.FunctionType | functools.partial):
            return self._differ(_parts_of(left), _parts_of(right), where)
        if isinstance(left, float) and math.isnan(left) and math.isnan(right):
            return None
        own_equality = getattr(type(left), "__eq__", None) is not getattr(object, "__eq__", None)
        if own_equality and not dataclasses.is_dataclass(left):
            return None if bool(left == right) else where
        attributes = _attributes(left)
        if not attributes and not hasattr(left, "__dict__"):
            return where  # a dtype, say, which is one object per value
        return self._differ(attributes, _attributes(right), where)


def _parts_of(function: Any) -> tuple[Any, ...]:
    """What tells one function, or one partial application, from another."""
    if isinstance(function, functools.partial):
        return function.func, function.args, function.keywords
    return (
        function.__code__,
        function.__defaults__,
        [cell.cell_contents for cell in function.__closure__ or ()],
    )


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes of an object, those in slots too."""
    slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
    return {
        **{name: getattr(value, name) for name in slots if hasattr(value, name)},
        **getattr(value, "__dict__", {}),
    }


def _equal_tensors(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape or left.device != right.device:
        return False
    return torch.equal(left, right) or bool(
        left.is_floating_point() and torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)
    )


def _first(differences: Any) -> str | None:
    return next((item for item in differences if item is not None), None)

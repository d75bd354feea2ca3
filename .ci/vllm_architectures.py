# SPDX-License-Identifier: Apache-2.0
"""Writes ``svsk_vllm/format/architectures.json``: what vLLM fuses, per architecture it registers.

And whose embedding or output head must stay dense, because vLLM's code reads its weight.

    python .ci/vllm_architectures.py [--write]

The table is read from the source of the installed vLLM, not from its classes: a third of them
cannot be imported where an optional package (torchvision, say) is missing, and what the table says
must not depend on that. The tests compare it with the classes that can be imported. Without
``--write`` the command says whether the table is up to date.

What is fused, a class says in ``packed_modules_mapping``, which it may complete while it is built
(``self.packed_modules_mapping["fused_qkv_a_proj"] = [...]``); where it says nothing, its mapper of
names (``orig_to_new_stacked``) or its loader (``stacked_params_mapping``) does. Conditions are not
looked at: a set of which a model has only one linear, or none, asks nothing of it.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

__all__ = ["TABLE", "read_table", "write_table"]

TABLE: Final = Path(__file__).resolve().parents[1] / "svsk_vllm/format/architectures.json"

_MODELS: Final = "vllm.model_executor.models"
_TEXT: Final = "_TEXT_GENERATION_MODELS"
_BACKEND: Final = "_TRANSFORMERS_SUPPORTED_MODELS"
_REGISTRIES: Final = (_TEXT, "_MULTIMODAL_MODELS", _BACKEND)
_REMOVED: Final = "_PREVIOUSLY_SUPPORTED_MODELS"
_USUAL: Final = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""What is assumed where the class does not tell.

The backend for transformers' classes finds what reads one input by tracing, and a multimodal class
hands its text to another class, which the configuration of the model chooses.
"""

_TABLES: Final = {"embed_tokens", "embedding", "word_embeddings", "wte", "lm_head", "output_layer"}
"""What vLLM's classes call an embedding table or an output head."""

Fused = dict[str, list[str]]
"""Parts by the name of the layer that vLLM makes of them."""


@dataclass
class _Module:
    """The syntax tree of one of vLLM's modules."""

    name: str
    tree: ast.Module
    is_package: bool

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)}

    @cached_property
    def imports(self) -> dict[str, list[tuple[str, str]]]:
        """Where each imported name comes from; several places where a condition chooses one."""
        found: dict[str, list[tuple[str, str]]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                package = self.name.split(".")
                up = node.level - self.is_package if node.level else len(package)
                base = (
                    [*package[: len(package) - up], *filter(None, [node.module])]
                    if node.level
                    else [node.module]
                )
                for alias in node.names:
                    place = (".".join(map(str, base)), alias.name)
                    found.setdefault(alias.asname or alias.name, []).append(place)
        return found

    def assigned(self, name: str) -> ast.expr | None:
        """Value that the module gives to a name at its top level."""
        return _assigned(self.tree.body, name)


@dataclass(frozen=True)
class _Class:
    """A class of vLLM."""

    module: _Module
    node: ast.ClassDef


@dataclass
class _Sources:
    """vLLM's source, read as needed."""

    root: Path
    _modules: dict[str, _Module | None] = field(default_factory=dict)

    def module(self, name: str) -> _Module | None:
        """A module of vLLM by its dotted name; None for what is not vLLM's."""
        if name not in self._modules:
            parts = name.split(".")
            stem = self.root.joinpath(*parts[1:])
            paths = [stem.with_suffix(".py"), stem / "__init__.py"] if parts[0] == "vllm" else []
            path = next((path for path in paths if path.is_file()), None)
            tree = ast.parse(path.read_text(encoding="utf-8")) if path else None
            self._modules[name] = (
                _Module(name, tree, path.name == "__init__.py") if path and tree else None
            )
        return self._modules[name]

    def find(self, module: str, name: str) -> _Class | None:
        """A class by the module that holds or imports it."""
        found = self.module(module)
        if found is None:
            return None
        if name in found.classes:
            return _Class(found, found.classes[name])
        places = [place for place in found.imports.get(name, []) if place != (module, name)]
        return next((there for place in places if (there := self.find(*place))), None)

    def lineage(self, owner: _Class) -> list[_Class]:
        """The class and its bases in the order of their look-up, without vLLM's interfaces."""
        order = [owner]
        for base in owner.node.bases:
            if isinstance(base, ast.Name) and (found := self.find(owner.module.name, base.id)):
                order += self.lineage(found)
        # the last place of each
        kept = {(cls.module.name, cls.node.name): index for index, cls in enumerate(order)}
        return [
            order[i]
            for i in sorted(kept.values())
            if not order[i].module.name.endswith(".interfaces")
        ]

    def attribute(self, owner: _Class, name: str) -> Any:
        """Value of a class attribute; None where there is none, or it is computed."""
        for cls in self.lineage(owner):
            value = _assigned(cls.node.body, name)
            if value is not None:
                return self.value(cls, value)
        return None

    def value(self, owner: _Class, node: ast.expr) -> Any:
        """Value of an expression in a class body, as far as it is written out; None otherwise."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.List | ast.Tuple):
            return [self.value(owner, item) for item in node.elts]
        if isinstance(node, ast.Dict):
            merged: dict[Any, Any] = {}
            for key, item in zip(node.keys, node.values, strict=True):
                inner = self.value(owner, item)
                merged |= {self.value(owner, key): inner} if key is not None else inner or {}
            return merged
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            left, right = (self.value(owner, side) or {} for side in (node.left, node.right))
            return left | right
        if isinstance(node, ast.Call):
            return self._mapper(owner, node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            other = self.find(owner.module.name, node.value.id)
            return self.attribute(other, node.attr) if other else None
        if isinstance(node, ast.Subscript):
            return (self.value(owner, node.value) or {}).get(self.value(owner, node.slice))
        if isinstance(node, ast.Name) and (value := owner.module.assigned(node.id)) is not None:
            return self.value(owner, value)
        return None

    def _mapper(self, owner: _Class, node: ast.Call) -> dict[str, Any] | None:
        """A ``WeightsMapper`` as one dictionary: of its entries only those that stack."""
        if not (isinstance(node.func, ast.Name) and node.func.id == "WeightsMapper"):
            return None
        stacked = next(
            (word.value for word in node.keywords if word.arg == "orig_to_new_stacked"), None
        )
        return {} if stacked is None else self.value(owner, stacked)


def read_table() -> dict[str, Any]:
    """The table of the installed vLLM, as it is stored.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("vLLM is not installed.")
    sources = _Sources(Path(spec.origin).parent)
    registry = sources.module(f"{_MODELS}.registry")
    assert registry is not None, "every vLLM has a registry"
    groups: dict[str, dict[str, Any]] = {}
    for table in _REGISTRIES:
        for architecture, (module, name) in _literal(registry, table).items():
            own = table != _BACKEND
            fused = _fused(sources, _full_name(module), name) if own else {}
            entry: dict[str, Any] = {} if own else {"transformers": True}
            if own and _reads_tables(sources, _full_name(module), name):
                entry["dense_tables"] = True
            entry["fused"] = dict(sorted((fused if table == _TEXT else _USUAL | fused).items()))
            groups.setdefault(json.dumps(entry), {**entry, "architectures": []})[
                "architectures"
            ].append(architecture)
    for entry in groups.values():
        entry["architectures"].sort()
    return {
        "vllm": _version(),
        "groups": sorted(
            groups.values(),
            key=lambda entry: (-len(entry["architectures"]), entry["architectures"]),
        ),
        "removed": dict(sorted(_literal(registry, _REMOVED).items())),
    }


def write_table(table: Mapping[str, Any], path: Path = TABLE) -> None:
    """Write the table, one line per group, so that a change of vLLM's can be read in a diff."""
    groups = ",\n".join("  " + json.dumps(group) for group in table["groups"])
    text = (
        f'{{"vllm": {json.dumps(table["vllm"])},\n "groups": [\n{groups}\n ],\n '
        f'"removed": {json.dumps(table["removed"])}}}\n'
    )
    path.write_text(text, encoding="utf-8")


def _fused(sources: _Sources, module: str, name: str) -> Fused:
    """What a model class fuses."""
    owner = sources.find(module, name)
    if owner is None:
        raise LookupError(
            f"{module}: no class {name}. vLLM's registry has changed; this reader must follow."
        )
    fused: Fused = dict(sources.attribute(owner, "packed_modules_mapping") or {})
    for cls in sources.lineage(owner):
        fused |= dict(_completed(cls.node))
    told = [_last_names(parts) for parts in fused.values()]
    for target, parts in _stacked(sources, owner).items():
        if not any(_last_names(parts) <= others for others in told):
            fused.setdefault(target, parts)
    return fused


def _reads_tables(sources: _Sources, module: str, name: str) -> bool:
    """Whether code beside a model class, other than what loads, reads ``embed_tokens.weight``."""
    owner = sources.find(module, name)
    trees = {cls.module.name: cls.module.tree for cls in sources.lineage(owner)} if owner else {}
    return any(_reads_weight(tree) for tree in trees.values())


def _reads_weight(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef) and node.name == "load_weights":
        return False
    if isinstance(node, ast.Attribute) and node.attr == "weight":
        of = node.value
        holder = of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", None)
        if holder in _TABLES:
            return True
    return any(_reads_weight(child) for child in ast.iter_child_nodes(node))


def _last_names(parts: list[str]) -> set[str]:
    return {part.rpartition(".")[2] for part in parts}


def _completed(node: ast.ClassDef) -> Iterator[tuple[str, list[str]]]:
    """Entries that a class adds to ``self.packed_modules_mapping`` while it is built."""
    for inner in ast.walk(node):
        if not (
            isinstance(inner, ast.Assign) and isinstance(target := inner.targets[0], ast.Subscript)
        ):
            continue
        if (
            isinstance(target.value, ast.Attribute)
            and target.value.attr == "packed_modules_mapping"
        ):
            yield ast.literal_eval(target.slice), ast.literal_eval(inner.value)


def _stacked(sources: _Sources, owner: _Class) -> Fused:
    """What the mapper of names and the loader of a class put together."""
    pairs: list[tuple[str, str]] = []
    mapper = sources.attribute(owner, "hf_to_vllm_mapper") or {}
    pairs += [(target[0], part) for part, target in mapper.items() if isinstance(target, list)]
    for cls in sources.lineage(owner):
        for node in ast.walk(cls.module.tree):
            if (
                isinstance(node, ast.Assign)
                and _name_of(node.targets[0]) == "stacked_params_mapping"
            ):
                rows = sources.value(cls, node.value) or []
                pairs += [
                    (row[0], row[1]) for row in rows if isinstance(row, list) and len(row) == 3
                ]
    fused: Fused = {}
    for target, part in pairs:
        parts = fused.setdefault(target.strip("."), [])
        if part.strip(".") not in parts:
            parts.append(part.strip("."))
    return fused


def _assigned(body: list[ast.stmt], name: str) -> ast.expr | None:
    """Value of the last plain assignment to a name among some statements."""
    found: ast.expr | None = None
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = node.value if name in map(_name_of, targets) else found
    return found


def _name_of(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _literal(registry: _Module, name: str) -> dict[str, Any]:
    value = registry.assigned(name)
    if value is None:
        raise LookupError(
            f"{registry.name}: no {name}. vLLM's registry has changed; this reader must follow."
        )
    table: dict[str, Any] = ast.literal_eval(value)
    return table


def _full_name(module: str) -> str:
    return module if module.startswith("vllm.") else f"{_MODELS}.{module}"


def _version() -> str:
    """Version of whichever distribution provides vLLM, without a local part."""
    names = importlib.metadata.packages_distributions()["vllm"]
    return importlib.metadata.version(names[0]).partition("+")[0]


def main() -> int:
    """Write the table, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description="The table of what vLLM fuses, per architecture.")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    table = read_table()
    if parser.parse_args().write:
        write_table(table)
        return 0
    stored = json.loads(TABLE.read_text(encoding="utf-8"))
    if stored == table:
        return 0
    sys.stderr.write(
        f"{TABLE}: made from vLLM {stored['vllm']}, installed is {table['vllm']}: run with"
        " --write.\n"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())

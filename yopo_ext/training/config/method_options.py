"""The methods and their options as the sources of `methods/` declare them, read without importing PyTorch.

Help texts and the command line's parser need names, types, defaults and explanations alone. Importing the methods for them would
cost seconds. A test holds what is read here against the classes.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Optional

from yopo_ext.training.nearest import nearest

FOLDER = Path(__file__).parent.parent / "methods"
TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str}


@dataclass(frozen=True)
class Declaration:
    """One option of one method."""

    type: Any  # as `typing.get_type_hints` gives it
    default: Any
    help: str


@cache
def declared_methods() -> dict[str, dict[str, Declaration]]:
    """Every method's options by name, in the order of `METHODS`."""
    classes: dict[str, tuple[str | None, list[str], dict[str, Declaration]]] = {}
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                classes[node.name] = (_name_of(node), bases, _options_of(node))

    def options(cls: str) -> dict[str, Declaration]:
        if cls not in classes:
            return {}
        inherited = {name: found for base in classes[cls][1] for name, found in options(base).items()}
        return {**inherited, **classes[cls][2]}

    return {str(classes[cls][0]): options(cls) for cls in _listed()}


def check_method_name(text: str) -> None:
    """Raise ValueError unless the text, "yopo-5-3:persist" say, begins with the name of a method."""
    names, head = declared_methods(), text.strip().partition(":")[0]
    if not any(head == name or head.startswith(f"{name}-") for name in names):
        close = nearest(re.sub(r"(-\d+)+$", "", head), names)
        raise ValueError(f"method must be one of {', '.join(names)}; got {head!r}{close}")


def _listed() -> list[str]:
    """The classes in `METHODS`, in its order."""
    for node in ast.parse((FOLDER / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "METHODS":
            assert isinstance(node.value, ast.DictComp)
            listed = node.value.generators[0].iter
            assert isinstance(listed, ast.Tuple)
            return [item.id for item in listed.elts if isinstance(item, ast.Name)]
    raise AssertionError("methods/__init__.py has no METHODS")


def _name_of(cls: ast.ClassDef) -> str | None:
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "name":
            return None if node.value is None else ast.literal_eval(node.value)
    return None


def _options_of(cls: ast.ClassDef) -> dict[str, Declaration]:
    found = {}
    for node in cls.body:
        value = node.value if isinstance(node, ast.AnnAssign) else None
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "option":
            assert isinstance(node, ast.AnnAssign)
            assert isinstance(node.target, ast.Name)
            default, text = (ast.literal_eval(argument) for argument in value.args)
            found[node.target.id] = Declaration(_type_of(node.annotation), default, text)
    return found


def _type_of(annotation: ast.expr) -> Any:
    if isinstance(annotation, ast.Name):
        return TYPES[annotation.id]
    if isinstance(annotation, ast.BinOp):  # TYPE | None
        return Optional[_type_of(annotation.left)]  # noqa: UP045  (there is no operator for a type held in a variable)
    assert isinstance(annotation, ast.Subscript)  # Literal[...]
    return Literal[ast.literal_eval(annotation.slice)]

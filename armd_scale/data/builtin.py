"""English text and code from the Python installation, for a first run without a download."""

import ast
import builtins
import functools
import importlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


@functools.cache
def python_documents() -> tuple[str, ...]:
    """The language reference and the docstrings of the standard library, with the signatures that they document.

    Each reference topic and each module is a document. Documents are sorted by name; repeated docstrings are left out.
    The text depends on the Python version only.
    """
    return tuple(_python_documents())


def _python_documents() -> Iterator[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    seen: set[str] = set()
    for name in sorted(topics):
        if topics[name] not in seen:
            seen.add(topics[name])
            yield topics[name].strip() + "\n"
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not _NOT_LIBRARY.intersection(path.relative_to(root).parts):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError, OSError):
                continue  # test data of the standard library, in odd encodings
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            text = _documented(module, _heads(tree), seen)
            if text:
                yield text
    for name in sorted({"builtins", *sys.builtin_module_names} - {"__main__"}):
        compiled = builtins if name == "builtins" else importlib.import_module(name)
        text = _documented(name, _compiled_heads(compiled), seen)
        if text:
            yield text


def _heads(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(signature, docstring) of a module and of its definitions, in the order of the source."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        if isinstance(node, ast.Module):
            yield "", docstring
        elif isinstance(node, ast.ClassDef):
            yield f"class {node.name}:", docstring
        else:
            yield f"def {node.name}({ast.unparse(node.args)}):", docstring


def _compiled_heads(module: object) -> Iterator[tuple[str, str]]:
    """(name, docstring) of a module written in C and of its definitions."""
    yield "", getattr(module, "__doc__", None) or ""
    for name, value in sorted(vars(module).items()):
        docstring = getattr(value, "__doc__", None)
        if name.startswith("_") or not callable(value) or not isinstance(docstring, str):
            continue
        yield name, docstring
        if isinstance(value, type):
            for method, entry in sorted(vars(value).items()):
                docstring = getattr(entry, "__doc__", None)
                if not method.startswith("_") and isinstance(docstring, str):
                    yield f"{name}.{method}", docstring


def _documented(name: str, heads: Iterator[tuple[str, str]], seen: set[str]) -> str:
    parts = []
    for head, docstring in heads:
        docstring = docstring.strip()
        if docstring and docstring not in seen:
            seen.add(docstring)
            parts.append(f"{head}\n{docstring}\n" if head else f"{docstring}\n")
    return f"module {name}\n\n" + "\n".join(parts) if parts else ""

"""What `kimi-k26 check` says of the code in a checkpoint folder, which is read and not run."""

import ast
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint_kimi_k26 import Finding


def judge_code(folder: Path, contents: dict) -> list[Finding]:
    """Classes that JSON files point at with `auto_map`, and that the folder's code does not have. A folder without any is sound."""
    if not any(folder.glob("*.py")):
        return []
    findings, known = [], {}
    for file, content in contents.items():
        named = (content or {}).get("auto_map", {})
        if not isinstance(named, dict):
            findings.append(Finding(file, "auto_map", f"must be an object of class names, got {named!r}"))
            continue
        for key, value in named.items():
            for name in value if isinstance(value, list) else [value]:
                module, dot, made = name.rpartition(".") if isinstance(name, str) else ("", "", "")
                if name is None or isinstance(name, str) and "--" in name:  # no fast tokenizer; code of another repository
                    continue
                if not dot:
                    findings.append(Finding(file, f"auto_map.{key}", f"must be module.Class, got {name!r}"))
                    continue
                findings += _module(folder, module, known)
                if known[module] is not None and made not in known[module]:
                    findings.append(Finding(file, f"auto_map.{key}", f"is {name}, which {module}.py does not define"))
    return findings


def _module(folder: Path, module: str, known: dict[str, set | None]) -> list[Finding]:
    """What is wrong with a module of the folder and with those that it imports. What each defines goes into `known`, `None` where it
    cannot be read."""
    if module in known:
        return []
    file, known[module], findings = f"{module}.py", None, []
    try:
        nodes = list(_statements(ast.parse((folder / file).read_bytes()).body))
    except FileNotFoundError:
        return [Finding(file, None, "is missing: the folder's code imports it")]
    except (OSError, SyntaxError, ValueError) as error:
        return [Finding(file, None, f"is no code that can be imported: {error}")]
    known[module] = {name for node in nodes for name in _defined(node)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            findings += _module(folder, node.module, known)
            for name in node.names if known[node.module] is not None else ():
                if name.name not in known[node.module] and name.name != "*":
                    findings.append(Finding(f"{node.module}.py", None, f"does not define {name.name}, which {file} imports"))
    return findings


def _statements(body: list) -> Iterator[ast.AST]:
    """What runs when a module is imported."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            for part in ("body", "orelse", "finalbody", "handlers"):
                yield from _statements(getattr(node, part, []))


def _defined(node: ast.AST) -> list[str]:
    """Names that a statement gives to something."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(name.asname or name.name).partition(".")[0] for name in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]

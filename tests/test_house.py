"""The rules of the house: layers, doors, sizes, docstrings; and words that do not belong here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vidbatch"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"errors", "data", "quantities"},
    {"config", "storage", "progress", "media", "sampling"},
    {"audio", "probe", "plan", "decode", "models", "batching", "tables"},
    {"archive", "ledger", "verify"},
    {"query", "report", "track"},  # what analysts use: tables, ledger, storage and config alone
    {"sandbox", "pipeline"},
    {"cluster"},
    {"demo", "jobfile", "launch", "logs", "submit", "trial", "cli", "cli_models", "__main__"},
]
LAYER = {room: n for n, rooms in enumerate(LAYERS) for room in rooms}
SIDEWAYS = {
    ("batching", "models"), ("verify", "ledger"), ("pipeline", "sandbox"), ("report", "query"),
    ("demo", "launch"), ("cli", "demo"), ("cli", "jobfile"), ("cli", "launch"),
    ("cli", "logs"), ("cli", "submit"), ("cli", "trial"), ("cli", "cli_models"), ("launch", "logs"),
    ("__main__", "cli"), ("data", "errors"),
}  # fmt: skip
"""Pairs of one layer that may look at each other, each for a reason its file states."""

ANALYSTS_MAY = {"errors", "data", "quantities", "config", "storage", "progress", "tables",
                "ledger", "verify", "models", "sampling", "query"}  # fmt: skip

DOORS = {
    "ray": ("cluster/",),
    "s3fs": ("storage/",),
    "fsspec": ("storage/",),
    "aiobotocore": ("storage/",),
    "botocore": ("storage/",),
    "torch": ("models/", "cluster/predictor.py"),
    "pyarrow.parquet": ("tables/", "query/"),
    "cv2": ("models/", "track/", "trial.py"),
    "duckdb": ("query/",),
}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found += [node.module] + [f"{node.module}.{a.name}" for a in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_keeps_its_place(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    assert room in LAYER, f"{room} has no layer: name it in LAYERS"
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "vidbatch" and len(parts) > 1 and parts[1] in LAYER and parts[1] != room:
            lower = LAYER[parts[1]] < LAYER[room] or (room, parts[1]) in SIDEWAYS
            assert lower, f"{path.name} ({room}) imports {parts[1]}, which is not below it"
            if room in ("query", "report", "track"):
                assert parts[1] in ANALYSTS_MAY, f"{room} may not look at {parts[1]}"
        for door, rooms in DOORS.items():
            if name == door or name.startswith(door + "."):
                inside = str(path.relative_to(PACKAGE)).startswith(rooms)
                assert inside, f"{path.name} imports {name}; its door is {rooms}"
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 400, f"{path.name} is past the 400-line wall"
    if "av.open(" in text:
        assert room == "media", f"{path.name} calls av.open; the only door is media"
    assert ast.get_docstring(ast.parse(text)), f"{path.name} does not say its job"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_public_name_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    missing = []

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if node.name.startswith("_"):
                    continue
                if not ast.get_docstring(node):
                    missing.append(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")

    visit(tree.body, "")
    assert not missing, f"{path.name}: no docstring: {missing}"


def test_importing_is_light() -> None:
    """No torch, ray, av, pyarrow or cv2 by importing the package or its command line."""
    code = "import sys, vidbatch, vidbatch.cli; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "ray", "av", "cv2", "duckdb", "pyarrow", "s3fs"} & set(out.stdout.split())
    assert not heavy, f"importing vidbatch.cli imports {heavy}"
    assert not out.stderr


FOREIGN = re.compile(  # in pieces, so that this file does not find itself
    "|".join(
        (
            "/wo" + "rk/",
            "/fa" + "rm/",
            "files.py" + "thonhosted",
            "py" + r"pi\.org",
            r"deb\.deb" + "ian",
            r"registry\.np" + "mjs",
        )
    )
)


def test_the_repository_speaks_of_the_product_alone() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False
    ).stdout.decode()
    paths = [ROOT / p for p in listed.split("\0") if p]
    if not paths:
        paths = [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts]
    for path in paths:
        if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".lock", ""):
            match = FOREIGN.search(path.read_text("utf-8", "replace"))
            assert not match, f"{path.relative_to(ROOT)} names {match and match[0]}"


def test_every_error_is_drawn() -> None:
    import vidbatch.errors as errors

    drawn = errors.__doc__ or ""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.VidbatchError):
            assert name in drawn, f"{name} is not in the tree of errors.py"

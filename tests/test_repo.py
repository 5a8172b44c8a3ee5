"""Rules of the repository itself: README tree, import directions, names and tables, importing starts nothing.

    python -m pytest tests/test_repo.py
"""

import ast
import importlib
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from core.args import parse_args

ROOT = Path(__file__).parent.parent
FLOORS = [  # a file imports from its own folder or from a lower floor
    ["kernels"], ["core"], ["tools"], ["data"], ["engines", "eval", "train_sft"], ["rollout", "grpo"], ["train_rl"],
    ["methods", "bench"], ["flywheel"], ["experiments"],
]  # fmt: skip
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def files():
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if out.returncode:
        pytest.skip("not a git checkout")
    return out.stdout.split()


def code():
    return [f for f in files() if f.endswith(".py") and not f.startswith("tests/")]


def imported_by(path):
    """Files of ours that a file imports, inside functions too."""
    known = {f.removesuffix(".py").removesuffix("/__init__").replace("/", "."): f for f in code()}
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return {known[name] for name in names if name in known} - {path}


def room(path):
    return path.removesuffix(".py").split("/")[0]


def test_files_import_from_their_own_folder_or_a_lower_floor():
    wrong = [
        f"{path} imports {other}"
        for path in code()
        for other in imported_by(path)
        if room(other) != room(path) and FLOOR[room(other)] >= FLOOR[room(path)]
    ]
    assert not wrong


def test_no_files_import_each_other_in_a_circle():
    todo = {path: imported_by(path) for path in code()}
    while free := [path for path, needs in todo.items() if not needs & todo.keys()]:
        for path in free:
            del todo[path]
    assert not todo


def test_importlib_is_for_scripts_by_name_only():
    allowed = {"bench/plan.py", "experiments/cells.py"}
    assert {path for path in code() if "importlib.import_module" in (ROOT / path).read_text()} <= allowed


def test_the_root_holds_four_scripts_and_the_readme_names_every_folder():
    assert [f for f in code() if "/" not in f] == ["flywheel.py", "rollout.py", "train_rl.py", "train_sft.py"]
    readme = (ROOT / "README.md").read_text()
    folders = {f.split("/")[0] for f in files() if "/" in f} - {".ci"}
    assert not [folder for folder in folders if f"`{folder}/`" not in readme]


def test_every_script_explains_itself():
    for path in files():
        if path.endswith(".py") and not path.endswith("__init__.py"):
            doc = ast.get_docstring(ast.parse((ROOT / path).read_text()))
            assert doc and doc.splitlines()[0].endswith((".", ":")), path


COMMANDS = (
    "train_sft", "train_rl", "rollout", "flywheel", "methods.selection", "methods.curriculum", "methods.warmup",
    "methods.refine", "experiments.reproduce", "experiments.claims", "eval.evaluate", "experiments.entropy_pilot",
)  # fmt: skip


@pytest.mark.parametrize("module", COMMANDS)
def test_every_flag_has_its_help(module, capsys):
    cls = importlib.import_module(module).Args
    with pytest.raises(SystemExit) as exit_:
        parse_args(cls, ["--help"])
    assert exit_.value.code == 0 and "--output" in capsys.readouterr().out
    assert all(f.metadata.get("help") for f in fields(cls))


def test_core_imports_without_optional_packages():
    """Kernels and training import without bitsandbytes, datasets, math-verify, bm25s and matplotlib."""
    code = (
        "import sys\n"
        "for name in ('bitsandbytes', 'datasets', 'math_verify', 'bm25s', 'matplotlib'): sys.modules[name] = None\n"
        "import kernels, train_rl, train_sft, rollout, eval.evaluate\n"
        "assert not __import__('torch').cuda.is_initialized()\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr

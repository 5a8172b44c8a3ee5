"""Rules of the repository itself: README tree, import directions, names and tables, importing starts nothing.

    python -m pytest tests/test_repo.py
"""

import ast
import importlib
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from core import run

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train_sft", "train_rl", "flywheel", "warmup", "refine", "reproduce"}
MAY_IMPORT = {  # module or package -> what of ours it may import
    "trajectory": set(),
    "claim_list": {"data"},
    "kernels": set(),
    "entropy": {"trajectory"},
    "rewards": {"trajectory", "entropy", "eval"},  # eval.behaviour: what a needed call is
    "losses": {"trajectory", "entropy", "rewards"},
    "distributed": set(),
    "common": {"trajectory", "distributed"},
    "tools": {"trajectory"},
    "model": {"trajectory", "kernels", "common"},
    "checkpoint": {"trajectory", "model"},
    "invariants": {"trajectory", "model"},
    "merged": {"model"},
    "update": {"trajectory", "distributed", "invariants", "kernels", "eval", "losses", "model"},
    "conversation": {"trajectory", "common", "tools", "data"},
    "branching": {"trajectory", "common", "data", "conversation"},
    "rollout": {
        "trajectory", "common", "tools", "data", "model", "conversation", "branching", "engine", "engine_openai",
    },  # fmt: skip
    "engine_openai": {"trajectory", "common", "tools", "model", "conversation", "rollout"},
    "memory": {"trajectory", "kernels", "model", "engine", "slot_cache"},
    "plan": {"trajectory", "common", "data", "model", "conversation", "memory"},
    "slot_cache": set(),
    "engine": {"tools", "model", "conversation", "branching", "rollout", "slot_cache"},
    "selection": {"trajectory", "common", "data", "eval"},
    "operators": {"trajectory", "tools", "data", "conversation"},
    "critics": {"trajectory", "entropy", "tools", "data", "model", "conversation", "rollout", "eval", "operators"},
}


def files():
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if out.returncode:
        pytest.skip("not a git checkout")
    return out.stdout.split()


def ours_imported_by(path):
    names = {f.removesuffix(".py").split("/")[0] for f in files() if f.endswith(".py")}
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found & names


def test_imports_go_one_way():
    for path in files():
        if not path.endswith(".py") or path.startswith("tests/"):
            continue
        name = path.removesuffix(".py").split("/")[0]
        imported = ours_imported_by(path) - {name}
        allowed = MAY_IMPORT.get(name)
        if name in ("eval", "data", "reproduce", "chains", "claims", "claim_cells", "claim_report", "experiment", "curriculum"):  # these drive the others
            continue
        if allowed is None:
            assert name in SCRIPTS, path
            assert not imported & (SCRIPTS - {name}), f"{path} imports another script"
        else:
            assert imported <= allowed, f"{path} imports {imported - allowed}"


def test_metrics_are_importable_without_the_rest():
    assert ours_imported_by("eval/metrics.py") <= {"trajectory", "eval"}


def test_readme_tree_is_the_repository():
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"## Files\n.*?```\n(.*?)```", readme, re.DOTALL).group(1)
    listed = set()
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0] if line.split() else ""
        if name.endswith("/"):
            folder = name
        elif name:
            listed.add((folder if line.startswith(" ") else "") + name)
    code = {f for f in files() if f.endswith((".py", ".sh")) and not f.startswith("tests/")}
    assert listed == code, {"not in the tree": code - listed, "not in the repository": listed - code}


def test_every_script_explains_itself():
    for path in files():
        if path.endswith(".py") and not path.endswith("__init__.py"):
            doc = ast.get_docstring(ast.parse((ROOT / path).read_text()))
            assert doc and doc.splitlines()[0].endswith((".", ":")), path


COMMANDS = (
    "train_sft", "train_rl", "rollout", "flywheel", "selection", "curriculum", "warmup", "refine", "reproduce", "claims",
    "eval.evaluate",
)  # fmt: skip


@pytest.mark.parametrize("module", COMMANDS)
def test_every_flag_has_its_help(module, capsys):
    cls = importlib.import_module(module).Args
    with pytest.raises(SystemExit) as exit_:
        run.parse_args(cls, ["--help"])
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

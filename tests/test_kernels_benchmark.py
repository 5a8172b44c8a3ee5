"""bench.kernels runs at toy shapes on a CPU, and its own baselines compute what the kernels compute.

Run: pytest tests/test_kernels_benchmark.py
"""

import json

import pytest
import torch

from bench import kernels
from bench.baselines import BASELINES
from bench.cases import make_case, make_head
from core.trajectory import DataError


def run(tmp_path, **flags):
    threads = torch.get_num_threads()
    try:
        args = kernels.Args(**{"output": str(tmp_path / "out" / "k"), "shapes": ["40,16,257"], "repeats": 2} | flags)
        return kernels.main(args)
    finally:
        torch.set_num_threads(threads)


def records(tmp_path):
    return json.loads((tmp_path / "out" / "k.json").read_text())


def test_smoke_writes_table_and_json(tmp_path, monkeypatch):
    def missing():
        import no_such_library  # noqa: F401

    eager = BASELINES["policy_loss"]["torch eager"]
    monkeypatch.setitem(BASELINES, "policy_loss", {"absent": (missing, ""), "torch eager": eager})
    monkeypatch.setitem(BASELINES, "logits_forward", {"torch eager": BASELINES["logits_forward"]["torch eager"]})
    rows = run(tmp_path, operations=["logits_forward", "linear_generic", "policy_loss"])
    result = records(tmp_path)
    assert {"cpu", "packages", "commit", "command"} <= set(result) and json.loads(json.dumps(rows)) == result["rows"]
    assert len(result["checks"]) == 4 and all(check["ok"] for check in result["checks"])
    methods = [(row["operation"], row["method"], row.get("trained")) for row in rows]
    assert methods == [
        ("machine", "torch.mm, copy", None),
        ("logits_forward", "tare", 1.0),
        *(("logits_forward", name, 1.0) for name in BASELINES["logits_forward"]),
        ("linear_generic", "tare", 1.0),
        ("policy_loss", "tare", 1.0),
        ("policy_loss", "absent", 1.0),
        ("policy_loss", "torch eager", 1.0),
        ("policy_loss", "tare", 0.3),
        ("policy_loss", "absent", 0.3),
        ("policy_loss", "torch eager", 0.3),
    ]
    skipped = [row["skipped"] for row in rows if "skipped" in row]
    assert skipped == ["ModuleNotFoundError: No module named 'no_such_library'"] * 2
    assert all(row["ms"] > 0 and row["percent"] > 0 for row in rows if "unit" in row)
    table = (tmp_path / "out" / "k.md").read_text()
    assert table.count("\n| ") == len(methods) and "gradient of entropy: error" in table


def test_a_failed_check_times_nothing(tmp_path, monkeypatch):
    bad = [{"check": "logp", "error": 1.0, "limit": 1e-4, "ok": False}]
    monkeypatch.setattr(kernels, "correctness", lambda *_: bad)
    with pytest.raises(DataError, match="nothing was timed: logp: error 1.0e[+]00"):
        run(tmp_path)
    assert records(tmp_path)["rows"] == []


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"shapes": ["40,16"]}, "--shapes: 40,16 is not N,H,V"),
        ({"shapes": ["40,x,16"]}, "--shapes: 40,x,16 is not N,H,V"),
        ({"operations": ["loss"]}, "--operations loss: not one of logits_forward"),
        ({"output": ""}, "--output is required"),
    ],
)
def test_bad_flags_are_named(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **flags)


@pytest.mark.parametrize("trained", [1.0, 0.3])
def test_lines_of_one_operation_compute_the_same(trained):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = make_case(64, make_head(1003, 32, device), trained, logits=True)
    for operation, names in (
        ("logits_forward", ["torch eager", "our torch reference"]),
        ("logits_backward", ["torch eager", "our torch reference"]),
        ("linear_forward", ["torch eager"]),
        ("policy_loss", ["torch eager"]),
    ):
        if trained < 1 and operation != "policy_loss":
            continue
        ours = kernels.OURS[operation](case)()[0].float()
        for name in names:
            build, _ = BASELINES[operation][name]
            out = build()(case)()
            out = (out[0] if isinstance(out, tuple) else out).float()
            assert (out - ours).norm() <= 0.05 * ours.norm()  # bf16 logits


def test_inputs_are_realistic():
    case = make_case(64, make_head(1003, 32, torch.device("cpu")), 0.3, logits=True)
    assert 15 < case.logits.abs().max() < 35
    assert len(case.keep) == 19 and (case.targets[case.keep] >= 0).all()
    assert (case.targets == -100).sum() == 64 - 19

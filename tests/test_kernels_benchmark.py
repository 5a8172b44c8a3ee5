"""kernels.benchmark runs at toy shapes on a CPU, and its own baselines compute what the kernels compute.

Run: pytest tests/test_kernels_benchmark.py
"""

import json

import pytest
import torch

from bench import kernels
from bench.baselines import BASELINES
from bench.cases import LIMITS, make_case, make_head

VARIANTS = ("--chunks", "16", "--triton_gemm", "64,16,2")


def run(tmp_path, *flags):
    return kernels.main(["--output", str(tmp_path / "out"), "--shapes", "40,16,257", "--repeats", "2", *flags])


def test_smoke_writes_table_and_json(tmp_path, monkeypatch):
    def missing():
        import no_such_library  # noqa: F401

    for name in ("gradient of logp", "gradient of entropy"):
        monkeypatch.setitem(LIMITS, name, 2e-2)  # the interpreter truncates to bf16 where a GPU rounds
    eager = BASELINES["policy_loss"]["torch eager"]
    monkeypatch.setitem(BASELINES, "policy_loss", {"absent": (missing, None, ""), "torch eager": eager})
    assert run(tmp_path, "--operations", "linear_generic", "policy_loss", *VARIANTS) == 0
    result = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert {"device", "torch", "triton", "commit", "command"} <= set(result["environment"])
    assert all(check["ok"] for check in result["checks"])
    methods = [(row["operation"], row["method"], row.get("trained")) for row in result["rows"]]
    assert methods == [
        ("machine", "torch.mm, copy", None),
        ("linear_generic", "tare", 1.0),
        ("policy_loss", "tare", 1.0),
        ("policy_loss", "tare, loop, chunk 16", 1.0),
        ("policy_loss", "tare, Triton GEMM 128x64x16, 2 stages", 1.0),
        ("policy_loss", "absent", 1.0),
        ("policy_loss", "torch eager", 1.0),
        ("policy_loss", "tare", 0.3),
        ("policy_loss", "absent", 0.3),
        ("policy_loss", "torch eager", 0.3),
    ]
    skipped = [row["skipped"] for row in result["rows"] if "skipped" in row]
    assert skipped == ["ModuleNotFoundError: No module named 'no_such_library'"] * 2
    assert all(row["ms"] > 0 and row["percent"] > 0 for row in result["rows"] if "unit" in row)
    table = (tmp_path / "out" / "kernels.md").read_text()
    assert table.count("\n| ") == 1 + len(methods)


def test_lines_after_the_deadline_are_named(tmp_path):
    assert run(tmp_path, "--operations", "logits_forward", "logits_backward", "--ours_only", "--minutes", "0") == 0
    rows = json.loads((tmp_path / "out" / "kernels.json").read_text())["rows"]
    assert [row.get("skipped") for row in rows[1:]] == ["--minutes 0.0 are over"] * 2


def test_a_failed_check_times_nothing(tmp_path, monkeypatch, capsys):
    bad = [{"check": "logp", "error": 1.0, "limit": 1e-4, "ok": False}]
    monkeypatch.setattr(kernels, "correctness", lambda *_: bad)
    assert run(tmp_path) == 1
    assert json.loads((tmp_path / "out" / "kernels.json").read_text())["rows"] == []
    assert "a check failed" in capsys.readouterr().err


def test_a_bad_shape_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        kernels.main(["--output", str(tmp_path), "--shapes", "40,16"])
    assert stop.value.code == 2 and "--shapes: 40,16 is not N,H,V" in capsys.readouterr().err


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
            build, wrap, _ = BASELINES[operation][name]
            out = wrap(build())(case)()
            out = (out[0] if isinstance(out, tuple) else out).float()
            assert (out - ours).norm() <= 0.05 * ours.norm()  # bf16 logits


def test_inputs_are_realistic():
    case = make_case(64, make_head(1003, 32, torch.device("cpu")), 0.3, logits=True)
    assert 15 < case.logits.abs().max() < 35
    assert len(case.keep) == 19 and (case.targets[case.keep] >= 0).all()
    assert (case.targets == -100).sum() == 64 - 19

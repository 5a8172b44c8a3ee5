"""Cells and claims: declarations, cells that share stages, rows and verdicts by hand, a real run killed and resumed.

    python -m pytest tests/test_claims.py
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.args import parse_args
from core.trajectory import DataError, ToolCall, Trajectory, read_jsonl
from eval.intervals import Interval
from experiments import cells, claims, workers
from experiments.cells import (
    EVAL_SEED,
    Job,
    column,
    compact,
    curves,
    hard_ids,
    locked,
    measure,
    module_of,
    plan_cell,
    reached,
    row_file,
    run_cell,
)  # fmt: skip
from experiments.claim_list import CLAIMS, Claim
from experiments.claim_report import calls_table, decide, difference, seeds_for_margin, variants_table, write_report
from experiments.claims import cells_of, collect_rows
from experiments.variants import FRONTIERS, REPRODUCTION, VARIANTS, WORLDS
from experiments.workers import next_cell, run_missing

COLUMNS = {"correctness", "efficiency", "calls", "redundant", "insufficient", "tokens", "thinking"}
CLAIM = Claim("here", "x", "calls", -1, 0.5, 0.01, (("rl_et", "rl_correct"),))


@pytest.fixture
def flags(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    return dict(output_dir=str(tmp_path / "out"), results=str(tmp_path / "results"), base=str(base))


# ---------------------------------------------------------------------------------------------------- declarations


def test_every_variant_is_one_that_its_scripts_accept(flags):
    args = claims.Args(full=True, **flags)
    for name in VARIANTS:
        for job in plan_cell(name, 1, args).jobs:
            module_of(job.script).Args(**job.flags)
            assert not [v for v in job.flags.values() if isinstance(v, str) and "{" in v], (name, job)


def test_claims_compare_variants_of_one_world_by_columns_that_rows_have():
    for name, claim in CLAIMS.items():
        for pair in claim.pairs:
            first, second = (VARIANTS[v].world for v in pair)
            families = {WORLDS[first].families, WORLDS[second].families}
            column, _, subset = claim.metric.partition("|")
            assert len(families) == 1 and column in COLUMNS and claim.sign in (1, -1), name
            assert not subset or (subset in ("hard", "easy") and WORLDS[first].sums), name
            assert claim.margin is None or claim.metric != "correctness", name
    used = {v for claim in CLAIMS.values() for pair in claim.pairs for v in pair}
    used |= {v for prices, methods in FRONTIERS.values() for v in (*prices, *methods)}
    used |= {v for variants in REPRODUCTION.values() for v in variants}
    assert used == set(VARIANTS), set(VARIANTS) ^ used


def test_cells_share_the_stages_they_have_in_common(flags, tmp_path):
    args = claims.Args(full=True, **flags)
    short, long, other_seed = (plan_cell(*c, args) for c in (("rft", 0), ("rft_rl_et", 0), ("rft", 1)))
    assert [j.folder for j in short.jobs[:2]] == [j.folder for j in long.jobs[:2]]
    assert long.jobs[2].flags["model_name_or_path"] == long.jobs[1].output
    assert long.jobs[1].flags["data"] == long.jobs[0].output + "/rft.jsonl"
    assert not {j.folder for j in short.jobs} & {j.folder for j in other_seed.jobs}
    assert short.digest != long.digest
    assert long.jobs[-1].flags["data"] == other_seed.jobs[-1].flags["data"]  # the same held-out questions
    assert long.jobs[-1].flags["seed"] == EVAL_SEED and other_seed.jobs[-1].flags["seed"] == EVAL_SEED + 1
    elsewhere = claims.Args(full=True, **flags | {"output_dir": str(tmp_path / "other")})
    assert plan_cell("rft", 0, elsewhere).digest == short.digest
    smaller = claims.Args(full=True, **flags, max_steps=2)
    assert plan_cell("rft", 0, smaller).digest != short.digest
    assert plan_cell("rft_rl_et", 0, smaller).jobs[2].flags["max_steps"] == 2
    (Path(flags["base"]) / "model.safetensors").write_bytes(b"other weights")
    assert plan_cell("rft", 0, args).digest != short.digest


def test_a_digest_outlives_a_move_of_its_script(flags, monkeypatch):
    """Finished rows are found by digests in which a script has its short name, wherever its module is."""
    args = claims.Args(full=True, **flags)
    before = plan_cell("rft_curriculum_pareto", 0, args).digest
    monkeypatch.setitem(sys.modules, "elsewhere", module_of("curriculum"))
    monkeypatch.setitem(cells.SCRIPTS, "curriculum", "elsewhere")
    assert plan_cell("rft_curriculum_pareto", 0, args).digest == before


def test_cells_of_the_reproduction(flags):
    """Sizes of quick are other sizes; each seed has its own held-out questions; the rounds share one curriculum."""
    args = claims.Args(full=True, **flags)
    whole, quick, other = (plan_cell(*c, args) for c in (("reproduce_rft", 0), ("quick_rft", 0), ("quick_rft", 1)))
    assert [j.flags.get("max_steps") for j in whole.jobs] == [None, 60, None, 60, None]
    assert [j.flags.get("max_steps") for j in quick.jobs] == [None, 6, None, 6, None]
    assert quick.files["held_out"] != other.files["held_out"] and "-120-" in quick.files["held_out"]
    first, second = (plan_cell(f"quick_rl_round_{r}", 1, args) for r in (1, 2))
    assert first.jobs[:-1] == second.jobs[:-1] and first.jobs[:4] == other.jobs[:4]
    assert second.jobs[-1].flags["model_name_or_path"] == first.jobs[-2].output + "/round-2/rl"
    assert second.jobs[-1].flags["seed"] == EVAL_SEED + 1 and second.jobs[-2].flags["seed"] == 1
    *_, alone, evaluation = plan_cell("quick_sums_no_warmup", 0, args).jobs
    assert alone.flags["model_name_or_path"] == args.base and evaluation.flags["model_name_or_path"] == alone.output


def test_a_round_that_a_curriculum_did_not_reach_is_its_last(tmp_path):
    (tmp_path / "round-1" / "rl").mkdir(parents=True)
    for r in (1, 2):
        assert reached(str(tmp_path / f"round-{r}/rl")) == str(tmp_path / f"round-{r}/rl")  # before it has finished
    (tmp_path / "result.json").write_text("{}")
    assert reached(str(tmp_path / "round-1/rl")) == str(tmp_path / "round-1/rl")
    assert reached(str(tmp_path / "round-2/rl")) == str(tmp_path)


@pytest.mark.parametrize("name, seed", [("quick_sums_base", 3), ("at_base", 0)])
def test_hard_sums_are_told_by_other_samples_than_those_that_are_measured(flags, name, seed, monkeypatch):
    args, asked = claims.Args(full=True, **flags, eval_questions=8), []
    monkeypatch.setattr(cells.rollout, "main", lambda args: asked.append(args))
    cell = plan_cell(name, 3, args)
    cells.prepare_world(cell, args)
    (probe,) = asked
    assert (probe.mode, probe.num_generations, probe.seed) == ("no_think", 8, seed) and EVAL_SEED + 3 != seed
    assert probe.data == cell.jobs[-1].flags["data"]
    held_out = [row["id"] for _, row in read_jsonl(probe.data)]  # the claims ask all seeds the same
    assert held_out == [f"running_sum-{EVAL_SEED + seed}-{i}" for i in range(8)]


def test_probe_runs_are_looked_at_and_thrown_away(flags):
    """Refinement chooses questions; its RL starts from the warm-up, as that of the variant on all questions."""
    args = claims.Args(full=True, **flags)
    whole = plan_cell("at_35_majority_decoupled", 0, args).jobs
    for how in ("epochs_low", "random"):
        *_, refine, train, evaluation = plan_cell(f"at_35_refine_{how}", 0, args).jobs
        assert train.flags["data"] == refine.output != whole[2].flags["data"]
        assert train.flags["model_name_or_path"] == whole[2].flags["model_name_or_path"] == whole[1].output
        assert evaluation.flags["model_name_or_path"] == train.output


def test_no_two_stages_of_different_flags_share_a_folder(flags):
    args, seen = claims.Args(full=True, **flags), {}
    for cell in cells_of(CLAIMS, args).values():
        for job in cell.jobs:
            assert seen.setdefault(job.folder, (job.script, job.flags)) == (job.script, job.flags)


# ---------------------------------------------------------------------------------------------------- rows, verdicts


def row(variant, seed, calls, correct=(1, 1, 0, 1), asked="a", **columns):
    others = dict.fromkeys(("redundant", "insufficient", "tokens", "thinking"), [0] * len(calls))
    questions = {**others, "calls": list(calls), "correctness": list(correct), **columns}
    return {"variant": variant, "seed": seed, "commit": "c", "asked": asked, "questions": questions, "curves": {}}


def rows_of(*made):
    return {(r["variant"], r["seed"]): r for r in made}


def test_decide_on_rows_with_a_known_difference():
    made = [row("rl_et", s, (1, 1, 1, 1)) for s in range(5)] + [row("rl_correct", s, (2, 2, 2, 2)) for s in range(5)]
    assert decide(CLAIM, CLAIM.pairs[0], rows_of(*made), 5) == [
        "rl_et", "rl_correct", 5, "-1.000 [-1.000, -1.000]", "+0.000 [+0.000, +0.000]", 0, "holds"]  # fmt: skip
    assert decide(CLAIM._replace(sign=+1), CLAIM.pairs[0], rows_of(*made), 5)[-1] == "fails (opposite)"
    assert decide(CLAIM._replace(at_least=1.5), CLAIM.pairs[0], rows_of(*made), 5)[-1] == "fails (smaller)"
    same = [row(v, s, (1, 1, 1, 1)) for v in CLAIM.pairs[0] for s in range(5)]
    assert decide(CLAIM._replace(at_least=0), CLAIM.pairs[0], rows_of(*same), 5)[-1] == "fails (smaller)"
    none_right = [row("rl_et", s, (1, 1, 1, 1), correct=(0, 0, 0, 0)) for s in range(5)] + [
        row("rl_correct", s, (2, 2, 2, 2), correct=(1, 1, 1, 1)) for s in range(5)
    ]
    assert decide(CLAIM, CLAIM.pairs[0], rows_of(*none_right), 5)[-1] == "fails (correctness)"
    wrong = [row("rl_et", s, (1, 1, 1, 1), correct=(1, 0, 0, 0)) for s in range(5)] + made[5:]
    assert decide(CLAIM, CLAIM.pairs[0], rows_of(*wrong), 5)[-1] != "holds"
    assert decide(CLAIM._replace(margin=None), CLAIM.pairs[0], rows_of(*wrong), 5)[-1] == "holds"


def test_seeds_that_the_margin_would_need():
    spread = Interval(0.0, -0.02, 0.02)  # of 5 seeds; half of it needs 4 times as many
    assert seeds_for_margin(spread, CLAIM, [0, 1, 2, 3, 4]) == 20
    assert seeds_for_margin(spread, CLAIM._replace(margin=None), [0, 1]) == ""
    assert seeds_for_margin(Interval(0.0, float("nan"), float("nan")), CLAIM, [0]) == ""


def test_missing_seeds_leave_a_claim_unfinished():
    made = [row("rl_et", s, (1, 1, 1, 1)) for s in range(5)] + [row("rl_correct", s, (2, 2, 2, 2)) for s in (0, 2, 4)]
    assert decide(CLAIM, CLAIM.pairs[0], rows_of(*made), 5)[2:] == [
        3, "-1.000 [-1.000, -1.000]", "+0.000 [+0.000, +0.000]", 0, "unfinished (3 of 5 seeds)"]  # fmt: skip
    assert decide(CLAIM, CLAIM.pairs[0], rows_of(*made[:5]), 5)[-1] == "not run"


def test_only_answers_to_the_same_questions_are_compared():
    made = [row("rl_et", 0, (1, 1, 1, 1)), row("rl_correct", 0, (1, 1, 1, 1), asked="b")]
    with pytest.raises(DataError, match="different questions"):
        decide(CLAIM, CLAIM.pairs[0], rows_of(*made), 1)


def test_a_subset_of_the_questions():
    made = [row("a", 0, (1, 5, 5, 3), hard=[1, 0, 0, 1]), row("b", 0, (0, 9, 9, 0), hard=[1, 0, 0, 1])]
    assert difference(made[:1], made[1:], "calls|hard").mean == 2.0  # (1 − 0 + 3 − 0) / 2


def test_calls_by_label_and_their_entropy():
    def entropy(needed, change, auc, segment="reasoning"):
        known = {"reducing": needed, "change": change, "before": 0.5}
        labels = {"needed": known, "redundant": {"reducing": None, "change": None, "before": None}}
        found = {"label": labels, "auc_needed": {"value": auc}, "all": {"n": 4, "empty": 1}}
        return {"segment": segment, "delta_margin": 0.0, **found}

    made = [
        row("rl_et", 0, (1,)) | {"entropy": [entropy(1.0, -0.2, 0.9), entropy(0.0, 0.1, 0.4, "think")]},
        row("rl_et", 1, (1,)) | {"entropy": [entropy(0.5, -0.1, None)]},
    ]
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in calls_table(CLAIM, rows_of(*made)).splitlines()]
    assert lines[2] == ["rl_et", "reasoning", "0.000", "2", "0.250", "0.75, -0.150, 0.500", "", "", "", "0.900"]
    assert lines[3] == ["rl_et", "think", "0.000", "1", "0.250", "0.00, +0.100, 0.500", "", "", "", "0.400"]
    assert len(lines) == 4  # the other variant has no rows


def test_points_of_a_curve_are_means_of_ten_steps(tmp_path):
    log = [{"step": n, "reward": n} | ({"think_rate/long": 0.5} if n < 3 else {}) for n in range(1, 13)]
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    jobs = [Job(tmp_path / "x", "train_sft", {}, "", 0), Job(tmp_path / "rl", "train_rl", {}, "", 0)]
    assert curves(jobs) == {"step": [10, 12], "reward": [5.5, 11.5], "think_rate/long": [0.5, None]}
    assert curves(jobs[:1]) == {}


def test_variants_on_sums_say_how_many_seeds_collapsed():
    """Two hard questions of four; seed 0 thinks on one of them and one easy one, seed 1 on both easy ones."""
    sums = dict(hard="0110", tokens=[4, 4, 4, 8])
    made = [
        row("at_85_none_none", 0, "0000", thinking="0101", **sums) | {"curves": {"frac_reward_zero_std": [0.0, 0.25]}},
        row("at_85_none_none", 1, "0000", thinking="1001", **sums) | {"curves": {"frac_reward_zero_std": [0.0, 0.75]}},
    ]
    claim = CLAIM._replace(pairs=(("at_85_none_none", "at_base"),))
    head, _, line = variants_table(claim, rows_of(*made)).splitlines()  # no line without rows
    found = dict(zip([c.strip() for c in head.split("|")], [c.strip() for c in line.split("|")]))
    assert found["thinking on hard"] == "0.250 ± 0.354" and found["thinking on easy"] == "0.750 ± 0.354"
    assert found["correctness on hard"] == "0.500 ± 0.000" and found["tokens"] == "5.000 ± 0.000"  # 1 1 0 1
    assert found["collapsed"] == "1" and found["groups without signal"] == "0.500"


def test_report_and_rows_file(flags):
    args = claims.Args(only=["et_critic"], seeds=2, **flags)
    cells = cells_of({"et_critic": CLAIMS["et_critic"]}, args)
    for (variant, seed), cell in cells.items():
        if (variant, seed) != ("rft_entropy_critic", 1):
            made = row(variant, seed, (1, 1, 1, 1)) | {"digest": cell.digest}
            row_file(cell, args).parent.mkdir(parents=True, exist_ok=True)
            row_file(cell, args).write_text(json.dumps(made))
    rows = collect_rows(cells, args)
    assert list(rows) == [("rft", 0), ("rft_entropy_critic", 0), ("rft", 1)]
    stored = [r for _, r in read_jsonl(Path(flags["results"]) / "rows.jsonl")]
    assert {(r["variant"], r["seed"]) for r in stored} == set(rows)
    write_report(Path(flags["results"]), {"et_critic": CLAIMS["et_critic"]}, rows, 2)
    report = (Path(flags["results"]) / "report.md").read_text()
    assert "variant/seeds: rft_entropy_critic/1." in report and "unfinished (1 of 2 seeds)" in report and "3 of 4 cells" in report
    assert "rft_entropy_critic/1" in claims.listing({"et_critic": CLAIMS["et_critic"]}, cells, rows)
    elsewhere = claims.Args(**vars(args) | {"output_dir": flags["output_dir"] + "2"})  # the rows alone are enough
    assert collect_rows(cells_of(CLAIMS, elsewhere), elsewhere) == rows
    scaled = claims.Args(**vars(args) | {"max_steps": 1})  # rows of another scale are kept and not used
    assert collect_rows(cells_of(CLAIMS, scaled), scaled) == {}
    assert len((Path(flags["results"]) / "rows.jsonl").read_text().splitlines()) == 3


def test_running_one_claim_keeps_the_others_in_the_report(flags):
    flags |= dict(seeds=1)
    for name in ("et_critic", "en_sparse_oracle"):
        args = claims.Args(only=[name], **flags)
        cells = cells_of({name: CLAIMS[name]}, args)
        row_file(next(iter(cells.values())), args).parent.mkdir(parents=True, exist_ok=True)
        for (variant, seed), cell in cells.items():
            made = row(variant, seed, (1, 1, 1, 1)) | {"digest": cell.digest}
            row_file(cell, args).write_text(json.dumps(made))
        assert list(claims.main(args)) == [name]
    report = (Path(flags["results"]) / "report.md").read_text()
    assert all((Path(flags["results"]) / name).stat().st_size > 10_000 for name in ("calls.png", "modes.png"))
    assert "## et_critic" in report and "## en_sparse_oracle" in report and "## at_collapse" not in report


# ---------------------------------------------------------------------------------------------------- scheduling


def test_no_worker_waits_for_a_stage_of_another(flags):
    args = claims.Args(full=True, **flags)
    rft, longer, other = (plan_cell(*c, args) for c in (("rft", 0), ("rft_rl_et", 0), ("rft", 1)))
    assert next_cell([longer, other], [rft]) == other
    assert next_cell([longer], [rft]) is None and next_cell([longer], []) == longer
    for job in rft.jobs[:2]:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        job.done.write_text("{}")
    assert next_cell([longer], [rft]) == longer  # what they share is finished


def test_a_lock_keeps_others_out_and_ends(tmp_path):
    with locked(tmp_path / "stage"), open(tmp_path / "stage.lock") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked(tmp_path / "stage"):
        pass


def test_time_limit_and_failures(flags, monkeypatch):
    args = claims.Args(full=True, **flags, workers=2)
    todo = [plan_cell("rl_et", s, args) for s in range(3)]
    stopped = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background shell may have it ignored
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: open({!r}, 'w').write('x')"
    )
    marks = [Path(flags["base"]) / f"mark{k}" for k in range(2)]
    made = iter(marks)
    monkeypatch.setattr(
        workers, "start", lambda cell, args: subprocess.Popen([sys.executable, "-c", stopped.format(str(next(made)))])
    )
    assert run_missing(todo, args, max_minutes=0.05) == []
    assert all(mark.exists() for mark in marks)  # both were running, and stopped as by Ctrl-C
    codes = iter((0, 3, 0))
    monkeypatch.setattr(workers, "start", lambda cell, args: subprocess.Popen(["sh", "-c", f"exit {next(codes)}"]))
    problems = run_missing(todo, claims.Args(full=True, **flags))
    assert len(problems) == 1 and "rl_et/1 (exit code 3" in problems[0]


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "choose what to run"),
        (["--only", "nothing"], "unknown claim 'nothing'"),
        (["--cell", "rl_et"], "not VARIANT/SEED"),
        (["--full", "--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_bad_flags(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(claims.Args, argv)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_two_cells_killed_in_training_end_with_the_same_rows(tmp_path):
    if not Path("data/tiny/model.safetensors").exists():
        pytest.skip("data/tiny is not there")
    flags = dict(only=["en_sparse_oracle"], seeds=1, max_steps=2, train_questions=24, eval_questions=12, workers=2)

    def rows_in(folder, killed):
        args = claims.Args(**flags, output_dir=str(folder / "out"), results=str(folder / "results"))
        todo = cells_of({name: CLAIMS[name] for name in flags["only"]}, args).values()
        if killed:
            kill_in_training(args, [cell.jobs[0].folder for cell in todo])
        for cell in todo:
            run_cell(cell, args)
        assert claims.main(args) != {}  # nothing left to run: rows and report
        return [r | {"seconds": 0, "commit": ""} for _, r in read_jsonl(folder / "results" / "rows.jsonl")]

    whole = rows_in(tmp_path / "whole", killed=False)
    assert all(r["entropy"][0]["all"]["n"] and r["curves"]["step"] == [2] for r in whole)
    assert len(whole) == 2 and whole == rows_in(tmp_path / "killed", killed=True)


def kill_in_training(args, folders):
    """Start the real command with two workers and SIGKILL all of it once a run has logged its first step."""
    words = [w for n in workers.PASSED_ON for w in (f"--{n}", str(getattr(args, n)))]
    words += ["--only", *args.only, "--results", args.results, "--seeds", "1", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "experiments.claims", *words], start_new_session=True)
    limit = time.monotonic() + 300
    while not any((f / "metrics.jsonl").exists() for f in folders) and time.monotonic() < limit:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(Path(args.output_dir).glob("rows/*"))


def test_hard_items_are_those_the_base_gets_wrong_without_thinking():
    """Right samples of 4: a 4, b 2 (not fewer than half), c 1, d 0."""
    rows = [
        Trajectory(name, i, "think", [1, 1], 1, [0, 1], True, f"<answer>{8 - (i < right)}</answer>", [], [], "eos", "7")
        for name, right in (("a", 4), ("b", 2), ("c", 1), ("d", 0))
        for i in range(4)
    ]
    assert hard_ids(rows) == {"c", "d"}


def test_a_row_has_one_value_per_question():
    calls = [ToolCall("search", "a of b", "a of b is c"), ToolCall("search", "a of b", "a of b is c")]
    answers = [("q2", "c", calls, 1), ("q1", "d", [], 1), ("q3", "c", [], 0)]
    made = [
        Trajectory(i, 0, "think", [1, 1, 1], 1, [0, 1, 1], True, f"<answer>{a}</answer>", [], list(c), "eos", ["c"],
                   meta={"min_tool_calls": need}) for i, a, c, need in answers
    ]  # fmt: skip
    found = measure(made, {"q1"})
    assert found["questions"] == {
        "correctness": "011", "calls": "020", "redundant": "010", "insufficient": "100", "tokens": "222",
        "thinking": "111", "hard": "100",
    }  # fmt: skip
    assert [column(found, name) for name in ("efficiency", "easy", "tokens")] == [[0, 0.5, 1], [0, 1, 1], [2, 2, 2]]
    assert compact([3, 10, 1]) == [3, 10, 1] and compact([0.5, 1.0]) == [0.5, 1.0]  # not all of them digits
    assert found["metrics"]["correctness"] == pytest.approx(2 / 3)
    assert found["asked"] == measure(made[::-1], None)["asked"] != measure(made[:2], None)["asked"]

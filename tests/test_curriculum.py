"""Curriculum: σ schedules by hand, rounds that go on from each other, exact continuation, selections that run short.

    python -m pytest tests/test_curriculum.py
"""

import json
from dataclasses import fields

import pytest

import rollout
import train_rl
from core.args import flags_of
from core.trajectory import DataError, Trajectory
from grpo import rewards
from methods import curriculum, selection


def by_ids(t):
    """A grade that random models earn on some samples and miss on others."""
    return float(sum(t.token_ids[t.prompt_len :]) % 2), True


def low_ids(group, correctness, formed, a):
    """A reward that random models earn unequally and can learn; shows the σ it was asked with."""
    return [{"total": -sum(t.token_ids[t.prompt_len :]) / 2000, "sigma": a.sigma_tool} for t in group]


@pytest.fixture
def flags(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "et_agent", low_ids)
    monkeypatch.setattr(selection, "grade", by_ids)
    data = tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps({"id": f"q{i}", "question": f"{i}?", "answer": "1"}) + "\n" for i in range(7)))
    return dict(
        model_name_or_path=str(tiny_model), data=str(data), output_dir=str(tmp_path / "run"), num_generations=3,
        questions_per_step=2, max_completion_length=12, max_steps=3, save_steps=1, threads=1, lora_r=4, rounds=2,
        select_generations=4, num_questions=4, rollout_batch_size=8, learning_rate=1e-4,
    )  # fmt: skip


def run(flags, **changes):
    return curriculum.main(curriculum.Args(**flags | changes))


def config_of(folder):
    return json.loads((folder / "rl/config.json").read_text())


@pytest.mark.parametrize(
    "schedule, steps, expected", [("fixed", 5, [0.4] * 5), ("linear", 5, [0.4, 0.3, 0.2, 0.1, 0]), ("linear", 1, [0.4])]
)
def test_sigma_within_a_run_by_hand(flags, schedule, steps, expected):
    names = {f.name for f in fields(train_rl.Args)}
    own = {k: v for k, v in flags.items() if k in names} | {"max_steps": steps}
    args = train_rl.Args(**own, reward="et_agent", sigma_schedule=schedule, sigma_tool=0.4, sigma_length=0.8)
    assert [train_rl.at_step(t, args).sigma_tool for t in range(steps)] == pytest.approx(expected)
    assert [train_rl.at_step(t, args).sigma_length for t in range(steps)] == pytest.approx([2 * s for s in expected])


@pytest.mark.parametrize(
    "schedule, start, logged",
    [("round", [0.1, 0.05, 0.025], 0), ("fixed", [0.1] * 3, 0), ("linear", [0.1] * 3, [0.1, 0.05, 0])],
)
def test_sigma_of_each_round(flags, tmp_path, schedule, start, logged):
    args = curriculum.Args(**flags | {"rounds": 3}, sigma_schedule=schedule, sigma_tool=0.1, sigma_length=0.2)
    settings = [curriculum.round_settings(tmp_path, "m", r, args) for r in (1, 2, 3)]
    assert [s.sigma_tool for s in settings] == pytest.approx(start)
    assert [s.sigma_length for s in settings] == pytest.approx([2 * s for s in start])
    assert len({s.seed for s in settings}) == 3
    if logged:
        train_rl.main(curriculum.round_settings(tmp_path, flags["model_name_or_path"], 1, _with_questions(args, tmp_path)))
        rows = map(json.loads, (tmp_path / "rl/metrics.jsonl").read_text().splitlines())
        assert [row["rewards/sigma/mean"] for row in rows] == pytest.approx(logged)


def _with_questions(args, folder):
    (folder / "questions.jsonl").write_bytes((folder / "q.jsonl").read_bytes())
    return args


def test_every_round_starts_from_the_last_one(flags, tmp_path):
    result = run(flags, sigma_tool=0.2)
    first, second = tmp_path / "run/round-1", tmp_path / "run/round-2"
    assert config_of(first)["model_name_or_path"] == flags["model_name_or_path"]
    assert config_of(second)["model_name_or_path"] == str(first / "rl") and result["adapter"] == str(second / "rl")
    weights = [(folder / "rl/adapter_model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] != weights[1]
    assert [config_of(folder)["sigma_tool"] for folder in (first, second)] == [0.2, 0.1]
    assert [row["rl"]["rewards/sigma/mean"] for row in result["rounds"]] == pytest.approx([0.2, 0.1])
    for folder, row in zip((first, second), result["rounds"]):
        lines = (folder / "trajectories.jsonl").read_text().splitlines()
        assert len(lines) == 7 * 4 and len((folder / "questions.jsonl").read_text().splitlines()) == 4
        chosen = row["selection"]
        assert (chosen["sampled"]["n"], chosen["selected"]["n"]) == (7, 4) and chosen["with signal"]["n"] >= 4
        scores = [by_ids(Trajectory.from_json(line))[0] for line in lines]
        assert chosen["sampled"]["correctness"] == pytest.approx(sum(scores) / len(scores))
    sampled = json.loads((second / "trajectories.jsonl.config.json").read_text())
    assert sampled["model_name_or_path"] == str(first / "rl") and sampled["num_generations"] == 4
    assert run(flags, sigma_tool=0.2) == result


class Killed(Exception):
    pass


def test_killed_anywhere_it_ends_with_the_same_adapter(flags, tmp_path, monkeypatch):
    whole = run(flags)
    real, calls = rollout.complete_groups, []

    def mortal(*args):
        calls.append(0)
        if len(calls) == dies:
            raise Killed
        return real(*args)

    monkeypatch.setattr(rollout, "complete_groups", mortal)
    deaths = 0
    for dies in (2, 3, 2, 4, 3, 99):
        calls.clear()
        try:
            ended = run(flags, output_dir=str(tmp_path / "killed"))
        except Killed:
            deaths += 1
            if deaths == 1:  # in the middle of a line of the samples
                with open(tmp_path / "killed/round-1/trajectories.jsonl", "a") as out:
                    out.write('{"question_id": "q6", "sa')
    assert deaths == 5
    for part in ("round-1/trajectories.jsonl", "round-1/questions.jsonl", "round-2/questions.jsonl"):
        assert (tmp_path / "killed" / part).read_bytes() == (tmp_path / "run" / part).read_bytes(), part
    adapters = [tmp_path / name / "round-2/rl/adapter_model.safetensors" for name in ("run", "killed")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert ended["rounds"] == whole["rounds"]


def test_all_questions_and_fewer_than_asked_for(flags, tmp_path):
    result = run(flags, selector="all", num_questions=0, rounds=1)
    assert result["rounds"][0]["selection"]["selected"]["n"] == 7
    few = run(flags, num_questions=99, rounds=1, output_dir=str(tmp_path / "few"))["rounds"][0]["selection"]
    assert 4 <= few["selected"]["n"] == few["with signal"]["n"] <= 7


def test_a_round_without_enough_questions_ends_the_curriculum(flags, tmp_path, monkeypatch, capsys):
    def right_after_training(t):
        return (1.0, True) if (tmp_path / "run/round-2").exists() else by_ids(t)

    monkeypatch.setattr(selection, "grade", right_after_training)
    result = run(flags)
    assert len(result["rounds"]) == 1 and result["adapter"].endswith("round-1/rl")
    assert "round 2: 0 questions selected, fewer than --questions_per_step 2" in result["ended"]
    assert result["ended"] in capsys.readouterr().out
    monkeypatch.setattr(selection, "grade", lambda t: (0.0, True))
    with pytest.raises(DataError, match="round 1: 0 questions selected"):
        run(flags, output_dir=str(tmp_path / "none"))


def test_flags(flags, monkeypatch):
    args = curriculum.Args(**flags, max_grad_norm=0.5, branching="arpo", engine="fast")
    assert set(flags_of(train_rl.Args, args)) == {f.name for f in fields(train_rl.Args)}
    settings = curriculum.round_settings(curriculum.Path("x"), "m", 1, args)
    assert (settings.max_grad_norm, settings.branching, settings.engine) == (0.5, "arpo", "fast")
    for changes, message in (
        ({"rounds": 0}, "--rounds"),
        ({"selector": "all"}, "--num_questions 4 does not go with --selector all"),
        ({"num_questions": 0}, "--num_questions 0 does not go with --selector pareto"),
        ({"num_questions": 3, "questions_per_step": 4}, "--num_questions 3 is less than --questions_per_step 4"),
    ):
        with pytest.raises(ValueError, match=message):
            curriculum.Args(**flags | changes)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process, not 2"):
        curriculum.Args(**flags)

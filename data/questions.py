"""Questions for rollout, RL and evaluation: one record, read from every format that users bring.

Formats: this project's jsonl (`id`|`qid`, `question`, `answer`|`golden_answers`|`ground_truth`), TRL rows
(`prompt` or `messages` with `answer`|`solution`), verl parquet (`prompt`, `reward_model.ground_truth`,
`extra_info.index`), and Hugging Face dataset ids (owner/name or owner/name:configuration) with rows of any of these
kinds. A row without an id gets its number in the file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from core.trajectory import DataError, Question, Task, read_jsonl

ID_KEYS = ("id", "qid", "question_id")
QUESTION_KEYS = ("question", "problem", "instruction")
ANSWER_KEYS = ("answer", "golden_answers", "ground_truth", "solution")


def load_questions(source: str, task: str = "auto", limit: int = 0, split: str = "train") -> list[Question]:
    """Read and check all questions; `task` auto = the row's own field, else a list of answers is qa, a string math.

    source: a .jsonl or .parquet file, or a Hugging Face dataset id. limit 0 = all.
    Raises DataError naming file, line and field for a missing or empty field, an unknown task or a duplicate id.
    """
    if task != "auto" and task not in get_args(Task):
        raise DataError(f"--task {task!r} is not one of {('auto', *get_args(Task))}")
    questions, where_seen = [], {}
    for number, (where, row) in enumerate(read_rows(source, split)):
        question = question_of(row, where, task, str(number))
        if question.id in where_seen:
            raise DataError(f"{where}: duplicate id {question.id!r}, first used at {where_seen[question.id]}")
        where_seen[question.id] = where
        questions.append(question)
        if len(questions) == limit:
            break
    if not questions:
        raise DataError(f"{source}: holds no questions")
    return questions


def read_rows(source: str, split: str = "train", config: str | None = None) -> Iterator[tuple[str, dict]]:
    """(where, row) pairs of a .jsonl or .parquet file or a dataset id; `where` is file:line or dataset[split]: row."""
    if source.endswith(".jsonl"):
        yield from ((f"{source}:{number}", row) for number, row in read_jsonl(source))
    elif source.endswith(".parquet"):
        import pyarrow.parquet

        if not Path(source).is_file():
            raise DataError(f"{source}: no such file")
        try:
            rows = pyarrow.parquet.read_table(source).to_pylist()
        except pyarrow.ArrowInvalid as e:
            raise DataError(f"{source}: not a parquet file: {e}") from None
        yield from ((f"{source}: row {i}", row) for i, row in enumerate(rows))
    elif Path(source).exists() or source.endswith((".json", ".csv", ".txt")) or source.count("/") > 1 or not source:
        raise DataError(f"{source!r}: expected an existing .jsonl or .parquet file, or a Hugging Face dataset id")
    else:
        import datasets

        name, _, named = source.partition(":")
        try:
            rows = datasets.load_dataset(name, config or named or None, split=split)
        except Exception as e:  # hub, network and format errors share no base class
            raise DataError(f"dataset {source!r} (split {split}): {type(e).__name__}: {e}") from None
        yield from ((f"{source}[{split}]: row {i}", row) for i, row in enumerate(rows))


def question_of(row: dict, where: str, task: str = "auto", default_id: str | None = None) -> Question:
    """One row of any supported kind; `where` names it in the DataError of a missing, empty or unknown field.

    An answer in GSM8K's form, a solution that ends in "#### 72", is the 72.
    """
    row = _from_bfcl(row, where) if isinstance(row.get("function"), list) else row
    used = {*ID_KEYS, *QUESTION_KEYS, *ANSWER_KEYS, "task", "tools", "prompt"}
    meta = {k: v for k, v in row.items() if k not in used and isinstance(v, (str, int, float)) and len(str(v)) <= 200}
    for name in ("extra_info", "reward_model"):
        if not isinstance(row.get(name) or {}, dict):
            raise DataError(f"{where}: field {name!r} is {str(row[name])[:80]!r}, not an object")
    extra = row.get("extra_info") or {}
    identity = _first(row, ID_KEYS)
    if identity is None:
        identity = extra.get("index")
        if identity is not None and row.get("data_source"):
            identity = f"{row['data_source']}-{extra.get('split', '')}-{identity}"
    identity = default_id if identity is None else identity
    if identity is None:
        raise DataError(f"{where}: missing field 'id' (or {', '.join(ID_KEYS[1:])}, extra_info.index)")
    text, system = _first(row, QUESTION_KEYS), None
    if text is None:
        text, system = _from_messages(row.get("prompt") or row.get("messages"), where)
    if not isinstance(text, str):
        raise DataError(f"{where}: field 'question' is {str(text)[:80]!r}, not text (id {identity!r})")
    if not text.strip():
        raise DataError(f"{where}: empty field 'question' (id {identity!r})")
    gold = _first(row, ANSWER_KEYS)
    if gold is None:
        gold = (row.get("reward_model") or {}).get("ground_truth")
    if gold is None or gold == "" or (gold == [] and row.get("task") != "function"):
        raise DataError(f"{where}: missing or empty field 'answer' (id {identity!r})")
    if not isinstance(gold, (str, int, float, list)):
        raise DataError(f"{where}: field 'answer' is {str(gold)[:80]!r}, not a text or a list (id {identity!r})")
    if isinstance(gold, str) and "\n#### " in gold:
        gold = gold.rsplit("\n#### ", 1)[1].strip()
    if not isinstance(row.get("tools") or [], list):
        raise DataError(f"{where}: field 'tools' is {str(row['tools'])[:80]!r}, not a list (id {identity!r})")
    kind = task if task != "auto" else row.get("task") or _task_of(row, gold)
    if kind not in get_args(Task):
        raise DataError(f"{where}: field 'task' is {kind!r}, not one of {get_args(Task)}")
    return Question(str(identity), text.strip(), gold, kind, row.get("tools"), system, meta)


def _from_bfcl(row: dict, where: str) -> dict:
    """A row of the Berkeley Function Calling Leaderboard, one turn, as one of ours with task `function`.

    `ground_truth` must be in the row (the leaderboard keeps it in a second file); irrelevance rows ask for no call.
    """
    turns, functions = row.get("question"), row["function"]
    if not isinstance(turns, list) or len(turns) != 1:
        raise DataError(f"{where}: field 'question' is not a list of one turn; rows of several turns cannot be read")
    if not all(isinstance(f, dict) and "name" in f for f in functions):
        raise DataError(f"{where}: field 'function' is not a list of functions with names")
    gold = [] if "irrelevance" in str(row.get("id")) else row.get("ground_truth")
    tools = [{"type": "function", "function": _json_schema(f)} for f in functions]
    others = {k: v for k, v in row.items() if k not in ("question", "function", "ground_truth")}
    return others | {"prompt": turns[0], "answer": gold, "tools": tools, "task": "function"}


def _json_schema(value: Any) -> Any:
    """BFCL's Python type names as JSON schema has them."""
    if isinstance(value, list):
        return [_json_schema(v) for v in value]
    if not isinstance(value, dict):
        return value
    names = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
    found = {k: _json_schema(v) for k, v in value.items()}
    if isinstance(kind := value.get("type"), str):
        found["type"] = names.get(kind, kind)
    return found


def _task_of(row: dict, gold: Any) -> Task:
    if row.get("ability") in ("math", "qa"):  # verl files name the task so; their answers are lists throughout
        return row["ability"]
    return "qa" if isinstance(gold, list) else "math"


def _from_messages(messages: Any, where: str) -> tuple[str, str | None]:
    """The last user message and the system message of a chat-style prompt; a plain string is the user message."""
    if isinstance(messages, str):
        return messages, None
    if not messages:
        raise DataError(f"{where}: missing field 'question' (or 'prompt', 'messages')")
    check_parts(messages, "prompt", ("role", "content"), where)
    users = [m["content"] for m in messages if m["role"] == "user"]
    systems = [m["content"] for m in messages if m["role"] == "system"]
    if not users:
        raise DataError(f"{where}: field 'prompt' has no user message")
    return users[-1], systems[0] if systems else None


def check_parts(parts: Any, name: str, keys: tuple[str, ...], where: str) -> None:
    """DataError unless field `name` is a list of objects that hold text under every one of `keys`."""
    if not isinstance(parts, list):
        raise DataError(f"{where}: field {name!r} is {str(parts)[:80]!r}, not a list of objects")
    for i, part in enumerate(parts):
        if missing := [key for key in keys if not isinstance(part, dict) or not isinstance(part.get(key), str)]:
            raise DataError(f"{where}: field {name!r} part {i} has no text {missing[0]!r}: {str(part)[:80]}")


def _first(row: dict, names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)

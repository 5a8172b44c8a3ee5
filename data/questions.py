"""Questions for rollout, RL and evaluation: one record, read from every format that users bring.

Formats: this project's jsonl (`id`|`qid`, `question`, `answer`|`golden_answers`|`ground_truth`), TRL rows
(`prompt` or `messages` with `answer`|`solution`), Alpaca's (`instruction`, `input`), verl parquet (`prompt`,
`reward_model.ground_truth`, `extra_info.index`), CSV with a header, and Hugging Face dataset ids (owner/name or
owner/name:configuration) with rows of any of these kinds. A row without an id gets its number in the file.
What a row says to the model reaches the prompt, or is an error that names its field.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from core.distributed import say_once
from core.trajectory import UNREADABLE, DataError, Question, Task, open_text, read_jsonl, unreadable, unwritable

ID_KEYS = ("id", "qid", "question_id")
QUESTION_KEYS = ("question", "problem", "instruction")
CHAT_KEYS = ("prompt", "messages")
ADDED_KEYS = ("input", "context", "passage")  # text that belongs to the question, which it follows in the prompt
SYSTEM_KEYS = ("system", "system_prompt")
UNASKED_KEYS = ("history", "choices", "options", "image", "images", "video", "videos", "audio", "audios")  # refused
ANSWER_KEYS = ("answer", "golden_answers", "ground_truth", "solution")
LONGEST_ANSWER = 500  # characters; eval/metrics.py takes no longer prediction for right


def load_questions(source: str, task: str = "auto", limit: int = 0, split: str = "train") -> list[Question]:
    """Read and check all questions; `task` auto = the row's own field, else a list of answers is qa, a string math.

    Prints, once per process, how many questions of each task were read and what told the task.
    source: a .jsonl, .jsonl.gz, .parquet or .csv file, or a Hugging Face dataset id. limit 0 = all.
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
    tasks = Counter((q.task, q.told_by) for q in questions).most_common()
    say_once(f"{source}: {len(questions)} questions: " + ", ".join(f"{n} {t} ({why})" for (t, why), n in tasks))
    return questions


def read_rows(source: str, split: str = "train", config: str | None = None) -> Iterator[tuple[str, dict]]:
    """(where, row) pairs of a .jsonl, .csv (each also .gz) or .parquet file or a dataset id.

    `where` is file:line, file: row or dataset[split]: row. DataError for what cannot be read or written again.
    """
    suffix = Path(source.removesuffix(".gz")).suffix
    if suffix == ".jsonl":
        yield from ((f"{source}:{number}", row) for number, row in read_jsonl(source))
    elif suffix == ".csv":
        yield from _csv_rows(source)
    elif source.endswith(".parquet"):
        import pyarrow.parquet

        if not Path(source).is_file():
            raise DataError(f"{source}: no such file")
        try:
            rows = pyarrow.parquet.read_table(source).to_pylist()
        except pyarrow.ArrowInvalid as e:
            raise DataError(f"{source}: not a parquet file: {e}") from None
        yield from _arrow_rows(source, rows)
    elif Path(source).exists() or suffix in (".json", ".txt") or source.count("/") > 1 or not source:
        raise DataError(f"{source!r}: expected a .jsonl, .parquet or .csv file, or a Hugging Face dataset id")
    else:
        import datasets

        name, _, named = source.partition(":")
        try:
            rows = datasets.load_dataset(name, config or named or None, split=split)
        except Exception as e:  # hub, network and format errors share no base class
            raise DataError(f"dataset {source!r} (split {split}): {type(e).__name__}: {e}") from None
        yield from _arrow_rows(f"{source}[{split}]", rows)


def _arrow_rows(source: str, rows: Iterable[dict]) -> Iterator[tuple[str, dict]]:
    for i, row in enumerate(rows):
        if problem := unwritable(row):
            raise DataError(f"{source}: row {i}: {problem}")
        yield f"{source}: row {i}", without_nulls(row)


def without_nulls(value: Any) -> Any:
    """The value without the keys whose value is null: Arrow gives every object the keys of all its kind."""
    if isinstance(value, list):
        return [without_nulls(v) if isinstance(v, (dict, list)) else v for v in value]
    if not isinstance(value, dict):
        return value
    return {k: without_nulls(v) for k, v in value.items() if v is not None}


def _csv_rows(source: str) -> Iterator[tuple[str, dict]]:
    """Rows of texts; empty cells are no fields, and a JSON list of texts in an answer's cell is a list of aliases."""
    try:
        with open_text(source, newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if len(set(names := reader.fieldnames or [])) < len(names):
                raise DataError(f"{source}: its header names a field twice: {names}")
            for row in reader:
                where = f"{source}:{reader.line_num}"
                if None in row:
                    raise DataError(f"{where}: more cells than the header has")
                yield where, {k: _aliases(v) if k in ANSWER_KEYS else v for k, v in row.items() if v}
    except UNREADABLE as e:
        raise DataError(unreadable(source, e)) from None
    except csv.Error as e:
        raise DataError(f"{source}: not CSV: {e}") from None


def _aliases(cell: str) -> str | list[str]:
    try:
        value = json.loads(cell)
    except ValueError:
        return cell
    return value if isinstance(value, list) and all(isinstance(v, str) for v in value) else cell


def question_of(row: dict, where: str, task: str = "auto", default_id: str | None = None) -> Question:
    """One row of any supported kind; `where` names it in the DataError of a missing, empty or unknown field.

    An answer in GSM8K's form, a solution that ends in "#### 72", is the 72.
    """
    row = without_nulls(row)
    row = _from_bfcl(row, where) if isinstance(row.get("function"), list) else row
    used = {*ID_KEYS, *QUESTION_KEYS, *CHAT_KEYS, *ADDED_KEYS, *SYSTEM_KEYS, *ANSWER_KEYS, "task", "tools"}
    meta = {k: v for k, v in row.items() if k not in used and isinstance(v, (str, int, float)) and len(str(v)) <= 200}
    if not isinstance(meta.get("min_tool_calls"), (int, type(None))):
        raise DataError(f"{where}: field 'min_tool_calls' is {meta['min_tool_calls']!r}, not a whole number")
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
    text, system = _prompt_of(row, where)
    if not text:
        raise DataError(f"{where}: empty field 'question' (id {identity!r})")
    gold = _first(row, ANSWER_KEYS)
    if gold is None:
        gold = (row.get("reward_model") or {}).get("ground_truth")
    kind, told_by = _task_of(row, gold, task)
    if kind not in get_args(Task):
        raise DataError(f"{where}: field 'task' is {kind!r}, not one of {get_args(Task)}")
    if not isinstance(tools := row.get("tools") or [], list):
        raise DataError(f"{where}: field 'tools' is {str(tools)[:80]!r}, not a list (id {identity!r})")
    try:
        gold = _checked_calls(gold) if kind == "function" else _checked_answers(gold, kind)
    except ValueError as e:
        raise DataError(f"{where}: {e} (id {identity!r})") from None
    return Question(str(identity), text, gold, kind, row.get("tools"), system, meta, told_by)


def _checked_answers(gold: Any, kind: Task) -> Any:
    """The text or number that is right, or the list of those; ValueError if nothing can be graded by it."""
    listed = gold if isinstance(gold, list) else [gold]
    if gold is None or not any(str(one).strip() for one in listed):
        raise ValueError("missing or empty field 'answer'")
    for one in listed:
        if not isinstance(one, (str, int, float)) or isinstance(one, bool):
            raise ValueError(f"field 'answer' is {str(gold)[:80]!r}, not a text or a list of texts")
    marked = [re.search(r"####\s*([^\s#][^\n#]*)\Z", str(one).strip()) for one in listed]
    finals = [found[1] if found else one for found, one in zip(marked, listed)]
    for one in map(str, finals):
        if kind == "math" and len(one) > LONGEST_ANSWER and "\\boxed" not in one:
            raise ValueError(f"field 'answer' has {len(one)} characters and no final '####' or \\boxed: {one[:60]!r}")
    return finals if isinstance(gold, list) else finals[0]


def _checked_calls(gold: Any) -> list[dict]:
    """The calls that eval/bfcl.py compares with; ValueError unless each is {function: {parameter: [values]}}."""
    if gold is None:
        raise ValueError("missing or empty field 'answer'")
    if not isinstance(gold, list):
        raise ValueError(f"field 'answer' is {str(gold)[:80]!r}, not a list of calls")
    for i, call in enumerate(gold):
        named = isinstance(call, dict) and len(call) == 1 and isinstance(next(iter(call.values())), dict)
        if not named or not all(isinstance(values, list) for values in next(iter(call.values())).values()):
            raise ValueError(f"field 'answer' part {i} is not {{function: {{parameter: [values]}}}}: {str(call)[:80]}")
    return gold


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


def _task_of(row: dict, gold: Any, task: str) -> tuple[str, str]:
    """(task, what told it)."""
    if task != "auto":
        return task, f"--task {task}"
    if row.get("task"):
        return row["task"], "field 'task'"
    if row.get("ability") in ("math", "qa"):  # verl files name the task so; their answers are lists throughout
        return row["ability"], "field 'ability'"
    if isinstance(gold, list):
        return "qa", "answer is a list"
    return "math", "answer is a string" if isinstance(gold, str) else "answer is a number"


def _prompt_of(row: dict, where: str) -> tuple[str, str | None]:
    """(question, system message): all that the row says to the model; DataError names a field that finds no place.

    Of several fields that ask, the longest is taken, and the others have to stand in it.
    """
    refuse_fields(row, UNASKED_KEYS, where)
    texts = {name: row[name] for name in QUESTION_KEYS if name in row}
    systems = [row[name] for name in SYSTEM_KEYS if name in row]
    for name in CHAT_KEYS:
        if row.get(name):
            texts[name], said = _from_messages(row[name], name, where)
            systems += said
    if not texts:
        raise DataError(f"{where}: missing field 'question' (or {', '.join((*QUESTION_KEYS[1:], *CHAT_KEYS))})")
    for name in (*texts, *SYSTEM_KEYS, *ADDED_KEYS):
        if not isinstance(text := texts.get(name, row.get(name, "")), str):
            raise DataError(f"{where}: field {name!r} is {str(text)[:80]!r}, not text")
    asked = max(texts, key=lambda name: len(texts[name]))
    question = texts[asked].strip()
    if other := next((name for name, text in texts.items() if text.strip() not in question), None):
        raise DataError(f"{where}: fields {other!r} and {asked!r} ask different things; keep one of them")
    if question:
        added = (row.get(name, "").strip() for name in ADDED_KEYS)
        shown = f"\n{question}\n"  # a prompt may hold it already
        question = "\n\n".join([question, *(text for text in added if text and f"\n{text}\n" not in shown)])
    system = "\n\n".join(dict.fromkeys(text.strip() for text in systems if text.strip()))
    return question, system or None


def refuse_fields(row: dict, names: Iterable[str], where: str) -> None:
    """DataError for the first of these fields that holds something: the model would never see it."""
    if name := next((name for name in names if row.get(name)), None):
        raise DataError(
            f"{where}: field {name!r} would not reach the prompt: write it into the question or the messages, or "
            f"remove it ({str(row[name])[:80]!r})"
        )


def _from_messages(messages: Any, name: str, where: str) -> tuple[str, list[str]]:
    """The user message and the system messages of a chat; a plain string is the user message.

    An assistant message that ends `messages` is an answer somebody wrote: no part of the question.
    """
    if isinstance(messages, str):
        return messages, []
    check_parts(messages, name, ("role", "content"), where)
    systems = [m["content"] for m in messages if m["role"] in ("system", "developer")]
    turns = [(i, m) for i, m in enumerate(messages) if m["role"] not in ("system", "developer")]
    if name == "messages" and len(turns) > 1 and turns[-1][1]["role"] == "assistant":
        turns.pop()
    if not any(m["role"] == "user" for _, m in turns):
        raise DataError(f"{where}: field {name!r} has no user message")
    if len(turns) > 1:
        i, turn = turns[0] if turns[-1][1]["role"] == "user" else turns[-1]
        raise DataError(f"{where}: field {name!r} part {i} is a turn beside the question, by {turn['role']!r}")
    return turns[0][1]["content"], systems


def check_parts(parts: Any, name: str, keys: tuple[str, ...], where: str) -> None:
    """DataError unless field `name` is a list of objects that hold text under every one of `keys`."""
    if not isinstance(parts, list):
        raise DataError(f"{where}: field {name!r} is {str(parts)[:80]!r}, not a list of objects")
    for i, part in enumerate(parts):
        if missing := [key for key in keys if not isinstance(part, dict) or not isinstance(part.get(key), str)]:
            raise DataError(f"{where}: field {name!r} part {i} has no text {missing[0]!r}: {str(part)[:80]}")


def _first(row: dict, names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)

"""Multi-hop questions -> demonstrations with the search tool, question files, and the search index they need.

    python -m data.prepare_multihop --input questions.jsonl --corpus corpus.jsonl --index DIR --output D.jsonl \\
        --questions Q.jsonl --num_questions 100

A question with hops (MuSiQue: sub-question, answer, gold passage) becomes one think/search/result turn per hop, "#1"
in a sub-question replaced by the first hop's answer, and an answer. The results are what the index returned to that
query, rendered as in a rollout. `--keep hit` keeps a demonstration only if every hop's gold passage came back and the
text shown holds the hop's answer, so that no thought claims to have read what was not there; `all` keeps the others
too and lets the thought say that the answer is remembered. `--num_questions` rows, drawn by `--seed` from all rows, are
held out for evaluation (MuSiQue composes questions from shared hops: one may share a hop with a demonstration).
Rows: {qid|id, question, golden_answers, hops: [{question, answer, gold_passage_id}]}, hops optional, passages in
--corpus; or MuSiQue's own {id, question, answer, answer_aliases, question_decomposition, paragraphs} without --corpus.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from core.args import arg, cli, require_positive
from core.run import shuffled, write_text
from core.trajectory import DataError, write_jsonl
from data.questions import read_rows
from tools.search import SearchIndex, read_passages, render


@dataclass
class Args:
    """Flags of data.prepare_multihop."""

    input: str = arg("", "questions (jsonl), or the id of a dataset with MuSiQue's rows")
    split: str = arg("train", "split of a dataset id")
    corpus: str = arg("", "passages (jsonl); not needed if the rows bring theirs")
    index: str = arg("", "folder of the search index, built from the passages (required)")
    output: str = arg("", "demonstrations (jsonl); skipped rows go to OUTPUT.report.json")
    questions: str = arg("", "held-out questions for rollout and evaluation (jsonl)")
    num_questions: int = arg(100, "how many questions to hold out (with --questions)")
    keep: Literal["hit", "all"] = arg("hit", "demonstrations to keep: every hop found its passage, or all")
    search_top_k: int = arg(4, "passages per search, as in rollout.py")
    search_max_chars: int = arg(1200, "characters kept of each passage, as in rollout.py")
    seed: int = arg(0, "seed of the held-out draw")

    def __post_init__(self):
        for name in ("input", "index"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is required")
        if not self.output and not self.questions:
            raise ValueError("nothing to write: give --output, --questions or both")
        require_positive(self, "num_questions")


def main(args: Args) -> dict:
    """Write index and files; returns {rows, held_out, converted, skipped: [{id, reason}]}."""
    rows, passages = checked_rows(args)
    if args.corpus:
        passages = list(read_passages(args.corpus))
    if not passages:
        raise DataError(f"{args.input}: rows without paragraphs need --corpus")
    index = SearchIndex.build(passages)
    index.save(args.index)
    print(f"{args.index}: index of {len(passages)} passages")
    held_out = shuffled(len(rows), args.seed, "held out")[: args.num_questions] if args.questions else []
    if args.questions:
        write_jsonl(args.questions, (plain(rows[i]) for i in held_out))
        print(f"{args.questions}: {len(held_out)} of {len(rows)} questions")
    report = {"rows": len(rows), "held_out": len(held_out), "converted": 0, "skipped": []}
    if args.output:
        made = []
        for i, row in enumerate(tqdm(rows, desc="demonstrations", unit="row")):
            if i not in held_out:
                outcome = demonstration(row, index, args)
                if isinstance(outcome, dict):
                    made.append(outcome)
                else:
                    report["skipped"].append({"id": row["id"], "reason": outcome})
        report["converted"] = write_jsonl(args.output, made)
        write_text(Path(args.output).with_suffix(".report.json"), json.dumps(report, indent=1) + "\n")
        reasons = Counter(row["reason"].split(":")[0] for row in report["skipped"])
        print(f"{args.output}: {len(made)} demonstrations; skipped {dict(reasons)}")
    return report


def checked_rows(args: Args) -> tuple[list[dict], list[dict]]:
    """(rows {id, question, answers, hops, family}, passages the rows bring); DataError names file, line and field."""
    rows, passages, seen = [], {}, set()
    for where, row in read_rows(args.input, args.split):
        if "question_decomposition" in row:
            row = _from_musique(row, passages, where)
        identity, answers = str(row.get("qid") or row.get("id") or ""), row.get("golden_answers")
        for name, value in (("id", identity), ("question", row.get("question")), ("golden_answers", answers)):
            if not value:
                raise DataError(f"{where}: missing or empty field {name!r}")
        if identity in seen:
            raise DataError(f"{where}: duplicate id {identity!r}")
        seen.add(identity)
        hops = row.get("hops") or []
        for n, hop in enumerate(hops, 1):
            for name in ("question", "answer", "gold_passage_id"):
                if not hop.get(name):
                    raise DataError(f"{where}: hop {n} has no {name!r}")
            if any(not 0 < int(i) < n for i in re.findall(r"#(\d+)", hop["question"])):
                raise DataError(f"{where}: hop {n} refers to a hop that is not before it: {hop['question']!r}")
        family = row.get("dataset", "multihop")
        rows.append({"id": identity, "question": row["question"], "answers": answers, "hops": hops, "family": family})
    if not rows:
        raise DataError(f"{args.input}: holds no rows")
    return rows, [{"id": i, "title": title, "text": text} for (title, text), i in passages.items()]


def _from_musique(row: dict, passages: dict[tuple[str, str], str], where: str) -> dict:
    """A row of MuSiQue's own format in ours; its paragraphs join `passages` ((title, text) -> id)."""
    try:
        ids = {}
        for paragraph in row["paragraphs"]:
            key = paragraph["title"], paragraph["paragraph_text"]
            ids[paragraph["idx"]] = passages.setdefault(key, f"musique-{len(passages):06d}")
        hops = [
            {"question": h["question"], "answer": h["answer"], "gold_passage_id": ids.get(h["paragraph_support_idx"])}
            for h in row["question_decomposition"]
        ]
        answers = [row["answer"], *(row.get("answer_aliases") or [])]
    except KeyError as e:
        raise DataError(f"{where}: missing field {e}") from None
    ours = {"golden_answers": answers, "hops": hops, "dataset": "musique"}
    return {"id": row.get("id"), "question": row.get("question"), **ours}


def plain(row: dict) -> dict:
    """The question as rollout and evaluation read it; tables are per dataset."""
    kind = {"task": "qa", "family": row["family"]}
    return {"id": row["id"], "question": row["question"], "answer": row["answers"], **kind}


def demonstration(row: dict, index: SearchIndex, args: Args) -> dict | str:
    """One demonstration, or the reason why the row gives none."""
    if not row["hops"]:
        return "no hops"
    response, answers, before = [], [], ""
    for n, hop in enumerate(row["hops"], 1):
        asked, query = sub_question(hop["question"], answers)
        found = index.search(query, args.search_top_k)
        text = render(found, args.search_max_chars)
        says = hop["answer"].lower() in text.lower()
        if args.keep == "hit" and hop["gold_passage_id"] not in [passage["id"] for passage in found]:
            return f"gold passage not found: hop {n}, query {query!r}"
        if args.keep == "hit" and not says:
            return f"answer cut off: hop {n}, query {query!r}"
        response += [
            {"role": "model", "text": f"<think>{before}I need to know: {asked}</think>\n<search>{query}</search>"},
            {"role": "tool", "name": "search", "text": text},
        ]
        answers.append(hop["answer"])
        before = "{}, say the results. " if says else "The results do not say it; I remember {}. "
        before = before.format(hop["answer"])
    final = f"<think>{before}That answers the question.</think>\n<answer>{row['answers'][0]}</answer>"
    return {**plain(row), "response": [*response, {"role": "model", "text": final}]}


def sub_question(text: str, answers: list[str]) -> tuple[str, str]:
    """(sub-question in words, query): "#1 >> place of birth" -> ("place of birth of X", "X place of birth")."""
    text = re.sub(r"#(\d+)", lambda found: answers[int(found[1]) - 1], text)
    subject, relation, property = (part.strip() for part in text.partition(">>"))
    if relation:
        return f"{property} of {subject}", f"{subject} {property}"
    asked = re.sub(r"\s+(?=[?'.,])", "", " ".join(text.split()))
    return asked, asked


if __name__ == "__main__":
    cli(main, Args)

"""Search tool: a BM25 index over passages (build, save, memory-map, query) and an HTTP client for retrieval servers.

Passages are {"id", "title", "text"} or FlashRAG's {"id", "contents"} (title on the first line, in quotes). Scores are
those of plain `bm25s` on title + text with English stop words; ties go to the earlier passage. An index and a client
answer the same two calls, `search(query, k)` and `search_many(queries, k)`.

    python -m tools.search --passages corpus.jsonl --output DIR        (builds an index and saves it)
"""

import argparse
import functools
import json
import mmap
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.trajectory import DataError, read_jsonl
from tools.client import ServerError, request_json
from tools.sandbox import ToolResult

PROTOCOLS = ("flashrag", "search_r1")
NO_RESULTS = "no results"
CACHED_QUERIES = 100_000
_WORD = re.compile(r"(?u)\b\w\w+\b")  # the pattern of bm25s


class SearchError(RuntimeError):
    """A retrieval server cannot be reached or answers nonsense."""


class SearchIndex:
    """BM25 over passages; made by `build` or `load`, safe to query from many threads."""

    def __init__(self, bm25, passages: Sequence[dict]):
        from bm25s.stopwords import STOPWORDS_EN

        self._bm25, self.passages, self._stop_words = bm25, passages, frozenset(STOPWORDS_EN)
        self._ranked = functools.lru_cache(CACHED_QUERIES)(self._rank)

    @staticmethod
    def build(passages: Iterable[dict], progress: bool = True) -> "SearchIndex":
        """Index passages, read once and in order; ValueError for a passage without text or for none at all."""
        import bm25s
        from bm25s.stopwords import STOPWORDS_EN

        stop_words, vocabulary, ids, kept = frozenset(STOPWORDS_EN), {}, [], []
        for row in tqdm(passages, desc="index", unit=" passages", disable=not progress):
            passage = normalise_passage(row)
            words = _words(f"{passage['title']} {passage['text']}", stop_words)
            ids.append([vocabulary.setdefault(word, len(vocabulary)) for word in words])
            kept.append(passage)
        if not vocabulary:
            raise ValueError("no passage with a word to index")
        bm25 = bm25s.BM25()
        bm25.index(bm25s.tokenization.Tokenized(ids=ids, vocab=vocabulary), show_progress=progress)
        return SearchIndex(bm25, kept)

    def save(self, folder: str | Path) -> None:
        """Write the index and its passages into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "passages.offsets.npy").unlink(missing_ok=True)  # written last: without it nothing is loaded
        self._bm25.save(folder, show_progress=False)
        offsets = [0]
        with open(folder / "passages.jsonl", "wb") as file:
            for passage in self.passages:
                offsets.append(offsets[-1] + file.write(json.dumps(passage, ensure_ascii=False).encode() + b"\n"))
        np.save(folder / "passages.offsets.npy", np.array(offsets, dtype=np.int64))

    @staticmethod
    def load(folder: str | Path) -> "SearchIndex":
        """Memory-map a saved index; DataError if the folder holds none."""
        import bm25s

        try:
            bm25 = bm25s.BM25.load(folder, mmap=True, show_progress=False)
            return SearchIndex(bm25, _PassageFile(Path(folder)))
        except (FileNotFoundError, NotADirectoryError) as e:
            raise DataError(f"{folder}: no search index here ({Path(e.filename or '').name} is missing)") from None
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"{folder}: damaged search index: {e}") from None

    def search(self, query: str, k: int = 4) -> list[dict]:
        """The k best passages, each with its "score", best first; empty if no word of the query is indexed."""
        return [self.passages[i] | {"score": score} for i, score in self._ranked(query, k)]

    def search_many(self, queries: Sequence[str], k: int = 4) -> list[list[dict]]:
        """`search` for each query."""
        return [self.search(query, k) for query in queries]

    def _rank(self, query: str, k: int) -> list[tuple[int, float]]:
        vocabulary = self._bm25.vocab_dict
        ids = [vocabulary[word] for word in _words(query, self._stop_words) if word in vocabulary]
        if not ids or k < 1:
            return []
        scores = self._bm25.get_scores_from_ids(ids)  # (passages,) fp32, > 0 where a word occurs
        threshold = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
        candidates = np.flatnonzero((scores >= threshold) & (scores > 0))  # ascending
        best = candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
        return [(int(i), float(scores[i])) for i in best]


class _PassageFile(Sequence):
    """Passages of a saved index, decoded one at a time from the memory-mapped file."""

    def __init__(self, folder: Path):
        self._offsets = np.load(folder / "passages.offsets.npy", mmap_mode="r")
        with open(folder / "passages.jsonl", "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> dict:
        return json.loads(self._bytes[self._offsets[i] : self._offsets[i + 1]])


def normalise_passage(row: dict) -> dict:
    """{"id", "title", "text"} from either format; ValueError names what is missing."""
    if "id" not in row:
        raise ValueError(f"a passage needs an id: {str(row)[:80]}")
    if isinstance(row.get("contents"), str):
        title, newline, text = row["contents"].partition("\n")
        if not newline:
            title, text = "", title
        quoted = re.fullmatch(r'\s*"(.*)"\s*', title)
        return {"id": row["id"], "title": quoted[1] if quoted else title.strip(), "text": text}
    if not isinstance(row.get("text"), str):
        raise ValueError(f"passage {row['id']!r} has neither text nor contents")
    return {"id": row["id"], "title": str(row.get("title") or ""), "text": row["text"]}


def read_passages(path: str | Path) -> Iterator[dict]:
    """Stream a jsonl file of passages in either format; DataError names file and line."""
    for number, row in read_jsonl(path):
        try:
            yield normalise_passage(row)
        except ValueError as e:
            raise DataError(f"{path}:{number}: {e}") from None


def render(passages: Sequence[dict], max_chars: int = 1200) -> str:
    """What the model reads: title line and text of each passage, cut at max_chars, a blank line between passages."""
    shown = []
    for passage in passages:
        text = f"{passage['title']}\n{passage['text']}" if passage["title"] else passage["text"]
        shown.append(text if len(text) <= max_chars else text[:max_chars] + "...")
    return "\n\n".join(shown) or NO_RESULTS


def run_search(searcher, query: str, k: int = 4, max_chars: int = 1200) -> ToolResult:
    """One search call as a tool: rendered passages, "no results" (ok), or a clear failure; never raises SearchError."""
    start = time.monotonic()
    try:
        text, error = render(searcher.search(query, k), max_chars), None
    except SearchError as e:
        text = error = f"search failed: {e}"
    return ToolResult(text, error is None, error, time.monotonic() - start)


class SearchClient:
    """A retrieval server of either protocol, with time limit, retries and a health check at the start.

    protocol: "flashrag" (POST /search, /batch_search; ET-Agent's retriever) or "search_r1" (POST /retrieve).
    timeout: seconds per attempt; retries: further attempts, after backoff, 2·backoff, 4·backoff … seconds.
    Raises SearchError if the server does not answer, or not in this protocol. Search-R1's web search servers give
    passages neither id nor score: both are None then. failed: requests in a row that brought an error.
    """

    def __init__(
        self, url: str, protocol: str = "flashrag", timeout: float = 60.0, retries: int = 4, backoff: float = 0.5
    ):
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol {protocol!r} is not one of {PROTOCOLS}")
        self.url, self.protocol = url.rstrip("/"), protocol
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._cached = functools.lru_cache(CACHED_QUERIES)(lambda query, k: self.search_many([query], k)[0])
        self.failed = 0
        self.check_health()

    def check_health(self) -> None:
        """Raise SearchError unless the server answers."""
        if self.protocol == "flashrag":
            self._request("/health", None)
        else:  # this protocol has no health page
            self._request("/retrieve", {"queries": ["health check"], "topk": 1, "return_scores": True})

    def search(self, query: str, k: int = 4) -> list[dict]:
        """The k best passages, each with its "score"; answers are cached."""
        return [dict(passage) for passage in self._cached(query, k)]

    def search_many(self, queries: Sequence[str], k: int = 4) -> list[list[dict]]:
        """One request for all queries; an empty query has no results and is not sent."""
        asked = [query for query in queries if query.strip()]
        answers = iter(self._ask(asked, k) if asked else [])
        return [next(answers) if query.strip() else [] for query in queries]

    def _ask(self, queries: list[str], k: int) -> list[list[dict]]:
        try:
            answers = self._answers(queries, k)
        except SearchError:
            self.failed += 1
            raise
        self.failed = 0
        return answers

    def _answers(self, queries: list[str], k: int) -> list[list[dict]]:
        try:
            if self.protocol == "flashrag":
                reply = self._request("/batch_search", {"query": queries, "top_n": k, "return_score": True})
                found = [list(zip(*pair, strict=True)) for pair in zip(*reply, strict=True)]
            else:
                reply = self._request("/retrieve", {"queries": queries, "topk": k, "return_scores": True})
                found = [[(hit["document"], hit.get("score")) for hit in hits] for hits in reply["result"]]
            if len(found) != len(queries):
                raise ValueError(f"{len(found)} answers to {len(queries)} queries")
            return [
                [
                    normalise_passage({"id": None} | document) | {"score": None if score is None else float(score)}
                    for document, score in hits
                ]
                for hits in found
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise SearchError(f"{self.url} does not speak {self.protocol}: {e!r}") from None

    def _request(self, path: str, body: dict | None):
        try:
            return request_json(self.url + path, body, "", self.timeout, self.retries, self.backoff)
        except ServerError as e:
            raise SearchError(str(e)) from None


def _words(text: str, stop_words: frozenset[str]) -> list[str]:
    """The words bm25s would index."""
    return [word for word in _WORD.findall(text.lower()) if word not in stop_words]


def main(argv: list[str] | None = None) -> None:
    """Build an index and save it; exit code 2 for passages that cannot be read."""
    parser = argparse.ArgumentParser(description="Build a BM25 index over passages.", allow_abbrev=False)
    parser.add_argument("--passages", required=True, help='jsonl of {"id", "title", "text"} or {"id", "contents"}')
    parser.add_argument("--output", required=True, help="folder for the index")
    args = parser.parse_args(argv)
    try:
        SearchIndex.build(read_passages(args.passages)).save(args.output)
    except (ValueError, OSError) as e:  # DataError is a ValueError
        parser.error(str(e))


if __name__ == "__main__":
    main()

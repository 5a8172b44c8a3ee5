"""tools/search.py and tools/serve_search.py: ranking, files, both protocols, a server that dies.

TARE_DATA=... python -m pytest tests/test_search.py          (-m slow -s: rates of results/sandbox.md)
"""

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import bm25s
import numpy as np
import pytest

import tools.search
import tools.serve_search
from core.trajectory import DataError
from engines.toolbox import FAILED_SEARCHES, open_tools
from rollout import RolloutArgs
from tools.sandbox import ToolResult
from tools.search import SearchClient, SearchError, SearchIndex, normalise_passage, read_passages, render, run_search
from tools.serve_search import SearchServer

PASSAGES = [
    {"id": "1", "title": "Cats", "text": "cats purr"},
    {"id": "2", "contents": '"Dogs "and" foxes"\ndogs bark'},
    {"id": "3", "title": "", "text": "cats and dogs"},
    {"id": "4", "contents": "a cat alone"},
]


@pytest.fixture(scope="module")
def index():
    return SearchIndex.build(PASSAGES, progress=False)


@pytest.fixture(scope="module")
def server(index):
    server = SearchServer(index)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def post(server, path, body, method="POST"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
    connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body))
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


# ---- as a tool of a rollout


@pytest.mark.parametrize("protocol, page", [("flashrag", "/batch_search"), ("search_r1", "/retrieve")])
def test_a_rollout_searches_at_a_server(server, index, tmp_path, protocol, page, monkeypatch):
    only = {name: answer for name, answer in tools.serve_search.PAGES.items() if name == page}
    monkeypatch.setattr(tools.serve_search, "PAGES", only)
    index.save(tmp_path / "index")
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with open_tools(RolloutArgs(index=str(tmp_path / "index"), search_top_k=2)) as here:
        with open_tools(RolloutArgs(index=url, search_protocol=protocol, search_top_k=2)) as there:
            assert here["search"]("cats").text == there["search"]("cats").text != "no results"
            assert here["search"]("cats").seconds == 0.0 < there["search"]("cats").seconds
            assert here["search"]("zebra") == ToolResult("no results", True, None, 0.0)


def test_a_server_or_folder_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(SearchClient.__init__, "__defaults__", ("flashrag", 1.0, 0, 0.1))
    for place, message in (("http://127.0.0.1:9", "--index http://127.0.0.1:9: "), ("gone", "--index gone: no such folder")):
        with pytest.raises(DataError, match=message), open_tools(RolloutArgs(index=place)):
            pass
    with pytest.raises(ValueError, match="--noise 0.5 needs a folder as --index"):
        RolloutArgs(index="http://x", noise=0.5, search_top_k=1)


def test_a_server_that_goes_away_ends_the_run(index, monkeypatch):
    """One query that the server refuses is answered to the model; no answer to anything is no business of the policy."""
    monkeypatch.setattr(SearchClient.__init__, "__defaults__", ("flashrag", 5.0, 0, 0.0))
    server = SearchServer(index)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    page = tools.serve_search.PAGES["/batch_search"]
    with open_tools(RolloutArgs(index=f"http://127.0.0.1:{server.server_address[1]}")) as toolbox:
        monkeypatch.setitem(tools.serve_search.PAGES, "/batch_search", lambda *_: {"no": "list"})
        result = toolbox["search"]("cats")
        assert not result.ok and "does not speak flashrag" in result.text
        monkeypatch.setitem(tools.serve_search.PAGES, "/batch_search", page)
        assert toolbox["search"]("dogs").ok
        server.shutdown()
        server.server_close()
        thread.join()
        with pytest.raises(DataError, match="--index http://127.0.0.1:"):
            toolbox["search"]("cats purr")


def test_a_server_of_passages_without_id_and_score(server, monkeypatch):
    """What Search-R1's servers for web search answer."""
    hits = [{"document": {"contents": '"Cats"\ncats purr'}}, {"document": {"contents": "a cat alone"}}]
    monkeypatch.setitem(tools.serve_search.PAGES, "/retrieve", lambda *_: {"result": [hits]})
    args = RolloutArgs(index=f"http://127.0.0.1:{server.server_address[1]}", search_protocol="search_r1")
    with open_tools(args) as toolbox:
        result = toolbox["search"]("cats")
        assert result.ok and result.text == "Cats\ncats purr\n\na cat alone"


@pytest.mark.parametrize("protocol, page", [("flashrag", "/batch_search"), ("search_r1", "/retrieve")])
def test_a_server_that_answers_every_search_with_an_error_ends_the_run(server, monkeypatch, protocol, page):
    """At the start, before any work, and in the middle, where its health check still passes."""
    monkeypatch.setattr(SearchClient.__init__, "__defaults__", ("flashrag", 5.0, 0, 0.0))
    args = RolloutArgs(index=f"http://127.0.0.1:{server.server_address[1]}", search_protocol=protocol)
    works = tools.serve_search.PAGES[page]
    with open_tools(args) as toolbox:
        for turn in (0, 1):  # one answer begins the count again
            assert toolbox["search"](f"cats {turn}").ok
            monkeypatch.setitem(tools.serve_search.PAGES, page, lambda *_: [{"no": "passage"}])
            for i in range(FAILED_SEARCHES - 1):
                assert not toolbox["search"](f"dogs {turn} {i}").ok
            monkeypatch.setitem(tools.serve_search.PAGES, page, works)
        monkeypatch.setitem(tools.serve_search.PAGES, page, lambda *_: [{"no": "passage"}])
        with pytest.raises(DataError, match=f"searches in a row failed, the last: .* does not speak {protocol}"):
            for i in range(FAILED_SEARCHES):
                toolbox["search"](f"foxes {i}")
                assert toolbox["search"]("cats 0").ok  # the cache answers, not the server
    with pytest.raises(DataError, match=f"--index http://127.0.0.1:.* does not speak {protocol}"), open_tools(args):
        pass


# ---- the index


def test_both_formats_become_one():
    assert [normalise_passage(p) for p in PASSAGES[1:]] == [
        {"id": "2", "title": 'Dogs "and" foxes', "text": "dogs bark"},
        {"id": "3", "title": "", "text": "cats and dogs"},
        {"id": "4", "title": "", "text": "a cat alone"},
    ]


def test_bad_passages_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": 1, "text": "a"}\n{"id": 2, "title": "b"}\n')
    with pytest.raises(DataError, match="p.jsonl:2: passage 2 has neither text nor contents"):
        list(read_passages(path))
    with pytest.raises(ValueError, match="no passage with a word"):
        SearchIndex.build([{"id": 1, "text": "the of"}], progress=False)


def test_search(index):
    assert [p["id"] for p in index.search("dogs", 4)] == ["2", "3"]
    assert [p["id"] for p in index.search("dogs", 1)] == ["2"]
    assert index.search("the unicorn!", 4) == index.search("", 4) == index.search("dogs", 0) == []
    assert index.search_many(["dogs", "unicorn"], 1) == [index.search("dogs", 1), []]


def test_a_result_may_be_changed_by_its_owner(index):
    index.search("dogs", 1)[0]["title"] = "changed"
    assert index.search("dogs", 1)[0]["title"] == 'Dogs "and" foxes'


def test_ties_go_to_the_earlier_passage():
    words = SearchIndex.build([{"id": i, "text": f"same w{i % 2}x"} for i in range(1000)], progress=False)
    assert [p["id"] for p in words.search("same", 70)] == list(range(70))
    assert [p["id"] for p in words.search("w1x same", 600)] == [*range(1, 1000, 2), *range(0, 200, 2)]


def test_saved_index_is_the_same(index, tmp_path):
    index.save(tmp_path)
    loaded = SearchIndex.load(tmp_path)
    assert isinstance(loaded._bm25.scores["data"], np.memmap)
    assert list(loaded.passages) == list(index.passages)
    for query in ("cats", "dogs bark", "unicorn"):
        assert loaded.search(query, 3) == index.search(query, 3)


def test_folder_without_index_is_named(tmp_path, index):
    with pytest.raises(DataError, match="nowhere: no search index here"):
        SearchIndex.load(tmp_path / "nowhere")
    index.save(tmp_path)
    (tmp_path / "data.csc.index.npy").write_bytes(b"x")
    with pytest.raises(DataError, match="damaged search index"):
        SearchIndex.load(tmp_path)


def test_render():
    passages = [{"title": "T", "text": "x" * 10}, {"title": "", "text": "y"}]
    assert render(passages) == "T\nxxxxxxxxxx\n\ny"
    assert render(passages, max_chars=5) == "T\nxxx...\n\ny"
    assert render([]) == "no results"


def test_no_results_is_ok(index):
    result = run_search(index, "unicorn")
    assert (result.text, result.ok, result.error) == ("no results", True, None)
    assert run_search(index, "bark").text == 'Dogs "and" foxes\ndogs bark'


# ---- real data


def real(name):
    folder = os.environ.get("TARE_DATA")
    if not folder:
        pytest.skip("TARE_DATA is not set")
    return Path(folder) / name


def test_recall_at_10_on_real_questions():
    """Plain bm25s has .914, .743, .589 here; and rank by rank ours are its scores."""
    passages = list(read_passages(real("retrieval/corpus.jsonl")))
    index = SearchIndex.build(passages, progress=False)
    plain = bm25s.BM25()
    plain.index(
        bm25s.tokenize([f"{p['title']} {p['text']}" for p in passages], show_progress=False), show_progress=False
    )
    recall = defaultdict(list)
    for line in real("retrieval/questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        found = index.search(row["question"], 10)
        gold = set(row["gold_passage_ids"])
        recall[row["dataset"]].append(len(gold & {p["id"] for p in found}) / len(gold))
        scores = plain.retrieve(
            bm25s.tokenize([row["question"]], show_progress=False), k=10, show_progress=False
        ).scores[0]
        assert [p["score"] for p in found] == scores[scores > 0].tolist()
    means = {name: round(sum(values) / len(values), 2) for name, values in recall.items()}
    assert means["hotpotqa"] >= 0.91 and means["2wiki"] >= 0.74 and means["musique"] >= 0.59, means


def test_recorded_queries_never_fail():
    index = SearchIndex.build(read_passages(real("retrieval/corpus.jsonl")), progress=False)
    for line in real("trajectories/search_queries.jsonl").read_text().splitlines():
        assert run_search(index, json.loads(line)["query"]).ok


# ---- server and client


def test_flashrag_requests(server):
    dogs = {"id": "2", "contents": '"Dogs "and" foxes"\ndogs bark'}
    assert post(server, "/health", b"", "GET") == (
        200,
        {"status": "healthy", "retrievers": {"total": 1, "available": 1}},
    )
    assert post(server, "/search", {"query": "bark", "top_n": 10, "return_score": False}) == (200, [dogs])
    status, (documents, scores) = post(server, "/search", {"query": "bark", "return_score": True})
    assert (status, documents, len(scores)) == (200, [dogs], 1)
    for key in ("query", "queries"):  # ET-Agent's own clients send the second
        assert post(server, "/batch_search", {key: ["bark", "unicorn"], "top_n": 1}) == (200, [[dogs], []])
    status, (documents, scores) = post(server, "/batch_search", {"query": ["bark"], "top_n": 1, "return_score": True})
    assert (status, documents, len(scores[0])) == (200, [[dogs]], 1)


def test_search_r1_requests(server):
    status, reply = post(server, "/retrieve", {"queries": ["bark"], "topk": 3, "return_scores": True})
    assert (
        status == 200
        and [hit["document"]["id"] for hit in reply["result"][0]] == ["2"]
        and reply["result"][0][0]["score"] > 0
    )
    status, reply = post(server, "/retrieve", {"queries": ["bark"], "topk": 3, "return_scores": False})
    assert (status, reply["result"][0][0]["id"]) == (200, "2")  # answered with 500 in the original


@pytest.mark.parametrize(
    "path, body, status",
    [
        ("/search", {"query": ""}, 400),
        ("/search", {"query": ["a"]}, 400),
        ("/search", b"{", 400),
        ("/search", b"[]", 400),
        ("/search", b"\xff", 400),
        ("/search", b"[" * 100_000, 400),
        ("/search", {"query": "a", "top_n": 0}, 400),
        ("/search", {"query": "a", "top_n": "x"}, 400),
        ("/batch_search", {"query": "a"}, 400),
        ("/retrieve", {}, 400),
        ("/nowhere", {}, 404),
    ],
)
def test_bad_requests_are_refused(server, path, body, status):
    assert post(server, path, body)[0] == status
    assert post(server, "/search", {"query": "bark"})[0] == 200


@pytest.mark.parametrize("protocol", ["flashrag", "search_r1"])
def test_client_and_index_give_the_same(server, index, protocol):
    client = SearchClient(f"http://127.0.0.1:{server.server_address[1]}/", protocol)
    assert client.search("dogs", 4) == index.search("dogs", 4)
    assert client.search_many(["cats", " ", "unicorn"], 2) == index.search_many(["cats", "", "unicorn"], 2)


class Recorded(BaseHTTPRequestHandler):
    """Answers with what the original servers sent: a list of (status, body), one per request."""

    answers: list = []
    requests: list = []

    def do_POST(self):
        Recorded.requests.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        status, body = Recorded.answers.pop(0)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status": "healthy"}')

    def log_message(self, *_):
        pass


@pytest.fixture
def recorded():
    Recorded.answers, Recorded.requests = [], []
    server = HTTPServer(("127.0.0.1", 0), Recorded)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_client_sends_and_reads_the_original_formats(recorded):
    document = {"id": "7", "contents": '"A"\nb'}
    Recorded.answers = [(200, [[[document]], [[1.5]]])]
    assert SearchClient(recorded).search("q", 3) == [{"id": "7", "title": "A", "text": "b", "score": 1.5}]
    assert Recorded.requests == [("/batch_search", {"query": ["q"], "top_n": 3, "return_score": True})]
    Recorded.requests.clear()
    Recorded.answers = [(200, {"result": [[]]}), (200, {"result": [[{"document": document, "score": 0.87}]]})]
    assert SearchClient(recorded, "search_r1").search("q", 3) == [{"id": "7", "title": "A", "text": "b", "score": 0.87}]
    assert Recorded.requests[1] == ("/retrieve", {"queries": ["q"], "topk": 3, "return_scores": True})


def test_half_a_surrogate_pair_from_a_server_can_be_written(recorded):
    Recorded.answers = [(200, b'[[[{"id": "7", "contents": "\\"A \\ud83d\\"\\nb \\ude00 \\ud83d\\ude00"}]], [[1.5]]]')]
    assert run_search(SearchClient(recorded), "q").text == "A ?\nb ? 😀"
    assert ToolResult("of a fork \ud83d", False, "\ud83d", 0.0).text == "of a fork ?"


@pytest.mark.parametrize(
    "answers, tries, problem",
    [
        ([(500, b"oops")] * 3, 3, "HTTP 500 oops"),
        ([(200, b"<html>")] * 3, 3, "Expecting value"),
        ([(400, b"empty query")], 1, "HTTP 400 empty query"),
        ([(200, {"detail": "?"})], 1, "does not speak flashrag"),
        ([(200, [[[]], [[]], 3])], 1, "does not speak flashrag"),
        ([(200, [[], []])], 1, "0 answers to 1 queries"),
    ],
)
def test_failures_are_clear_tool_errors(recorded, answers, tries, problem):
    client = SearchClient(recorded, retries=2, backoff=0.01)
    Recorded.answers = list(answers)
    result = run_search(client, "q")
    assert not result.ok and problem in result.error and result.text == result.error
    assert len(Recorded.requests) == tries


def test_client_tries_again_and_remembers_answers_only(recorded):
    client = SearchClient(recorded, retries=2, backoff=0.01)
    Recorded.answers = [(503, b"")] * 3 + [(503, b""), (200, [[[]], [[]]])]
    assert not run_search(client, "q").ok
    assert run_search(client, "q").text == run_search(client, "q").text == "no results"
    assert len(Recorded.requests) == 5


def test_unreachable_server_is_refused_at_the_start():
    with pytest.raises(SearchError, match="http://127.0.0.1:9/health after 2 attempts"):
        SearchClient("http://127.0.0.1:9", retries=1, backoff=0.01)


def start_server(folder, port=0):
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.serve_search", "--index", str(folder), "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, int(process.stdout.readline().rpartition(":")[2])


def test_server_program_dies_and_comes_back(index, tmp_path):
    """Killed mid-run: a clear error, and the next call after its return is answered; SIGTERM is a clean end."""
    index.save(tmp_path)
    process, port = start_server(tmp_path)
    client = SearchClient(f"http://127.0.0.1:{port}", retries=1, backoff=0.05)
    assert client.search("bark") == index.search("bark")
    process.kill()
    process.wait()
    assert "search failed" in run_search(client, "cats").error
    patient = SearchClient.__new__(SearchClient)
    patient.__dict__ = client.__dict__ | {"retries": 8, "backoff": 0.1}
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(patient.search_many(["cats"], 4)[0]))
    waiting.start()
    process, _ = start_server(tmp_path, port)
    waiting.join()
    assert answers == [index.search("cats", 4)]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0


def test_index_program(tmp_path, index):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in PASSAGES))
    tools.search.main(["--passages", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "index")])
    assert SearchIndex.load(tmp_path / "index").search("dogs", 4) == index.search("dogs", 4)


def test_bad_arguments_exit_with_2(tmp_path, capsys):
    nowhere = str(tmp_path / "x.jsonl")
    for program, arguments in (
        (tools.serve_search.main, ["--index", nowhere]),
        (tools.serve_search.main, []),
        (tools.search.main, ["--passages", nowhere, "--output", str(tmp_path)]),
    ):
        with pytest.raises(SystemExit) as e:
            program(arguments)
        assert e.value.code == 2
    assert "x.jsonl: no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_hundred_thousand_passages(tmp_path):
    """Build, load by mmap, and the rate against a bare bm25s loop in the same run."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(50_000)])
    ranks = np.minimum(rng.zipf(1.2, size=(100_000, 80)) - 1, 49_999)
    passages = [{"id": str(i), "title": f"title {i}", "text": " ".join(words[row])} for i, row in enumerate(ranks)]
    start = time.monotonic()
    index = SearchIndex.build(passages)
    built = time.monotonic() - start
    index.save(tmp_path)
    start = time.monotonic()
    loaded = SearchIndex.load(tmp_path)
    opened = time.monotonic() - start
    bare = bm25s.BM25.load(tmp_path, mmap=True)
    picks = random.Random(0)
    queries = [" ".join(picks.choice(words[:20_000]) for _ in range(8)) for _ in range(400)]
    ours = theirs = 0.0
    for query in queries:
        start = time.monotonic()
        documents, scores = bare.retrieve(bm25s.tokenize([query], show_progress=False), k=4, show_progress=False)
        middle = time.monotonic()
        found = loaded.search(query, 4)
        ours, theirs = ours + time.monotonic() - middle, theirs + middle - start
        assert [p["score"] for p in found] == scores[0][scores[0] > 0].tolist()
    print(f"| 100,000 | {built:.1f} | {opened:.2f} | {len(queries) / ours:.0f} | {len(queries) / theirs:.0f} |")
    assert opened < 1 and ours <= theirs / 0.9

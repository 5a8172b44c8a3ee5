"""engines/openai.py, tools/client.py: a real HTTP server of the test speaks the protocol, with token ids and without.

python -m pytest tests/test_engine_openai.py
"""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import get_args

import pytest
from tiny_models import ScriptedModel, byte_tokenizer, family_tokenizer
from transformers import GenerationConfig

import flywheel
import rollout
import train_rl
from core.parse import STOPS
from core.trajectory import DataError, Question, load_trajectories
from engines import openai
from engines.turns import start_draft
from rollout import RolloutArgs
from tools.client import ServerError, request_json
from tools.sandbox import ToolResult

CALL = "<think>count</think><python>print(1 + 1)</python>"


def script(response, prompt):
    """What the model writes next: a call and the answer; or the answer at once, after a void turn, or no end at all."""
    if "what is one" in prompt:
        return CALL if "<result>" not in response else "<think>so 2</think><answer>2</answer>"
    if "what is two" in prompt:
        return "<think>hm</think>x<|im_end|>"
    if "hermes" in prompt:
        return '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
    return "<think>" + "never" * 100


QUESTIONS = [Question(f"q{i}", f"what is {n}", "2", "qa") for i, n in enumerate(("one", "two", "three", "one more"))]
QUESTIONS.append(Question("f", "hermes", [{"add": {"a": [1]}}], "function", tools=[]))


class Handler(BaseHTTPRequestHandler):
    """Answers completions by the script as its server's `style` does: vllm and sglang with ids, plain and bare text."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            fail = len(server.requests) in server.fails
            dead = len(server.requests) > server.lives
        if dead:  # the process is gone in the middle of an answer
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fail:
            return self.answer(503, {"error": "loading"})
        if self.path != "/v1/completions":
            return self.answer(404, {"error": "no such page"})
        self.answer(200, {"choices": [server.choice(body)]})

    def answer(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, style, lives=10**9, fails=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.style, self.lives, self.fails = style, lives, fails
        self.tokenizer, self.requests, self.lock = byte_tokenizer(), [], threading.Lock()

    def choice(self, body):
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = self.tokenizer(ids)["input_ids"]
        prompt, _, response = self.tokenizer.decode(ids).partition("<|im_start|>assistant\n")
        text, stop, reason = script(response, prompt), None, "length"
        ends = [text.find(s) + len(s) for s in body["stop"] or [] if s in text]
        if "<|im_end|>" in text:
            reason = "stop"
        if ends:
            text = text[: min(ends)]
            stop, reason = next(s for s in body["stop"] if text.endswith(s)), "stop"
        new = self.tokenizer(text)["input_ids"][: body["max_tokens"]]
        reason = reason if len(new) < body["max_tokens"] else "length"
        shown = text.removesuffix(stop or "").removesuffix("<|im_end|>")[: body["max_tokens"]]
        choice = {"index": 0, "text": shown, "finish_reason": reason}
        if self.style == "vllm":
            # a step of several tokens may run past the stop tag
            past = self.tokenizer(" and more")["input_ids"] if stop else []
            return choice | {"stop_reason": stop, "token_ids": new + past, "prompt_token_ids": ids}
        if self.style == "sglang":
            return choice | {"matched_stop": stop, "token_ids": [i for i in new if i != self.tokenizer.eos_token_id]}
        return choice | ({"stop_reason": stop} if self.style == "plain" else {})


@contextmanager
def serving(style, **behaviour):
    server = Server(style, **behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(openai, "BACKOFF", 0.01)


TOOLS = {"python": lambda code: ToolResult("2", True, None, 0.0)}


def sampled(server, model_folder, questions=QUESTIONS, **flags):
    flags = dict(num_generations=2, max_completion_length=150, temperature=1.0, rollout_batch_size=3) | flags
    url = f"http://127.0.0.1:{server.server_port}/v1"
    args = RolloutArgs(engine="openai", base_url=url, **flags)
    connecting = SimpleNamespace(
        model_name_or_path=str(model_folder), trust_remote_code=False, base_url=url, served_model_name="served"
    )
    return rollout.rollout(*openai.connect(connecting), questions, args, TOOLS, (0,))


@pytest.fixture(scope="module")
def reference():
    """The same script through --engine hf."""
    tokenizer = byte_tokenizer()
    args = RolloutArgs(num_generations=2, max_completion_length=150)
    return rollout.rollout(ScriptedModel(tokenizer, script), tokenizer, QUESTIONS, args, TOOLS, (0,))


def comparable(t):
    return (t.question_id, t.sample_idx, t.token_ids, t.loss_mask, t.spans, t.finish, [c.name for c in t.tool_calls])


@pytest.mark.parametrize("style", ["vllm", "sglang", "plain", "bare"])
def test_turns_are_those_of_the_reference(style, tiny_model, reference):
    with serving(style) as server:
        found = sampled(server, tiny_model)
    assert [comparable(t) for t in found] == [comparable(t) for t in reference]
    assert {t.sampled for t in found} == {style in ("vllm", "sglang")}
    assert [t.n_calls for t in found] == [1, 1, 0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("style", ["vllm", "bare"])
def test_a_turn_has_a_budget_of_its_own(style, tiny_model):
    with serving(style) as server:
        found = sampled(server, tiny_model, QUESTIONS[:3], num_generations=1, max_turn_length=50)
    assert {body["max_tokens"] for _, _, body in server.requests} == {50}
    assert [(t.finish, sum(t.loss_mask)) for t in found if t.question_id == "q2"] == [("length", 50)]
    tokenizer = byte_tokenizer()
    args = RolloutArgs(num_generations=1, max_completion_length=150, max_turn_length=50)
    hf = rollout.rollout(ScriptedModel(tokenizer, script), tokenizer, QUESTIONS[:3], args, TOOLS, (0,))
    assert [comparable(t) for t in found] == [comparable(t) for t in hf]


def test_requests_hold_every_parameter(tiny_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving("vllm") as server:
        found = sampled(server, tiny_model, QUESTIONS[:1], temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1)
    (path, headers, first), (_, _, second) = server.requests[0], server.requests[-1]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer secret"
    assert first["model"] == "served" and first["stop"] == list(STOPS["tags"]) and first["return_token_ids"]
    sampling = {k: first[k] for k in ("temperature", "top_p", "top_k", "repetition_penalty")}
    assert sampling == {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    assert first["prompt"].endswith("<|im_start|>assistant\n") and first["max_tokens"] == 150
    written = found[0].token_ids[: found[0].spans[-2].start]
    assert second["prompt"] == byte_tokenizer().decode(written) and "<result>\n2" in second["prompt"]
    assert second["max_tokens"] == 150 - (len(written) - found[0].prompt_len)
    assert len({body["seed"] for _, _, body in server.requests}) == len(server.requests) == 4
    with serving("vllm") as server:
        sampled(server, tiny_model, QUESTIONS[:1], num_generations=1)
    assert server.requests[0][2]["top_k"] == -1 and server.requests[0][2]["repetition_penalty"] == 1.0


def test_ids_that_their_text_does_not_give_back_are_sent_as_ids(tiny_model):
    tokenizer = byte_tokenizer()
    args = RolloutArgs(engine="openai", base_url="http://x")
    server = openai.Server("http://x", "m", GenerationConfig())
    d = start_draft(QUESTIONS[0], 0, tokenizer, args, (0,))
    assert isinstance(openai.request_of(d, server, tokenizer, args)["prompt"], str)
    eos = tokenizer.eos_token_id
    d.add_segment("model", tokenizer("<|im_")["input_ids"] + tokenizer("end|>")["input_ids"], "<|im_end|>")  # spelled out
    assert openai.request_of(d, server, tokenizer, args)["prompt"] == d.ids
    assert eos not in d.ids[d.prompt_len :]
    d.sampled = False
    assert openai.request_of(d, server, tokenizer, args)["prompt"] == d.ids  # its text would end the turn
    d = start_draft(QUESTIONS[0], 0, tokenizer, args, (0,))
    d.add_segment("model", [*tokenizer("xy")["input_ids"]], "xyz")
    d.sampled = False
    assert isinstance(openai.request_of(d, server, tokenizer, args)["prompt"], str)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_server_that_adds_a_bos_gets_none(sampled):
    tokenizer = family_tokenizer("llama-3.1")
    args = RolloutArgs(engine="openai", base_url="http://x")
    server = openai.Server("http://x", "m", GenerationConfig(eos_token_id=[tokenizer.eos_token_id]))
    for question in (QUESTIONS[0], Question("q", "what is <|eot_id|>", "2", "qa")):
        d = start_draft(question, 0, tokenizer, args, (0,))
        d.sampled = sampled
        request = openai.request_of(d, server, tokenizer, args)
        assert isinstance(request["prompt"], str) == (question is QUESTIONS[0])
        read = tokenizer(request["prompt"])["input_ids"] if question is QUESTIONS[0] else request["prompt"]
        assert read == d.ids and read.count(tokenizer.bos_token_id) == 1
        assert request["stop_token_ids"] == sorted(
            [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")]
        )


def test_what_ended_a_turn(tiny_model):
    ended = openai.swallowed
    for reply, text, missing in [
        ({"stop_reason": "</search>"}, "<search>x", "</search>"),
        ({"matched_stop": "</answer>"}, "<search>x</search> <answer>y", "</answer>"),
        ({"stop_reason": None}, "<search>x", "<eos>"),  # the model gave up inside the block
        ({"matched_stop": 7}, "text", "<eos>"),
        ({}, "<python>1", "</python>"),
        ({}, "<search>x</search> <python>1", "</python>"),
        ({}, "<answer>1</answer>", ""),
        ({}, "<answer>1</answer> bye", "<eos>"),
        ({}, "bye<eos>", ""),
    ]:
        assert ended(reply, text, "tags", "<eos>") == missing, (reply, text)
    assert ended({}, "<tool_call>{}</tool_call>", "hermes", "<eos>") == "<eos>"


def test_failures_that_pass_are_waited_for(tiny_model, reference):
    with serving("vllm", fails={1, 2, 5}) as server:
        found = sampled(server, tiny_model, rollout_batch_size=1)
    assert [comparable(t) for t in found] == [comparable(t) for t in reference]
    turns = 2 * (2 + 1 + 1 + 2 + 1)
    assert len(server.requests) == turns + 3


def test_bad_servers_are_named(tiny_model, monkeypatch):
    monkeypatch.setattr(openai, "RETRIES", 1)
    with serving("vllm", lives=0) as server, pytest.raises(DataError, match=r"--base_url http://127.*after 2 attempts"):
        sampled(server, tiny_model)
    with pytest.raises(DataError, match="after 2 attempts"):
        sampled(server, tiny_model)  # nobody listens any more
    with serving("vllm") as server:
        monkeypatch.setattr(Server, "choice", lambda self, body: {"text": 1, "finish_reason": "stop"})
        with pytest.raises(DataError, match="text 1"):
            sampled(server, tiny_model)
        monkeypatch.setattr(Server, "choice", lambda self, body: {})
        with pytest.raises(DataError, match="not an answer of a completions endpoint"):
            sampled(server, tiny_model)
        whole = {"text": "x", "finish_reason": "length", "token_ids": [5], "prompt_token_ids": [1, 2]}
        monkeypatch.setattr(Server, "choice", lambda self, body: whole)
        with pytest.raises(DataError, match="another model"):
            sampled(server, tiny_model)
        monkeypatch.setattr(Server, "choice", lambda self, body: {"text": "", "finish_reason": "length"})
        with pytest.raises(DataError, match="an empty turn for question 'q0'"):
            sampled(server, tiny_model)


def test_client_retries_what_may_pass():
    with serving("bare", fails={1, 2}) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ServerError, match=r"after 3 attempts: HTTP 404 .*no such page"):
            request_json(url + "/nothing", {}, backoff=0.01)
        assert len(server.requests) == 3
        with pytest.raises(ServerError, match="after 1 attempts: HTTP 404"):
            request_json(url + "/nothing", {}, backoff=0.01)


# ---------------------------------------------------------------------------------------------------- scripts


def question_file(tmp_path, n=8):
    path = tmp_path / "q.jsonl"
    rows = [{"id": f"q{i}", "question": f"what is one {i}", "answer": "2"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@contextmanager
def no_sandbox(args):
    yield TOOLS


def test_a_server_that_dies_costs_nothing(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(rollout, "open_tools", no_sandbox)
    monkeypatch.setattr(openai, "RETRIES", 1)
    flags = dict(model_name_or_path=str(tiny_model), data=question_file(tmp_path), output=str(tmp_path / "t.jsonl"))
    flags |= dict(engine="openai", num_generations=2, rollout_batch_size=4, threads=1)
    with serving("vllm", lives=15) as server:
        flags["base_url"] = f"http://127.0.0.1:{server.server_port}/v1"
        with pytest.raises(DataError, match="goes on from what is written"):
            rollout.main(rollout.Args(**flags))
    kept = load_trajectories(flags["output"])
    assert 2 <= len(kept) < 16 and len(kept) % 2 == 0  # whole groups
    with serving("vllm") as server:  # it has come back elsewhere
        flags["base_url"] = f"http://127.0.0.1:{server.server_port}/v1"
        done = rollout.main(rollout.Args(**flags))
        asked = {body["prompt"].partition("one ")[2][0] for _, _, body in server.requests}
    assert asked.isdisjoint(t.question_id[1] for t in kept)
    assert load_trajectories(flags["output"]) == done and done[: len(kept)] == kept
    assert sorted((t.question_id, t.sample_idx) for t in done) == [(f"q{i}", k) for i in range(8) for k in range(2)]


def test_evaluation_and_flywheel_sample_at_a_server(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(rollout, "open_tools", no_sandbox)
    monkeypatch.setattr(flywheel, "open_tools", no_sandbox)
    with serving("bare") as server:
        flags = dict(
            model_name_or_path=str(tiny_model), data=question_file(tmp_path, 3), engine="openai", threads=1, task="qa"
        )
        flags["base_url"] = f"http://127.0.0.1:{server.server_port}/v1/"
        rollout.main(rollout.Args(**flags, output=str(tmp_path / "t.jsonl"), num_generations=1, evaluate=True))
        metrics = json.loads((tmp_path / "t.jsonl.metrics.json").read_text())
        assert metrics["all"]["correctness"] == 1.0 and metrics["all"]["calls"] == 1.0
        result = flywheel.main(flywheel.Args(**flags, output_dir=str(tmp_path / "fly"), critic="rule", rounds=1))
    assert result["pool"] >= 3 and result["rft"] >= 3
    assert not any(t.sampled for t in load_trajectories(tmp_path / "fly" / "rft.jsonl"))


def test_flags_that_do_not_go_together(tmp_path):
    flags = dict(model_name_or_path="m", data="q", output_dir="x", engine="openai", base_url="http://x/v1")
    assert "openai" not in get_args(train_rl.Args.__dataclass_fields__["engine"].type)  # RL samples from its policy
    for critic in ("entropy", "model"):
        with pytest.raises(ValueError, match=f"no model here for --critic {critic}"):
            flywheel.Args(**flags, critic=critic)
    flywheel.Args(**flags, critic="model", critic_base_url="http://x/v1")
    with pytest.raises(ValueError, match="--engine openai does not go with --base_url ''"):
        RolloutArgs(engine="openai")
    with pytest.raises(ValueError, match="--engine hf does not go with --base_url 'http://x'"):
        RolloutArgs(base_url="http://x")

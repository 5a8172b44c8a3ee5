"""Sampler at an OpenAI-compatible server (vLLM, SGLang, …): `complete` of rollout.py, turn by turn over HTTP.

    python rollout.py --engine openai --base_url http://localhost:8000/v1 --model_name_or_path M --data Q.jsonl …

`rollout_batch_size` trajectories are under way at once, tools run between their turns. A turn is one completion of the
text so far, with the stop tags of the dialect, and asks for token ids (`return_token_ids` of vLLM and SGLang). Where
they come back they are kept as they are, and the trajectory counts as sampled. Otherwise the text is tokenised here,
and the trajectory is text only (`sampled` False): good for the flywheel, SFT and evaluation, refused by RL.

Every sampling parameter is sent, because a server takes missing ones from the model's generation_config. Turns are
seeded, but what a seed is worth is up to the server. The API key is OPENAI_API_KEY of the environment.
"""

import os
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase

from core.conversation import Draft, decode, encode, turn_end
from core.model import load_tokenizer
from core.parse import STOPS
from core.run import seed_of
from core.trajectory import DataError
from engines.args import SamplingArgs
from engines.toolbox import ToolBox
from engines.turns import (
    Pending,
    closing_tokens,
    collect_results,
    end_if_spent,
    eos_ids,
    submit_calls,
    tokens_left,
    turn_length,
)
from tools.client import ServerError, request_json

TIMEOUT = 600.0  # seconds per turn
RETRIES, BACKOFF = 5, 1.0  # waits of 1, 2, 4, 8, 16 seconds


class Server(NamedTuple):
    """What stands where the other engines have a model."""

    url: str
    name: str  # of the model at the server
    generation_config: GenerationConfig  # for the ids that end a turn


def connect(args: Any) -> tuple[Server, PreTrainedTokenizerBase]:
    """The server of `--base_url` and the tokenizer of `--model_name_or_path`; no weights are loaded."""
    tokenizer = load_tokenizer(args.model_name_or_path, args.trust_remote_code, getattr(args, "date", ""))
    try:
        config = GenerationConfig.from_pretrained(args.model_name_or_path)
    except OSError:  # a folder without one: the tokenizer's eos is all there is
        config = GenerationConfig()
    return Server(args.base_url.rstrip("/"), args.served_model_name or args.model_name_or_path, config), tokenizer


def complete(
    server: Server, tokenizer: PreTrainedTokenizerBase, drafts: list[Draft], args: SamplingArgs, toolbox: ToolBox
) -> None:
    """Sample every draft to its end. DataError if the server fails; what was finished by then stays finished.

    After a failure nothing new is asked; turns that are on their way are waited for.
    """
    eos = set(eos_ids(server, tokenizer))
    queue = deque(d for d in drafts if d.finish is None)
    asked: dict[Future, Draft] = {}
    called: Pending = []
    failure = None
    with ThreadPoolExecutor(args.tool_workers) as tools, ThreadPoolExecutor(args.rollout_batch_size) as pool:
        while queue or asked or called:
            while queue and len(asked) + len(called) < args.rollout_batch_size:
                d = queue.popleft()
                end_if_spent(d, args)
                if d.finish is None:
                    asked[pool.submit(ask, server, request_of(d, server, tokenizer, args))] = d
            wait([*asked, *(f for _, fs in called for f in fs if not f.done())], return_when=FIRST_COMPLETED)
            for future in [f for f in asked if f.done()]:
                d = asked.pop(future)
                try:
                    add_turn(d, future.result(), server, tokenizer, eos, args)
                except DataError as e:
                    failure = failure or e
                    continue
                running = submit_calls([d], toolbox, args, eos, tools)
                called += running
                if not running and d.finish is None:
                    queue.appendleft(d)
            done = [all(f.done() for f in fs) for _, fs in called]
            back = [pair for pair, over in zip(called, done) if over]
            called = [pair for pair, over in zip(called, done) if not over]
            collect_results(back, args, tokenizer)
            queue.extendleft(d for d, _ in back if d.finish is None)
            if failure:
                queue.clear()
    if failure:
        raise failure


def request_of(d: Draft, server: Server, tokenizer: PreTrainedTokenizerBase, args: SamplingArgs) -> dict:
    """The completion request for a draft's next turn.

    The prompt is text if the server's tokenizer will make the draft's ids of it, and the ids where it would not (what
    was sampled may be spelled in other tokens). Of text only drafts the control tokens have to be the same ones. The
    server is taken to add a bos token where the tokenizer does, so that the text goes without it.
    """
    text = tokenizer.decode(d.ids[: d.prompt_len]) + "".join(piece for *_, piece in d.segments)
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(tokenizer.bos_token)
    read, control = tokenizer(text)["input_ids"], set(tokenizer.added_tokens_decoder)
    exact = read == d.ids if d.sampled else [i for i in read if i in control] == [i for i in d.ids if i in control]
    return {
        "model": server.name,
        "prompt": text if exact else d.ids,
        "max_tokens": tokens_left(d, args),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k or -1,
        "repetition_penalty": args.repetition_penalty,
        "stop": list(STOPS[d.dialect]) or None,
        "stop_token_ids": eos_ids(server, tokenizer),
        "seed": seed_of(d.seed, d.response_len) & 0x7FFFFFFF,
        "return_token_ids": True,
    }


def ask(server: Server, body: dict) -> dict:
    """The server's choice: text, finish_reason and, from some servers, token_ids; DataError if there is none."""
    key = os.environ.get("OPENAI_API_KEY", "")
    try:
        choice = request_json(f"{server.url}/completions", body, key, TIMEOUT, RETRIES, BACKOFF)["choices"][0]
        if choice["finish_reason"] not in ("stop", "length") or not isinstance(choice["text"], str):
            raise ServerError(f"finish_reason {choice['finish_reason']!r}, text {choice['text']!r:.80}")
    except ServerError as e:
        raise DataError(f"--base_url {e}; the same command goes on from what is written") from None
    except (KeyError, IndexError, TypeError) as e:
        raise DataError(f"--base_url {server.url}: not an answer of a completions endpoint: {e!r}") from None
    return choice


def add_turn(
    d: Draft, choice: dict, server: Server, tokenizer: PreTrainedTokenizerBase, eos: set[int], args: SamplingArgs
) -> None:
    """Append a turn to its draft; DataError if it is empty or the server's ids are not those of our tokenizer."""
    budget = tokens_left(d, args)
    ids, ended = choice.get("token_ids"), choice["finish_reason"] == "stop"
    if ids is None:
        d.sampled = False
        text = choice["text"]
        text += swallowed(choice, text, d.dialect, turn_end(tokenizer)) if ended else ""
        ids = encode(tokenizer, text)
    else:
        prompt_ids = choice.get("prompt_token_ids")
        if d.sampled and prompt_ids is not None and prompt_ids != d.ids:
            raise DataError(
                f"--base_url {server.url}: the server reads the prompt as other tokens than the tokenizer of "
                "--model_name_or_path: another model?"
            )
        count, cut = turn_length(ids, eos, closing_tokens(tokenizer), STOPS[d.dialect], tokenizer)
        end = tokenizer.convert_tokens_to_ids(turn_end(tokenizer))
        ids = ids[:count] + ([] if cut or not ended else [end])  # an eos that the server kept back
        text = decode(tokenizer, ids)
    if len(ids) > budget:
        ids, ended = ids[:budget], False
        text = decode(tokenizer, ids)
    if not ids:
        raise DataError(f"--base_url {server.url}: an empty turn for question {d.question.id!r}")
    d.add_segment("model", ids, text)
    if not ended:
        d.finish = "length"


def swallowed(choice: dict, text: str, dialect: str, eos: str) -> str:
    """What ended a turn and is missing from its text: a stop tag or `eos`, the mark that ends a turn.

    vLLM names it as `stop_reason`, SGLang as `matched_stop`; of other servers' texts the open block tells.
    """
    stops = STOPS[dialect]
    if any(text.endswith(stop) for stop in stops) or text.endswith(eos):
        return ""
    reason = choice.get("stop_reason", choice.get("matched_stop"))
    if reason in stops:
        return reason
    if "stop_reason" not in choice and "matched_stop" not in choice:
        for stop in stops:
            if text.rfind(stop.replace("/", "")) > text.rfind(stop):
                return stop
    return eos

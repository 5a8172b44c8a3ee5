"""The tools a model may call, and what a call is answered with.

A tool takes its text, or a dict if its schema in `TOOL_SCHEMAS` (core/conversation.py) has several parameters, and
returns a ToolResult. A new tool is an entry in the box of `open_tools`, its tag in `TOOL_TAGS` (core/parse.py) or its
schema in `TOOL_SCHEMAS`, and a sentence in the prompt.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from core.conversation import TOOL_SCHEMAS
from core.trajectory import DataError, ToolCall
from engines.args import SamplingArgs, is_url
from tools.sandbox import PythonSandbox, ToolResult
from tools.search import SearchClient, SearchError, SearchIndex, run_search

FAILED_SEARCHES = 20  # in a row, after which a server is taken for broken
ToolBox = dict[str, Callable[[Any], ToolResult]]  # name -> (its text; a dict if its schema has several parameters)


@contextmanager
def open_tools(args: SamplingArgs) -> Iterator[ToolBox]:
    """The tools a model may call: python always, search if `--index` is given (else says so). Closed on exit."""
    search = {"search": search_tool(args)} if args.index else {}
    if not search:
        print("tools: python; without --index a search is answered with an error")
    with PythonSandbox(args.python_timeout, workers=args.tool_workers) as sandbox:
        yield {"python": sandbox.run, **search}


def search_tool(args: SamplingArgs) -> Callable[[str], ToolResult]:
    """Search in the folder or at the server of `--index`. DataError if there is none.

    An index in memory is so fast that its time counts as 0: what is written does not depend on the machine.
    """
    check_index(args.index)
    if is_url(args.index):
        with named_index(args.index):
            client = SearchClient(args.index, args.search_protocol)
            client.search("health check", 1)  # it may be up and speak another protocol
        return partial(search_at_server, client, args)
    index = SearchIndex.load(args.index)
    if args.noise:
        from data.world.noise import NoisyIndex  # here: only the world's own experiments search in noise

        index = NoisyIndex(index, args.noise, args.noise_seed)
    return lambda query: replace(run_search(index, query, args.search_top_k, args.search_max_chars), seconds=0.0)


def search_at_server(client: SearchClient, args: SamplingArgs, query: str) -> ToolResult:
    """One search. DataError if the server is gone: a policy must not learn from that; the same command goes on later.

    So is a server that answers FAILED_SEARCHES searches in a row with an error.
    """
    result = run_search(client, query, args.search_top_k, args.search_max_chars)
    if client.failed >= FAILED_SEARCHES:
        raise DataError(f"--index {args.index}: {client.failed} searches in a row failed, the last: {result.error}")
    if not result.ok:  # this query's matter, if the server still answers
        with named_index(args.index):
            client.check_health()
    return result


@contextmanager
def named_index(index: str) -> Iterator[None]:
    """Inside: a server's error is a DataError that names `--index`."""
    try:
        yield
    except SearchError as e:
        raise DataError(f"--index {index}: {e}") from None


def check_index(index: str) -> None:
    """DataError if `--index` names a folder that is not there; before any work starts."""
    if not has_index(index):
        raise DataError(f"--index {index}: no such folder")


def has_index(index: str) -> bool:
    """False if `--index` names a folder that is not on this machine."""
    return not index or is_url(index) or Path(index).is_dir()


def run_call(call: ToolCall, earlier: list[ToolCall], toolbox: ToolBox, max_seconds: float) -> ToolCall:
    """The call with its result filled in. A malformed, refused or failed call gets an answer too (ok False).

    max_seconds: of all calls of the trajectory; what comes later is refused.
    """
    if not call.ok:
        return ToolCall(call.name, call.arguments, f"error: {call.error}", False, call.error)
    refusal = None
    if call.name not in toolbox:
        refusal = f"no tool named {call.name}"
    elif sum(c.seconds for c in earlier) >= max_seconds:
        refusal = "refused: the tool time of this question is used up"
    if refusal:
        return ToolCall(call.name, call.arguments, f"error: {refusal}", False, refusal)
    given = call.arguments
    if isinstance(given, dict) and len(parameters_of(call.name)) < 2:  # hermes: {"query": …} or {"code": …}
        if len(given) != 1 or not isinstance(next(iter(given.values())), str):
            error = f"{call.name} takes one text argument"
            return ToolCall(call.name, call.arguments, f"error: {error}", False, error)
        given = next(iter(given.values()))
    result = toolbox[call.name](given)
    return ToolCall(call.name, call.arguments, result.text.rstrip("\n"), result.ok, result.error, result.seconds)


def parameters_of(name: str) -> dict[str, dict]:
    """The parameters that TOOL_SCHEMAS declares of a tool; none if it is not there."""
    schemas = (schema["function"] for schema in TOOL_SCHEMAS)
    return next((schema["parameters"]["properties"] for schema in schemas if schema["name"] == name), {})

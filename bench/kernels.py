"""Benchmark of the kernels against other implementations: a table and a json with hardware, versions and commit.

    python -m bench.kernels --output results/kernels                    every operation, about 8 minutes on one GPU
    python -m bench.kernels --output out/k --operations policy_loss --shapes 8192,3584,152064 \\
        --ours_only --chunks 512 1152 1408 --triton_gemm 256,64,3 128,64,4      variants of the chunk loop, beside ours

Prints versions, checks the kernels against float64 from the same bf16 inputs (and past N·V = 2^31) and only then times:
median of --repeats calls over rotating inputs with realistic logits (largest about 25, entropy 0.5 to 1 nat), after
warm-up. Every number stands beside the rate of the same machine in the same run: linear operations beside torch.mm on
their shapes (one GEMM forward, two with gradients), logits operations beside a copy of the logits. Operations:

    logits_forward    logp and entropy from logits           logits_backward   their gradients, in place for ours
    linear_forward    no gradient, from hidden states        linear_generic    with gradient, loss unknown: 3 GEMMs
    policy_loss       loss and gradient for hidden, with KL and entropy terms; 30 % rows train on 30 % of the tokens

Without CUDA it runs tiny shapes on the CPU paths, to show that it works. Results are written after every line, so a
run that is stopped, or that ends at --minutes, keeps what it measured.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from bench.baselines import BASELINES, Prepare
from bench.cases import LIMITS, Case, kept, loop_errors, make_case, make_head, past_int32_error
from bench.gemm_stats import TILE, run_head_fused
from kernels import linear_logprob_entropy, linear_policy_loss, logprob_entropy
from kernels.linear_logprob_entropy import run_head

Shape = tuple[int, int, int]  # N tokens, H hidden, V vocabulary (or, of a tile: columns, depth, stages)
OPERATIONS = ("logits_forward", "logits_backward", "linear_forward", "linear_generic", "policy_loss")
MAIN: Shape = (8192, 3584, 152064)  # with all baselines; the others with ours alone
OTHERS: list[Shape] = [
    (8192, 2048, 151936),
    (8192, 1536, 151936),
    (8192, 896, 151936),
    (8192, 4096, 128256),
    (8191, 3584, 151665),
    (2048, 3584, 152064),
    (32768, 3584, 152064),
    (65536, 3584, 152064),
]
TOY: list[Shape] = [(96, 32, 1003), (70, 16, 257)]
WARMUP = 5  # calls before the timed ones, beside one for each input set
MAX_LOGITS_ROWS = 16384  # logits operations hold (N, V) logits; beyond this many rows they say nothing new


# -------------------------------------------------------------------------------------------- our own lines


def ours_logits_forward(case: Case):
    return lambda: logprob_entropy(case.logits, case.targets, case.temperature)


def ours_logits_backward(case: Case):
    logits = case.logits.detach().clone().requires_grad_()
    logp, entropy = logprob_entropy(logits, case.targets, case.temperature, inplace_backward=True)
    total = (logp + 0.01 * entropy).sum()
    return lambda: torch.autograd.grad(total, logits)


def ours_linear_forward(case: Case):
    def timed():
        hidden, targets, _ = kept(case)
        with torch.no_grad():
            return linear_logprob_entropy(hidden, case.weight, targets, case.temperature)

    return timed


def ours_linear_generic(case: Case):
    def timed():
        hidden, targets, _ = kept(case)
        logp, entropy = linear_logprob_entropy(hidden, case.weight, targets, case.temperature)
        return torch.autograd.grad((logp + 0.01 * entropy).sum(), case.hidden)

    return timed


def ours_policy_loss(case: Case):
    def timed():
        hidden, targets, arguments = kept(case)
        loss, _ = linear_policy_loss(hidden, case.weight, targets, temperature=case.temperature, **arguments)
        return torch.autograd.grad(loss, case.hidden)

    return timed


def bare_loop(loop: Callable, with_gradients: bool) -> Prepare:
    """A chunk loop alone, with fixed g_logp and g_entropy in place of the loss."""

    def prepare(case):
        some = torch.full((len(case.targets),), 1e-4, device=case.targets.device)

        def gradients(rows, _logp, _entropy):
            return some[rows], some[rows]

        args = (case.hidden.detach(), case.weight, case.targets, case.temperature)
        return lambda: loop(*args, gradients if with_gradients else None)

    return prepare


def gemm_loop(tile: Shape) -> Callable:
    """The loop of gemm_stats.py with a tile given as (columns, depth, stages)."""
    columns, depth, stages = tile
    return partial(run_head_fused, tile=TILE | {"COLUMNS": columns, "DEPTH": depth, "num_stages": stages})


def gemm_name(tile: Shape) -> str:
    columns, depth, stages = tile
    return f"Triton GEMM {TILE['ROWS']}x{columns}x{depth}, {stages} stages"


def candidates(args, operation: str) -> Iterator[tuple[str, Prepare]]:
    """Variants of the chunk loop that were asked for on the command line."""
    if operation not in ("linear_forward", "policy_loss"):
        return
    with_gradients = operation == "policy_loss"
    for chunk in args.chunks:
        loop = partial(run_head, triton=torch.cuda.is_available(), chunk=chunk)
        yield f"tare, loop, chunk {chunk}", bare_loop(loop, with_gradients)
    for tile in args.triton_gemm:
        yield f"tare, {gemm_name(tile)}", bare_loop(gemm_loop(tile), with_gradients)


OURS: dict[str, Prepare] = {
    "logits_forward": ours_logits_forward,
    "logits_backward": ours_logits_backward,
    "linear_forward": ours_linear_forward,
    "linear_generic": ours_linear_generic,
    "policy_loss": ours_policy_loss,
}


# ----------------------------------------------------------------------------------------------- measuring


def measure(prepare: Prepare, cases: list[Case], repeats: int) -> tuple[float, float | None]:
    """Median milliseconds of timed(), inputs rotating, and on CUDA the peak MiB that one call adds to its inputs."""
    cuda, peak = cases[0].hidden.is_cuda, None
    for case in cases:
        prepare(case)()
    if cuda:
        timed = prepare(cases[0])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        del timed
    milliseconds = []
    for i in range(repeats + WARMUP):
        timed = prepare(cases[i % len(cases)])
        if cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            timed()
            end.record()
            end.synchronize()
            milliseconds.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            timed()
            milliseconds.append((time.perf_counter() - begin) * 1e3)
        del timed
    return statistics.median(milliseconds[WARMUP:]), peak


def machine_rates(case: Case, repeats: int) -> dict[str, float]:
    """What this machine does on these shapes: ms of both GEMMs in the head's dtype, GB/s of a copy."""
    parts, weight = case.hidden.detach().split(8192), case.weight
    logits = torch.mm(parts[0], weight.t())
    target, out = torch.empty_like(logits), torch.empty_like(parts[0])

    def gemm1(_case):
        return lambda: [torch.mm(part, weight.t(), out=target[: len(part)]) for part in parts]

    def gemm2(_case):
        return lambda: [torch.mm(logits[: len(part)], weight, out=out[: len(part)]) for part in parts]

    def copy(_case):
        return lambda: target.copy_(logits)

    ms = {f.__name__: measure(f, [case], repeats)[0] for f in (gemm1, gemm2, copy)}
    flop = 2 * len(case.hidden) * weight.numel()
    return {
        "gemm1_ms": ms["gemm1"],
        "gemm2_ms": ms["gemm2"],
        "matmul_tflops": 2 * flop / (ms["gemm1"] + ms["gemm2"]) / 1e9,
        "copy_gbps": 2 * logits.numel() * logits.element_size() / ms["copy"] / 1e6,
    }


def rate(operation: str, case: Case, ms: float, rates: dict[str, float]) -> dict:
    """Useful work per second, and as a percentage of what the machine needs for the bare GEMMs or the bare copy."""
    if operation.startswith("logits"):
        passes = 1 if operation == "logits_forward" else 2
        gbps = passes * case.logits.numel() * case.logits.element_size() / ms / 1e6
        return {"rate": gbps, "unit": "GB/s", "percent": 100 * gbps / rates["copy_gbps"]}
    share = 1.0 if case.keep is None else len(case.keep) / len(case.targets)
    gemms = 1 if operation == "linear_forward" else 2
    flop = 2 * gemms * share * len(case.targets) * case.weight.numel()
    bare = share * (rates["gemm1_ms"] + (gemms - 1) * rates["gemm2_ms"])
    return {"rate": flop / ms / 1e9, "unit": "TFLOP/s", "percent": 100 * bare / ms}


# ------------------------------------------------------------------------------------------------ the run


def correctness(device: torch.device, tiles: list[Shape]) -> list[dict]:
    """Errors in bf16 against float64 of the chunk loops that will be timed, on CUDA also past 2^31 logits."""
    cuda = device.type == "cuda"
    loops = {"": partial(run_head, triton=cuda)} | {gemm_name(t): gemm_loop(t) for t in tiles}
    shape = (384, 1024, 151936) if cuda else (40, 32, 1003)
    checks = []
    for prefix, loop in loops.items():
        for name, error in loop_errors(loop, *shape, device).items():
            checks.append({"check": f"{prefix} {name}".strip(), "error": error, "limit": LIMITS[name]})
    if cuda:
        checks.append({"check": "logits past 2^31", "error": past_int32_error(device), "limit": 1e-4})
    return [check | {"ok": check["error"] <= check["limit"]} for check in checks]


def lines(args, shape: Shape) -> Iterator[tuple[str, float, str, Callable[[], Prepare], str]]:
    """(operation, trained share, method, build, note) of one shape: ours, then --chunks, then the baselines."""
    for operation in args.operations:
        if operation.startswith("logits") and shape[0] > MAX_LOGITS_ROWS:
            continue
        for trained in (1.0, 0.3) if operation == "policy_loss" else (1.0,):
            yield operation, trained, "tare", lambda operation=operation: OURS[operation], ""
            if trained == 1:
                for name, prepare in candidates(args, operation):
                    yield operation, trained, name, lambda prepare=prepare: prepare, "the chunk loop alone"
            if shape in args.with_baselines:
                for name, (build, wrap, note) in BASELINES.get(operation, {}).items():
                    yield operation, trained, name, lambda build=build, wrap=wrap: wrap(build()), note


def run_shape(args, shape: Shape, device: torch.device, deadline: float, add: Callable[[dict], None]) -> None:
    """Measure every line of one shape; a line that fails is recorded as skipped with its reason."""
    needs_logits = any(o.startswith("logits") for o in args.operations) and shape[0] <= MAX_LOGITS_ROWS
    N, H, V = shape
    weight = make_head(V, H, device)
    sets = {1.0: [make_case(N, weight, logits=needs_logits, seed=seed) for seed in (1, 2)]}
    sets[0.3] = [make_case(N, weight, 0.3, seed=seed) for seed in (3, 4)]
    rates = machine_rates(sets[1.0][0], args.repeats)
    add({"operation": "machine", "method": "torch.mm, copy", "shape": shape, **rates})
    for operation, trained, method, build, note in lines(args, shape):
        row = {"operation": operation, "method": method, "shape": shape, "trained": trained, "note": note}
        if time.monotonic() > deadline:
            add(row | {"skipped": f"--minutes {args.minutes} are over"})
            continue
        try:
            ms, peak = measure(build(), sets[trained], args.repeats)
        except Exception as e:  # another library's failure is a result here; ours re-raises
            if method.startswith("tare"):
                raise
            add(row | {"skipped": f"{type(e).__name__}: {e}".splitlines()[0][:160]})
            continue
        add(row | {"ms": ms, "peak_mib": peak, **rate(operation, sets[trained][0], ms, rates)})


def environment(device: torch.device) -> dict:
    """Hardware, versions, commit and command."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or f"CPU: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "commit": git.stdout.strip() or "unknown",
        "command": "python -m bench.kernels " + " ".join(sys.argv[1:]),
    }


def table(result: dict) -> str:
    """The markdown table of a result."""
    out = [f"{k}: {v}" + "  " for k, v in result["environment"].items()]
    out += [f"check {c['check']}: error {c['error']:.1e}, limit {c['limit']:.0e}  " for c in result["checks"]]
    head = ("operation", "N", "H", "V", "trained", "method", "ms", "rate", "% of peak", "extra MiB", "note")
    out += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in result["rows"]:
        shape = " | ".join(map(str, row["shape"]))
        if row["operation"] == "machine":
            gemms = f"{row['gemm1_ms']:.2f} + {row['gemm2_ms']:.2f}"
            speed = f"{row['matmul_tflops']:.0f} TFLOP/s, {row['copy_gbps']:.0f} GB/s"
            out.append(f"| machine | {shape} | | {row['method']} | {gemms} | {speed} | 100 | | |")
            continue
        start = f"| {row['operation']} | {shape} | {100 * row['trained']:.0f} % | {row['method']} "
        if "skipped" in row:
            out.append(start + f"| | | | | skipped: {row['skipped'].replace('|', '/')} |")
            continue
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        numbers = f"| {row['ms']:.2f} | {row['rate']:.3g} {row['unit']} | {row['percent']:.0f} | {peak} "
        out.append(start + numbers + f"| {row['note']} |")
    return "\n".join(out) + "\n"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; --shapes given by hand all get the baselines."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Time the kernels.")
    shape = lambda text: tuple(int(n) for n in text.split(","))  # noqa: E731
    parser.add_argument("--output", required=True, type=Path, help="folder for kernels.json and kernels.md")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="which to time")
    parser.add_argument("--shapes", nargs="+", type=shape, help="N,H,V …; default: the list in this file")
    parser.add_argument("--ours_only", action="store_true", help="no baselines")
    parser.add_argument("--chunks", nargs="+", type=int, default=[], help="time the chunk loop at these sizes too")
    parser.add_argument(
        "--triton_gemm", nargs="+", type=shape, default=[], help="columns,depth,stages of gemm_stats.py"
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed calls per line")
    parser.add_argument("--minutes", type=float, default=8, help="start no new line after this time")
    args = parser.parse_args(argv)
    for flag, form in (("shapes", "N,H,V"), ("triton_gemm", "columns,depth,stages")):
        for given in getattr(args, flag) or []:
            if len(given) != 3 or min(given) < 1:
                parser.error(f"--{flag}: {','.join(map(str, given))} is not {form}")
    default = [MAIN, *OTHERS] if torch.cuda.is_available() else TOY
    args.with_baselines = [] if args.ours_only else args.shapes or default[:1]
    args.shapes = args.shapes or default
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the checks and the measurements; exit code 1 if a check fails."""
    args = parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {"environment": environment(device), "checks": [], "rows": []}
    print(json.dumps(result["environment"], indent=1), flush=True)

    def write() -> None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.output / "kernels.md").write_text(table(result))

    result["checks"] = correctness(device, args.triton_gemm)
    write()
    print(json.dumps(result["checks"], indent=1), flush=True)
    if not all(check["ok"] for check in result["checks"]):
        print("a check failed: nothing was timed", file=sys.stderr)
        return 1
    total = sum(1 + len(list(lines(args, shape))) for shape in args.shapes)
    with tqdm(total=total, unit="line") as progress:

        def add(row: dict) -> None:
            result["rows"].append(row)
            write()
            progress.update()

        for shape in args.shapes:
            run_shape(args, shape, device, deadline, add)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

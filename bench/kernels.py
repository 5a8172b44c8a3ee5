"""Are the kernels right, and how fast are they beside other implementations? Checks them first, then times them.

    python -m bench.kernels --output results/kernels                    every operation, about 8 minutes on one GPU
    python -m bench.kernels --output out/k --operations policy_loss --shapes 8192,3584,152064 --ours_only

First the kernels are compared with float64 on the same bf16 inputs (and past N·V = 2^31); if a check fails, nothing is
timed. A line is the median of --repeats calls over rotating inputs with realistic logits (largest about 25, entropy 0.5
to 1 nat), after warm-up. Every number stands beside the rate of the same machine in the same run: linear operations
beside torch.mm on their shapes (one GEMM forward, two with gradients), logits operations beside a copy of the logits.

    logits_forward    logp and entropy from logits           logits_backward   their gradients, in place for ours
    linear_forward    no gradient, from hidden states        linear_generic    with gradient, loss unknown: 3 GEMMs
    policy_loss       loss and gradient for hidden, with KL and entropy terms; 30 % rows train on 30 % of the tokens

Without CUDA it runs tiny shapes on the CPU paths, to show that it works. Results are written after every line, so a
run that is stopped keeps what it measured.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from bench import report
from bench.baselines import BASELINES, Prepare
from bench.cases import LIMITS, Case, kept, loop_errors, make_case, make_head, past_int32_error
from core.args import arg, check_numbers, cli, require_positive
from core.model import device
from core.trajectory import DataError
from kernels import linear_logprob_entropy, linear_policy_loss, logprob_entropy
from kernels.linear_logprob_entropy import run_head

Shape = tuple[int, int, int]  # N tokens, H hidden, V vocabulary
MAIN = "8192,3584,152064"  # with all baselines; the others with ours alone
OTHERS = [
    "8192,2048,151936", "8192,1536,151936", "8192,896,151936", "8192,4096,128256", "8191,3584,151665",
    "2048,3584,152064", "32768,3584,152064", "65536,3584,152064",
]  # fmt: skip
TOY = ["96,32,1003", "70,16,257"]  # without a GPU
WARMUP = 5  # calls before the timed ones, beside one for each input set
MAX_LOGITS_ROWS = 16384  # logits operations hold (N, V) logits; beyond this many rows they say nothing new
COLUMNS = ["operation", "N,H,V", "trained", "method", "ms", "rate", "% of peak", "extra MiB", "note"]


# -------------------------------------------------------------------------------------------- our own lines


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


OURS: dict[str, Prepare] = {
    "logits_forward": lambda case: lambda: logprob_entropy(case.logits, case.targets, case.temperature),
    "logits_backward": ours_logits_backward,
    "linear_forward": ours_linear_forward,
    "linear_generic": ours_linear_generic,
    "policy_loss": ours_policy_loss,
}


@dataclass
class Args:
    """Flags of the benchmark."""

    output: str = arg("", "prefix of the table (.md) and the records (.json) (required)")
    operations: list[str] = arg(list(OURS), "operations to time")
    shapes: list[str] = arg([], "N,H,V …, all with baselines; default: those of this file, the first with baselines")
    ours_only: bool = arg(False, "no baselines")
    repeats: int = arg(30, "timed calls per line, of which the median counts")
    threads: int = arg(2, "CPU threads")

    def __post_init__(self):
        if not self.output:
            raise ValueError("--output is required")
        check_numbers(self)
        require_positive(self, "repeats", "threads")
        if unknown := [name for name in self.operations if name not in OURS]:
            raise ValueError(f"--operations {unknown[0]}: not one of {', '.join(OURS)}")
        default = [MAIN, *OTHERS] if torch.cuda.is_available() else TOY
        self.with_baselines = [] if self.ours_only else self.shapes or default[:1]
        self.shapes = self.shapes or default
        for text in self.shapes:
            shape_of(text)


def shape_of(text: str) -> Shape:
    """N,H,V as three numbers; ValueError if they are not."""
    numbers = [int(n) if n.isdigit() else 0 for n in text.split(",")]
    if len(numbers) != 3 or min(numbers) < 1:
        raise ValueError(f"--shapes: {text} is not N,H,V")
    return tuple(numbers)


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
    bare = {
        "gemm1": lambda: [torch.mm(part, weight.t(), out=target[: len(part)]) for part in parts],
        "gemm2": lambda: [torch.mm(logits[: len(part)], weight, out=out[: len(part)]) for part in parts],
        "copy": lambda: target.copy_(logits),
    }
    ms = {name: measure(lambda _, call=call: call, [case], repeats)[0] for name, call in bare.items()}
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


def correctness(on: torch.device) -> list[dict]:
    """Errors in bf16 against float64 of the chunk loop that will be timed, on CUDA also past 2^31 logits."""
    cuda = on.type == "cuda"
    errors = loop_errors(partial(run_head, triton=cuda), *((384, 1024, 151936) if cuda else (40, 32, 1003)), on)
    limits = LIMITS
    if cuda:
        errors, limits = errors | {"logits past 2^31": past_int32_error(on)}, limits | {"logits past 2^31": 1e-4}
    return [
        {"check": name, "error": error, "limit": limits[name], "ok": error <= limits[name]}
        for name, error in errors.items()
    ]


def lines(args: Args, text: str) -> Iterator[tuple[str, float, str, Callable[[], Prepare], str]]:
    """(operation, trained share, method, build, note) of one shape: ours, then the baselines."""
    for operation in args.operations:
        if operation.startswith("logits") and shape_of(text)[0] > MAX_LOGITS_ROWS:
            continue
        for trained in (1.0, 0.3) if operation == "policy_loss" else (1.0,):
            yield operation, trained, "tare", lambda operation=operation: OURS[operation], ""
            if text in args.with_baselines:
                for name, (build, note) in BASELINES.get(operation, {}).items():
                    yield operation, trained, name, build, note


def run_shape(args: Args, text: str, add: Callable[[dict], None]) -> None:
    """Measure every line of one shape; a line that fails is recorded as skipped with its reason."""
    N, H, V = shape_of(text)
    needs_logits = any(o.startswith("logits") for o in args.operations) and N <= MAX_LOGITS_ROWS
    weight = make_head(V, H, device())
    sets = {1.0: [make_case(N, weight, logits=needs_logits, seed=seed) for seed in (1, 2)]}
    sets[0.3] = [make_case(N, weight, 0.3, seed=seed) for seed in (3, 4)]
    rates = machine_rates(sets[1.0][0], args.repeats)
    add({"operation": "machine", "method": "torch.mm, copy", "shape": text, **rates})
    for operation, trained, method, build, note in lines(args, text):
        row = {"operation": operation, "method": method, "shape": text, "trained": trained, "note": note}
        try:
            ms, peak = measure(build(), sets[trained], args.repeats)
        except Exception as e:  # another library's failure is a result here; ours re-raises
            if method == "tare":
                raise
            add(row | {"skipped": f"{type(e).__name__}: {e}".splitlines()[0][:160].replace("|", "/")})
            continue
        add(row | {"ms": ms, "peak_mib": peak, **rate(operation, sets[trained][0], ms, rates)})


def cells(rows: list[dict]) -> list[list]:
    """The lines of the table."""
    result = []
    for r in rows:
        if r["operation"] == "machine":
            speed = f"{r['matmul_tflops']:.0f} TFLOP/s, {r['copy_gbps']:.0f} GB/s"
            gemms = f"{r['gemm1_ms']:.2f} + {r['gemm2_ms']:.2f}"
            result.append(["machine", r["shape"], "", r["method"], gemms, speed, 100, "", ""])
            continue
        line = [r["operation"], r["shape"], f"{100 * r['trained']:.0f} %", r["method"]]
        if "skipped" in r:
            result.append([*line, "", "", "", "", f"skipped: {r['skipped']}"])
            continue
        peak = "" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}"
        numbers = [f"{r['ms']:.2f}", f"{r['rate']:.3g} {r['unit']}", f"{r['percent']:.0f}", peak]
        result.append([*line, *numbers, r["note"]])
    return result


def main(args: Args) -> list[dict]:
    """Check, then measure every line; returns the rows. DataError if a check fails."""
    torch.set_num_threads(args.threads)
    result = report.start("bench.kernels", args)
    result["checks"] = correctness(device())
    shown = [f"{c['check']}: error {c['error']:.1e}, limit {c['limit']:.0e}" for c in result["checks"]]
    notes = f"Errors in bf16: {'; '.join(shown)}. Median of {args.repeats}."
    report.write(result, COLUMNS, [], notes)
    if bad := [text for text, check in zip(shown, result["checks"]) if not check["ok"]]:
        raise DataError(f"a check failed, nothing was timed: {bad[0]}")
    total = sum(1 + len(list(lines(args, shape))) for shape in args.shapes)
    with tqdm(total=total, unit="line") as progress:

        def add(row: dict) -> None:
            result["rows"].append(row)
            report.write(result, COLUMNS, cells(result["rows"]), notes)
            progress.update()

        for shape in args.shapes:
            run_shape(args, shape, add)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    print(report.write(result, COLUMNS, cells(result["rows"]), notes))
    return result["rows"]


if __name__ == "__main__":
    cli(main, Args)

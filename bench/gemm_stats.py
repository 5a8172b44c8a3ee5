"""Candidate for the chunk loop of the linear operations: the statistics fused into GEMM 1. Run by the benchmark alone.

`kernels.linear_logprob_entropy.run_head` writes fp32 logits and reads them twice. Here the first GEMM is a persistent
Triton kernel whose epilogue turns each tile of x = z log2(e)/T, still in registers, into three numbers per row,

    k = max x,   d = Σ 2^(x−k),   s = Σ (x−k) 2^(x−k)            (notation of kernels.logprob_entropy)

and, where a gradient will follow, writes E = 2^(x−k) in the head's dtype: p = E·2^(k − m − log2 d) then has the
relative precision of bf16, which bf16 logits do not give. A second kernel merges the tiles of a row into logp and H; a
third turns E into dz in place, the target's own entry from logp:

    dz_v = [ p_v (A + B ln p_v) + g_logp 1[v=y] ] / T,   A = −g_logp − g_H H,   B = −g_H

Traffic: 12 bytes per row and tile forward; with gradients 2 bytes per logit written, read, written and read again,
8 in all against 16. Memory: 2·c·V bytes, none without gradients. The tiles of one vocabulary strip run next to each
other, so that W is read once. `run_head_fused` has the contract of `run_head` and replaces it once it measures faster.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.linear_logprob_entropy import Gradients, head_input_gradient
from kernels.logprob_entropy import _CONSTANTS, _TRITON_DTYPE, LOG2E, accumulator

TILE = {"ROWS": 128, "COLUMNS": 256, "DEPTH": 64, "num_warps": 8, "num_stages": 3}  # for sm90; depth in elements of H


@triton.jit
def _gemm_stats_kernel(
    hidden,  # (n, H) descriptor
    weight,  # (V, H) descriptor
    targets,  # (n,)
    target_x,  # (n,) out: x of the target
    tile_max,  # (tiles of V, n) out: k
    tile_sum,  # (tiles of V, n) out: d
    tile_moment,  # (tiles of V, n) out: s
    exponentials,  # (n, V) out: E, if STORE
    n,
    V,
    H,
    n_tiles,
    v_tiles,
    n_programs,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    STORE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies bf16 as raw integers
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Each program computes every n_programs-th tile of the logits, row tiles innermost."""
    for tile in tl.range(tl.program_id(0), n_tiles * v_tiles, n_programs, flatten=True):
        row_start = (tile % n_tiles) * ROWS
        v_tile = tile // n_tiles
        v_start = v_tile * COLUMNS
        z = tl.zeros((ROWS, COLUMNS), ACC)
        for start in range(0, H, DEPTH):
            h = hidden.load([row_start, start])
            w = weight.load([v_start, start])
            if UPCAST:
                h = h.to(ACC)
                w = w.to(ACC)
            z = tl.dot(h, w.T, z, input_precision="ieee", out_dtype=ACC)
        rows = row_start + tl.arange(0, ROWS)
        v = v_start + tl.arange(0, COLUMNS)
        x = tl.where((v < V)[None, :], z * SCALE, float("-inf"))
        k = tl.max(x, 1)
        shifted = x - k[:, None]
        shifted = tl.where(shifted < FLOOR, FLOOR, shifted)  # 2^FLOOR = 0, and FLOOR · 0 = 0
        e = tl.exp2(shifted)
        part = v_tile.to(tl.int64) * n + rows
        tl.store(tile_max + part, k, mask=rows < n)
        tl.store(tile_sum + part, tl.sum(e, 1), mask=rows < n)
        tl.store(tile_moment + part, tl.sum(e * shifted, 1), mask=rows < n)
        y = tl.load(targets + rows, mask=rows < n, other=-1)
        mine = (y >= v_start) & (y < v_start + COLUMNS) & (y < V)
        tl.store(target_x + rows, tl.sum(tl.where(v[None, :] == y[:, None], x, 0.0), 1), mask=mine)
        if STORE:
            out = exponentials + rows.to(tl.int64)[:, None] * V + v[None, :]
            inside = (rows < n)[:, None] & (v < V)[None, :]
            tl.store(out, e.to(exponentials.dtype.element_ty), mask=inside)


@triton.jit
def _merge_kernel(
    targets,  # (n,)
    target_x,  # (n,)
    tile_max,  # (tiles of V, n)
    tile_sum,
    tile_moment,
    logp,  # (n,) out
    entropy,  # (n,) out
    log2_norm,  # (2, n) out: m and log2 d
    n,
    v_tiles,
    LN2: tl.constexpr,
    FLOOR: tl.constexpr,
    IGNORE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program merges the tiles of ROWS rows: once for the maximum, once for the two sums."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tiles = tl.arange(0, TILES)
    m = tl.full((ROWS,), -1.0e38, ACC)  # finite: −inf − −inf would be nan in rows past n
    for start in range(0, v_tiles, TILES):
        inside = (start + tiles < v_tiles)[:, None] & (rows < n)[None, :]
        part = (start + tiles).to(tl.int64)[:, None] * n + rows[None, :]
        m = tl.maximum(m, tl.max(tl.load(tile_max + part, mask=inside, other=float("-inf")), 0))
    total = tl.zeros((ROWS,), ACC)
    moment = tl.zeros((ROWS,), ACC)
    for start in range(0, v_tiles, TILES):
        inside = (start + tiles < v_tiles)[:, None] & (rows < n)[None, :]
        part = (start + tiles).to(tl.int64)[:, None] * n + rows[None, :]
        delta = tl.load(tile_max + part, mask=inside, other=float("-inf")) - m[None, :]
        delta = tl.where(delta < FLOOR, FLOOR, delta)
        d = tl.load(tile_sum + part, mask=inside, other=0.0)
        s = tl.load(tile_moment + part, mask=inside, other=0.0)
        alpha = tl.exp2(delta)
        total += tl.sum(alpha * d, 0)
        moment += tl.sum(alpha * (s + delta * d), 0)
    total = tl.where(rows < n, total, 1.0)
    log2_d = tl.log2(total)
    counted = tl.load(targets + rows, mask=rows < n, other=IGNORE) != IGNORE
    x_y = tl.load(target_x + rows, mask=rows < n, other=0.0)
    tl.store(logp + rows, tl.where(counted, LN2 * ((x_y - m) - log2_d), 0.0), mask=rows < n)
    tl.store(entropy + rows, tl.where(counted, LN2 * (log2_d - moment / total), 0.0), mask=rows < n)
    tl.store(log2_norm + rows, m, mask=rows < n)
    tl.store(log2_norm + n + rows, log2_d, mask=rows < n)


@triton.jit
def _exponentials_to_gradients_kernel(
    exponentials,  # (n, V): E in, dz out
    targets,  # (n,)
    tile_max,  # (tiles of V, n)
    logp,  # (n,)
    entropy,  # (n,)
    log2_norm,  # (2, n)
    g_logp,  # (n,)
    g_entropy,  # (n,)
    n,
    V,
    v_tiles,
    n_blocks,
    INV_T: tl.constexpr,
    LN2: tl.constexpr,
    FLOOR: tl.constexpr,
    IGNORE: tl.constexpr,
    ACC: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program rewrites TILES tiles of one row; it reads nothing that another program writes."""
    pid = tl.program_id(0)
    row = (pid // n_blocks).to(tl.int64)
    tiles = (pid % n_blocks) * TILES + tl.arange(0, TILES)
    v = tiles[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at = exponentials + row * V + v
    y = tl.load(targets + row)
    if y == IGNORE:
        tl.store(at, tl.zeros((TILES, COLUMNS), ACC).to(exponentials.dtype.element_ty), mask=v < V)
        return
    ln_y = tl.load(logp + row).to(ACC)
    g_y = tl.load(g_logp + row).to(ACC)
    g_h = tl.load(g_entropy + row).to(ACC)
    a = -g_y - g_h * tl.load(entropy + row).to(ACC)
    k = tl.load(tile_max + tiles.to(tl.int64) * n + row, mask=tiles < v_tiles, other=0.0)
    shift = (k - tl.load(log2_norm + row)) - tl.load(log2_norm + n + row)
    shift = tl.where(shift < FLOOR, FLOOR, shift)[:, None]
    e = tl.load(at, mask=v < V, other=0.0).to(ACC)
    log2_p = tl.where(e > 0, tl.log2(tl.where(e > 0, e, 1.0)) + shift, 0.0)
    dz = e * tl.exp2(shift) * (a - g_h * (LN2 * log2_p))
    dz_y = tl.exp2(ln_y / LN2) * (a - g_h * ln_y) + g_y  # from fp32 logp: 1 − p_y would not survive a bf16 p_y near 1
    dz = tl.where(v == y, dz_y, dz)
    tl.store(at, (dz * INV_T).to(exponentials.dtype.element_ty), mask=v < V)


def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def fused_rows(vocab: int) -> int:
    """Tokens per chunk with gradients: about 1 GiB at 2 bytes per logit, in multiples of a 128-row tile."""
    return max(128, 2**30 // (2 * vocab) // 128 * 128)


def run_head_fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    gradients: Gradients | None,
    chunk: int | None = None,
    tile: dict = TILE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What `run_head` returns, from hidden (N, H) and weight (V, H) with rows of a multiple of 16 bytes."""
    N, V = len(hidden), len(weight)
    device, acc = hidden.device, accumulator(hidden, weight)
    chunk = max(1, min(N, chunk or fused_rows(V)))
    v_tiles = triton.cdiv(V, tile["COLUMNS"])
    constants = {**_CONSTANTS, "ACC": _TRITON_DTYPE[acc]}
    epilogue = {name: constants[name] for name in ("FLOOR", "ACC")}
    weight_descriptor = TensorDescriptor.from_tensor(weight, [tile["COLUMNS"], tile["DEPTH"]])
    parts = torch.empty(3, v_tiles, chunk, dtype=acc, device=device)
    e = torch.empty(chunk if gradients else 0, V, dtype=weight.dtype, device=device)
    logp, entropy = (torch.empty(N, dtype=acc, device=device) for _ in range(2))
    dhidden = torch.zeros_like(hidden) if gradients else None
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        n = rows.stop - start
        h, y = hidden[rows].to(weight.dtype).contiguous(), targets[rows].contiguous()
        n_tiles = triton.cdiv(n, tile["ROWS"])
        x_y = torch.full((n,), float("nan"), dtype=acc, device=device)  # a target that no tile owns stays visible
        log2_norm = torch.empty(2, n, dtype=acc, device=device)
        _gemm_stats_kernel[(min(_programs(device), n_tiles * v_tiles),)](
            TensorDescriptor.from_tensor(h, [tile["ROWS"], tile["DEPTH"]]), weight_descriptor, y, x_y, *parts, e,
            n, V, h.shape[1], n_tiles, v_tiles, min(_programs(device), n_tiles * v_tiles),
            SCALE=LOG2E / temperature, STORE=gradients is not None, UPCAST=device.type == "cpu", **epilogue, **tile,
        )  # fmt: skip
        _merge_kernel[(triton.cdiv(n, 32),)](
            y, x_y, *parts, logp[rows], entropy[rows], log2_norm, n, v_tiles, ROWS=32, TILES=32, **constants
        )
        if gradients is None:
            continue
        g_logp, g_entropy = (g.contiguous() for g in gradients(rows, logp[rows], entropy[rows]))
        n_blocks = triton.cdiv(v_tiles, 16)
        _exponentials_to_gradients_kernel[(n * n_blocks,)](
            e, y, parts[0], logp[rows], entropy[rows], log2_norm, g_logp, g_entropy, n, V, v_tiles, n_blocks,
            INV_T=1 / temperature, COLUMNS=tile["COLUMNS"], TILES=16, num_warps=8, **constants,
        )  # fmt: skip
        dhidden[rows] = head_input_gradient(e[:n], weight, hidden.dtype).to(hidden.dtype)
    return logp, entropy, dhidden

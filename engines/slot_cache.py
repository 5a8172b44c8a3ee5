"""The fast engine's KV cache, one row for each answer under way, and the attention that reads it.

Why attention is written out here (rounding that no batch changes): docstring of engines/fast.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, PreTrainedModel

WIDTH = 64  # keys of every attention are a multiple of this
CALL = 100  # keys that one more attention call is worth on a CPU
ATTENTION = "tare_slots"  # name of `attend` among transformers' attention functions

Group = tuple[slice, slice, int, Tensor]  # rows of the pass, their slots, keys seen, mask (rows, 1, 1, n, keys)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


class SlotCache(Cache):
    """Keys and values of all slots: per layer two buffers (S, H_kv, L, D), written at any (slot, position)."""

    def __init__(self, slots: int):
        super().__init__(layers=[])
        self.slots, self.width, self.buffers = slots, 0, []
        self.where: tuple[Tensor, Tensor] = None  # slots (R, 1), positions (R, n) of the pass

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Write (R, H_kv, n, D) keys and values; returns the whole buffers, `attend` picks its keys."""
        if layer_idx == len(self.buffers):
            shape = (self.slots, key_states.shape[1], self.width, key_states.shape[3])
            self.buffers.append([key_states.new_zeros(shape), value_states.new_zeros(shape)])
        slots, positions = self.where
        for buffer, states in zip(self.buffers[layer_idx], (key_states, value_states)):
            buffer[slots, :, positions] = states.transpose(1, 2)  # (R, n, H_kv, D)
        return tuple(self.buffers[layer_idx])

    def reserve(self, width: int) -> None:
        """Make room for `width` tokens per slot; at least doubles, so that growing costs little."""
        if width <= self.width:
            return
        self.width = max(round_up(width, WIDTH), 2 * self.width)
        for pair in self.buffers:
            for i, old in enumerate(pair):
                pair[i] = old.new_zeros(*old.shape[:2], self.width, old.shape[3])
                pair[i][:, :, : old.shape[2]] = old

    def save(self, slot: int, length: int) -> list[Tensor]:
        """Copies of the first `length` positions of a slot."""
        return [buffer[slot, :, :length].clone() for pair in self.buffers for buffer in pair]

    def load(self, slot: int, saved: list[Tensor]) -> None:
        """Put what `save` returned into a slot."""
        for buffer, states in zip((b for pair in self.buffers for b in pair), saved):
            buffer[slot, :, : states.shape[1]] = states


def attend(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float, plan: list[Group], **other
) -> tuple[Tensor, None]:
    """Attention of (R, H_q, n, D) queries, group by group of `plan`, to their slots' keys; rows in no group get 0.

    Key heads are never repeated: the query heads that share one are stacked as more queries of it.
    """
    if odd := [k for k in ("softcap", "s_aux", "sliding_window", "position_bias") if other.get(k) is not None]:
        raise ValueError(f"--engine fast has no {odd[0]}, which this model's attention uses; use --engine hf")
    R, heads, n, D = query.shape
    shared = heads // key.shape[1]
    query = (query * scaling).reshape(R, key.shape[1], shared * n, D)
    out = torch.zeros_like(query)
    for rows, slots, width, mask in plan:
        scores = query[rows] @ key[slots, :, :width].transpose(2, 3)  # (r, H_kv, shared * n, width)
        scores = scores.unflatten(2, (shared, n)).add_(mask).flatten(2, 3)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        out[rows] = weights @ value[slots, :, :width]
    return out.reshape(R, heads, n, D).transpose(1, 2).contiguous(), None  # (R, n, H_q, D)


def causal_mask(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(r, n) positions of the queries -> (r, 1, 1, n, width), 0 where a key is visible and -inf elsewhere."""
    hidden = torch.arange(width, device=positions.device) > positions[:, None, None, :, None]
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))


def slot_plan(lengths: list[int], call: float = CALL) -> list[tuple[int, int, int]]:
    """Groups (first, end, keys) of neighbouring slots for one decode step; lengths: keys each slot needs, 0 = none.

    A group pays for its longest row, another group for its call: rows join where that is cheaper. call: the price of
    one; inf = a single group, for a GPU, where launching six kernels per layer costs more than masked keys do.
    """
    groups: list[tuple[int, int, int]] = []
    for slot, length in enumerate(lengths):
        width = round_up(length, WIDTH)
        if groups and length:
            first, end, keys = groups[-1]
            if (slot + 1 - first) * max(keys, width) <= (end - first) * keys + width + call:
                groups[-1] = (first, slot + 1, max(keys, width))
                continue
        if length:
            groups.append((slot, slot + 1, width))
    return groups


@contextmanager
def slot_attention(lm: PreTrainedModel) -> Iterator[None]:
    """Inside: the model's layers call `attend`."""
    AttentionInterface.register(ATTENTION, attend)
    before = lm.config._attn_implementation
    lm.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        lm.set_attn_implementation(before)

"""A faster sampler than `generate`: it keeps its KV cache across tool turns. Same drafts in, same drafts out.

A draft holds a slot (a row of the cache) from its prompt to its end; at most `rollout_batch_size` slots are taken.
1. Free slots take drafts from the queue. Drafts that start with the same ids share one prefill and copy its rows.
2. A tool result that came back goes to its slot: a long one is prefilled in pieces, a short one fed token by token
   while other slots sample, so that it costs no pass of its own.
3. One token for every slot that waits for no tool; a slot whose turn is over starts its calls, which run meanwhile.

In float32 on a CPU logits, and so ids, are the same bit for bit for any number and order of slots (tested with 1 and 2
threads). What would break that is avoided: matrix products and SiLU round differently for some row counts (rows come in
multiples of ROWS); SDPA splits keys by batch and threads (attention is two matrix products around a softmax over a
multiple of WIDTH keys, where masked keys add exact zeros); prefilling and feeding round differently (which of them
happens depends on the segment alone). In bfloat16 or on a GPU samples follow the same distribution, but may depend on
the batch. Against `--engine hf`, which rounds in another order, ids are equal up to ties.

Not used: transformers' continuous batching. It took four times as long as generate for 64 rows of 48 + 100 tokens (one
CPU thread, busy machine), knows no stop tags and no per-row seeds, and frees the pages at the end of a turn. On a GPU
all rows are one group of attention; no CUDA graphs yet. Not measured on a GPU.
"""

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.conversation import Draft, decode
from core.model import causal_lm, sampling_mode
from core.parse import STOPS
from core.trajectory import DataError
from engines.args import SamplingArgs
from engines.branching import OPENING, entropy_share, note_segment
from engines.slot_cache import CALL, WIDTH, Group, SlotCache, causal_mask, round_up, slot_attention, slot_plan
from engines.toolbox import ToolBox
from engines.turns import (
    closes_tag,
    closing_tokens,
    collect_results,
    end_if_spent,
    eos_ids,
    gumbel_noise,
    score_processors,
    submit_calls,
    tokens_left,
)

ROWS = 16  # rows of every matrix product are a multiple of this
PIECE = 256  # tokens of one row in one prefill pass
PASS = 4096  # tokens of all rows in one prefill pass
IN_STEP = 24  # results up to this many tokens are fed while others sample, longer ones are prefilled


@dataclass
class Slot:
    """A draft and its row of the cache."""

    draft: Draft
    length: int  # ids whose keys and values are cached
    feed: deque[int]  # ids that follow them; when it runs empty the next token is sampled
    logp: list[float] = field(default_factory=list)  # of new_ids, with --check
    new_ids: list[int] = field(default_factory=list)  # sampled in this turn
    opening: list[float] = field(default_factory=list)  # entropies of the first of them, for branching
    calls: list[Future] = field(default_factory=list)  # running; the slot rests until all are done


class Engine:
    """Slots, queue and cache of one `complete`."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        drafts: list[Draft],
        args: SamplingArgs,
        toolbox: ToolBox,
        pool: Executor,
    ):
        self.tokenizer, self.args, self.toolbox, self.pool = tokenizer, args, toolbox, pool
        self.decoder, self.head = causal_lm(model).base_model, causal_lm(model).get_output_embeddings()
        self.dtype, self.on = self.decoder.dtype, next(model.parameters()).device
        self.eos = set(eos_ids(model, tokenizer))
        self.closing = set(closing_tokens(tokenizer).nonzero().flatten().tolist())
        self.processors = score_processors(args)
        self.queue: deque[Draft] = deque()
        self.waiting: Counter = Counter()  # drafts of the queue by their ids
        self.prefixes: dict[tuple, list[Tensor]] = {}  # ids -> cache rows of all but the last, while drafts wait
        for d in drafts:
            self.enqueue(d)
        trees = {id(d.tree): d.tree.size for d in drafts if d.tree}
        most = sum(trees.values()) + sum(not d.tree for d in drafts)
        size = min(args.rollout_batch_size, max(most, 1))
        self.slots: list[Slot | None] = [None] * round_up(size, ROWS)
        self.cache = SlotCache(len(self.slots))
        self.counts = Counter(prefilled=0, copied=0, fed=0, sampled=0, steps=0)
        self.turned = True  # a turn has ended, or is over by its limits, since `more` was asked

    def enqueue(self, draft: Draft) -> None:
        """Put a draft into the queue, unless it is finished or has no budget left."""
        end_if_spent(draft, self.args)
        if draft.finish is None:
            self.queue.append(draft)
            if draft.cache is None:
                self.waiting[tuple(draft.ids)] += 1

    def forward(self, tokens: Tensor, slots: list[int], positions: Tensor, plan: list[Group]) -> Tensor:
        """(R, n) tokens at (R, n) positions of R slots -> hidden states (R, n, H); fills the cache."""
        self.cache.where = (torch.tensor(slots, device=self.on)[:, None], positions)
        tokens = tokens.to(self.on)
        out = self.decoder(tokens, position_ids=positions, past_key_values=self.cache, use_cache=True, plan=plan)
        return out.last_hidden_state

    def admit(self) -> None:
        """Fill free slots from the queue; drafts of equal ids get copies of one prefill, a branch its parent's rows."""
        room = self.args.rollout_batch_size - sum(slot is not None for slot in self.slots)
        members: dict[tuple, list[int]] = {}
        for i in [i for i, slot in enumerate(self.slots) if slot is None][: min(room, len(self.queue))]:
            draft = self.queue.popleft()
            self.slots[i] = Slot(draft, 0, deque(draft.ids))
            if draft.cache is None:
                members.setdefault(tuple(draft.ids), []).append(i)
            else:
                self.copy_rows(i, draft.cache)
                draft.cache = None
        self.prefill([m[0] for ids, m in members.items() if ids not in self.prefixes])
        for ids, m in members.items():
            self.waiting[ids] -= len(m)
            if ids not in self.prefixes:
                self.prefixes[ids] = self.cache.save(m.pop(0), len(ids) - 1)
            for i in m:
                self.copy_rows(i, self.prefixes[ids])
            if not self.waiting[ids]:
                del self.waiting[ids], self.prefixes[ids]

    def copy_rows(self, i: int, saved: list[Tensor]) -> None:
        """Give a slot the cache rows of all its ids but the last."""
        slot = self.slots[i]
        self.cache.load(i, saved)
        slot.length, slot.feed = len(slot.draft.ids) - 1, deque(slot.draft.ids[-1:])
        self.counts["copied"] += slot.length

    def prefill(self, todo: list[int]) -> None:
        """Cache everything but the last id of these slots, in pieces; rows of equal padded length share a pass."""
        while todo := [i for i in todo if len(self.slots[i].feed) > 1]:
            lengths = [round_up(min(len(self.slots[i].feed) - 1, PIECE), ROWS) for i in todo]
            padded = lengths[0]
            rows = [i for i, n in zip(todo, lengths) if n == padded][: PASS // padded]
            positions = torch.tensor([[self.slots[i].length] for i in rows]) + torch.arange(padded)  # (R, padded)
            self.cache.reserve(int(positions.max()) + 1)
            tokens = torch.zeros_like(positions)  # padding is written behind the row's end, where it is never seen
            positions, plan = positions.to(self.on), []
            for r, i in enumerate(rows):
                slot = self.slots[i]
                n = min(len(slot.feed) - 1, padded)
                tokens[r, :n] = torch.tensor([slot.feed.popleft() for _ in range(n)])
                width = round_up(slot.length + padded, WIDTH)
                mask = causal_mask(positions[r : r + 1], width, self.dtype)
                plan.append((slice(r, r + 1), slice(i, i + 1), width, mask))
                slot.length += n
                self.counts["prefilled"] += n
            self.forward(tokens, rows, positions, plan)

    def step(self) -> bool:
        """Advance every slot that is not waiting for a tool by one token; False if there is none."""
        active = [i for i, slot in enumerate(self.slots) if slot and not slot.calls]
        if not active:
            return False
        tokens = torch.zeros(len(self.slots), 1, dtype=torch.long)
        positions = torch.tensor([[slot.length if slot else 0] for slot in self.slots])  # a resting slot's next one
        lengths = [0] * len(self.slots)
        for i in active:
            slot = self.slots[i]
            tokens[i, 0] = slot.feed.popleft()
            slot.length += 1
            lengths[i] = slot.length
        self.cache.reserve(int(positions.max()) + 1)
        positions = positions.to(self.on)
        plan = [
            (slice(first, end), slice(first, end), keys, causal_mask(positions[first:end], keys, self.dtype))
            for first, end, keys in slot_plan(lengths, CALL if self.on.type == "cpu" else float("inf"))
        ]
        hidden = self.forward(tokens, list(range(len(self.slots))), positions, plan)[:, -1]  # (S, H)
        ready = [i for i in active if not self.slots[i].feed]
        self.counts.update(steps=1, fed=len(active) - len(ready), sampled=len(ready))
        if ready:
            self.sample(hidden, ready)
        return True

    def sample(self, hidden: Tensor, ready: list[int]) -> None:
        """Choose the next token of the `ready` slots; (S, H) hidden states."""
        drafts = [self.slots[i].draft for i in ready]
        rows = ready + ready[:1] * (round_up(len(ready), ROWS) - len(ready))
        logits = self.head(hidden[rows])[: len(ready)]  # (len(ready), V)
        scores = self.processors(None, logits.float())
        young = [r for r, i in enumerate(ready) if drafts[r].tree and len(self.slots[i].new_ids) < OPENING]
        if young and self.args.branching != "random":
            for r, share in zip(young, entropy_share(scores[young]).tolist()):
                self.slots[ready[r]].opening.append(share)
        noisy = scores
        if self.args.temperature > 0:
            seeds = torch.tensor([d.seed for d in drafts], device=self.on)
            at = torch.tensor([d.response_len + len(self.slots[i].new_ids) for i, d in zip(ready, drafts)])
            noisy = scores + gumbel_noise(seeds, at.to(self.on), scores.shape[-1])
        chosen = noisy.argmax(dim=-1)
        if self.args.check:
            for i, logp in zip(ready, scores.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()):
                self.slots[i].logp.append(logp)
        for i, token in zip(ready, chosen.tolist()):
            slot = self.slots[i]
            slot.new_ids.append(token)
            slot.feed.append(token)
            self.end_turn(i, token)

    def end_turn(self, i: int, token: int) -> None:
        """Close the turn if this token ends it: start its tool calls, or free the slot."""
        slot, draft = self.slots[i], self.slots[i].draft
        ended = token in self.eos
        if not ended and token in self.closing:
            ended = closes_tag(slot.new_ids, STOPS[draft.dialect], self.tokenizer)
        if not ended and len(slot.new_ids) < tokens_left(draft, self.args):
            return
        if child := note_segment(draft, slot.opening, self.args.branching):
            child.cache = self.cache.save(i, len(child.ids) - 1)
        logp = slot.logp if self.args.check else None
        draft.add_segment("model", slot.new_ids, decode(self.tokenizer, slot.new_ids), logp)
        slot.new_ids, slot.opening, slot.logp = [], [], []
        if not ended:
            draft.finish = "length"
        if pending := submit_calls([draft], self.toolbox, self.args, self.eos, self.pool):
            slot.calls, self.turned = pending[0][1], True
        else:
            self.go_on(i)

    def grow(self, more: Callable[[], list[Draft]]) -> bool:
        """Queue what `more` returns, asked only if a turn has ended since; True if there was something."""
        new, self.turned = more() if self.turned else [], False
        for draft in new:
            self.enqueue(draft)
        return bool(new)

    def go_on(self, i: int) -> None:
        """Next turn of a slot, or free it if its draft is finished or has no budget left."""
        draft, self.turned = self.slots[i].draft, True
        end_if_spent(draft, self.args)
        if draft.finish is not None:
            self.slots[i] = None

    def collect(self, block: bool) -> None:
        """Append the results of the tool calls that are done; `block`: wait for one at least."""
        if block:
            wait([f for slot in self.slots if slot for f in slot.calls], return_when=FIRST_COMPLETED)
        done = [i for i, s in enumerate(self.slots) if s and s.calls and all(f.done() for f in s.calls)]
        for i in done:
            slot = self.slots[i]
            collect_results([(slot.draft, slot.calls)], self.args, self.tokenizer)
            slot.calls, slot.feed = [], deque(slot.draft.ids[slot.length :])
            self.go_on(i)
        self.prefill([i for i in done if self.slots[i] and len(self.slots[i].feed) > IN_STEP])

    def shrink(self) -> None:
        """With an empty queue, move the drafts of the last slots into free ones, so that a step has fewer rows."""
        rows = round_up(max(sum(slot is not None for slot in self.slots), 1), ROWS)
        growing = any(slot and slot.draft.tree and not slot.draft.tree.full for slot in self.slots)
        if self.queue or growing or rows == len(self.slots):
            return
        free = [i for i in range(rows) if self.slots[i] is None]
        for source in range(rows, len(self.slots)):
            if slot := self.slots[source]:
                target = free.pop()
                self.cache.load(target, self.cache.save(source, slot.length))
                self.slots[target] = slot
        del self.slots[rows:]


def check_engine(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, args: Any) -> None:
    """DataError if `--engine fast` is asked of a model whose attention it does not compute: windows, caps, sinks."""
    if args.engine == "fast":
        try:
            _check_attention(model, tokenizer, args)
        except ValueError as e:
            raise DataError(f"--model_name_or_path {args.model_name_or_path}: {e}") from None


@torch.no_grad()
def _check_attention(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, args: SamplingArgs) -> None:
    lm = causal_lm(model)
    # not every model hands its windows to the attention function
    if kinds := set(getattr(lm.config.get_text_config(), "layer_types", None) or []) - {"full_attention"}:
        raise ValueError(f"--engine fast has no {min(kinds)}, which this model uses; use --engine hf")
    with sampling_mode(model), slot_attention(lm):
        engine = Engine(model, tokenizer, [], args, {}, None)
        engine.cache.reserve(1)
        at = torch.zeros(1, 1, dtype=torch.long, device=engine.on)
        first = slice(0, 1)
        engine.forward(at, [0], at, [(first, first, WIDTH, causal_mask(at, WIDTH, engine.dtype))])


def complete(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    drafts: list[Draft],
    args: SamplingArgs,
    toolbox: ToolBox,
    more: Callable[[], list[Draft]] = list,
) -> Counter:
    """Sample every draft to its end, as engines/hf.py does; returns token counts.

    Counts: prefilled, copied (cache rows instead of a prefill), fed (in step with sampling), sampled, steps.
    """
    with (
        torch.no_grad(),
        sampling_mode(model),
        slot_attention(causal_lm(model)),
        ThreadPoolExecutor(args.tool_workers) as pool,
    ):
        engine = Engine(model, tokenizer, drafts, args, toolbox, pool)
        stalled = False
        while engine.grow(more) or engine.queue or any(engine.slots):
            engine.collect(block=stalled)
            engine.admit()
            engine.shrink()
            stalled = not engine.step()
    return engine.counts

"""The reference engine: every turn is one call of Hugging Face `generate` on the whole context of all live drafts.

1. `generate` until each draft closes a tool call or its answer, ends, or spends its budget.
2. Keep the sampled ids verbatim (loss_mask 1); run the tool calls of the batch concurrently.
3. Append each tool's result as ids (loss_mask 0) and go to 1 with the drafts that are not finished.

Every turn prefills its whole context again: the readable reference. `engines/fast.py` does the same work on a cache
that lives across turns.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from core.conversation import Draft, decode
from core.model import sampling_mode
from core.parse import STOPS
from engines.args import SamplingArgs
from engines.branching import OPENING, entropy_share, note_segment
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
    turn_length,
)


def complete(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    drafts: list[Draft],
    args: SamplingArgs,
    toolbox: ToolBox,
    more: Callable[[], list[Draft]] = list,
) -> None:
    """Sample every draft to its end, turn by turn in batches of `--rollout_batch_size`.

    The batches take turns in a fixed order, so the tool calls of one run while the next one generates.
    more: asked after every turn for drafts that start now (branching).
    """
    eos, size = set(eos_ids(model, tokenizer)), args.rollout_batch_size
    with sampling_mode(model), ThreadPoolExecutor(args.tool_workers) as pool:
        batches = deque((drafts[at : at + size], []) for at in range(0, len(drafts), size))
        while batches:
            live, pending = batches.popleft()
            collect_results(pending, args, tokenizer)
            for d in live:
                end_if_spent(d, args)
            live = [d for d in live if d.finish is None]
            if live:
                generate_turn(model, tokenizer, live, args)
                batches.append((live, submit_calls(live, toolbox, args, eos, pool)))
            for d in more():
                if not batches or len(batches[-1][0]) >= size:
                    batches.append(([], []))
                batches[-1][0].append(d)


class StopAtTags(StoppingCriteria):
    """Stops a row at eos or at the token that completes one of its dialect's stop tags."""

    def __init__(self, drafts: list[Draft], width: int, eos: list[int], tokenizer: PreTrainedTokenizerBase):
        self.drafts, self.width, self.tokenizer = drafts, width, tokenizer
        self.eos_token_id = torch.tensor(eos)
        self.closing = closing_tokens(tokenizer)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        last = input_ids[:, -1].cpu()  # (B,)
        done = torch.isin(last, self.eos_token_id)
        in_range = last.clamp(max=len(self.closing) - 1)  # ids beyond the tokenizer's are padding of the embedding
        for row in (self.closing[in_range] & ~done).nonzero().flatten().tolist():
            new_ids = input_ids[row, self.width :].tolist()
            done[row] = closes_tag(new_ids, STOPS[self.drafts[row].dialect], self.tokenizer)
        return done.to(input_ids.device)


class GumbelSampling(LogitsProcessor):
    """Turns greedy decoding into sampling: the argmax of logits + Gumbel noise is a draw from softmax(logits)."""

    def __init__(self, drafts: list[Draft], width: int, keep_logp: bool):
        self.width, self.keep_logp = width, keep_logp
        self.seeds = torch.tensor([d.seed for d in drafts])
        self.lengths = torch.tensor([d.response_len for d in drafts])
        self.logp: list[Tensor] = []  # (B,) each: log-probabilities of the tokens chosen

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.width
        seeds, positions = self.seeds.to(scores.device), (self.lengths + step).to(scores.device)
        noisy = scores + gumbel_noise(seeds, positions, scores.shape[-1])
        if self.keep_logp:
            self.logp.append(scores.log_softmax(-1).gather(1, noisy.argmax(-1, keepdim=True))[:, 0])
        return noisy


class OpeningEntropy(LogitsProcessor):
    """Keeps the entropies of the first steps of every row (see engines/branching.py); changes no score."""

    def __init__(self):
        self.steps: list[Tensor] = []  # (B,) each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self.steps) < OPENING:
            self.steps.append(entropy_share(scores))
        return scores


def generate_turn(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, drafts: list[Draft], args: SamplingArgs
) -> None:
    """Extend every draft by one model segment; finish those that ended or spent their budget."""
    width = max(len(d.ids) for d in drafts)
    ids = torch.full((len(drafts), width), tokenizer.pad_token_id)  # (B, width) left-padded
    attention = torch.zeros_like(ids)
    for row, d in enumerate(drafts):
        ids[row, width - len(d.ids) :] = torch.tensor(d.ids)
        attention[row, width - len(d.ids) :] = 1
    budgets = [tokens_left(d, args) for d in drafts]
    eos = eos_ids(model, tokenizer)
    on = next(model.parameters()).device
    processors, opening = score_processors(args), OpeningEntropy()
    if args.branching not in ("none", "random"):
        processors.append(opening)
    sampling = GumbelSampling(drafts, width, args.check)
    if args.temperature > 0:
        processors.append(sampling)
    config = GenerationConfig(  # greedy over noisy logits; the model's own settings must not shape the samples
        do_sample=False,
        max_new_tokens=max(budgets),
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=1.0,
    )
    out = model.generate(
        input_ids=ids.to(on),
        attention_mask=attention.to(on),
        generation_config=config,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([StopAtTags(drafts, width, eos, tokenizer)]),
    )[:, width:].tolist()
    closing = closing_tokens(tokenizer)
    entropies = torch.stack(opening.steps, dim=1).tolist() if opening.steps else [[] for _ in drafts]  # (B, <= 20)
    logps = torch.stack(sampling.logp, dim=1).tolist() if sampling.logp else [None] * len(drafts)
    for d, new_ids, budget, entropy, logp in zip(drafts, out, budgets, entropies, logps):
        count, ended = turn_length(new_ids[:budget], set(eos), closing, STOPS[d.dialect], tokenizer)
        note_segment(d, entropy[:count], args.branching)
        d.add_segment("model", new_ids[:count], decode(tokenizer, new_ids[:count]), logp and logp[:count])
        if not ended:
            d.finish = "length"

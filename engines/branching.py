"""Samples a question's G answers as a tree that forks after tool results, as ARPO does [2507.19849; PAPERS A5].

1. N0 rollouts start from the prompt.
2. After each tool result: k = min(20, both lengths) tokens at the start of the new segment and of the trajectory's own
   first segment; ΔH = (Σ entropy of the new ones − Σ entropy of the first ones) / ln V. By ΔH (`branch_probability`)
   the trajectory gets at most one child, which copies everything up to the result and goes on under its own seed.
   This is the paper's reading; `arpo_released` measures as the released code does (`compared`).
3. When nothing of the tree is running, what is left of G is spent on rollouts from the prompt.

Who gets the last places must not depend on who was sampled first: what happens after the t-th result is decided for
the whole tree at once, in the order of sample indices, when every trajectory has got past it. So both engines, and a
resumed run, grow the same tree.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import log
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.conversation import Draft
from core.run import seed_of
from core.trajectory import Question
from engines.args import SamplingArgs
from engines.toolbox import ToolBox
from engines.turns import start_draft

OPENING = 20  # most tokens of a segment that are compared
BASE, WEIGHT = 0.5, 0.2  # probability of a branch: BASE + WEIGHT ΔH


@dataclass
class Tree:
    """The drafts of one question; a draft's `tree` points here while it may branch."""

    question: Question
    size: int  # G
    drafts: list[Draft] = field(default_factory=list)  # by sample index
    openings: dict[int, list[list[float]]] = field(default_factory=dict)  # sample index -> per segment H_t / ln V
    forks: dict[tuple[int, int], Draft] = field(default_factory=dict)  # (results, sample index) -> child, if wanted
    depth: int = 1  # number of tool results after which is decided next

    @property
    def full(self) -> bool:
        """True once all G trajectories have been started."""
        return len(self.drafts) == self.size

    def add(self, draft: Draft, openings: list[list[float]]) -> Draft:
        """Enter a draft, whose sample index is the next one, with the openings it has inherited."""
        self.openings[draft.sample_idx] = openings
        self.drafts.append(draft)
        return draft


def plant(question: Question, tokenizer: PreTrainedTokenizerBase, args: SamplingArgs, run: tuple) -> Tree:
    """The tree of a question with its initial rollouts: N0 of G, by default half of them."""
    tree = Tree(question, args.num_generations)
    first = args.initial_rollouts or -(-tree.size // 2)
    for i in range(first):
        draft = tree.add(start_draft(question, i, tokenizer, args, run), [])
        draft.tree = None if first == tree.size else tree
    return tree


def start_groups(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, args: SamplingArgs, run: tuple
) -> list[list[Draft]]:
    """The drafts of each question: G of them, or with branching fewer, in a list that grows."""
    if args.branching == "none":
        return [[start_draft(q, i, tokenizer, args, run) for i in range(args.num_generations)] for q in questions]
    return [plant(q, tokenizer, args, run).drafts for q in questions]


def complete_groups(
    complete: Callable[..., Any],
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: list[list[Draft]],
    args: SamplingArgs,
    toolbox: ToolBox,
    run: tuple,
) -> None:
    """Sample the drafts of all groups, and those that branch off meanwhile, to their end; `complete`: the engine's."""
    drafts = [d for group in groups for d in group]
    if args.branching == "none":
        complete(model, tokenizer, drafts, args, toolbox)
        return
    trees = [group[0].tree for group in groups if group[0].tree]
    more = lambda: [d for tree in trees for d in grow(tree, tokenizer, args, run)]  # noqa: E731
    complete(model, tokenizer, drafts, args, toolbox, more)


def note_segment(draft: Draft, entropies: list[float], branching: str) -> Draft | None:
    """Take note of a sampled segment before it is appended; returns the child that the draft asks for in its place.

    entropies: of the segment's first tokens, as shares of ln V. The child starts only if `grow` finds it a place.
    """
    tree = draft.tree
    if tree is None or tree.full:
        return None
    openings, results = tree.openings[draft.sample_idx], sum(who == "tool" for who, *_ in draft.segments)
    if len(openings) > results:  # a turn without a call goes on
        return None
    child = None
    if results and len(draft.ids) > draft.inherited:  # at its origin a child does not branch again
        uniform = seed_of(draft.seed, "branch", results) / 2**63
        if uniform < branch_probability(branching, *compared(branching, draft, openings, entropies)):
            copies = {name: list(getattr(draft, name)) for name in ("ids", "mask", "logp", "segments", "calls")}
            child = replace(draft, parent=draft.sample_idx, inherited=len(draft.ids), **copies)
            tree.forks[results, draft.sample_idx] = child
    openings.append(entropies[:OPENING])
    return child


def compared(
    branching: str, draft: Draft, openings: list[list[float]], new: list[float]
) -> tuple[list[float], list[float]]:
    """The two openings whose entropies are compared after a result: (first, new) of `branch_probability`.

    openings: of the draft's segments so far, the inherited ones included; new: of the segment after the result.
    arpo_released takes the segment before the call, whose result has just come, in place of the new one, and for a
    child its own first segment, the one after its origin; so at a trajectory's first call of its own ΔH is 0.
    """
    if branching != "arpo_released":
        return openings[0], new
    return openings[sum(who == "tool" and end <= draft.inherited for who, _, end, _ in draft.segments)], openings[-1]


def branch_probability(
    branching: Literal["random", "arpo", "arpo_released", "threshold"], first: list[float], new: list[float]
) -> float:
    """Probability that a trajectory branches, from the openings of two of its segments [PAPERS A5].

    arpo: clip(0.5 + 0.2 ΔH, 0, 1) on equally many tokens of both. arpo_released: the same with each sum over its own
    min(20, length) tokens (there over the ten likeliest tokens' terms, here over the whole vocabulary). threshold: 1
    where 0.5 + 0.2 ΔH > 0.5, else 0 (a threshold is the paper's rule; 0.5 is our reading). random: 0.5, whatever the
    entropy.
    """
    k = OPENING if branching == "arpo_released" else min(OPENING, len(first), len(new))
    change = sum(new[:k]) - sum(first[:k])
    if branching == "random":
        return BASE
    if branching == "threshold":
        return float(BASE + WEIGHT * change > BASE)
    return min(max(BASE + WEIGHT * change, 0.0), 1.0)


def entropy_share(scores: Tensor) -> Tensor:
    """(B, V) scores that are sampled from -> (B,) entropy in units of ln V, between 0 and 1."""
    return torch.special.entr(scores.float().softmax(dim=-1)).sum(dim=-1) / log(scores.shape[-1])


def grow(tree: Tree, tokenizer: PreTrainedTokenizerBase, args: SamplingArgs, run: tuple) -> list[Draft]:
    """Drafts that the tree starts now: children after the results that all have got past, in the end fresh rollouts."""
    before = len(tree.drafts)
    while not tree.full:
        past = [len(tree.openings[d.sample_idx]) > tree.depth for d in tree.drafts]
        if not all(done or d.finish for done, d in zip(past, tree.drafts)):
            break
        for parent in [d.sample_idx for d in tree.drafts if (tree.depth, d.sample_idx) in tree.forks]:
            if not tree.full:
                child, i = tree.forks[tree.depth, parent], len(tree.drafts)
                child.sample_idx, child.seed = i, seed_of(*run, tree.question.id, i)
                tree.add(child, tree.openings[parent][: tree.depth])
        while not any(past) and not tree.full:  # no draft has come this far, so none is running
            tree.add(start_draft(tree.question, len(tree.drafts), tokenizer, args, run), [])
        tree.depth += 1
    if tree.full:
        tree.forks.clear()  # and with them the cache rows of children that found no place
    return tree.drafts[before:]

"""Flags of sampling and tools, shared by every script that samples."""

from dataclasses import dataclass
from typing import Literal

from core.args import arg, check_numbers, require_positive


@dataclass
class SamplingArgs:
    """How trajectories are sampled, tools included; every script that samples has these flags."""

    top_p = 1.0  # no flags: training samples by temperature alone, as it scores; rollout.py makes flags of these three
    top_k = 0
    repetition_penalty = 1.0

    num_generations: int = arg(8, "G, trajectories per question")
    branching: Literal["none", "random", "arpo", "arpo_released", "threshold"] = arg(
        "none", "start fewer and branch after tool results (ARPO): by the rise of entropy, or with p = 0.5 (random)"
    )
    initial_rollouts: int = arg(0, "N0, rollouts that branching starts with; 0 = half of G (ARPO: 8 of 16)")
    max_prompt_length: int = arg(2048, "longest prompt, in tokens; a longer one is an error before any work")
    max_completion_length: int = arg(512, "response budget in tokens, tool results included")
    max_turn_length: int = arg(0, "tokens the model may write between two tool results; 0 = no limit of its own")
    temperature: float = arg(1.0, "sampling temperature; 0 = greedy (not in RL)")
    mode: Literal["auto", "think", "no_think"] = arg("auto", "force a think block, force none, or let the model choose")
    format: Literal["lenient", "strict"] = arg(
        "lenient", "strict: a well-formed response opens with a think block and boxes every answer (ET-Agent's code)"
    )
    dialect: Literal["tags", "hermes"] = arg("tags", "call format; questions of task function always use hermes")
    max_tool_calling_iterations: int = arg(6, "tool calls per trajectory; one more ends it")
    max_calls_per_tool: int = arg(6, "calls of one tool per trajectory; one more ends it")
    max_tool_seconds: float = arg(60.0, "tool time per trajectory, in seconds; later calls are refused")
    rollout_batch_size: int = arg(128, "trajectories decoded at once")
    tool_workers: int = arg(2, "tool calls run at once")
    index: str = arg("", "folder of a search index (data.world --index, tools.search), or URL of a search server")
    search_protocol: Literal["flashrag", "search_r1"] = arg("flashrag", "how to talk to the server of --index URL")
    search_top_k: int = arg(4, "passages per search")
    search_max_chars: int = arg(1200, "characters kept of each passage")
    noise: float = arg(0.0, "world's index only: scale 0 to 1 of wrong and ambiguous passages (data/world/noise.py)")
    noise_seed: int = arg(0, "draws which wordings of a query are answered with a flaw")
    python_timeout: float = arg(5.0, "seconds per python call")
    check: bool = arg(False, "keep the sampler's log-probs; train_rl.py verifies every step's invariants with them")

    def __post_init__(self):
        check_numbers(self)
        require_positive(self, "num_generations", "max_completion_length", "rollout_batch_size", "tool_workers")
        require_positive(self, "search_top_k", "search_max_chars")
        if self.max_turn_length > self.max_completion_length:
            raise ValueError(
                f"--max_turn_length {self.max_turn_length} is more than --max_completion_length "
                f"{self.max_completion_length} and would never act"
            )
        if self.temperature == float("inf"):
            raise ValueError("--temperature must be finite, not inf")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"--noise must be from 0 to 1, not {self.noise}")
        if self.noise and (not self.index or is_url(self.index) or self.search_top_k != 1):
            raise ValueError(f"--noise {self.noise} needs a folder as --index and --search_top_k 1")
        if not 0 <= self.initial_rollouts <= (self.num_generations if self.branching != "none" else 0):
            raise ValueError(
                f"--initial_rollouts {self.initial_rollouts} does not go with --branching {self.branching} and "
                f"--num_generations {self.num_generations}"
            )

    def more_calls(self, extra: int) -> dict[str, int]:
        """The two limits on calls raised by `extra`, for a trajectory that goes on behind an edit or a hint."""
        limits = ("max_tool_calling_iterations", "max_calls_per_tool")
        return {name: getattr(self, name) + extra for name in limits}


def is_url(place: str) -> bool:
    """Whether a flag's value is a server's address, not a folder."""
    return place.startswith(("http://", "https://"))

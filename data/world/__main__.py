"""The world's command line: questions, the search index, and the pre-training of its base model.

    python -m data.world --questions 500 --seed 1 --output questions.jsonl
    python -m data.world --index out/index
    python -m data.world --pretrain --preset tiny --output data/tiny
"""

import argparse
import sys
from pathlib import Path

from core.trajectory import DataError, write_jsonl
from data.world.facts import EASY_TERMS, FAMILIES, GRADED, PLAIN, PRESETS, World, questions
from data.world.noise import MIX
from data.world.pretrain import pretrain
from tools.search import SearchIndex


def main(argv: list[str] | None = None) -> None:
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m data.world", description=about, allow_abbrev=False)
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--questions", type=int, metavar="N", help="write N question rows to --output")
    job.add_argument("--pretrain", action="store_true", help="pre-train the base into --output; resumes")
    job.add_argument("--index", metavar="DIR", help="build the BM25 index of all facts in this folder")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny", help="of world and model")
    parser.add_argument("--seed", type=int, default=0, help="draws the questions; the facts have their own fixed seed")
    parser.add_argument("--output", help="jsonl file (--questions) or model folder (--pretrain)")
    parser.add_argument("--families", default=",".join(PLAIN),
                        help=f"of {', '.join(FAMILIES + GRADED)}; noisy = the mix of data/world/noise.py "
                             "(default: the first six)")  # fmt: skip
    parser.add_argument("--easy_share", type=float, metavar="P",
                        help="share of running sums with at most --easy_terms terms (default: every length as often)")
    parser.add_argument("--easy_terms", type=int, default=EASY_TERMS,
                        help="longest easy sum: where the base is right without a thought in half of the cases")
    parser.add_argument("--thoughts", choices=("belief", "terse"), default="belief",
                        help="--pretrain: thoughts carry the model's belief, or bare plans")  # fmt: skip
    parser.add_argument("--steps", type=int, help="--pretrain: optimizer steps (default: the preset's)")
    parser.add_argument("--threads", type=int, default=2, help="--pretrain: CPU threads (the weights depend on it)")
    args = parser.parse_args(argv)
    if args.index is None and not args.output:
        parser.error("--output is required with --questions and --pretrain")
    if args.questions is not None and args.questions < 1:
        parser.error(f"--questions must be at least 1, found {args.questions}")
    families = MIX if args.families == "noisy" else tuple(args.families.split(","))
    if wrong := [f for f in families if f not in FAMILIES + GRADED]:
        parser.error(f"--families: unknown family {wrong[0]!r}, known are {', '.join(FAMILIES + GRADED)}")
    if args.easy_share is not None and not 0 <= args.easy_share <= 1:
        parser.error(f"--easy_share must be in [0, 1], found {args.easy_share}")
    if not 2 <= args.easy_terms <= 7:
        parser.error(f"--easy_terms must be 2 to 7, found {args.easy_terms}")
    try:
        if args.questions is not None:
            easy = None if args.easy_share is None else (args.easy_share, args.easy_terms)
            rows = questions(World(args.preset), args.questions, args.seed, families, easy)
            count = write_jsonl(args.output, rows)
            print(f"{count} questions written to {args.output}")
        elif args.index:
            passages = World(args.preset).passages()
            SearchIndex.build(passages).save(args.index)
            print(f"index of {len(passages)} passages written to {args.index}")
        else:
            pretrain(Path(args.output), args.preset, args.thoughts, args.steps, args.threads)
    except DataError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""Feed mutated inputs to every boundary of the program, and count what happens.

python tests/fuzz/run.py --seed 3 --inputs 2000 [--targets yaml,records] [--only yaml:17]

An input is identified by its seed, target and number; `--only` repeats one. Prints a table of
outcomes, and each fault; exit status 1 if there is one. With --json, prints the counts as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

gc.set_threshold(50_000, 20, 100)
# The tests' modules, and the package of this folder rather than an installed one.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fuzz import data_targets, model_targets, text_targets  # noqa: E402
from fuzz.outcomes import FAULTS, HANG_S, Outcome, Target, run_case  # noqa: E402

TARGETS = [*text_targets.TARGETS, *data_targets.TARGETS, *model_targets.TARGETS]


def run_input(
    target: Target, seed: int, number: int, limit_s: float = HANG_S
) -> tuple[str, Outcome]:
    """Make one input in a new folder and run it; return what was changed, and the outcome."""
    rng = random.Random(f"{seed}/{target.name}/{number}")
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        case = target.make(rng, Path(folder))
        return case.about, run_case(case, limit_s)


def run(targets: list[Target], seed: int, inputs: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Run `inputs` inputs, the targets in turn; return the verdicts of each, and the faults."""
    counts: dict[str, Counter[str]] = {target.name: Counter() for target in targets}
    faults = []
    for i in range(inputs):
        target, number = targets[i % len(targets)], i // len(targets)
        about, outcome = run_input(target, seed, number)
        counts[target.name][outcome.verdict] += 1
        if outcome.verdict in FAULTS:
            place = f"--seed {seed} --only '{target.name}:{number}'"
            faults.append(f"{outcome.verdict} {place} ({about})\n{outcome.detail[-1500:]}")
    return counts, faults


def quiet() -> None:
    """Silence warnings of the program and of other packages; error lines are printed otherwise."""
    logging.getLogger().addHandler(logging.NullHandler())
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


def main() -> None:
    """Parse arguments, run, and print the report."""
    parser = argparse.ArgumentParser(description="Feed mutated inputs to every boundary.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inputs", type=int, default=500)
    parser.add_argument("--targets", default="", help="names, separated by commas")
    parser.add_argument("--only", default="", help="TARGET:NUMBER of one input")
    parser.add_argument("--json", type=Path, help="file for counts and faults")
    arguments = parser.parse_args()
    quiet()
    if arguments.only:
        name, _, number = arguments.only.partition(":")
        target = next(target for target in TARGETS if target.name == name)
        about, outcome = run_input(target, arguments.seed, int(number))
        print(f"{about}\n{outcome.verdict} in {outcome.seconds:.2f} s\n{outcome.detail}")
        sys.exit(outcome.verdict in FAULTS)
    wanted = arguments.targets.split(",")
    targets = [target for target in TARGETS if not arguments.targets or target.name in wanted]
    counts, faults = run(targets, arguments.seed, arguments.inputs)
    if arguments.json:
        arguments.json.write_text(json.dumps({"counts": counts, "faults": faults}))
    for fault in faults:
        print(fault, "\n")
    for name, verdicts in counts.items():
        print(
            f"{name:14}", *(f"{verdict} {n}" for verdict, n in sorted(verdicts.items())), sep="  "
        )
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()

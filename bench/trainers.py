"""The product's trainers for a benchmark, on random weights and random tokens of real lengths.

Built as the commands build them, except that weights are drawn on the device (drawing 1.3 billion
on a CPU takes 10 to 20 s per model) and data are token lists in memory. Out of scope: timing, which
is end_to_end.py's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import partial
from typing import Any, Literal

import torch

from fastrlhf.config import (
    Config,
    DataConfig,
    GenerationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    ScheduleConfig,
    TrainConfig,
)
from fastrlhf.data.batches import (
    PackedBatch,
    TokenizedDemonstration,
    TokenizedPrompt,
    TokenizedRanking,
    pack_rankings,
    ranking_tokens,
)
from fastrlhf.generation.engine import generate_all
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.run import builder, jobs

SEED = 20220304
EOS = 0
Metrics = dict[str, float]


# ---- what is trained on ------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One global batch of each stage, and the configuration that both sides follow."""

    config: Config
    vocab: int
    demonstrations: list[TokenizedDemonstration]
    rankings: list[TokenizedRanking]
    prompts: list[list[int]]
    windows: list[list[int]]


def make_task(args: argparse.Namespace) -> Task:
    """Return random demonstrations, rankings and prompts.

    Demonstrations and rankings have prompts and responses of a quarter of the longest to the
    longest; PPO's all have the full length, so that the iteration's tokens are known beforehand.
    """
    generator = torch.Generator().manual_seed(SEED)

    def draw(length: int) -> list[int]:
        return torch.randint(1, args.vocab, (length,), generator=generator).tolist()

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def some(longest: int) -> list[int]:
        return draw(number(max(1, longest // 4), longest))

    def demonstration() -> TokenizedDemonstration:
        prompt = some(args.prompt)
        return TokenizedDemonstration(prompt + some(args.response), len(prompt))

    def ranking() -> TokenizedRanking:
        K = number(4, 9)
        return TokenizedRanking(
            some(args.prompt), [some(args.response) for _ in range(K)], list(range(K))
        )

    length = args.prompt + args.response
    return Task(
        make_config(args),
        args.vocab,
        [demonstration() for _ in range(args.sft_batch)],
        [ranking() for _ in range(args.rankings)],
        [draw(args.prompt) for _ in range(args.episodes)],
        [draw(length + 1) for _ in range(args.minibatch * args.ptx_per_episode)],
    )


def make_config(args: argparse.Namespace) -> Config:
    """Return the paper's algorithm at the sizes of `args`; no path in it is ever opened."""
    length, nowhere = args.prompt + args.response, "random"
    return Config(
        model=ModelConfig(
            family="gpt",
            num_layers=args.layers,
            hidden_size=args.hidden,
            num_heads=args.heads,
            max_positions=length,
            dtype=args.dtype,
        ),
        data=DataConfig(
            tokenizer=nowhere,
            train=nowhere,
            prompts=nowhere,
            pretrain=nowhere,
            sequence_length=length,
        ),
        optimizer=OptimizerConfig(lr=9e-6, eps=1e-5),
        schedule=ScheduleConfig(decay="constant"),
        train=TrainConfig(steps=10**6, max_tokens_per_micro_batch=args.micro_tokens, seed=SEED),
        ppo=PPOConfig(
            reward_model=nowhere,
            batch_size=args.episodes,
            minibatch_size=args.minibatch,
            ptx_per_episode=args.ptx_per_episode,
            no_stop_penalty=None,
        ),
        generation=GenerationConfig(
            max_new_tokens=args.response, min_new_tokens=args.response, slots=args.episodes
        ),
        log=LogConfig(samples=0),
        output_dir=nowhere,
    )


# ---- how it is built ---------------------------------------------------------------------------


class Tokens:
    """The part of a tokenizer that PPO needs when no text is read or written."""

    eos_token_id = EOS
    chat_template = None

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def __len__(self) -> int:
        return self.vocab

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.vocab)}


class RandomParts(builder.RunBuilder):
    """The parts of a run with the weights and data of `task` instead of files."""

    def __init__(self, task: Task, mesh: Mesh) -> None:  # not super's, which opens a tokenizer
        self.config, self.mesh, self.task = task.config, mesh, task
        self.tokenizer: Any = Tokens(task.vocab)
        self.vocab_size = task.vocab

    def model(self, model: ModelConfig, head: Literal["lm", "scalar"]) -> GPT:
        stage = build_model(model, self.mesh, self.vocab_size, head=head)
        draw_weights(stage)
        return stage

    def reward(self, path: str) -> GPT:
        return self.model(self.config.model, "scalar")

    def value(self, path: str) -> GPT:
        return self.reward(path)

    def windows(self, sources: list[str] | dict[str, float]) -> Any:
        return self.task.windows

    def demonstrations(self, paths: list[str]) -> Sequence[Any]:
        return self.task.demonstrations

    def rankings(self, paths: list[str]) -> Sequence[Any]:
        return self.task.rankings

    def prompts(self, paths: list[str]) -> Sequence[Any]:
        return [TokenizedPrompt(tokens) for tokens in self.task.prompts]


@torch.no_grad()
def draw_weights(stage: GPT) -> None:
    """Draw N(0, init_std) in matrices on the device, the same for stages of one shape.

    `initialize_weights`, in contrast, draws numbers that are the same on every machine.
    """
    generator = torch.Generator(stage.mesh.device).manual_seed(SEED)
    for name, parameter in stage.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            std = stage.score.init_std if name == "score.weight" else stage.model_config.init_std
            parameter.normal_(0.0, std, generator=generator)


# ---- the steps ---------------------------------------------------------------------------------


@dataclass
class Steps:
    """A trainer's step: `step()` runs one and returns its metrics."""

    step: Callable[[], Metrics]
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """Parts of it to be timed by themselves."""
    last: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """As `others`, but after everything else: what a failure of one leaves behind then harms
    nothing."""


class Trainers:
    """The product's side; each stage's learner is built when first used and then kept."""

    def __init__(self, parts: RandomParts) -> None:
        self.parts, self.task, self.mesh = parts, parts.task, parts.mesh
        self._reward: jobs.TrainingJob | None = None

    def _sized(self, batch: int) -> None:
        """Return the parts of a command whose global batch is `batch`."""
        train = self.task.config.train.model_copy(update={"global_batch_size": batch})
        self.parts.config = self.task.config.model_copy(update={"train": train})

    def sft(self) -> Steps:
        self._sized(len(self.task.demonstrations))
        job = jobs.sft_job(self.parts)
        return _stepping(job.algorithm.step, iter(job.batches))

    def rm(self, shared_prompt: bool) -> Steps:
        self._sized(len(self.task.rankings))
        if self._reward is None:
            self._reward = jobs.reward_model_job(self.parts)
        batches = self.parts.loader(
            self.task.rankings,
            partial(pack_rankings, shared_prompt=shared_prompt),
            cost=partial(ranking_tokens, shared_prompt=shared_prompt),
        )
        return _stepping(self._reward.algorithm.step, iter(batches))

    def ppo(self) -> Steps:
        job = jobs.ppo_job(self.parts)
        algorithm = job.algorithm

        def rollout(**changes: Any) -> None:
            """Sample as `PPO.sample` does, with other options."""
            generate_all(
                algorithm.policy.model,
                self.task.prompts,
                changed(algorithm.sampling, **changes),
                mesh=self.mesh,
                eos=EOS,
                slots=algorithm.slots,
            )

        steps = _stepping(algorithm.step, iter(job.batches))
        steps.others["prefill"] = partial(rollout, max_new_tokens=1, min_new_tokens=0)
        if self.mesh.device.type == "cuda":
            steps.last["rollout, CUDA graphs"] = partial(rollout, cuda_graphs=True)
        return steps


def _stepping(step: Callable[[Any], Metrics], batches: Iterator[Any]) -> Steps:
    return Steps(lambda: step(next(batches)))


def ranking_batch(task: Task, shared_prompt: bool) -> PackedBatch:
    """Return all rankings in one row, for counting."""
    return pack_rankings(task.rankings, shared_prompt=shared_prompt)

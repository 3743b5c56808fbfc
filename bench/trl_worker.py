"""TRL's side of bench/ppo_iteration.py: iterations of `trl.experimental.ppo.PPOTrainer`.

    python trl_worker.py FOLDER '{"threads": 2, ...}'

Runs one iteration for each line on stdin, in a separate virtual environment (torch, transformers,
trl), and imports nothing of this project. An iteration is timed from one `on_step_end` to the next,
so that everything TRL does in between is counted, and nothing of ours.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


def say(**message: Any) -> None:
    print("@" + json.dumps(message), flush=True)


class Timer(TrainerCallback):
    """Times each iteration and waits for a line before each; end of stdin ends the process."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer
        self.metrics: dict[str, float] = {}
        self.wait()

    def wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        self.metrics = dict(logs or {})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        say(
            wall=wall,
            cpu=cpu,
            kl=self.metrics["objective/kl"],
            entropy=self.metrics["objective/entropy"],
        )
        self.wait()


@torch.no_grad()
def fingerprint(policy: Any, reward: Any, tokens: list[list[int]]) -> dict[str, float]:
    """Return numbers that the same weights must reproduce.

    They are the mean log-prob of the second half of each row, and the mean score at its end.
    """
    rows = torch.tensor(tokens)
    half = rows.shape[1] // 2
    logprobs = torch.log_softmax(policy(rows).logits[:, half - 1 : -1].float(), -1)
    hidden = reward.base_model(rows).last_hidden_state[:, -1]
    return {
        "logprob": logprobs.gather(-1, rows[:, half:, None]).mean().item(),
        "score": reward.score(hidden).mean().item(),
    }


def main(folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(options["threads"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # past the vocabulary: never sampled
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward") for _ in range(2)
    )
    prompts = [
        json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()
    ]
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    batch, updates = options["episodes"], options["minibatches"]
    # One update: gradients of several micro-batches are summed. More: TRL updates after each of
    # them.
    micro = batch if updates > 1 else options["micro"]
    args = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        num_mini_batches=updates,
        num_ppo_epochs=1,
        total_episodes=batch * 1000,
        local_rollout_forward_batch_size=options["rollout"],
        response_length=options["response"],
        temperature=1.0,
        kl_coef=0.02,
        learning_rate=options["lr"],
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        num_sample_generations=0,
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows[:batch]}),
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    say(**fingerprint(policy.eval(), reward.eval(), rows[:8]))
    trainer.add_callback(Timer(trainer))
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

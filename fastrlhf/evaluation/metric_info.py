"""Titles and meanings of the metrics that runs record, for their reports."""

from __future__ import annotations

METRIC_INFO = {
    "loss": (
        "Loss",
        "The training objective. It should fall fast at first, then slowly. A sudden rise "
        "suggests that the learning rate is too high.",
    ),
    "accuracy": (
        "Accuracy",
        "Share of ranked pairs in which the better response has the higher score; 0.5 is chance.",
    ),
    "margin": (
        "Margin",
        "Mean difference between the scores of the better and the worse response of a pair.",
    ),
    "score": (
        "Score",
        "Mean reward-model score of the sampled responses. It should rise.",
    ),
    "reward": ("Reward", "Score minus KL penalty, which PPO maximizes. It should rise."),
    "kl": (
        "KL from the reference",
        "Divergence of the policy from the reference model, in nats per response.",
    ),
    "response_length": (
        "Response length",
        "In tokens. A drift to very long or very short responses suggests reward hacking.",
    ),
    "no_stop": (
        "Responses cut off",
        "Share of the responses that reached the length limit before a stop token.",
    ),
    "valid_kl_per_token": (
        "KL from the reference per token, held out",
        "Divergence of the policy from the reference on the held-out prompts, in nats per token.",
    ),
    "valid_stopped": (
        "Responses that stopped, held out",
        "Share of the responses to held-out prompts that end with a stop token.",
    ),
    "entropy": (
        "Entropy",
        "Entropy of the policy's next-token distribution, in nats per token. Near zero the policy "
        "always gives the same response.",
    ),
    "ptx_loss": (
        "Pretraining loss",
        "Cross-entropy on the pretraining text mixed into PPO, in nats per token.",
    ),
    "value_loss": (
        "Value loss",
        "Half the squared error of the predicted return. It should fall as the value model learns.",
    ),
    "explained_variance": (
        "Explained variance",
        "Share of the variance of the returns that the value model predicts; 1 is perfect.",
    ),
    "policy_loss": (
        "Policy loss",
        "PPO's clipped objective. Its level has no meaning; it should stay small and bounded.",
    ),
    "clip_fraction": (
        "Clipped share",
        "Share of tokens whose ratio left the clip range. Above 0.3 the steps are too large.",
    ),
    "approx_kl": (
        "KL of one update",
        "Divergence of the policy after one update. It should stay well below 0.1.",
    ),
    "ratio_deviation": (
        "Deviation of the first ratio from 1",
        "Rollout and training must agree up to rounding; a larger deviation is a bug.",
    ),
    "ppo_grad_norm": (
        "Gradient norm of PPO",
        "Norm of the policy loss alone, in the first minibatch. If it is far below that of the "
        "pretraining loss, PPO learns little.",
    ),
    "ptx_grad_norm": (
        "Gradient norm of the pretraining loss",
        "Norm of gamma times the pretraining loss, in the first minibatch.",
    ),
    "grad_norm": (
        "Gradient norm",
        "Before clipping. Rare spikes are harmless, steady growth is not.",
    ),
    "pretrain_share_rows": (
        "Pretraining share of the rows",
        "Share of the batch's rows that are pretraining text.",
    ),
    "pretrain_share_loss": (
        "Pretraining share of the loss",
        "Share of the weight of pretraining tokens in the mean loss of the batch.",
    ),
    "lr": ("Learning rate", "The configured schedule: warm-up, then decay."),
    "seconds": (
        "Seconds per step",
        "Wall-clock time. It should be constant; growth suggests a memory leak or a slowing disk.",
    ),
}
"""(title, meaning and expected course) of each metric, in the order of the page."""

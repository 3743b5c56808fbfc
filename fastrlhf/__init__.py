"""RLHF training at Megatron scale: SFT, reward model and PPO-ptx (arXiv 2203.02155)."""

__version__ = "0.1.0"

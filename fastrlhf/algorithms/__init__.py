"""The algorithms, one file each: SFT (and plain language modelling), the reward model, PPO-ptx."""

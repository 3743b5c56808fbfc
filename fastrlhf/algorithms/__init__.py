"""Training algorithms, one file each: SFT and language modelling, the reward model, and PPO-ptx."""

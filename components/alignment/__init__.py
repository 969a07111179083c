"""How a generator learns: supervised fine-tuning, rewards, online RL."""

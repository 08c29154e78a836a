"""Files of others in: Stable-Baselines3 zips."""

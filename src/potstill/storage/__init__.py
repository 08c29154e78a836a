"""Run directories and their locks, checkpoints, reading what others wrote, and writing as a whole or not at all."""

"""Reinforcement-learning experts, distilled into smaller networks, and what size buys."""

__version__ = "0.1.0"

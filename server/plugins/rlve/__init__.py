"""Reinforcement learning that the server runs itself, in environments that can verify an answer."""

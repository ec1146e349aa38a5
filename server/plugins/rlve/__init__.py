"""Reinforcement learning that the server runs itself, in environments that verify answers."""

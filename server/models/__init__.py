"""What clients create and use: sessions, models, samplers and losses; their numbers, quotas and recovery."""

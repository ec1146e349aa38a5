"""Sessions, models, samplers and losses, which clients create; their numbers, quotas and recovery."""

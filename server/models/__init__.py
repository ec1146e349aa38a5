"""What clients create and use: sessions, models and samplers; their state, their numbers, their recovery."""

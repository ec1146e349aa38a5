"""What clients have made and use: sessions, runs, samplers, losses."""

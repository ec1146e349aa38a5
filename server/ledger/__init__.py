"""What was accepted, and what came of it: the database that the engine's state is a fold over."""

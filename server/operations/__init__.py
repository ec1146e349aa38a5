"""What was accepted: its order, its answer, its place in the ledger."""

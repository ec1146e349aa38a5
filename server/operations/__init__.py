"""Accepted operations: their order, their answers, their place in the ledger."""

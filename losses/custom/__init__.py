"""Custom losses: graphs that a client has traced, run as JAX by a table of ours."""

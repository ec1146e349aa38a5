"""Custom losses: graphs traced by the client, evaluated in JAX with a fixed table of functions."""

"""The HTTP routes, a few lines each: body in, one call, answer out."""

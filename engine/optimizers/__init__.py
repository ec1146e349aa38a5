"""Steps of weights by their gradients, by family."""

"""Optional parts of the server: SGLang servers that draw samples, training that the server runs itself
(RLVE), metrics for Weights & Biases, and traces."""

"""What can be left out of the server: SGLang servers that draw samples, training that the server runs itself
(RLVE), and metrics for Weights & Biases."""

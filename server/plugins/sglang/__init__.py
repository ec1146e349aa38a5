"""SGLang servers that draw samples: their registration, health, weights, and requests to them."""

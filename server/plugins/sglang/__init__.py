"""SGLang servers beside this one: which there are, how they are, and what is sampled on them."""

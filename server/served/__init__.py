"""Samples as SGLang's and OpenAI's routes answer them."""

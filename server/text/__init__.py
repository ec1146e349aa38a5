"""Text and tokens: tokenizers, chat templates, and the text of samples."""

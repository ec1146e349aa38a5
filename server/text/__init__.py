"""From text to tokens and back: tokenizers, chat templates, the text of samples."""

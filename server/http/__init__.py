"""HTTP: the routes, what stands in front of them, and answers in the shapes of SGLang and OpenAI."""

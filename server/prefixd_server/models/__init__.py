"""Loading any Hugging Face LM, its geometry and its weights."""

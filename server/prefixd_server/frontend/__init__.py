"""Between text and tokens: tokenise, detokenise, and the waiters of the event loop."""

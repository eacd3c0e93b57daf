"""`paceline doctor`: what the way to a server is like, and what to expect of a run over it."""

"""Reading and rewriting programs: the q/dq operators and what recognises them."""

"""What searches over a language model cost on pages, and without them."""

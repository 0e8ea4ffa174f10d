"""From sums of hidden states to predictions or errors, and back."""

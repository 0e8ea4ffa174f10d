"""What the list ops share: checks of tensor lists, memory orders, shards, the average itself,
stochastic rounding."""

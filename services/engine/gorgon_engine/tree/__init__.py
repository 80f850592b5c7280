"""Token trees: candidates, builders, flattening, and the cost model that sizes them."""

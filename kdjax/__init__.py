"""kdjax: distil a large language model into a small one on JAX."""

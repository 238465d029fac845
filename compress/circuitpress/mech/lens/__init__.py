"""Lenses: what a model attends to, writes, and could predict at every depth. Most of it is correlational, and says so.

`logits` reads the residual stream with the unembedding, `attention` the patterns of heads, `residual` norms and shares,
`spectra` the weights alone, `probe` what is linearly decodable; `inspect` writes each as one json and one figure.
"""

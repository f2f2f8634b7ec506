"""The seed: KakeyaTurbo's codec ("v1.3 PPL") and its rivals, for comparison in ``kakeya eval``.

A block of rows gets a PCA basis of its own, K-means centres for the direction of each row's
coefficients, and a Hadamard-rotated residual in Lloyd-Max codes. Every choice that its authors made
or tried is a switch of a recipe (:mod:`.recipe`); two mistakes are corrected and can be switched on
again. For evaluations the codec runs in hooks (:mod:`.coder`), on whatever device the
keys and values are, and sizes are those of bytes that would be stored. On the CPU vLLM also serves
recipes whose blocks can be pages (:mod:`.pages`, :mod:`.backend`, :mod:`.impl`). docs/seed.md has
the history, the switches and what was measured.
"""

"""Evaluation: how far the answers move when the cache is compressed.

``protocol`` runs passages through one cache in a process of its own, ``simulate`` compresses inside
the stock engine, ``metrics`` turns log-probabilities into figures and a verdict, ``command`` is
``kakeya eval``, ``html`` its report, ``tasks`` questions with answers.
"""

"""How sure a comparison on a sample is: intervals, a test of two models on the same rows, and what it could have found.

Rows that are asked alike succeed and fail together. Rows of one template (their `group`) are therefore one cluster:
the bootstrap draws clusters, and an interval says what other templates would have given. McNemar's test takes rows as
independent; where clusters are given, go by the interval.
"""

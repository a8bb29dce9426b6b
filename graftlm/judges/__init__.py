"""Grades of answers by a model behind an endpoint."""

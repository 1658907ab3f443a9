"""Suites: lists of cases, one module for each level."""

"""Promises of the runbook, kept against real PostgreSQL servers."""

"""Shared by every room of tests."""

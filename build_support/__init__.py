"""Helpers of setup.py; never part of the installed package."""

"""Holds the module that Python imports at the start of processes whose clock is shifted."""

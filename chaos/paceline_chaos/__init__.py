"""Breaks a running deployment in every way that it must survive, and checks that nothing acknowledged was lost."""

"""Faults at random moments, and the one invariant that must survive them: nothing lost, no wrong row."""

"""Tests, in folders named like what they test; `subjects` has the small models and the calls that many of them use."""

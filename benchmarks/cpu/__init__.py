"""Whole models and single ops on CPUs, and a soak test."""

"""Spatial-reduction attention: `reduction` of the map that keys and values come from, and `forward`."""

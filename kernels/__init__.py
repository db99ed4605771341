"""Backend "triton": not written yet."""

from pvt_fast.dispatch import BackendUnavailable

raise BackendUnavailable("the triton backend is not written yet")

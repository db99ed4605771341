from .dispatch import BackendUnavailable

raise BackendUnavailable("the cpp backend is not written yet")

"""A model's whole forward at once: as one call into C++ (`program`), as one CUDA graph (`cuda_graph`)."""

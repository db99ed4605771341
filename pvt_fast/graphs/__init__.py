"""A model's whole forward at once: one call into C++ (`program`), one op of a compiled graph (`compiled`), one CUDA
graph (`cuda_graph`). `state` tells whether the model is still what such a form was made of.
"""

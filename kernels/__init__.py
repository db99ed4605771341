"""Backend "triton": what `backend` says, as `pvt_fast.kernels`.

The folder may be found under its bare name too: by Python in the repository's root, for a program that looks for the
package `kernels` of PyPI (transformers does). That is not for us: `namesake` hands over, and nothing of ours is loaded.
"""

if __name__ == "kernels":
    from .namesake import hand_over

    hand_over(__name__, __file__)
else:
    from .backend import BACKEND

    __all__ = ["BACKEND"]

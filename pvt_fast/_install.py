"""Checks, before anything else is imported, that this copy of the package is whole.

The sources of `pvt_fast.kernels` lie in kernels/ beside the package; installing puts them inside it. Run from the
repository root, Python finds the source tree first: that works when the extension was built in place
(`pip install -e .` or `python setup.py build_ext --inplace`), and is refused with a sentence when it was not.
"""

import importlib.util
from pathlib import Path

import pvt_fast

_package = Path(__file__).resolve().parent

if importlib.util.find_spec("pvt_fast.kernels") is None and (_package.parent / "kernels" / "__init__.py").exists():
    pvt_fast.__path__.append(str(_package.parent))

if importlib.util.find_spec("pvt_fast._C") is None:
    raise ImportError(
        f"pvt_fast: the compiled extension pvt_fast._C is not in {_package}. If that is the source tree, it shadows "
        "an installed pvt_fast: run Python from another directory, or work in the tree with `pip install -e .`"
    )

"""Builds pvt_fast._C from csrc/ and installs kernels/ as pvt_fast.kernels; everything else is in pyproject.toml.

csrc/ includes no torch header, so one wheel serves every torch. No -m flags: each file of csrc/isa/ opens its own
instruction set, and one is chosen at run time.
"""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ParallelCompile("MAX_JOBS").install()

# GCC 12 warns of its own intrinsics headers ("__Y may be used uninitialized"), and of vector ABIs within one file.
QUIET = ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]

extension = Pybind11Extension(
    "pvt_fast._C",
    sources=sorted(set(glob("csrc/**/*.cpp", recursive=True)) - set(glob("csrc/tests/**", recursive=True))),
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra", *QUIET],
    extra_link_args=["-fopenmp"],
)

setup(
    packages=[
        *find_packages(include=["pvt_fast", "pvt_fast.*"]),
        "pvt_fast.kernels",
        *(f"pvt_fast.kernels.{package}" for package in find_packages("kernels")),
    ],
    package_dir={"pvt_fast.kernels": "kernels"},
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
)

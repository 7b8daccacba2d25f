"""Only the C kernels are here; the rest is in pyproject.toml. Without a compiler the install goes on without them."""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "model.kernels._kernels",
            ["model/kernels/kernels.c"],
            depends=glob("model/kernels/*.h"),
            extra_compile_args=["-O3", "-ffp-contract=off"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)

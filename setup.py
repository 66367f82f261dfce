"""Packaging. `kernels/` and `models/` install as `dpengine.kernels` and `dpengine.models`.

An installed top-level package named `kernels` would overwrite Hugging Face's package of that
name, which transformers and diffusers import.
"""

from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md")

setup(
    name="dpengine",
    version="0.1.0",
    description="Fine-tune diffusion models with LoRA under differential privacy",
    keywords="differential privacy, diffusion models, LoRA, DP-SGD, fine-tuning, Triton",
    project_urls={"Paper": "https://arxiv.org/abs/2406.01355"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Healthcare Industry",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Security",
        "Typing :: Typed",
    ],
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"dpengine.kernels": "kernels", "dpengine.models": "models"},
    packages=[
        "dpengine",
        "dpengine.accounting",
        "dpengine.auditing",
        "dpengine.capture",
        "dpengine.capture.layers",
        "dpengine.data",
        "dpengine.dropin",
        "dpengine.evaluation",
        "dpengine.execution",
        "dpengine.kernels",
        "dpengine.kernels.gpu",
        "dpengine.mechanism",
        "dpengine.models",
        "dpengine.optim",
        "dpengine.optim.update",
        "dpengine.run",
        "dpengine.training",
    ],
    package_data={
        "dpengine": ["py.typed"],
        "dpengine.models": ["weights/*/*", "weights/*/*/*"],
    },
    include_package_data=False,  # what else lies in the folders, such as READMEs, is no part of it
    install_requires=[
        "torch>=2.10,<2.14",
        "triton>=3.6,<3.9; platform_system == 'Linux'",
        "diffusers>=0.42.1",
        "peft>=0.18",
        "transformers>=5",  # which PEFT needs, and text encoders are
        "numpy>=2.0",
        "scipy>=1.13",
        "prv-accountant==0.2.0",
        "dp-accounting>=0.6",
        "safetensors>=0.5",
        "cryptography>=43",
        "scikit-learn>=1.5",
        "matplotlib>=3.9",
        "pillow>=10.1",  # decodes the private images, draws the public glyphs
        "tyro>=0.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "mpmath>=1.3",
            "opacus>=1.6",
            "accelerate>=1.0",
            "transformers>=4.50",
            "ruff>=0.9",
        ],
        "bench": ["opacus>=1.6", "matplotlib>=3.9"],
    },
)

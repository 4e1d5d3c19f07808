"""The range of transformers that the tests pass on, checked at import."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet


# `FederatedTrainer` replaces `Trainer`'s training loop, which is not a public interface: both ends are what
# `make test-oldest` and `make test-newest` have proved. The same range stands in setup.py.
SUPPORTED_TRANSFORMERS = ">=5.18.0,<5.24"


def require_supported_transformers() -> None:
    """Refuse a transformers version outside the tested range.

    Raises:
        ImportError: With the version found and the range.
    """
    found = version("transformers")
    if not SpecifierSet(SUPPORTED_TRANSFORMERS).contains(found, prereleases=True):
        raise ImportError(
            f"fedex_hf is tested with transformers{SUPPORTED_TRANSFORMERS}, and {found} is installed. Install a "
            f'version in the range: pip install "transformers{SUPPORTED_TRANSFORMERS}".'
        )


require_supported_transformers()

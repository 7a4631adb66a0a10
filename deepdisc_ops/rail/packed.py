"""An ensemble as one file, as RAIL wants its models: a zip of the ensemble folder. Nothing in it is ever unpickled."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from deepdisc_ops.errors import ArchiveError

if TYPE_CHECKING:
    from deepdisc_ops.inference.ensemble import Ensemble

DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class PackedEnsemble:
    """The bytes of a zip with ensemble.yaml and its members' files, the same for the same ensemble."""

    content: bytes

    def __repr__(self) -> str:
        return f"<PackedEnsemble of bands {' '.join(self.description['bands'])}, {len(self.content) / 1e6:.1f} MB>"

    @classmethod
    def read(cls, path: Path) -> PackedEnsemble:
        """A file that `DeepdiscInformer` wrote, an archive (.mar), an ensemble folder or a checkpoint folder."""
        from deepdisc_ops.inference.ensemble import DESCRIPTION
        from deepdisc_ops.model.weights import DESCRIPTION as MEMBER

        if not path.exists():
            raise ArchiveError(f"no model at {path}; run DeepdiscInformer, or give an archive, an ensemble or a checkpoint folder")
        if (path / MEMBER).is_file():
            return cls.gather([path])
        if path.is_dir():
            return cls._of_folder(path)
        packed = cls(path.read_bytes())
        with TemporaryDirectory() as scratch:
            packed._unpack([DESCRIPTION], Path(scratch))
        return packed

    @classmethod
    def gather(cls, checkpoints: Sequence[Path]) -> PackedEnsemble:
        """The members of checkpoint folders."""
        from deepdisc_ops.inference.ensemble import write_ensemble

        with TemporaryDirectory() as scratch:
            write_ensemble(Path(scratch), checkpoints)
            return cls._of_folder(Path(scratch))

    @classmethod
    def _of_folder(cls, folder: Path) -> PackedEnsemble:
        from deepdisc_ops.inference.ensemble import DESCRIPTION, read_description

        names = [DESCRIPTION, *(str(entry["file"]) for entry in read_description(folder)["members"])]
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
            for name in names:
                archive.writestr(zipfile.ZipInfo(name, DATE), (folder / name).read_bytes())
        return cls(content.getvalue())

    @property
    def description(self) -> dict[str, Any]:
        """What ensemble.yaml says."""
        from deepdisc_ops.inference.ensemble import DESCRIPTION, read_description

        with TemporaryDirectory() as scratch:
            self._unpack([DESCRIPTION], Path(scratch))
            return read_description(Path(scratch))

    def load(self, device: str = "cpu") -> Ensemble:
        """The networks, on ``device``; what was damaged is named in the `ArchiveError`."""
        from deepdisc_ops.inference.ensemble import DESCRIPTION, Ensemble

        with TemporaryDirectory() as scratch:
            names = [DESCRIPTION, *(str(entry["file"]) for entry in self.description["members"])]
            self._unpack(names, Path(scratch))
            return Ensemble.load(Path(scratch), device)

    def _unpack(self, names: Sequence[str], folder: Path) -> None:
        try:
            with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
                for name in names:
                    archive.extract(name, folder)  # which keeps out of other folders
        except (zipfile.BadZipFile, KeyError) as error:
            raise ArchiveError(f"the model is no packed ensemble ({' '.join(str(error).split())}); inform it again") from None

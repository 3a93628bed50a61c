"""A pack's checkpoints: the last two, in the pack's folder and, where `compute.checkpoints` names one, in a storage
that other machines see, too.

A checkpoint is a file of its own; the manifest `checkpoint.json`, written last, names it with its size and SHA-256. So
a kill at any moment leaves the checkpoints of before, and one that was damaged afterwards is noticed when it is read:
then the one before it is used. Training from an earlier epoch repeats what came after it, so that only time is lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from envs.errors import UserError
from envs.files import write_atomically

MANIFEST = "checkpoint.json"
KEPT = 2
_BLOCK = 2**20


@dataclass(frozen=True)
class Saved:
    """What the manifest says of a checkpoint."""

    file: str
    epoch: int
    bytes: int
    sha256: str


class Checkpoints:
    """Of one pack.

    Args:
        folder: of the pack.
        storage: a URL of fsspec's under which this pack's checkpoints lie, too; None: nowhere else.
    """

    def __init__(self, folder: Path, storage: str | None = None) -> None:
        self.folder, self.storage = folder, storage

    def exist(self) -> bool:
        """Whether there is one to go on from, damaged or not."""
        return (self.folder / MANIFEST).exists() or bool(self.storage and self._remote_manifest())

    @property
    def newest(self) -> Path:
        """The latest file in the pack's folder.

        Raises:
            FileNotFoundError: there is none.
        """
        found = self._manifest((self.folder / MANIFEST).read_bytes())
        if not found:
            raise FileNotFoundError(f"the manifest in {self.folder} names no checkpoint")
        return self.folder / found[0].file

    def save(self, epoch: int, content: Mapping[str, Any]) -> str | None:
        """Keep what a learner knows at the end of an epoch. A storage that fails is for the next time: the pack's
        folder has it.

        Returns:
            Why it is not in the storage; None: it is, or there is none.

        Raises:
            OSError: it could not be written to the pack's folder, such as to a full disk.
        """
        path = self.folder / f"checkpoint-{epoch:06d}.pt"
        digest = hashlib.sha256()

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                hashing: Any = _Hashing(file, digest)
                torch.save(dict(content), hashing)

        write_atomically(path, write)
        saved = Saved(path.name, epoch, path.stat().st_size, digest.hexdigest())
        known = self._local()
        kept = [saved, *(one for one in known if one.epoch < epoch)][:KEPT]
        write_atomically(self.folder / MANIFEST, lambda temporary: temporary.write_bytes(_manifest_of(kept)))
        for other in self.folder.glob("checkpoint-*.pt"):
            if other.name not in {one.file for one in kept}:
                other.unlink(missing_ok=True)
        if self.storage is None:
            return None
        try:
            self._upload(path, saved)
        except Exception as error:  # what S3's and others' libraries raise has no common type
            return f"the checkpoint of epoch {epoch} is not in {shown(self.storage)}: {_reason(error)}"
        return None

    def load(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The latest checkpoint that is whole, wherever it lies; None: there is none, and training begins anew. Only
        tensors and plain values are unpickled. Warns of those that are damaged or missing."""
        sources: list[tuple[Saved, bool]] = [(one, False) for one in self._local()]
        if self.storage is not None:
            try:
                sources += [(one, True) for one in self._remote_manifest()]
            except Exception as error:
                warnings.warn(f"cannot read checkpoints in {shown(self.storage)}: {_reason(error)}", stacklevel=2)
        # the nearest one first of those of the same epoch
        for saved, remote in sorted(sources, key=lambda source: (-source[0].epoch, source[1])):
            try:
                with self._downloaded(saved) if remote else contextlib.nullcontext(self.folder / saved.file) as path:
                    _verify(path, saved)
                    content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
                return content
            except Exception as error:
                where = shown(self.storage or "") if remote else self.folder
                warnings.warn(f"checkpoint {saved.file} in {where} is not used: {_reason(error)}", stacklevel=2)
        return None

    # ---- the pack's folder ------------------------------------------------------------------------------------------

    def _local(self) -> list[Saved]:
        try:
            return self._manifest((self.folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            return []

    @staticmethod
    def _manifest(content: bytes) -> list[Saved]:
        try:
            return [Saved(**one) for one in json.loads(content)["saved"]]
        except (ValueError, KeyError, TypeError):
            warnings.warn(f"a manifest of checkpoints is damaged: {content[:80]!r}", stacklevel=2)
            return []

    # ---- the storage ------------------------------------------------------------------------------------------------

    def _upload(self, path: Path, saved: Saved) -> None:
        assert self.storage is not None
        fs, root = open_storage(self.storage)
        kept = [saved, *(one for one in self._remote_manifest() if one.epoch < saved.epoch)][:KEPT]
        _make_folder(fs, root)
        fs.put_file(str(path), f"{root}/{saved.file}")
        _put(fs, f"{root}/{MANIFEST}", _manifest_of(kept))
        names = {one.file for one in kept} | {MANIFEST}
        for other in fs.ls(root, detail=False, refresh=True):
            if str(other).rpartition("/")[2] not in names:
                fs.rm_file(other)

    def _remote_manifest(self) -> list[Saved]:
        assert self.storage is not None
        fs, root = open_storage(self.storage)
        try:
            return self._manifest(fs.cat_file(f"{root}/{MANIFEST}"))
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def _downloaded(self, saved: Saved) -> Iterator[Path]:
        assert self.storage is not None
        fs, root = open_storage(self.storage)
        with tempfile.TemporaryDirectory(prefix="offsweep-") as folder:
            path = Path(folder) / saved.file
            fs.get_file(f"{root}/{saved.file}", str(path))
            yield path


def open_storage(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        UserError: no such protocol, or a package that it needs is missing.
    """
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url, **({"use_listings_cache": False} if "://" in url else {}))
    except ImportError as error:
        needed = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"compute.checkpoints={shown(url)} cannot be opened: {needed} (for s3:// that is `pip install "
            "'offsweep[s3]'`, on every machine)"
        ) from None
    except ValueError as error:
        raise UserError(
            f"compute.checkpoints={shown(url)} cannot be opened: {error}; name a folder that all machines see, or a "
            "URL such as s3://bucket/folder"
        ) from None
    return fs, str(root).rstrip("/")


def absolute(url: str) -> str:
    """A folder of this machine's by its whole path; URLs are."""
    return url if "://" in url else str(Path(url).absolute())


def check_storage(url: str) -> None:
    """Write to a storage and read it again, before anything is trained.

    Raises:
        UserError: it is none, or does not do that.
    """
    if re.search(r"://[^/@]*:[^/@]*@", url):
        raise UserError(
            "compute.checkpoints must not hold a password, which would be stored with the study; give it to the "
            "machines as environment variables, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    fs, root = open_storage(url)
    probe, content = f"{root}/.offsweep-{hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:8]}", b"offsweep"
    try:
        _make_folder(fs, root)
        _put(fs, probe, content)
        found = fs.cat_file(probe)
        fs.rm_file(probe)
    except Exception as error:
        raise UserError(
            f"compute.checkpoints={url} cannot be written to: {_reason(error)}; name another storage, or leave it out"
        ) from None
    if found != content:
        raise UserError(f"compute.checkpoints={url} does not give back what was written to it; name another storage")


def storage_of(url: str | None, study_folder: str, pack_id: str) -> str | None:
    """Where a pack's checkpoints lie under `compute.checkpoints`; studies of one name in several work folders do not
    meet there."""
    if url is None:
        return None
    place = hashlib.sha256(study_folder.encode()).hexdigest()[:8]
    return f"{url.rstrip('/')}/{Path(study_folder).name}-{place}/{pack_id}"


def shown(url: str) -> str:
    """Without what may be a password."""
    return re.sub(r"://[^/@]*@", "://", url)


class _Hashing:
    """A file that is written to, and a digest of what is."""

    def __init__(self, file: Any, digest: Any) -> None:
        self._file, self._update = file, digest.update

    def write(self, block: Any) -> int:
        self._update(block)
        written: int = self._file.write(block)
        return written

    def flush(self) -> None:
        self._file.flush()


def _make_folder(fs: Any, path: str) -> None:
    """Where there are folders: an object store would make a bucket of a misspelt name."""
    if _on_disk(fs):
        fs.makedirs(path, exist_ok=True)


def _put(fs: Any, path: str, content: bytes) -> None:
    """Write a file so that nobody sees a half of it: object stores do it so, a disk by a second name."""
    if _on_disk(fs):
        write_atomically(Path(path), lambda temporary: temporary.write_bytes(content))
    else:
        fs.pipe_file(path, content)


def _on_disk(fs: Any) -> bool:
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _manifest_of(saved: list[Saved]) -> bytes:
    return (json.dumps({"saved": [asdict(one) for one in saved]}, indent=1) + "\n").encode()


def _verify(path: Path, saved: Saved) -> None:
    """Raises ValueError if a file is not what was saved."""
    size = path.stat().st_size
    if size != saved.bytes:
        raise ValueError(f"it has {size} bytes and not {saved.bytes}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        read: Callable[[], bytes] = lambda: file.read(_BLOCK)  # noqa: E731
        for block in iter(read, b""):
            digest.update(block)
    if digest.hexdigest() != saved.sha256:
        raise ValueError("its content is not what was written")


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__

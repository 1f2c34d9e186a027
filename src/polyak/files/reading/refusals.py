"""What lies where a checkpoint should be: in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyak.files.reading.raw import RawFile

__all__ = ["mistaken_for"]

_STARTS = {
    b"version https://git-lfs": "it is a Git LFS pointer, and the weights were never downloaded: git lfs pull",
    b"# xet version": "it is a Xet pointer, and the weights were never downloaded",
    b"<!DOCTYPE": "it is a web page; the download failed",
    b"<!doctype": "it is a web page; the download failed",
    b"<html": "it is a web page; the download failed",
    b"GGUF": "it is a GGUF file, whose weights are packed for inference; average the files that it was converted from",
    b"\x89HDF": "it is an HDF5 file; expected safetensors or what torch.save writes",
    b"\x93NUMPY": "it is an array of numpy; expected safetensors or what torch.save writes",
    b"\x1f\x8b": "it is compressed by gzip; unpack it first",
    b"7z\xbc\xaf": "it is a 7z archive; unpack it first",
    b"Rar!": "it is a RAR archive; unpack it first",
}
_TAR = b"ustar"


def mistaken_for(file: RawFile) -> str:
    """Return in words what a file is that is no checkpoint; empty if nothing is known of it."""
    if not file.size:
        return "it is empty"
    start = file.read(512, 0)
    if start[257:262] == _TAR:
        return "it is a tar archive; unpack it, or load and save it by torch.save where it comes from torch before 0.2"
    return next((words for begin, words in _STARTS.items() if start.startswith(begin)), "")

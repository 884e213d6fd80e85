"""Everything that leaves a stream: videos, manifests, contact sheets, progress."""

from streamvid.io.contact_sheet import ContactSheet
from streamvid.io.manifest import Manifest, manifest_path
from streamvid.io.progress import ProgressBar
from streamvid.io.video import read_video
from streamvid.io.writers import AnimationWriter, Mp4Writer, PngFolderWriter, Writer, open_writer

__all__ = [
    "AnimationWriter",
    "ContactSheet",
    "Manifest",
    "Mp4Writer",
    "PngFolderWriter",
    "ProgressBar",
    "Writer",
    "manifest_path",
    "open_writer",
    "read_video",
]

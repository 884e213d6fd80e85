"""Run by the tests: writes a moving test picture and prints the frame count after every chunk.

python slow_writer.py PATH CHUNKS SECONDS_BETWEEN [BYTES_AT_MOST]
"""

import resource
import sys
import time

import numpy as np

from streamvid.errors import UserError
from streamvid.io import open_writer

HEIGHT, WIDTH, FPS, FRAMES_PER_CHUNK = 96, 128, 16, 12


def smooth_frames(first: int, count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Soft waves that drift and tell frames apart: uint8 (count, height, width, 3)."""
    time_step, row, column = np.mgrid[first : first + count, :height, :width].astype(np.float32)
    waves = [
        np.sin(column / 23 + time_step / 6),
        np.sin(row / 17 - time_step / 9),
        np.cos((row + column) / 31 + time_step / 13),
    ]
    return (128 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def main() -> None:
    path, chunks, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    if len(sys.argv) > 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
    try:
        with open_writer(path, FPS) as writer:
            for _ in range(chunks):
                writer.write(smooth_frames(writer.frames_written, FRAMES_PER_CHUNK))
                print(writer.frames_written, flush=True)
                time.sleep(pause)
    except UserError as error:
        sys.exit(f"UserError: {error}")


if __name__ == "__main__":
    main()

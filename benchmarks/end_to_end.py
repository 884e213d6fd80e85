"""The numbers of the README: `streamvid bench` of the embedded model, on an idle machine.

python -m benchmarks.end_to_end     # then: python -m benchmarks.readme
"""

import sys

from streamvid.cli import main

PARTS = "first_frame,denoise,decode,disk,prompt,roofline"
OUTPUT = "benchmarks/results/end_to_end.json"

if __name__ == "__main__":
    sys.exit(
        main(["bench", "--parts", PARTS, "--blocks", "100", "--length", "2040", "-o", OUTPUT, *sys.argv[1:]])
    )

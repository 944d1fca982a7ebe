"""Pictures of a report page at 1440 and 390 pixels, for docs/: page_pictures.py FOLDER OUT [NAME].

FOLDER is what `svg generate` or `svg sweep` wrote. Needs the extra `test` and Chromium on PATH.
"""

import io
import sys
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
from chromium import Chromium

from svg.eval.page import build_page

WIDTHS = (1440, 390)
LONGEST = 8000  # pixels of height


def main(folder: str, out: str, name: str = "report") -> None:
    page = build_page(folder)
    with Chromium() as browser:
        for width in WIDTHS:
            browser.open(page, width)
            browser.resize(width, min(LONGEST, browser.evaluate("document.documentElement.scrollHeight")))
            browser.wait("[...document.querySelectorAll('video')].every((video) => video.readyState >= 3)")
            time.sleep(1)  # until frames and the difference are painted
            path = Path(out) / f"{name}-{width}.png"
            picture = Image.open(io.BytesIO(browser.picture())).convert("RGB")
            picture.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])

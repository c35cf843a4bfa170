"""The page in a browser: it draws loads and computations, in the light and in the dark."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from ucm.bench.overlap_page import Page, render_page
from ucm.testing.overlap_events import hybrid_timeline, layerwise_timeline

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium here: the page is not looked at (apt install chromium)"
)
WIDTH, HEIGHT = 560, 860
COLOURS = {
    "dark": {"load": (0x6E, 0xA3, 0xFF), "compute": (0xF2, 0xA9, 0x50), "back": (0x15, 0x18, 0x1D)},
    "light": {
        "load": (0x2F, 0x6F, 0xDE),
        "compute": (0xE0, 0x8A, 0x1E),
        "back": (0xFC, 0xFC, 0xFD),
    },
}

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.int16]]


def screenshot(page: Path, folder: Path, mode: str) -> Pixels:
    """[HEIGHT, WIDTH, 3] of what the browser shows."""
    image = folder / f"{mode}.png"
    subprocess.run(
        [
            str(BROWSER),
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--hide-scrollbars", "--force-device-scale-factor=1", "--no-first-run"),
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if mode == 'dark' else 1}",
            f"--window-size={WIDTH},{HEIGHT}",
            f"--screenshot={image}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return decode_png(image.read_bytes())


def decode_png(data: bytes) -> Pixels:
    """An 8-bit RGB or RGBA image without interlacing, as [height, width, 3]."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        chunks[kind] = chunks.get(kind, b"") + data[at + 8 : at + 8 + length]
        at += length + 12
    width, height, depth, colour = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    size = {2: 3, 6: 4}[colour]
    assert depth == 8
    raw = zlib.decompress(chunks[b"IDAT"])
    stride = width * size
    above, rows = [0] * stride, []
    for row in range(height):
        begin = row * (stride + 1)
        above = unfilter(raw[begin], list(raw[begin + 1 : begin + 1 + stride]), above, size)
        rows.append(above)
    return np.array(rows, dtype=np.int16).reshape(height, width, size)[:, :, :3]


def unfilter(kind: int, line: list[int], above: list[int], size: int) -> list[int]:
    """One row by its filter (PNG specification, section 9)."""
    if kind in (0, 2):
        return [(a + b) & 255 for a, b in zip(line, above, strict=True)] if kind else line
    for i, up in enumerate(above):
        left, corner = (line[i - size], above[i - size]) if i >= size else (0, 0)
        guess = left if kind == 1 else (left + up) // 2
        if kind == 4:
            guess = min((left, up, corner), key=lambda x, p=left + up - corner: abs(p - x))  # type: ignore[misc]
        line[i] = (line[i] + guess) & 255
    return line


def share(pixels: Pixels, colour: tuple[int, int, int]) -> float:
    """How much of the picture has about this colour."""
    near = np.abs(pixels - np.array(colour, dtype=np.int16)).max(axis=2) <= 12
    return float(near.mean())


@pytest.mark.timeout(150)
def test_a_browser_draws_the_page_in_both_modes(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        render_page(
            Page(
                title="Loading while computing",
                facts={"bandwidth": "10 MB/s"},
                timelines=(layerwise_timeline(), hybrid_timeline()),
                explanations={},
            )
        ),
        encoding="utf-8",
    )
    for mode, colours in COLOURS.items():
        pixels = screenshot(page, tmp_path, mode)
        assert share(pixels, colours["back"]) > 0.6, mode
        assert share(pixels, colours["load"]) > 0.0015, mode
        assert share(pixels, colours["compute"]) > 0.005, mode
        # The staircase goes from the upper left to the lower right.
        found = np.abs(pixels - np.array(colours["load"], dtype=np.int16)).max(axis=2) <= 12
        rows, columns = np.nonzero(found[150 : HEIGHT // 2])
        assert np.corrcoef(rows, columns)[0, 1] > 0.9, mode

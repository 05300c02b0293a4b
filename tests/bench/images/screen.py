"""An image of what a command shows on a terminal.

    python tests/bench/images/screen.py --out docs/images/watch.png -- status --watch --root data/demo

The command runs for `--seconds` in a pseudo-terminal. rich converts the last frame to SVG, and Chromium, which must be
installed, renders it.
"""

import argparse
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

CHECKOUT = Path(__file__).resolve().parents[3]
_LINES = 40
_NEXT_FRAME = re.compile(r"(?:\r?\x1b\[(?:2K|1A))+")
"""rich clears the lines of a frame before it writes the next one."""
_CHROMIUM = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--force-device-scale-factor=2")


def read_screen(words: list[str], seconds: float, columns: int) -> str:
    """The text that a terminal shows after the command ran for so many seconds, with its colors."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _LINES, columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, "-m", "jobs", *words], stdin=slave, stdout=slave, stderr=slave,
                               env=environment, start_new_session=True)
    os.close(slave)
    os.set_blocking(master, False)
    output, end = b"", time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
        try:
            output += os.read(master, 1 << 20)
        except BlockingIOError:
            continue
    process.terminate()
    process.wait()
    frames = [frame for frame in _NEXT_FRAME.split(output.decode()) if frame.strip()]
    if not frames:
        raise SystemExit(f"{' '.join(words)} showed nothing within {seconds} s")
    return re.sub(r"\x1b\[\?\d+[hl]", "", frames[-1]).replace("\r", "").strip("\n")


def render(screen: str, title: str, columns: int, out: Path) -> None:
    """Write a PNG of the text in a window with this title."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen), no_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        drawing = Path(folder) / "screen.svg"
        svg = console.export_svg(title=title)
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())  # type: ignore[union-attr]
        drawing.write_text(svg)
        subprocess.run([*_CHROMIUM, f"--screenshot={out.resolve()}", f"--window-size={width:.0f},{height:.0f}",
                        f"--user-data-dir={folder}/profile", drawing.as_uri()], check=True, capture_output=True)


def main() -> None:
    """Parse the command line, run the command and write the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30, help="how long the command runs")
    parser.add_argument("--columns", type=int, default=120)
    parser.add_argument("words", nargs="+", help="the words after `python -m jobs`")
    options = parser.parse_args()
    render(read_screen(options.words, options.seconds, options.columns), f"rdm {' '.join(options.words)}",
           options.columns, options.out)


if __name__ == "__main__":
    main()

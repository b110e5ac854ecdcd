"""Tables, Markdown and pictures of a comparison, made anew from its figures.

python -m bench.report runs/compare/results.json
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from bench.compare.results import render


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what `python -m bench.compare --out` has written")
    render(parser.parse_args().results, Console(width=None if sys.stdout.isatty() else 220))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""text-generation-server: tools around the engine. TGI starts shards with it; ours starts them itself."""

from __future__ import annotations

import argparse
import logging
import sys

from engine.errors import StartError
from engine.logs import configure_logging

logger = logging.getLogger(__name__)


def main() -> None:
    """Console script. Prints the model's folder as the last line of standard output."""
    parser = argparse.ArgumentParser(prog="text-generation-server", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    download = commands.add_parser("download-weights", help="fetch a model from the Hub into the cache")
    download.add_argument("model_id", metavar="MODEL_ID")
    download.add_argument("--revision", help="branch, tag or commit (default: main)")
    download.add_argument("--cache-dir", help="folder of the Hub's cache (default: the Hub's own)")
    args = parser.parse_args()
    configure_logging("info", "download")
    from engine.hub import download_model

    try:
        print(download_model(args.model_id, args.revision, args.cache_dir))
    except StartError as error:
        logger.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""`python -m gorgon_gateway`: the gateway; with `keys new NAME` a new API key."""

import argparse
import sys

from gorgon_gateway.callers import new_key
from gorgon_gateway.settings import PREFIX, GatewaySettings
from gorgon_protocol.errors import GorgonError


def main(arguments: list[str] | None = None) -> int:
    """The exit status. Errors are one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m gorgon_gateway",
        description=f"The gateway. Its settings come from the environment: {PREFIX}*.",
    )
    commands = parser.add_subparsers(dest="command")
    keys = commands.add_parser("keys", help="API keys").add_subparsers(dest="action", required=True)
    new = keys.add_parser("new", help="print a new key, and the line for the file of keys")
    new.add_argument("name", help="whose it is")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.command == "keys":
            made = new_key(parsed.name)
            print(f"key:  {made.key}\nline: {made.line}")
            return 0
        settings = GatewaySettings.from_environment()
        from gorgon_gateway.server import serve  # not for a key's sake

        serve(settings)
    except GorgonError as error:
        print(f"gorgon_gateway: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# The real servers and programs that the tests run: Debian packages that are missing (as root; else says which).
set -euo pipefail
missing=()
command -v redis-server > /dev/null || missing+=(redis-server)
command -v curl > /dev/null || missing+=(curl)
[ -x "${CHROMIUM:-/usr/bin/chromium}" ] || missing+=(chromium fonts-dejavu-core fonts-liberation)
command -v docker-compose > /dev/null || missing+=(docker-compose)
command -v promtool > /dev/null || missing+=(prometheus)
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get > /dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
else
    echo "tests: missing: ${missing[*]}. Install them first (Debian: sudo apt-get install ${missing[*]})." >&2
    exit 1
fi

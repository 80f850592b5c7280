#!/bin/sh
# Start Redis with the users of users.acl; the password is the secret's, and only its hash is written anywhere.
set -eu
umask 077
here=$(dirname "$0")
secret=/run/secrets/redis_password
password=$(tr -d '[:space:]' < "$secret")
if [ -z "$password" ]; then
    echo "redis: $secret is empty: run deploy/secrets.sh" >&2
    exit 1
fi
digest=$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)
sed "s/PASSWORD_SHA256/$digest/" "$here/users.acl" > /run/redis/users.acl
exec redis-server "$here/redis.conf" --dir /data

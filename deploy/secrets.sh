#!/usr/bin/env bash
# Make the secrets that docker-compose.yml mounts, those that are missing: deploy/secrets.sh [FOLDER]
set -euo pipefail
folder=${1:-$(dirname "$0")/../secrets}
mkdir -p "$folder"
# The services are other users than you: they may read the files, and nobody else comes into the folder.
chmod 700 "$folder"
echo '*' > "$folder/.gitignore"
for name in engine_secret grafana_password redis_password; do
    if [ -s "$folder/$name" ]; then continue; fi
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$folder/.$name"
    chmod 444 "$folder/.$name"
    mv "$folder/.$name" "$folder/$name"
    echo "secrets: made $folder/$name"
done
if [ ! -e "$folder/api_keys" ]; then
    echo "# One line a key: python3 -m gorgon_gateway keys new NAME" > "$folder/api_keys"
    chmod 644 "$folder/api_keys"
fi

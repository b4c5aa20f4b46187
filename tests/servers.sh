#!/usr/bin/env bash
# Installs, from Debian's packages, the real servers that tests start: PostgreSQL. Says what it does; where it may
# not (no root, no apt) the tests that need them are skipped and say so.
set -euo pipefail

have_postgresql() { compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null || command -v initdb >/dev/null; }

have_postgresql && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "servers: PostgreSQL is not installed and cannot be installed here; its tests are skipped" >&2
  exit 0
fi
echo "servers: installing PostgreSQL from Debian's packages, for the tests of the watch's store"
export DEBIAN_FRONTEND=noninteractive
# The tests start a server of their own; the package's needs not run.
mkdir -p /etc/postgresql-common
[ -e /etc/postgresql-common/createcluster.conf ] ||
  echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql; } >/dev/null 2>&1 ||
  echo "servers: that did not work; the tests that need PostgreSQL are skipped" >&2

#!/usr/bin/env bash
# Installs, from Debian's packages, the real programs that tests start: PostgreSQL, Prometheus with promtool, and
# Chromium. Says what it does; where it may not (no root, no apt) the tests that need them are skipped and say so.
set -euo pipefail

have_postgresql() { compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null || command -v initdb >/dev/null; }
have_prometheus() { command -v prometheus >/dev/null && command -v promtool >/dev/null; }
have_chromium() { command -v chromium >/dev/null || command -v google-chrome >/dev/null; }

missing=()
have_postgresql || missing+=(postgresql)
have_prometheus || missing+=(prometheus)
have_chromium || missing+=(chromium)
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "servers: ${missing[*]} cannot be installed here; the tests that need it are skipped" >&2
  exit 0
fi
echo "servers: installing ${missing[*]} from Debian's packages, for tests"
export DEBIAN_FRONTEND=noninteractive
# The tests start servers of their own; the packages' need not run.
mkdir -p /etc/postgresql-common
[ -e /etc/postgresql-common/createcluster.conf ] ||
  echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
{ apt-get update -qq && RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null 2>&1 ||
  echo "servers: that did not work; the tests that need ${missing[*]} are skipped" >&2

#!/bin/sh
# The store tests start their own redis-server on a free loopback port, the CPU kernels are compiled
# with g++, and METEOR looks for synonyms in WordNet; install what is missing.
missing=""
command -v redis-server >/dev/null 2>&1 || missing="redis-server"
command -v g++ >/dev/null 2>&1 || missing="$missing g++"
[ -e /usr/share/wordnet/data.noun ] || missing="$missing wordnet-base"
[ -z "$missing" ] && exit 0
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
  # shellcheck disable=SC2086
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null
else
  echo "not installed: $missing; the tests that need it will be skipped" >&2
fi

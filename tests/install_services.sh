#!/bin/sh
# The store tests start their own redis-server on a free loopback port; install it where it is missing.
command -v redis-server >/dev/null 2>&1 && exit 0
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq redis-server >/dev/null
else
  echo "redis-server is not installed: the Redis tests will be skipped" >&2
fi

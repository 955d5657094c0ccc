"""The Lua scripts of the Redis store and the keys they share.

All metadata lies in nine keys with one hash tag, so that a script over them is atomic on a Cluster
too. A *field* is ``<tenant>:<task>`` or ``<tenant>:<sha256>`` (names hold no colon). A *copy* is
one upload of a blob, ``<tenant>:<sha256>:<upload id>:<chunks>:<bytes>``; its bytes are in keys
without the tag, spread over the cluster.
"""

from __future__ import annotations

__all__ = ["COMMIT", "RETIRE", "TOUCH", "key_names"]

_KEYS = ("tasks", "index", "events", "last", "blobs", "refs", "trash", "uploads", "dead")


def key_names(namespace: str) -> dict[str, str]:
    """The nine keys, in the order in which the scripts take them.

    tasks    hash    task field → record (JSON)
    index    zset    task fields, all of score 0: ordered by name
    events   stream  the feed, trimmed to about ``max_events``
    last     string  id of the newest event
    blobs    hash    blob field → ``<upload id>:<chunks>:<bytes>`` of the copy in use
    refs     hash    blob field → number of tasks that name it
    trash    zset    blob fields that no task names, by the time of release
    uploads  zset    copies being written, by the time of the latest sign of life
    dead     zset    copies whose chunks are to be deleted, by the time they were given up
    """
    return {key: f"{{{namespace}}}:{key}" for key in _KEYS}


_PRELUDE = """
local tasks, index, events, last, blobs, refs, trash, uploads, dead = unpack(KEYS)
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
"""

# ARGV: sha1 of the record that the change was computed from ('' for none), the new record ('' to
# delete it), tenant, task, revision, max_events, blob field to acquire (''), copy to put in use
# (''), blob field of the copy (''), copy that it replaces (''), then the blob fields to release.
# Answers 'done', 'stale' (somebody else changed the record) or 'lost' (there is no such blob).
COMMIT = (
    _PRELUDE
    + """
local expected, record, tenant, task, revision, max_events = unpack(ARGV, 1, 6)
local acquire, copy, copied, replaces = unpack(ARGV, 7, 10)
local field = tenant .. ':' .. task
local current = redis.call('HGET', tasks, field)

-- Sent again by redis-py because the answer was lost: this very change was made already. (Where the
-- record was to stay as it is, to mend its blob, expected is its hash.)
if (current or '') == record and expected ~= redis.sha1hex(record) then return 'done' end
if current and redis.sha1hex(current) ~= expected then return 'stale' end
if not current and expected ~= '' then return 'stale' end
if copy ~= '' then
  if not redis.call('ZSCORE', uploads, copy) then return 'lost' end
elseif acquire ~= '' and redis.call('HEXISTS', blobs, acquire) == 0 then
  return 'lost'
end

-- The first write is the one that a server out of memory refuses, before anything has changed.
if record ~= '' then
  redis.call('HSET', tasks, field, record)
  redis.call('ZADD', index, 0, field)
else
  redis.call('HDEL', tasks, field)
  redis.call('ZREM', index, field)
end

if copy ~= '' then
  redis.call('ZREM', uploads, copy)
  local old = redis.call('HGET', blobs, copied)
  if old and old ~= replaces then
    redis.call('ZADD', dead, now, copy)  -- another upload of the same bytes was faster
  else
    if old then redis.call('ZADD', dead, now, copied .. ':' .. old) end
    redis.call('HSET', blobs, copied, string.sub(copy, #copied + 2))
  end
end
if acquire ~= '' then
  redis.call('HINCRBY', refs, acquire, 1)
  redis.call('ZREM', trash, acquire)
end
for i = 11, #ARGV do
  if redis.call('HINCRBY', refs, ARGV[i], -1) <= 0 then
    redis.call('HDEL', refs, ARGV[i])
    redis.call('ZADD', trash, now, ARGV[i])
  end
end

-- Each event names the one before it, so that a reader knows when it has missed any.
local before = redis.call('GET', last) or '0-0'
local kind = record ~= '' and 'put' or 'delete'
local id = redis.call('XADD', events, 'MAXLEN', '~', max_events, '*', 'kind', kind,
  'tenant', tenant, 'task', task, 'revision', revision, 'before', before)
redis.call('SET', last, id)
return 'done'
"""
)

# ARGV: copy, 'start' or 'alive'. Answers 0 when the copy was given up meanwhile.
TOUCH = (
    _PRELUDE
    + """
if ARGV[2] == 'alive' and not redis.call('ZSCORE', uploads, ARGV[1]) then return 0 end
redis.call('ZADD', uploads, now, ARGV[1])
return 1
"""
)

# ARGV: grace in seconds, most to handle. Moves blobs that nobody names and uploads without a sign
# of life to the dead, where nothing finds them. Answers {number handled, time}.
RETIRE = (
    _PRELUDE
    + """
local cutoff, limit = now - tonumber(ARGV[1]), ARGV[2]
local released = redis.call('ZRANGEBYSCORE', trash, '-inf', cutoff, 'LIMIT', 0, limit)
for _, field in ipairs(released) do
  local copy = redis.call('HGET', blobs, field)
  redis.call('ZREM', trash, field)
  if copy and redis.call('HEXISTS', refs, field) == 0 then
    redis.call('HDEL', blobs, field)
    redis.call('ZADD', dead, now, field .. ':' .. copy)
  end
end
local silent = redis.call('ZRANGEBYSCORE', uploads, '-inf', cutoff, 'LIMIT', 0, limit)
for _, copy in ipairs(silent) do
  redis.call('ZREM', uploads, copy)
  redis.call('ZADD', dead, now, copy)
end
return {#released + #silent, tostring(now)}
"""
)

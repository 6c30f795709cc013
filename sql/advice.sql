-- 00: what tells whether partitioning will help.

-- name: memory
-- The surer first: the server's own, then what the planner counts on.
SELECT name, pg_size_bytes(current_setting(name)) AS bytes
  FROM unnest(ARRAY['shared_buffers', 'effective_cache_size']) WITH ORDINALITY AS s (name, place) ORDER BY place

-- name: scans
-- Since the statistics began: scans of all indexes, and of those with the key among their columns.
SELECT coalesce(sum(s.idx_scan), 0)::bigint AS every,
       coalesce(sum(s.idx_scan) FILTER (WHERE EXISTS (
         SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
          WHERE i.indexrelid = s.indexrelid AND a.attname = {key})), 0)::bigint AS by_key
  FROM pg_stat_user_indexes s WHERE s.relid = {oid}

-- name: by_place
SELECT p.oid::regprocedure::text AS function FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
 WHERE l.lanname IN ('sql', 'plpgsql') AND p.prosrc ~* '\mctid\M' AND p.prosrc ~* '\m(delete|update)\M'
   AND EXISTS (SELECT FROM unnest({names}::text[]) n(name) WHERE p.prosrc ~* format('(^|\W)%s(\W|$)', regexp_replace(n.name, '(\W)', '\\\1', 'g')))
 ORDER BY 1

-- name: conflicts
SELECT p.oid::regprocedure::text AS function, p.prosrc AS source FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
 WHERE l.lanname IN ('sql', 'plpgsql') AND p.prosrc ~* '\mon\s+conflict\M' ORDER BY 1

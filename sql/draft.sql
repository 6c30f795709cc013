-- What 00 asks of the server besides the catalog.

-- name: literal
-- A value as the key's type prints it: what the catalog and the rows will show. Fails for a value the type does not take.
SELECT CAST({value} AS {type})::text

-- name: values
SELECT {key}::text AS value, count(*) AS rows FROM ONLY {table} GROUP BY {key} ORDER BY 2 DESC, 1 LIMIT {most}

-- name: doubles
-- Rows too many for a unique key once NULL is a value like another.
SELECT coalesce(sum(n - 1), 0)::bigint AS rows
  FROM (SELECT count(*) AS n FROM ONLY {table} WHERE ({key} IS NULL OR {key} = {filled}::{type}) AND {given} AND ({predicate}) GROUP BY {others} HAVING count(*) > 1) d

-- name: placed
-- The values that occur, NULL as what it becomes, with the given one that each equals. Beyond {most} of those that nothing
-- equals, the rest is one. Grouped: what equals what is the type's to say, and its operator need not be in the search_path.
WITH counted AS (
  SELECT value, max(given) AS given, sum(rows) AS rows
    FROM (SELECT coalesce({key}, {filled}::{type}) AS value, NULL AS given, count(*) AS rows FROM ONLY {table} GROUP BY 1
          UNION ALL SELECT g::{type}, g, 0 FROM unnest({values}::text[]) g) each GROUP BY value),
ranked AS (
  SELECT value::text AS value, given, rows, row_number() OVER (PARTITION BY given IS NULL ORDER BY rows DESC, value) AS place
    FROM counted WHERE rows > 0)
SELECT CASE WHEN given IS NULL AND value IS NOT NULL AND place > {most} THEN '(others)' ELSE value END AS value, given, sum(rows)::bigint AS rows
  FROM ranked GROUP BY 1, 2 ORDER BY 3 DESC, 1

-- name: rows
SELECT count(*) AS rows, count(*) - count({key}) AS nulls FROM ONLY {table}

-- name: extent
-- Not min() and max(), which not every type has.
SELECT (SELECT {key} FROM ONLY {table} WHERE {key} IS NOT NULL AND {finite} ORDER BY {key} LIMIT 1)::text AS low,
       (SELECT {key} FROM ONLY {table} WHERE {key} IS NOT NULL AND {finite} ORDER BY {key} DESC LIMIT 1)::text AS high,
       count(*) AS rows, count(*) - count({key}) AS nulls FROM ONLY {table}

-- name: range_counts
-- How many rows lie from each bound, in all the forms that were given (1.0 and 1.00), to the next, in their order; NULL: below the first.
WITH given AS (SELECT array_agg(DISTINCT b ORDER BY b) AS bounds FROM (SELECT t::{type} AS b FROM unnest({bounds}::text[]) t) u)
SELECT CASE WHEN place > 0 THEN ARRAY(SELECT t FROM unnest({bounds}::text[]) t WHERE t::{type} = (SELECT bounds[place] FROM given)) END AS lower, coalesce(rows, 0) AS rows
  FROM generate_series(0, (SELECT cardinality(bounds) FROM given)) place
  LEFT JOIN (SELECT width_bucket(coalesce({key}, {filled}::{type}), (SELECT bounds FROM given)) AS place, count(*) AS rows
               FROM ONLY {table} WHERE coalesce({key}, {filled}::{type}) IS NOT NULL GROUP BY 1) placed USING (place) ORDER BY place

-- name: category
-- D: a date or time; N: a number. Of a domain, what its base is.
SELECT typcategory::text FROM pg_type WHERE oid = {type}::regtype

-- name: time_steps
-- A step of a day begins at midnight UTC: that is the session's time zone while the plan is made. Made one by one up to the limit: in
-- FROM a function is run to its end, and a step far too small would fill the disk.
SELECT b::{type}::text AS lower, (b + {step}::interval)::{type}::text AS upper, to_char(b, {form}) || CASE WHEN b < '0001-01-01' THEN '_bc' ELSE '' END AS name
  FROM (SELECT generate_series(date_trunc({unit}, coalesce({low}::text::{type}::timestamp, localtimestamp)),
                               date_trunc({unit}, coalesce({high}::text::{type}::timestamp, localtimestamp)) + {ahead} * {step}::interval, {step}::interval) AS b
         LIMIT {most}) steps

-- name: number_steps
-- A step in which the type's own numbers begin or end has no bound there.
SELECT CASE WHEN b >= -coalesce({last}::numeric, 'Infinity') THEN b::{type}::text END AS lower,
       CASE WHEN b + {step} <= coalesce({last}::numeric, 'Infinity') THEN (b + {step})::{type}::text END AS upper, replace(b::text, '-', 'minus_') AS name
  FROM (SELECT generate_series(floor(coalesce({low}, '0')::numeric / {step}) * {step},
                               floor(coalesce({high}, '0')::numeric / {step}) * {step} + {ahead} * {step}::numeric, {step}::numeric) AS b
         LIMIT {most}) steps
 WHERE b <= coalesce({last}::numeric, 'Infinity')

-- name: unreadable
-- Tables that pg_dump would lock for the definitions, and may not; its own extensions' it leaves alone.
SELECT c.oid::regclass::text AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema' AND NOT has_table_privilege(c.oid, 'SELECT')
   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e') ORDER BY 1 LIMIT 5

-- name: free
-- What would be refused at the cut-over must be refused here.
SELECT relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = {schema} AND relname = ANY ({names})
UNION
SELECT typname FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
 WHERE n.nspname = {schema} AND typname = ANY ({names}) AND typelem = 0

-- name: exists
SELECT EXISTS (SELECT FROM {table} WHERE {column} = {value}::{type})

-- name: allowed
-- Those values that a check of the key alone allows.
SELECT {key}::text AS value FROM (SELECT v::{type} AS {key}, n FROM unnest({values}::text[]) WITH ORDINALITY u (v, n)) k WHERE ({condition}) IS NOT FALSE ORDER BY n

-- name: domain
-- What a domain is made of in the end, its default, and its checks as checks of the key; of any other type just that.
WITH RECURSIVE made AS (
  SELECT oid, typbasetype, typtype, typdefault FROM pg_type WHERE oid = {type}::regtype
  UNION ALL SELECT t.oid, t.typbasetype, t.typtype, t.typdefault FROM pg_type t JOIN made m ON m.typbasetype = t.oid AND m.typtype = 'd')
SELECT (SELECT format_type(oid, NULL) FROM made WHERE typtype <> 'd') AS type,
       (SELECT typdefault FROM made WHERE typtype = 'd' AND typdefault IS NOT NULL LIMIT 1) AS default,
       ARRAY(SELECT json_build_object('name', conname, 'definition', regexp_replace(pg_get_constraintdef(c.oid), '\mVALUE\M', {key_text}, 'g'))
               FROM pg_constraint c JOIN made m ON m.oid = c.contypid WHERE c.contype = 'c') AS checks

-- name: labels
-- Every value that a type can have, where these are few.
SELECT enumlabel::text AS label FROM pg_enum WHERE enumtypid = {type}::regtype
UNION ALL SELECT unnest(ARRAY['false', 'true']) WHERE {type}::regtype = 'boolean'::regtype
